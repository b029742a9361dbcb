"""Measures what a large batch is worth: the query-key test after training with batches of 32 to 2,048 pairs.

  python -m benchmarks.batch_size --data=DIR --output=batch_size.png

Trains one recipe for the same number of steps with each batch size (above --micro_batch pairs by gradient caching), prints a
table and writes a plot. Expect the scores to rise with each doubling; the default takes 12 minutes on 2 CPU cores.
"""

import functools
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags, logging

from benchmarks import common
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.evals import query_key
from contrastive_jax.inference import forward
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build

DATA = flags.DEFINE_string("data", None, "Prepared dataset.", required=True)
OUTPUT = flags.DEFINE_string("output", "batch_size.png", "The plot to write.")
RECIPE = flags.DEFINE_string("recipe", "bag", "A recipe in configs/.")
STEPS = flags.DEFINE_integer("steps", 300, "Steps of each run.")
BATCHES = flags.DEFINE_list("batches", ["32", "64", "128", "256", "512", "1024", "2048"], "Batch sizes, pairs.")
MICRO_BATCH = flags.DEFINE_integer("micro_batch", 256, "Pairs per micro-batch; batches up to this size are encoded at once.")


def train(batch_size: int) -> dict[str, float]:
    """Trains the recipe with this batch size; returns its query-key scores, measure → fraction."""
    config = common.load_recipe(RECIPE.value)
    config.steps = STEPS.value
    config.optim.warmup_steps = STEPS.value // 10
    config.data.update(dir=DATA.value, batch_size=batch_size)
    config.micro_batch = MICRO_BATCH.value if batch_size > MICRO_BATCH.value else 0
    records, held_out = (prepared.open_split(DATA.value, split) for split in ("train", "validation"))
    pairs = query_key.make_pairs(held_out, config.eval, config.data)
    mesh = sharding.make_mesh(config.mesh)
    run = build.build(config, mesh, records.manifest["vocab_size"])
    state, rows = run.init(), sharding.rows_of_process(batch_size, mesh)
    batches = pipeline.batches(records, config.data, config.seed, rows)
    for _ in range(config.steps):
        state, metrics, _ = run.train_step(state, sharding.to_global(next(batches), rows, batch_size, mesh))
    jax.block_until_ready(metrics)
    encode = functools.partial(forward.make_forward(run.encoder.apply, run.mesh), state.params["encoder"])
    return query_key.score_embeddings(query_key.embed_tokens(encode, pairs, config.eval.batch_size))["mean"]


def plot(batches: list[int], scores: list[dict[str, float]]) -> None:
    """Writes the plot of MRR and top-1 against the batch size."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label in (("mrr", "MRR"), ("top1", "top-1")):
        axis.plot(batches, [100 * score[name] for score in scores], marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [f"{b:,}" for b in batches])
    axis.set_xlabel("pairs per batch")
    axis.set_ylabel("query-key test, %")
    axis.set_title(f"{RECIPE.value}, {STEPS.value} steps")
    axis.legend()
    figure.savefig(OUTPUT.value, dpi=150)


def main(argv: list[str]) -> None:
    """Prints a line per batch size and writes the plot."""
    del argv
    logging.set_verbosity(logging.WARNING)
    plt.switch_backend("Agg")  # needs no display
    batches, scores = [int(b) for b in BATCHES.value], []
    print(f"{RECIPE.value}, {STEPS.value} steps\n{'batch':>7}{'top-1':>8}{'top-5':>8}{'MRR':>8}{'seconds':>9}")
    for batch_size in batches:
        begin = time.perf_counter()
        score = train(batch_size)
        scores.append(score)
        cells = "".join(f"{100 * score[name]:>8.1f}" for name in ("top1", "top5", "mrr"))
        print(f"{batch_size:>7}{cells}{time.perf_counter() - begin:>9.0f}", flush=True)
    plot(batches, scores)
    rises = np.diff([score["mrr"] for score in scores]) > 0
    print(f"MRR rises with {rises.sum()} of {len(rises)} doublings; plot: {OUTPUT.value}")


if __name__ == "__main__":
    app.run(main)
