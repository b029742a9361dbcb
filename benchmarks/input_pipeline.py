"""Measures how fast prepared records become batches: by this pipeline, by Grain, and by a plain loop with NumPy.

  python -m benchmarks.input_pipeline --data=DIR              the records on a local disk
  python -m benchmarks.input_pipeline --data=DIR --bucket     on an emulated bucket too, which answers 20 ms late

All sides read the same records, cut spans with the same sampler, and make rows with the same function, so that what differs is
how they find, read and parse records and hand batches over. They run one after another, each in a process of its own on
--cores cores. DIR should hold more records than a cache of the pipeline: half a million are enough.

* `pipeline` is what training uses: batches are a pure function of the step.
* `grain` reads a copy of the records in the form that Grain asks for, one record per compressed block, which allows a full
  shuffle; a batch is read at once.
* `grain_chunks` reads whole chunks of the very same file shards, and shuffles in windows as large as those of the pipeline.
* `numpy` reads chunks in random order in one thread and does not shuffle the records of a chunk.
"""

import functools
import importlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from array_record.python import array_record_module
from ml_collections import ConfigDict

from contrastive_jax import files
from contrastive_jax.config import default_config
from contrastive_jax.data import pipeline, prepared, spans, store, token_type, views

DATA = flags.DEFINE_string("data", None, "Prepared dataset on a local disk.", required=True)
BUCKET = flags.DEFINE_bool("bucket", False, "Measure on an emulated bucket too; needs the extra `test`.")
DELAY = flags.DEFINE_float("delay", 0.02, "Seconds by which each answer of the emulated bucket is delayed.")
SECONDS = flags.DEFINE_float("seconds", 10.0, "How long each side is measured in a round.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds in which the sides take turns; the median of the pairs/s counts.")
CORES = flags.DEFINE_integer("cores", 2, "Cores that a side may use.")
SIDES = flags.DEFINE_list("sides", ["pipeline", "grain", "grain_chunks", "numpy"], "The sides to measure.")
SHAPES = flags.DEFINE_list("shapes", ["plain", "spread", "packed"], "The shapes of batches to measure.")
MEASURE = flags.DEFINE_string("measure", None, "Measures one side in this process: a list in JSON, [side, shape, data, cache].")

# plain: rows full of tokens. packed: 48 pairs in 15 rows. spread: the spans of packed, one per row. host: what one of 64 hosts
# needs, at the rate at which CPT-S (arXiv 2201.10005) is trained on 64 v5e chips' hosts: 213 pairs/s of 2 x 512 tokens.
SHAPE_CONFIGS: dict[str, dict[str, int]] = {
    "plain": dict(batch_size=4096, length=128, min_span=126, max_span=126),
    "spread": dict(batch_size=3072, length=512, min_span=64, max_span=510),
    "host": dict(batch_size=4096, length=512, min_span=64, max_span=510),
    "packed": dict(batch_size=3072, length=1024, min_span=64, max_span=510, pack_pairs=48, pack_rows=15),
}
WORKERS = 2
HOST_PAIRS, HOST_RATE = 64, 213
# Records in one window of the shuffle of `grain_chunks`.
WINDOW = 1 << 17


class Speed(NamedTuple):
    """What a side achieved.

    Attributes:
      tokens: per second, with delimiters and without padding.
      pairs: per second.
      first: seconds until the first batch.
      waited: the share of the time that was spent waiting for a batch.
      requests: to the bucket, per 64 pairs, after the first batch.
    """

    tokens: float
    pairs: float
    first: float
    waited: float
    requests: float


class Chunk(NamedTuple):
    """The records of a chunk: those from `begin` to `end` of a file shard."""

    path: str
    begin: int
    end: int


class Source(NamedTuple):
    """Where the records are and how batches are made of them, for the sides other than the pipeline.

    Attributes:
      chunks: all chunks of the training split.
      paths: the file shards.
      usable: int64[n], the numbers of the records that are long enough.
      make_views: (records as they are stored, uniform float32[b u]) → the views of a batch.
      batch_size: pairs per batch.
      uniforms: u, the random numbers per pair.
      min_bytes: the bytes of the tokens of the shortest record that is used.
    """

    chunks: list[Chunk]
    paths: list[str]
    usable: np.ndarray
    make_views: Callable[[Sequence[bytes], np.ndarray], views.Views]
    batch_size: int
    uniforms: int
    min_bytes: int


