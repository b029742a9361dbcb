"""The data: spans never overlap, and the batch of step k is a pure function of (data, seed, k)."""

import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from conftest import RESERVED
from ml_collections import ConfigDict

from configs import base
from contrastive_jax.data import pipeline, spans


def data_config(**changes: object) -> ConfigDict:
    # Sizes that all differ, so that swapped arguments fail.
    config = base.get_config().data
    config.update(batch_size=48, length=32, min_span=7, max_span=13, min_gap=0, max_gap=5)
    config.update(changes)
    return config


def cut(config: ConfigDict, lengths: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    sampler = spans.neighbours(config)
    uniform = np.random.default_rng(seed).random((len(lengths), sampler.uniforms), np.float32)
    start, size = sampler.cut(tf.constant(lengths, tf.int32), tf.constant(uniform))
    return start.numpy(), size.numpy()


@pytest.mark.parametrize("order", ["random", "kept"])
@pytest.mark.parametrize(("min_gap", "max_gap"), [(0, 0), (3, 11)])
def test_neighbours_keep_their_bounds(order: str, min_gap: int, max_gap: int) -> None:
    config = data_config(order=order, min_gap=min_gap, max_gap=max_gap)
    lengths = np.random.default_rng(1).integers(2 * 7 + min_gap, 60, 20_000)
    start, size = cut(config, lengths)
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


def test_neighbours_reach_both_ends_of_a_window() -> None:
    start, size = cut(data_config(min_gap=0, max_gap=0), np.full(5000, 40))
    assert start.min() == 0 and (start + size).max() == 40


def test_shortest_window_is_used_whole() -> None:
    start, size = cut(data_config(min_gap=2, max_gap=9, order="kept"), np.full(100, 2 * 7 + 2))
    np.testing.assert_array_equal(start, [[0, 9]] * 100)
    np.testing.assert_array_equal(size, [[7, 7]] * 100)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"min_span": 0}, "min_span"),
        ({"min_span": 20}, "max_span"),
        ({"min_gap": -1}, "min_gap"),
        ({"max_gap": 1, "min_gap": 2}, "max_gap"),
        ({"order": "sorted"}, "order"),
        ({"sampler": "neighbors"}, "sampler"),
    ],
)
def test_bad_sampler_values_name_the_key(changes: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"config.data.*{key}"):
        spans.make(data_config(**changes))


def take(windows: pipeline.Windows, config: ConfigDict, count: int, **kwargs: object) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(pipeline.batches(windows, config, 3, **kwargs), count))


def test_spans_are_cut_out_of_their_window_and_delimited(dataset: pathlib.Path) -> None:
    windows = pipeline.open_split(dataset, "train")
    whole = pipeline.read_tokens(windows, tf.range(len(windows.length), dtype=tf.int64)).numpy()
    everything = [row[:length].tolist() for row, length in zip(whole, windows.length, strict=True)]
    for delimiters in (False, True):
        batch = take(windows, data_config(delimiters=delimiters), 1)[0]
        assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
            "tokens": ((48, 2, 32), "int32"),
            "segment": ((48, 2, 32), "int32"),
            "doc": ((48,), "int32"),
            "text": ((48, 2), "int32"),
        }
        for tokens, mask, doc in zip(batch["tokens"], batch["segment"] == 1, batch["doc"], strict=True):
            assert (tokens[~mask] == 0).all()
            rows = [row[inside].tolist() for row, inside in zip(tokens, mask, strict=True)]
            if delimiters:
                ends = [(row[0], row[-1]) for row in rows]
                assert ends == [
                    (RESERVED["x_open"], RESERVED["x_close"]),
                    (RESERVED["y_open"], RESERVED["y_close"]),
                ]
                rows = [row[1:-1] for row in rows]
            homes = [everything[i] for i in np.flatnonzero(windows.document == doc)]
            for row in rows:
                assert 7 <= len(row) <= 13
                assert any(row == home[i : i + len(row)] for home in homes for i in range(len(home)))


def test_batch_is_a_function_of_the_step_and_rows(dataset: pathlib.Path) -> None:
    windows, config = pipeline.open_split(dataset, "train"), data_config()
    whole = take(windows, config, 5)
    late = take(windows, config, 2, start=3)
    shares = [take(windows, config, 5, rows=rows) for rows in (np.arange(0, 20), np.arange(20, 48))]
    for name in ("tokens", "segment", "doc", "text"):
        for k in range(5):
            np.testing.assert_array_equal(np.concatenate([share[k][name] for share in shares]), whole[k][name])
        for k in range(2):
            np.testing.assert_array_equal(late[k][name], whole[3 + k][name])
    assert not np.array_equal(whole[0]["tokens"], whole[1]["tokens"])
    other = next(pipeline.batches(windows, config, 4))
    assert not np.array_equal(whole[0]["tokens"], other["tokens"])


def test_each_epoch_visits_every_usable_window_once(dataset: pathlib.Path) -> None:
    windows = pipeline.open_split(dataset, "train")
    usable = np.flatnonzero(windows.length >= 14)
    assert 0 < len(usable) < len(windows.length)
    index = pipeline.make_index(windows, data_config(), seed=0, min_window=14)
    # An epoch is a run of positions within a block of the mixture: with one pool both orders are permutations.
    records = index(tf.range(pipeline.BLOCK, dtype=tf.int64)).numpy()
    counts = np.bincount(records, minlength=len(windows.length))
    assert (counts[np.setdiff1d(np.arange(len(windows.length)), usable)] == 0).all()
    assert counts[usable].min() == pipeline.BLOCK // len(usable)
    assert counts[usable].max() <= pipeline.BLOCK // len(usable) + 1


def test_mixture_gives_each_domain_its_share(dataset: pathlib.Path) -> None:
    windows = pipeline.open_split(dataset, "train")
    index = pipeline.make_index(windows, data_config(weights=(("b", 3.0), ("a", 1.0))), seed=0, min_window=14)
    records = index(tf.range(4 * pipeline.BLOCK, dtype=tf.int64)).numpy()
    domain = windows.domain[records]
    assert (domain == 1).mean() == 0.75
    for part in np.split(domain, 64):  # mixed throughout, not only on the whole
        assert 0.7 < (part == 1).mean() < 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (("c", 1.0),)}, "no domain 'c'; there are a, b"),
        ({"weights": (("a", 1.0), ("b", -1.0))}, "weights are positive"),
        ({"weights": (("a", 1.0), ("b", 1e-9))}, "'b' gets less than 1 in 65536"),
        ({"min_span": 60, "max_span": 70, "length": 72}, "120 tokens.*lower config.data.min_span"),
        ({"max_span": 31}, "config.data.length=32: config.data.max_span=31 needs 33"),
    ],
)
def test_bad_data_values_name_the_mend(dataset: pathlib.Path, changes: dict, message: str) -> None:
    windows = pipeline.open_split(dataset, "train")
    with pytest.raises(ValueError, match=message):
        pipeline.batches(windows, data_config(**changes), 0)


def test_a_folder_without_data_names_the_command(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest.json there.*contrastive_jax\.prepare"):
        pipeline.open_split(tmp_path, "train")
