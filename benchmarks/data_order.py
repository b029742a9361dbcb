"""Measures the order of the data: exact epochs, and how far batches are from those of a full permutation.

  python -m benchmarks.data_order --output=docs/data_order.png
  python -m benchmarks.data_order --billion=DIR      a folder with 3 GB of space, on the disk that holds --data
      --data=DIR2                                    a prepared dataset, whose file shards stand for all others

The first prints tables and writes a figure; it takes a minute, and needs no data: the order depends on the index alone. The
second makes an index of a billion records, whose file shards are links to a few, and opens it in processes of their own. Expect
the first batch after 3 to 10 seconds, in less than 1 GB of memory.
"""

import itertools
import os
import pathlib
import subprocess
import sys
import time
import types
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from contrastive_jax import files
from contrastive_jax.config import default_config
from contrastive_jax.data import order, prepared, store

OUTPUT = flags.DEFINE_string("output", "data_order.png", "The figure to write.")
RECORDS = flags.DEFINE_integer("records", 1_000_000, "Records of the figure.")
PAIRS = flags.DEFINE_integer("pairs", 4096, "Pairs per batch.")
BILLION = flags.DEFINE_string("billion", "", "The folder in which to make an index of a billion records, and to open it.")
DATA = flags.DEFINE_string("data", "", "With --billion: the prepared dataset whose file shards are used.")
SIZES = flags.DEFINE_list("sizes", ["100", "14460", "1000000"], "Records of the datasets whose epochs are counted.")
REPEATS = 8  # full permutations that are measured
PROCESSES = (1, 2, 8, 64, 256)

# Run for each number of processes: opens the data, makes batches, and prints seconds, MB and a hash of the tokens.
OPEN = """
import hashlib, pathlib, re, sys, time
import numpy as np
from contrastive_jax.config import default_config
from contrastive_jax.data import pipeline, prepared
began, count, number = time.perf_counter(), int(sys.argv[2]), int(sys.argv[3])
config = default_config().data
config.update(batch_size=4096, length=512, min_span=64, max_span=510)
pairs = np.arange(4096).reshape(count, -1)[number]
batches = pipeline.batches(prepared.open_split(sys.argv[1], "train"), config, 0, pairs)
tokens = [next(batches).tokens]
seconds = time.perf_counter() - began
tokens += [next(batches).tokens for _ in range(2)]
digests = [hashlib.sha256(pair.tobytes()).hexdigest()[:8] for step in tokens for pair in step]
peak = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]
print(seconds, int(peak) / 1000, *digests)
"""


def make_order(records: int, pairs: int, shuffled: int, seed: int = 0) -> order.Order:
    """Returns the order of records that do not exist, in chunks of 128."""
    usable = np.diff(np.arange(0, records + store.CHUNK, store.CHUNK).clip(max=records)).astype(np.uint8)
    split: Any = types.SimpleNamespace(domains=["all"], datasets={"all": [0]}, chunk_domain=np.zeros(len(usable), np.uint16))
    config = default_config().data
    config.update(batch_size=pairs, shuffle_records=shuffled)
    return order.Order(split, config, seed, usable)


