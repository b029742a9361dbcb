"""The data: spans never overlap, and the batch of step k is a pure function of (data, seed, k)."""

import itertools
import pathlib
import shutil
import threading

import numpy as np
import pytest
from conftest import RESERVED
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pipeline, prepared, spans, views
from contrastive_jax.data.batch import Batch


def data_config(**changes: object) -> ConfigDict:
    # Sizes that all differ, so that swapped arguments fail.
    config = default_config().data
    config.update(batch_size=48, length=32, min_span=7, max_span=13, min_gap=0, max_gap=5)
    config.update(changes)
    return config


def sample(config: ConfigDict, lengths: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    sampler = spans.neighbours(config)
    uniform = np.random.default_rng(seed).random((len(lengths), sampler.uniforms), np.float32)
    return sampler.sample(lengths.astype(np.int32), uniform)


@pytest.mark.parametrize("order", ["random", "kept"])
@pytest.mark.parametrize(("min_gap", "max_gap"), [(0, 0), (3, 11)])
def test_neighbours_keep_their_bounds(order: str, min_gap: int, max_gap: int) -> None:
    config = data_config(order=order, min_gap=min_gap, max_gap=max_gap)
    lengths = np.random.default_rng(1).integers(2 * 7 + min_gap, 60, 20_000)
    start, size = sample(config, lengths)
    first = np.argmin(start, axis=1)
    rows = np.arange(len(lengths))
    end_of_first = start[rows, first] + size[rows, first]
    gap = start[rows, 1 - first] - end_of_first
    assert (size >= 7).all() and (size <= 13).all()
    assert (gap >= min_gap).all() and (gap <= max_gap).all()
    assert (start >= 0).all() and ((start + size).max(axis=1) <= lengths).all()
    assert (first == 0).all() if order == "kept" else 0.48 < first.mean() < 0.52
    roomy = lengths >= 2 * 13 + max_gap
    for sizes in size[roomy].T:  # each length equally likely where nothing has to shrink
        assert np.abs(np.bincount(sizes, minlength=14)[7:] / roomy.sum() - 1 / 7).max() < 0.02
    assert set(gap[roomy]) == set(range(min_gap, max_gap + 1))


def test_neighbours_reach_both_ends_of_a_record() -> None:
    start, size = sample(data_config(min_gap=0, max_gap=0), np.full(5000, 40))
    assert start.min() == 0 and (start + size).max() == 40


def test_shortest_record_is_used_whole() -> None:
    start, size = sample(data_config(min_gap=2, max_gap=9, order="kept"), np.full(100, 2 * 7 + 2))
    np.testing.assert_array_equal(start, [[0, 9]] * 100)
    np.testing.assert_array_equal(size, [[7, 7]] * 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_span": 20}, "min_span=20: must not be above config.data.max_span=13"),
        ({"max_gap": 1, "min_gap": 2}, "min_gap=2: must not be above config.data.max_gap=1"),
    ],
)
def test_bad_sampler_values_name_the_key(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"config.data.{message}"):
        spans.make_sampler(data_config(**changes))


def take(records: prepared.Records, config: ConfigDict, count: int, **kwargs: object) -> list[Batch]:
    return list(itertools.islice(pipeline.batches(records, config, 3, **kwargs), count))


def test_spans_are_cut_out_of_their_record_and_delimited(dataset: pathlib.Path) -> None:
    records = prepared.open_split(dataset, "train")
    whole = records.read_records(np.arange(len(records)))
    everything = whole.token_lists()
    for delimiters in (False, True):
        batch = take(records, data_config(delimiters=delimiters), 1)[0]
        assert {name: x if x is None else (x.shape, x.dtype.name) for name, x in batch._asdict().items()} == {
            "tokens": ((48, 2, 1, 32), "int32"),
            "segment": ((48, 2, 1, 32), "int32"),
            "document": ((48,), "int32"),
            "span_hash": ((48, 2), "int32"),
            "label": None,
            "scores": None,
        }
        for tokens, mask, document in zip(batch.tokens[:, :, 0], batch.segment[:, :, 0] == 1, batch.document, strict=True):
            assert (tokens[~mask] == 0).all()
            rows = [row[inside].tolist() for row, inside in zip(tokens, mask, strict=True)]
            if delimiters:
                ends = [(row[0], row[-1]) for row in rows]
                assert ends == [
                    (RESERVED["x_open"], RESERVED["x_close"]),
                    (RESERVED["y_open"], RESERVED["y_close"]),
                ]
                rows = [row[1:-1] for row in rows]
            homes = [everything[i] for i in np.flatnonzero(whole.document == document)]
            for row in rows:
                assert 7 <= len(row) <= 13
                assert any(row == home[i : i + len(row)] for home in homes for i in range(len(home)))


