"""Samplers: their spans lie inside the record, and their draws have the distributions that their sources ask for."""

import itertools
import pathlib
from collections import Counter

import numpy as np
import pytest
from conftest import VOCAB
from ml_collections import ConfigDict
from scipy import stats

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pieces, pipeline, prepared, spans, tokenizer

DRAWS = 100_000
SEPARATIONS = [(0, None), (1, None), (2, 2), (1, 3), (0, 0)]
# The config of each sampler with the values that change what it does.
VARIANTS = [
    *[dict(sampler="neighbours", views=views, order=order) for views in (2, 3, 5) for order in ("random", "kept")],
    dict(sampler="span"),
    *[
        dict(sampler="declutr", strategy=strategy, views=1 + p)
        for strategy in ("default", "subsuming", "adjacent")
        for p in (1, 3)
    ],
    *[dict(sampler="sentences", sentences=3, min_separation=low, max_separation=high) for low, high in SEPARATIONS],
    dict(sampler="sentences", sentences=2, order="kept"),
]


def data_config(**changes: object) -> ConfigDict:
    config = default_config().data
    config.update(min_span=7, max_span=13, min_gap=1, max_gap=5, batch_size=16, length=15)
    config.update(changes)
    return config


def draw(
    config: ConfigDict, length: np.ndarray, units: pieces.Units | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What the sampler gives for records of these lengths, (start, size)."""
    sampler = spans.make_sampler(config)
    uniform = np.random.default_rng(seed).random((len(length), sampler.uniforms), np.float32)
    return sampler.sample(length.astype(np.int32), uniform, *([units] if sampler.ends else []))


def units_of(starts: list[list[int]], length: np.ndarray) -> pieces.Units:
    """The units of records from the positions at which they start in each, of which the first is 0."""
    begin = np.cumsum(length) - length
    start = [at + np.array(own) for at, own in zip(begin, starts, strict=True)]
    return pieces.Units(np.append(np.concatenate(start), length.sum()), np.cumsum([0, *map(len, starts)]))


def random_units(length: np.ndarray, rate: float) -> tuple[list[list[int]], pieces.Units]:
    rng = np.random.default_rng(1)
    starts = [[0, *(np.flatnonzero(rng.random(size - 1) < rate) + 1).tolist()] for size in length.tolist()]
    return starts, units_of(starts, length)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_row46_row50_row51_every_span_lies_inside_its_record_whatever_its_length(changes: dict, rate: float) -> None:
    config = data_config(**changes)
    sampler = spans.make_sampler(config)
    length = np.repeat(np.arange(sampler.min_record, sampler.max_record + 30), 300)
    _, units = random_units(length, rate)
    start, size = draw(config, length, units)
    assert start.shape == size.shape == (len(length), sampler.views)
    assert (start >= 0).all() and (start + size <= length[:, None]).all()
    assert (size >= sampler.min_span).all() and (size <= sampler.max_span).all()
    assert (size.max() == sampler.max_span) or changes["sampler"] == "sentences"


@pytest.mark.parametrize("order", ["random", "kept"])
def test_row52_spans_in_a_row_follow_one_another_with_their_gaps(order: str) -> None:
    config = data_config(views=4, order=order)
    length = np.random.default_rng(0).integers(4 * 7 + 3, 90, DRAWS)
    start, size = draw(config, length)
    turned = start[:, 0] > start[:, 1]
    assert 0.49 < turned.mean() < 0.51 if order == "random" else not turned.any()
    start, size = (np.where(turned[:, None], x[:, ::-1], x) for x in (start, size))
    gap = start[:, 1:] - start[:, :-1] - size[:, :-1]
    assert (gap >= 1).all() and (gap <= 5).all()
    roomy = length >= 4 * 13 + 3 * 5
    for column in gap[roomy].T:
        assert stats.chisquare(np.bincount(column, minlength=6)[1:]).pvalue > 1e-3
    last = length - start[:, -1] - size[:, -1]
    assert stats.ks_2samp(start[roomy, 0], last[roomy]).pvalue > 1e-3  # as much room before as behind


def test_row51_one_span_lies_anywhere_with_equal_chance() -> None:
    start, size = draw(data_config(sampler="span"), np.full(DRAWS, 20))
    assert stats.chisquare(np.bincount(size[:, 0])[7:]).pvalue > 1e-3
    for length in range(7, 14):
        assert stats.chisquare(np.bincount(start[size == length], minlength=21 - length)).pvalue > 1e-3


def geometry(changes: dict, length: int = 5_000_000, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Anchors and positives of long records, so that lengths are as good as continuous: s, l [n 1] and s', l' [n p]."""
    config = data_config(sampler="declutr", min_span=32, max_span=1_000_032, **changes)
    start, size = draw(config, np.full(DRAWS, length), seed=seed)
    return start[:, :1], size[:, :1], start[:, 1:], size[:, 1:]


def test_row50_lengths_have_both_beta_distributions() -> None:
    _, anchor, _, positive = geometry(dict(views=3))
    assert stats.kstest((anchor[:, 0] - 32) / 1e6, stats.beta(4, 2).cdf).pvalue > 1e-3
    for column in positive.T:
        assert stats.kstest((column - 32) / 1e6, stats.beta(2, 4).cdf).pvalue > 1e-3
    drawn = np.concatenate([anchor, positive], axis=1)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.015  # drawn apart


def test_row50_a_default_positive_overlaps_or_touches_its_anchor_anyhow() -> None:
    start, size, first, length = geometry(dict(views=3))
    end = start + size
    assert (first + length >= start).all() and (first <= end).all()
    low, high = np.maximum(0, start - length), np.minimum(end, 5_000_000 - length)
    place = (first - low) / (high - low + 1)
    for column in place.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert stats.kstest((start / (5_000_000 - size + 1))[:, 0], "uniform").pvalue > 1e-3


def test_row50_a_subsumed_positive_lies_inside_its_anchor() -> None:
    start, size, first, length = geometry(dict(strategy="subsuming"))
    assert (first >= start).all() and (first + length <= start + size).all()
    share = ((length - 32) / (size - 32))[size > 10_000]
    assert stats.kstest(share, stats.beta(2, 4).cdf).pvalue > 1e-3
    assert stats.kstest(((first - start) / (size - length + 1))[:, 0], "uniform").pvalue > 1e-3


def test_row50_an_adjacent_positive_borders_on_its_anchor_on_either_side() -> None:
    start, size, first, length = geometry(dict(strategy="adjacent", views=3))
    before, after = first + length == start, first == start + size
    assert (before | after).all() and (before != after).all()
    both = (start >= length) & (start + size + length <= 5_000_000)
    assert stats.binomtest(int(before[both].sum()), int(both.sum())).pvalue > 1e-3
    assert (before[start + size + length > 5_000_000]).all() and (after[start < length]).all()
    # In a record that is used up, the first token is as good a place for a positive as the last.
    start, size = draw(data_config(sampler="declutr", strategy="adjacent"), np.full(20_000, 20))
    assert (start[:, 1] == 0).any() and (start[:, 1] + size[:, 1] == 20).any()


def pairs_of(count: int, wanted: int, low: int, high: int | None) -> dict[tuple[int, int], float]:
    """All (i, j) of a record of so many sentences with their chances, by enumeration."""
    chunk = min(wanted, (count - low) // 2)
    high = count if high is None else high
    starts = range(count - chunk + 1)
    partners = {i: [k for k in starts if low + chunk <= abs(i - k) <= high + chunk] for i in starts}
    partners = {i: others for i, others in partners.items() if others}
    return {(i, k): 1 / len(partners) / len(others) for i, others in partners.items() for k in others}


@pytest.mark.parametrize("count", range(7, 13))
@pytest.mark.parametrize(("low", "high"), SEPARATIONS)
def test_row46_chunks_have_the_chances_of_an_enumeration(count: int, low: int, high: int | None) -> None:
    config = data_config(sampler="sentences", min_separation=low, max_separation=high, max_span=100)
    own = np.cumsum([0, *range(2, count + 1)]).tolist()  # sentences of 2, 3, ... tokens
    length = np.full(DRAWS, own[-1] + 5)
    begin = np.arange(DRAWS)[:, None] * length[:1]
    units = pieces.Units(np.append((begin + own).ravel(), length.sum()), np.arange(DRAWS + 1) * count)
    start, size = draw(config, length, units, seed=count)
    number = np.searchsorted(own, start)
    chances = pairs_of(count, 3, low, high)
    found = Counter(zip(*number.T.tolist(), strict=True))
    assert set(found) <= set(chances)
    expected = DRAWS * np.array(list(chances.values()))
    if len(chances) > 1:
        assert stats.chisquare([found[pair] for pair in chances], expected).pvalue > 1e-3
    ends, chunk = np.array([*own, own[-1] + 5]), min(3, (count - low) // 2)
    np.testing.assert_array_equal(start, ends[number])
    np.testing.assert_array_equal(start + size, ends[number + chunk])


@pytest.mark.parametrize("order", ["random", "kept"])
def test_row46_every_start_follows_an_end_and_records_of_few_sentences_are_cut_at_their_middle(order: str) -> None:
    config = data_config(sampler="sentences", order=order, max_span=30)
    length = np.random.default_rng(0).integers(14, 120, 5000)
    starts, units = random_units(length, 0.06)
    start, size = draw(config, length, units)
    few = 0
    for own, begin, count, total in zip(starts, start.tolist(), size.tolist(), length.tolist(), strict=True):
        (first, first_size), (second, second_size) = sorted(zip(begin, count, strict=True))
        assert first + first_size <= second  # never a common token
        assert order == "random" or begin == sorted(begin)
        if len(own) < 3:
            few += 1
            assert (first, second) == (0, total // 2)
            assert (first_size, second_size) == (min(30, total // 2), min(30, total - total // 2))
        else:
            assert set(begin) <= set(own)
            chunk, ends = min(3, (len(own) - 1) // 2), [*own, total]
            assert count == [min(30, ends[own.index(at) + chunk] - at) for at in begin]
            assert abs(own.index(first) - own.index(second)) >= chunk + 1
    assert few > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sampler="span", min_span=20), "min_span=20: must not be above config.data.max_span=13"),
        (dict(sampler="declutr", min_span=20), "min_span=20: must not be above config.data.max_span=13"),
        (dict(sampler="sentences", max_separation=0), "min_separation=1: must not be above config.data.max_separation=0"),
        (dict(min_gap=9), "min_gap=9: must not be above config.data.max_gap=5"),
    ],
)
def test_bounds_that_contradict_each_other_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"config.data.{message}"):
        spans.make_sampler(data_config(**changes))


def test_a_span_alone_has_no_gaps() -> None:
    assert spans.make_sampler(data_config(sampler="span", min_gap=9)).keys == ("span",)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> pieces.Tables:
    """Tables by which the random tokens of the dataset make sentences of 8 tokens or so."""
    rng = np.random.default_rng(0)
    tables = pieces.Tables(*(rng.random((3, VOCAB)) < [[0.6], [0.2], [0.1]]))
    monkeypatch.setattr(tokenizer.Tokenizer, "tables", lambda _: tables)
    return tables


@pytest.mark.parametrize("changes", VARIANTS[::3], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("tables")
def test_row46_row50_row51_batches_are_the_same_on_1_2_and_8_processes(
    changes: dict, packed: bool, dataset: pathlib.Path
) -> None:
    packing = dict(length=30, pack_pairs=2) if packed else {}
    config, records = data_config(**changes, **packing, dir=str(dataset)), prepared.open_split(dataset, "train")

    def take(pairs: np.ndarray | None, start: int = 0) -> list[np.ndarray]:
        batches = list(itertools.islice(pipeline.batches(records, config, 3, pairs, start), 3))
        return [np.concatenate([batch.tokens.reshape(len(batch.document), -1), batch.span_hash], axis=1) for batch in batches]

    whole, views = take(None), spans.make_sampler(config).views
    if not packed:
        later = take(None, 2)
        np.testing.assert_array_equal(later[0], whole[2])
    for processes in (2, 8):
        shares = [take(pairs) for pairs in np.split(np.arange(16), processes)]
        for step in range(3):
            np.testing.assert_array_equal(np.concatenate([share[step] for share in shares]), whole[step])
    assert whole[0].shape[1] == views * (15 + 1)


def test_row46_batches_hold_whole_sentences_between_the_delimiters(
    tables: pieces.Tables, dataset: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = data_config(sampler="sentences", dir=str(dataset), max_span=60, length=62, sentences=2)
    records = prepared.open_split(dataset, "train")
    with caplog.at_level("INFO", logger="absl"):
        batches = list(itertools.islice(pipeline.batches(records, config, 0), 3))
    said = [message for message in caplog.messages if "sentences of a whole pair" in message]
    assert len(said) == 1 and "have the 5 sentences of a whole pair" in said[0] and "fewer than 3" in said[0]
    whole = records.read_records(np.arange(len(records)))
    homes = [np.array(tokens) for tokens in whole.token_lists()]
    checked = 0
    for row in np.concatenate([batch.tokens[:, :, 0].reshape(-1, 62) for batch in batches]):
        text = row[row > 0][1:-1]
        at = [(home, i) for home in homes for i in range(len(home) - len(text) + 1) if (home[i : i + len(text)] == text).all()]
        home, i = at[0]
        units = pieces.sentences(home, np.array([0]), tables)
        if len(units.start) > 3:
            assert i in units.start
            checked += 1
    assert checked > 30


@pytest.mark.parametrize(("changes", "views"), [(dict(sampler="span"), 1), (dict(sampler="declutr", views=4), 4)])
def test_row50_row51_view_0_is_x_and_all_others_are_y(changes: dict, views: int, dataset: pathlib.Path) -> None:
    config = data_config(**changes)
    batch = next(pipeline.batches(prepared.open_split(dataset, "train"), config, 0))
    assert batch.tokens.shape == (16, views, 1, 15) and batch.span_hash.shape == (16, views)
    assert batch.tokens[:, :, 0, 0].tolist() == [[4, 6, 6, 6][:views]] * 16
    last = np.take_along_axis(batch.tokens, batch.segment.sum(-1, keepdims=True) - 1, axis=-1)[..., 0, 0]
    assert last.tolist() == [[5, 7, 7, 7][:views]] * 16


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_draw_is_a_function_of_its_own_numbers(changes: dict) -> None:
    """A record's spans do not depend on the others in the batch."""
    config = data_config(**changes)
    sampler = spans.make_sampler(config)
    length = np.random.default_rng(2).integers(sampler.min_record, 90, 64)
    starts, units = random_units(length, 0.2)
    uniform = np.random.default_rng(3).random((64, sampler.uniforms), np.float32)
    own = units_of(starts[10:20], length[10:20])
    whole = sampler.sample(length, uniform, *[units] * bool(sampler.ends))
    part = sampler.sample(length[10:20], uniform[10:20], *[own] * bool(sampler.ends))
    for one, other in zip(whole, part, strict=True):
        np.testing.assert_array_equal(one[10:20], other)