def epochs(data: order.Order, records: int, pairs: int, count: int) -> np.ndarray:
    """Returns the record of each pair, int64[count records], over the first epochs."""
    located = [data.locate(step, np.arange(pairs)) for step in range(-(-count * records // pairs))]
    return np.concatenate([chunk * store.CHUNK + number for chunk, number in located])[: count * records].reshape(count, -1)


def overlaps(one: np.ndarray, other: np.ndarray, pairs: int) -> np.ndarray:
    """Returns how many records each batch of one epoch shares with each of another, int64[batches batches]."""
    batch_of = np.argsort(other) // pairs
    batches = len(one) // pairs
    shared = np.zeros((batches + 1, batches + 1), np.int64)
    np.add.at(shared, (np.arange(len(one)) // pairs, batch_of[one]), 1)
    return shared[:batches, :batches]


def nearest(epoch: np.ndarray, pairs: int) -> np.ndarray:
    """Returns the distance of each record to the nearest one of its batch, in the order of the file shards."""
    batch = np.sort(epoch[: len(epoch) // pairs * pairs].reshape(-1, pairs), axis=1)
    gap = np.diff(batch, axis=1)
    far = np.full((len(batch), 1), np.iinfo(np.int64).max)
    return np.minimum(np.concatenate([far, gap], axis=1), np.concatenate([gap, far], axis=1)).reshape(-1)


def overlap_row(shared: np.ndarray) -> tuple[float, float, float, float]:
    """Returns the mean and the deviation over all pairs of batches, the mean of each batch's largest overlap, the largest."""
    return shared.mean(), shared.std(), shared.max(axis=1).mean(), shared.max()


def print_row(name: str, values: Any) -> None:
    """Prints a line of the table of overlaps."""
    print(f"{name:<36}" + "".join(f"{value:>{width}.2f}" for value, width in zip(values, (8, 11, 15, 9), strict=True)))


def count_epochs(pairs: int) -> None:
    """Prints for datasets of several sizes whether each record comes once per epoch, in three epochs."""
    for size in map(int, SIZES.value):
        numbers = epochs(make_order(size, pairs, 131_072), size, pairs, 3)
        exact = all((np.bincount(epoch, minlength=size) == 1).all() for epoch in numbers)
        print(f"{size:>12,} records: each exactly once in each of 3 epochs: {exact}")


def measure_batches(records: int, pairs: int) -> None:
    """Prints the overlaps, and draws them and the distances of the records of a batch."""
    print(f"\n{records:,} records, batches of {pairs:,} pairs: records that two batches share")
    print(f"{'order':<36}{'mean':>8}{'deviation':>11}{'largest, mean':>15}{'largest':>9}")
    figure, (distance_axis, overlap_axis) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rng = np.random.default_rng(0)
    random = [overlaps(rng.permutation(records), rng.permutation(records), pairs) for _ in range(REPEATS)]
    rows = np.array([overlap_row(shared) for shared in random])
    print_row("full permutations", rows.mean(axis=0))
    print_row("  their standard deviation", rows.std(axis=0))
    curves = {"full permutation": (nearest(rng.permutation(records), pairs), random[0])}
    for shuffled in (1 << 15, 1 << 17, 1 << 19):
        data = make_order(records, pairs, shuffled)
        one, two = epochs(data, records, pairs, 2)
        other = epochs(make_order(records, pairs, shuffled, seed=1), records, pairs, 1)[0]
        for name, epoch in (("epochs 0 and 1", two), ("seeds 0 and 1", other)):
            print_row(f"windows of {shuffled:,}, {name}", overlap_row(overlaps(one, epoch, pairs)))
        curves[f"windows of {shuffled:,}"] = (nearest(one, pairs), overlaps(one, two, pairs))
    for name, (distance, shared) in curves.items():
        distance_axis.plot(np.sort(distance), np.linspace(0, 1, len(distance)), label=name)
        overlap_axis.plot(np.bincount(shared.reshape(-1)) / shared.size, label=name)
    distance_axis.set(xscale="log", xlabel="records to the nearest record of the batch", ylabel="share of the records")
    overlap_axis.set(xlabel="records that batches of two epochs share", ylabel="share of the pairs of batches")
    distance_axis.legend(loc="lower right")
    overlap_axis.legend()
    figure.savefig(OUTPUT.value, dpi=120)


def count_requests(records: int, pairs: int) -> None:
    """Prints the pairs per request of one process among several, over an epoch."""
    data = make_order(records, pairs, 131_072)
    steps = range(records // pairs)
    for processes in PROCESSES:
        own = np.arange(pairs // processes) + pairs // processes * (processes // 3)
        chunks: set[tuple[int, int]] = set()
        for step in steps:
            for _, window, _, ranks in data.runs(step, own):
                chunks |= {(window.first, chunk) for chunk in np.unique(window.locate(ranks)[0]).tolist()}
        print(f"{processes:>5} processes: {len(steps) * len(own) / len(chunks):.0f} pairs per request")


def make_billion(folder: pathlib.Path, data: str, records: int = 10**9) -> None:
    """Writes the index of a billion records, whose file shards are links to those of a prepared dataset."""
    split = prepared.open_split(data, "train")
    paths = sorted(pathlib.Path(data).glob("pile/*/*-train.array_record-*"))
    columns = [np.load(store.index_path(files.absolute(data), "train", column)) for column in store.COLUMNS]
    copies = -(-records // len(split))
    (folder / "pile" / "1.0.0").mkdir(parents=True)
    (folder / "index").mkdir()
    for column, values in zip(store.COLUMNS, columns, strict=True):
        path = store.index_path(files.absolute(folder), "train", column)
        whole = np.lib.format.open_memmap(path, "w+", values.dtype, (len(values) * copies,))
        for i in range(copies):
            whole[i * len(values) : (i + 1) * len(values)] = values
    for number, path in zip(range(copies * len(paths)), itertools.cycle(paths)):
        os.link(path, folder / store.NAME.format(split="train", number=number, count=copies * len(paths)))
    (folder / "manifest.json").write_text((pathlib.Path(data) / "manifest.json").read_text())


def open_billion(folder: pathlib.Path) -> None:
    """Prints seconds and memory until the first batch, and whether 1, 2 and 8 processes make the same batches."""
    digests = {}
    for processes in (1, 2, 8):
        outputs = []
        for number in range(processes):
            arguments = [sys.executable, "-c", OPEN, str(folder), str(processes), str(number)]
            outputs.append(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split())
        parts = np.array([output[2:] for output in outputs]).reshape(processes, 3, -1)
        digests[processes] = parts.transpose(1, 0, 2).reshape(-1).tolist()
        seconds, megabytes = (max(float(output[i]) for output in outputs) for i in range(2))
        same = digests[processes] == digests[1]
        print(
            f"{processes} processes: first batch after {seconds:.1f} s, {megabytes:,.0f} MB; the batches of one process: {same}"
        )


def main(argv: list[str]) -> None:
    """Prints tables, and draws the figure."""
    del argv
    if BILLION.value:
        folder = pathlib.Path(BILLION.value)
        if not folder.exists():
            began = time.perf_counter()
            make_billion(folder, DATA.value)
            print(f"index of a billion records: {time.perf_counter() - began:.0f} s")
        open_billion(folder)
        return
    plt.switch_backend("Agg")  # needs no display
    count_epochs(PAIRS.value)
    measure_batches(RECORDS.value, PAIRS.value)
    count_requests(RECORDS.value, PAIRS.value)
    print(f"figure: {OUTPUT.value}")


if __name__ == "__main__":
    app.run(main)
