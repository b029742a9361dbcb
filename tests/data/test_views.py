"""Views: the tokens of every span arrive in their row, between delimiters, and equal spans have equal hashes."""

import numpy as np
import pytest

from contrastive_jax.data import packing, spans, views

RESERVED = {"x_open": 4, "x_close": 5, "y_open": 6, "y_close": 7}
DELIMITERS = views.delimiter_ids({"reserved": RESERVED}, 2)


@pytest.mark.parametrize(("count", "expected"), [(1, [[4, 5]]), (4, [[4, 5], [6, 7], [6, 7], [6, 7]])])
def test_view_0_is_x_and_all_others_are_y(count: int, expected: list[list[int]]) -> None:
    assert views.delimiter_ids({"reserved": RESERVED}, count).tolist() == expected


@pytest.mark.parametrize("token_type", [np.uint16, np.int32])
@pytest.mark.parametrize("delimited", [False, True])
@pytest.mark.parametrize(("pairs", "rows", "length"), [(1, 1, 22), (8, 8, 22), (8, 5, 24)])
@pytest.mark.parametrize("v", [1, 2, 3])
def test_views_equal_a_plain_loop(
    v: int, pairs: int, rows: int, length: int, delimited: bool, token_type: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    delimiters = views.delimiter_ids({"reserved": RESERVED}, v) if delimited else None
    monkeypatch.setattr(views, "BLOCK", 100)  # several blocks
    rng, n = np.random.default_rng(pairs + rows), 48
    tokens = rng.integers(8, 60_000, 5000).astype(token_type)
    size = rng.integers(6, 21, (n, v)).astype(np.int32)
    begin = rng.integers(0, len(tokens) - 20, (n, v))
    result = views.make_views(tokens, begin, size, length, delimiters, pairs, rows)
    expected = np.zeros((2, n // pairs, v, rows, length), np.int32)
    edge = 0 if delimiters is None else 1
    fitted, positions = packing.fit(size + 2 * edge, pairs, rows, length)
    for pair, view in np.ndindex(n, v):
        span = tokens[begin[pair, view] :][: fitted[pair, view] - 2 * edge].tolist()
        if delimiters is not None:
            span = [delimiters[view, 0], *span, delimiters[view, 1]]
        group, member = divmod(pair, pairs)
        row, start = positions.row[group, view, member], positions.start[group, view, member]
        assert start + len(span) <= length and not expected[1, group, view, row, start : start + len(span)].any()
        expected[:, group, view, row, start : start + len(span)] = span, [member + 1] * len(span)
    np.testing.assert_array_equal(result.tokens, expected[0])
    np.testing.assert_array_equal(result.segment, expected[1])
    assert {x.dtype.name for x in result} == {"int32"}


def test_equal_spans_have_equal_hashes() -> None:
    rng = np.random.default_rng(0)
    tokens = np.concatenate([rng.integers(8, 320, 1000)] * 2).astype(np.uint16)
    begin = rng.integers(0, 900, (500, 2))
    size = rng.integers(3, 90, (500, 2)).astype(np.int32)
    hashes = views.make_views(tokens, begin, size, 92, DELIMITERS).span_hash
    elsewhere = views.make_views(tokens, begin + 1000, size, 128).span_hash  # in other rows, without delimiters
    np.testing.assert_array_equal(hashes, elsewhere)
    distinct = {(first, count) for first, count in zip(begin.ravel().tolist(), size.ravel().tolist(), strict=True)}
    assert len(np.unique(hashes)) == len(distinct)


def test_b8_records_may_have_more_tokens_than_an_int32_can_number() -> None:
    tokens = np.zeros((1 << 31) + 100, np.uint16)  # memory that the system gives only where it is written
    tokens[-50:] = np.arange(50) + 8
    begin = np.array([[len(tokens) - 50, len(tokens) - 20]])
    result = views.make_views(tokens, begin, np.full((1, 2), 20, np.int32), 20)
    np.testing.assert_array_equal(result.tokens[0, :, 0], [np.arange(8, 28), np.arange(38, 58)])


def test_the_uniform_numbers_of_a_step_are_a_function_of_seed_and_step() -> None:
    first = spans.uniform_numbers(3, 10**12, 4000, 5)
    assert first.shape == (4000, 5) and first.dtype == np.float32
    assert first.min() >= 0 and first.max() < 1 and np.abs(first.mean(axis=0) - 0.5).max() < 0.02
    np.testing.assert_array_equal(first, spans.uniform_numbers(3, 10**12, 4000, 5))
    for other in (spans.uniform_numbers(4, 10**12, 4000, 5), spans.uniform_numbers(3, 10**12 + 1, 4000, 5)):
        assert np.abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.03