def open_source(directory: str, config: ConfigDict) -> Source:
    """Opens the training split of a prepared dataset, local or on gs://."""
    root, manifest = files.absolute(directory), prepared.load_manifest(directory)
    length, chunk_size, shard_chunks = (
        np.load(io.BytesIO(store.index_path(root, "train", column).read_bytes()))
        for column in ("length", "chunk_size", "shard_chunks")
    )
    paths = [
        os.fspath(root / store.NAME.format(split="train", number=i, count=len(shard_chunks))) for i in range(len(shard_chunks))
    ]
    chunks = []
    for path, sizes in zip(paths, np.split(chunk_size.astype(int), np.cumsum(shard_chunks)[:-1]), strict=True):
        ends = np.cumsum(sizes).tolist()
        chunks += [Chunk(path, begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    sampler, dtype = spans.make_sampler(config), token_type(manifest["vocab_size"])
    delimiters = views.delimiter_ids(manifest, sampler.views)

    def make_views(tokens: Sequence[bytes], uniform: np.ndarray) -> views.Views:
        sizes = np.array([len(record) for record in tokens], np.int32) // dtype.itemsize
        start, size = sampler.sample(sizes, uniform)
        begin = (np.cumsum(sizes, dtype=np.int64) - sizes)[:, None] + start
        flat = np.frombuffer(b"".join(tokens), dtype)
        return views.make_views(flat, begin, size, config.length, delimiters, config.pack_pairs, config.pack_rows)

    return Source(
        chunks=chunks,
        paths=paths,
        usable=np.flatnonzero(length >= sampler.min_record),
        make_views=make_views,
        batch_size=config.batch_size,
        uniforms=sampler.uniforms,
        min_bytes=sampler.min_record * dtype.itemsize,
    )


@functools.cache
def open_reader(path: str) -> Any:
    """Returns the reader of a file shard, which stays open in this process."""
    options = "readahead_buffer_size:0,max_parallelism:0"
    return array_record_module.ArrayRecordReader(path, options=options, file_reader_buffer_size=1 << 15)


def read_chunk(chunk: Chunk, min_bytes: int) -> list[bytes]:
    """Returns the tokens of the records of a chunk that are long enough."""
    records = open_reader(chunk.path).read(chunk.begin, chunk.end)
    tokens = [prepared.feature_bytes(record, prepared.TOKENS_KEY) for record in records]
    return [record for record in tokens if len(record) >= min_bytes]


def pipeline_batches(directory: str, cache: str, config: ConfigDict, pairs: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the segments of these pairs of each batch of the pipeline of this repository."""
    records = prepared.open_split(directory, "train", cache)
    return (batch.segment for batch in pipeline.batches(records, config, 0, pairs))


def numpy_batches(source: Source) -> Iterator[np.ndarray]:
    """Yields the segments of batches that one thread makes of chunks in random order."""
    rng, waiting = np.random.default_rng(0), list[bytes]()
    while True:
        for number in rng.permutation(len(source.chunks)):
            waiting += read_chunk(source.chunks[number], source.min_bytes)
            while len(waiting) >= source.batch_size:
                uniform = rng.random((source.batch_size, source.uniforms), np.float32)
                yield source.make_views(waiting[: source.batch_size], uniform).segment
                del waiting[: source.batch_size]


def grain_batches(source: Source, by_chunk: bool) -> Iterator[np.ndarray]:
    """Yields the segments of batches that Grain makes in WORKERS processes.

    Of the settings that were tried, these were the fastest: one thread per process reads local records, a batch at a time; many
    threads read single records, or chunks, from a bucket.
    """
    import grain

    remote = files.on_bucket(source.paths[0])
    options = grain.ReadOptions(num_threads=32 if remote else 1, prefetch_buffer_size=64 if remote else 2)
    array_records = grain.sources.ArrayRecordDataSource(source.paths)

    def read_record(number: int) -> bytes:
        return prepared.feature_bytes(array_records[number], prepared.TOKENS_KEY)

    def read_batch(numbers: Sequence[int]) -> list[bytes]:
        return [prepared.feature_bytes(record, prepared.TOKENS_KEY) for record in array_records.__getitems__(numbers)]

    def batch_views(tokens: Sequence[bytes], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return tuple(source.make_views(tokens, rng.random((source.batch_size, source.uniforms), np.float32)))

    class Unpack(grain.experimental.FlatMapTransform):
        """Yields the records of a chunk."""

        max_fan_out = store.CHUNK

        def flat_map(self, element: list[bytes]) -> list[bytes]:
            return element

    shuffled = grain.MapDataset.source(source.chunks if by_chunk else source.usable).shuffle(seed=0).repeat()
    if by_chunk:
        chunks = shuffled.map(functools.partial(read_chunk, min_bytes=source.min_bytes)).to_iter_dataset(options)
        records = grain.experimental.FlatMapIterDataset(chunks, Unpack())
        records = grain.experimental.WindowShuffleIterDataset(records, window_size=WINDOW // WORKERS, seed=0)
        batches = records.batch(source.batch_size, drop_remainder=True, batch_fn=list)
    elif remote:
        batches = shuffled.map(read_record).to_iter_dataset(options).batch(source.batch_size, batch_fn=list)
    else:
        batches = shuffled.batch(source.batch_size, batch_fn=list).map(read_batch).to_iter_dataset(options)
    processes = grain.MultiprocessingOptions(num_workers=WORKERS, per_worker_buffer_size=2)
    return (segment for _, segment, _ in batches.random_map(batch_views, seed=0).mp_prefetch(processes))


def measure(side: str, shape: str, directory: str, cache: str) -> Speed:
    """Measures one side in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: CORES.value])
    config = default_config().data
    config.update(SHAPE_CONFIGS[shape])
    pairs = HOST_PAIRS if shape == "host" else config.batch_size
    begin = time.perf_counter()
    if side == "pipeline":
        segments = pipeline_batches(directory, cache, config, np.arange(pairs))
    else:
        source = open_source(directory, config)
        segments = numpy_batches(source) if side == "numpy" else grain_batches(source, by_chunk=side == "grain_chunks")
    next(segments)
    first = time.perf_counter() - begin
    count_requests()
    begin, tokens, batches, waited = time.perf_counter(), 0, 0, 0.0
    while (now := time.perf_counter()) < begin + SECONDS.value:
        if shape == "host":
            time.sleep(max(0.0, begin + batches * pairs / HOST_RATE - now))
            now = time.perf_counter()
        tokens += int(np.count_nonzero(next(segments)))
        waited, batches = waited + time.perf_counter() - now, batches + 1
    elapsed, total = time.perf_counter() - begin, batches * pairs
    return Speed(tokens / elapsed, total / elapsed, first, waited / elapsed, count_requests() / total * 64)


def count_requests() -> int:
    """Returns the reads of the emulated bucket since the call before; 0 without a bucket."""
    address = os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT")
    if not address:
        return 0
    with urllib.request.urlopen(f"{address}/_proxy/counts?counts=0") as answer:
        return sum(count for name, count in json.load(answer).items() if name.startswith("read "))


def measure_apart(side: str, shape: str, directory: str, cache: str = "") -> Speed:
    """Measures one side in a process of its own."""
    forwarded = [f"--{name}={flags.FLAGS[name].value}" for name in ("data", "seconds", "cores")]
    command = [
        sys.executable,
        "-m",
        "benchmarks.input_pipeline",
        *forwarded,
        "--measure",
        json.dumps([side, shape, directory, cache]),
    ]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Speed(*json.loads(output.strip().splitlines()[-1]))


def print_table(title: str, speeds: dict[str, Speed]) -> None:
    """Prints a line per side, with the ratio of the pipeline's pairs/s to those of the side."""
    print(f"\n{title:<26}   tokens/s   pairs/s   first batch   waited   requests per 64 pairs   pipeline is")
    for name, (tokens, pairs, first, waited, requests) in speeds.items():
        ratio = f"{speeds['pipeline'].pairs / pairs:.2f} x" if "pipeline" in speeds else ""
        print(
            f"{name:<26}{tokens:>11,.0f}{pairs:>10,.0f}{first:>12.1f} s{waited:>9.0%}{requests:>24.2f}{ratio:>14}", flush=True
        )


def copy_for_grain(data: str, target: pathlib.Path) -> None:
    """Copies the training split, one record per compressed block."""
    for path in sorted(pathlib.Path(data).glob("pile/*/*-train.array_record-*")):
        copy = target / path.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        writer = array_record_module.ArrayRecordWriter(str(copy), "group_size:1,uncompressed")
        for record in array_record_module.ArrayRecordReader(str(path)).read_all():
            writer.write(record)
        writer.close()
    shutil.copytree(pathlib.Path(data, "index"), target / "index")
    shutil.copy(pathlib.Path(data, "manifest.json"), target)


def measure_in_turns(folders: dict[str, str], shape: str) -> dict[str, Speed]:
    """Measures sides in ROUNDS rounds, so that a busy machine slows all of them down.

    Args:
      folders: side → where its records are.
      shape: a key of SHAPE_CONFIGS.

    Returns:
      Side → its round with the median of the pairs/s.
    """
    rounds = [{side: measure_apart(side, shape, folder) for side, folder in folders.items()} for _ in range(ROUNDS.value)]
    return {side: sorted((turn[side] for turn in rounds), key=lambda speed: speed.pairs)[len(rounds) // 2] for side in folders}


def measure_local(copy: pathlib.Path) -> None:
    """Prints a table per shape, of all sides on local records; `copy` is from `copy_for_grain`."""
    folders = {side: str(copy) if side == "grain" else DATA.value for side in SIDES.value}
    for shape in SHAPES.value:
        print_table(f"local, {shape}", measure_in_turns(folders, shape))


def measure_bucket(copy: pathlib.Path, cache: str) -> None:
    """Prints the table of all sides on records on an emulated bucket, which the pipeline reads with and without a cache."""
    emulators = importlib.import_module("tests.cloud.emulators")
    proxy = [sys.executable, "-m", "tests.cloud.proxy", f"--delay=1:{DELAY.value}"]
    with emulators.start_gcs() as upstream:
        bucket = emulators.make_bucket("gs", upstream)
        emulators.upload(pathlib.Path(DATA.value), f"{bucket}/chunks", upstream)
        emulators.upload(copy, f"{bucket}/records", upstream)
        server = subprocess.Popen([*proxy, f"--upstream={upstream}"], stdout=subprocess.PIPE, text=True)
        assert server.stdout
        try:
            os.environ.update(emulators.gcs_environment(server.stdout.readline().strip()))
            folders = {side: f"{bucket}/{'records' if side == 'grain' else 'chunks'}" for side in SIDES.value}
            title = f"bucket, {DELAY.value * 1000:.0f} ms"
            speeds = {side: measure_apart(side, "spread", folder) for side, folder in folders.items()}
            for state in ("cold", "warm"):
                speeds[f"pipeline, {state} cache"] = measure_apart("pipeline", "spread", f"{bucket}/chunks", cache)
            print_table(f"{title}, spread", speeds)
            print_table(f"{title}, host", {"pipeline": measure_apart("pipeline", "host", f"{bucket}/chunks")})
        finally:
            server.kill()


def main(argv: list[str]) -> None:
    """Prints the tables."""
    del argv
    if MEASURE.value:
        print(json.dumps(measure(*json.loads(MEASURE.value))))
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "copy")
        copy_for_grain(DATA.value, copy)
        measure_local(copy)
        if BUCKET.value:
            measure_bucket(copy, str(pathlib.Path(folder, "cache")))


if __name__ == "__main__":
    app.run(main)
