"""Speed of the data: prepared windows into batches, beside a plain Python loop over the raw shards.

  python -m contrastive_jax.prepare --input=GLOB --output=DIR       prints its own MB/s
  python benchmarks/input_pipeline.py --data=DIR --input=GLOB

Both make batches of 4,096 pairs of spans, 128 tokens a row with delimiters. The loop reads a shard line by line, tokenises
the document, cuts it into windows, picks two adjacent spans of each at a random place, delimits and stacks them.
"""

import glob
import io
import json
import pathlib
import random
import sys
import time
from collections.abc import Iterator

import numpy as np
import zstandard
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from ml_collections import ConfigDict

from configs import base
from contrastive_jax.data import pipeline, tokenizer

DATA = flags.DEFINE_string("data", None, "Prepared dataset.", required=True)
INPUT = flags.DEFINE_string("input", None, "Glob of the .jsonl.zst shards it was made of.", required=True)
PAIRS = flags.DEFINE_integer("pairs", 4096, "Pairs of a batch.")
LENGTH = flags.DEFINE_integer("length", 128, "Tokens of a row.")
SECONDS = flags.DEFINE_float("seconds", 20.0, "How long to measure each.")


def plain_loop(paths: list[str], config: ConfigDict, data: str) -> Iterator[np.ndarray]:
    """Batches of mask bool[b 2 l], with the work of making the tokens done."""
    codec, manifest = tokenizer.load(data), pipeline.load_manifest(data)
    (opening, closing), rows, masks = pipeline.delimiter_ids(manifest).T, [], []
    span, window = config.max_span, manifest["window"]
    for path in paths:
        with open(path, "rb") as file:
            reader = zstandard.ZstdDecompressor().stream_reader(file)
            for line in io.TextIOWrapper(reader, encoding="utf-8"):
                tokens = codec.encode(json.loads(line)["text"])
                for begin in range(0, len(tokens), window):
                    part = tokens[begin : begin + window]
                    if len(part) < 2 * span:
                        continue
                    start = random.randrange(len(part) - 2 * span + 1)
                    for view in range(2):
                        cut = part[start + view * span : start + (view + 1) * span]
                        rows.append([opening[view], *cut, closing[view]])
                        masks.append([True] * config.length)
                    if len(rows) == 2 * config.batch_size:
                        np.array(rows, np.int32)
                        yield np.array(masks)
                        rows, masks = [], []


def measure(masks: Iterator[np.ndarray], seconds: float) -> tuple[float, float]:
    """Tokens/s and pairs/s, the first batch (start-up) left out."""
    next(masks)
    begin, tokens, pairs = time.perf_counter(), 0, 0
    for mask in masks:
        tokens, pairs = tokens + int(mask.sum()), pairs + len(mask) // (2 if mask.ndim == 2 else 1)
        if time.perf_counter() - begin > seconds:
            break
    spent = time.perf_counter() - begin
    return tokens / spent, pairs / spent


def main(argv: list[str]) -> None:
    """Prints both speeds and their ratio."""
    del argv
    config = base.get_config().data
    span = LENGTH.value - 2
    config.update(batch_size=PAIRS.value, length=LENGTH.value, min_span=span, max_span=span)
    windows = pipeline.open_split(DATA.value, "train")
    ours = measure((batch["segment"] > 0 for batch in pipeline.batches(windows, config, 0)), SECONDS.value)
    loop = measure(plain_loop(sorted(glob.glob(INPUT.value)), config, DATA.value), SECONDS.value)
    print(f"{'':<12}{'tokens/s':>14}{'pairs/s':>12}")
    for name, (tokens, pairs) in (("pipeline", ours), ("plain loop", loop)):
        print(f"{name:<12}{tokens:>14,.0f}{pairs:>12,.0f}")
    print(f"{'ratio':<12}{ours[0] / loop[0]:>14.1f}{ours[1] / loop[1]:>12.1f}")


if __name__ == "__main__":
    app.run(main)