@pytest.mark.parametrize("changes", [{}, {"weights": (("b", 3.0), ("a", 1e-4))}, {"alpha": 0.5}, {"one_source": "domain"}])
def test_batch_is_a_function_of_the_step_and_rows(changes: dict, dataset: pathlib.Path) -> None:
    records, config = prepared.open_split(dataset, "train"), data_config(**changes)
    whole = take(records, config, 5)
    late = take(records, config, 2, start=3)
    shares = [take(records, config, 5, pairs=pairs) for pairs in (np.arange(0, 20), np.arange(20, 48))]
    for name in ("tokens", "segment", "document", "span_hash"):
        for k in range(5):
            joined = np.concatenate([getattr(share[k], name) for share in shares])
            np.testing.assert_array_equal(joined, getattr(whole[k], name))
        for k in range(2):
            np.testing.assert_array_equal(getattr(late[k], name), getattr(whole[3 + k], name))
    assert not np.array_equal(whole[0].tokens, whole[1].tokens)
    other = next(pipeline.batches(records, config, 4))
    assert not np.array_equal(whole[0].tokens, other.tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (("c", 1.0),)}, "no domain 'c'; there are a, b"),
        ({"weights": (("a", 1.0), ("b", -1.0))}, "weights are positive"),
        ({"weights": (("a", 1.0), ("b", 1e-9))}, "'b' gets less than 1 in 65536"),
        ({"min_span": 60, "max_span": 70, "length": 72}, "120 tokens.*lower config.data.min_span"),
        ({"weights": (("a", 1.0),), "alpha": 0.5}, "alpha=0.5: config.data.weights sets the shares already"),
        ({"max_span": 31}, "config.data.length=32: config.data.max_span=31 needs 33"),
    ],
)
def test_bad_data_values_name_the_mend(dataset: pathlib.Path, changes: dict, message: str) -> None:
    records = prepared.open_split(dataset, "train")
    with pytest.raises(UserError, match=message):
        pipeline.batches(records, data_config(**changes), 0)


@pytest.mark.parametrize(("changes", "needed"), [({"max_span": 49, "length": 51}, 103), ({"max_gap": 71}, 97)])
def test_b1_spans_and_gaps_that_no_record_can_hold_are_refused(dataset: pathlib.Path, changes: dict, needed: int) -> None:
    name, value = next(iter(changes.items()))
    message = (
        f"config.data.{name}={value}.* need records of {needed} tokens, .* at most 96; .* prepare .*--record_tokens={needed}"
    )
    with pytest.raises(UserError, match=message):
        pipeline.batches(prepared.open_split(dataset, "train"), data_config(**changes), 0)


def test_b1_the_share_of_the_records_that_hold_the_longest_pairs_is_logged(
    dataset: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = prepared.open_split(dataset, "train")
    with caplog.at_level("INFO", logger="absl"):
        pipeline.batches(records, data_config(max_gap=40), 0)
    share = 100 * (records.lengths() >= 66).sum() / (records.lengths() >= 14).sum()
    assert f"max_gap=40: {share:.1f} % of the records have room for the longest; the others have shorter ones" in caplog.text


def test_b8_records_of_more_tokens_than_an_int32_counts(tmp_path: pathlib.Path) -> None:
    first = 2**31 + 5
    with open(tmp_path / "tokens", "wb") as file:  # the disk holds the end alone
        file.seek(2 * first)
        file.write(np.arange(1, 9, dtype=np.uint16).tobytes())
    tokens = np.memmap(tmp_path / "tokens", np.uint16, "r")
    cut = views.make_views(tokens, np.array([[first, first + 4]]), np.array([[4, 3]]), 5)
    assert cut.tokens[0, :, 0].tolist() == [[1, 2, 3, 4, 0], [5, 6, 7, 0, 0]]


def test_a_folder_without_data_names_the_command(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"no manifest.json there.*contrastive_jax prepare"):
        prepared.open_split(tmp_path, "train")


def test_a_missing_file_of_the_index_is_named(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = pathlib.Path(shutil.copytree(dataset, tmp_path / "data"))
    with pytest.raises(UserError, match="data: no split 'test' among train, validation$"):
        prepared.open_split(copy, "test")
    (copy / "index" / "train-length.npy").unlink()
    with pytest.raises(
        UserError, match=r"index/train-length.npy: missing, .*copy the whole dataset, or prepare the data again$"
    ):
        prepared.open_split(copy, "train")


def test_records_are_read_at_once_and_in_the_order_of_their_numbers(
    dataset: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = prepared.open_split(dataset, "train")
    numbers = np.random.default_rng(0).permutation(len(records))[:90]
    lengths = records.lengths()[numbers]
    read, together = records.read_chunk, threading.Barrier(3)  # breaks if fewer read at once

    def read_together(chunk: int) -> prepared.Chunk:
        if chunk < 3:
            together.wait(timeout=5)
        return read(chunk)

    monkeypatch.setattr(records, "read_chunk", read_together)
    np.testing.assert_array_equal(records.read_records(numbers).length, lengths)

    def fail(chunk: int) -> prepared.Chunk:
        raise UserError(f"chunk {chunk}")

    monkeypatch.setattr(records, "read_chunk", fail)
    with pytest.raises(UserError, match="chunk 0"):
        records.read_records(numbers)
