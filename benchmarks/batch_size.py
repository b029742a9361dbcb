"""What a large batch is worth: one recipe, one number of steps, batches from 32 to 2,048 by gradient caching.

  python benchmarks/batch_size.py --data=DIR --out=batch_size.png

Writes a table and a plot of the query-key test (top-1 and MRR on held-out pairs) against the batch size.
"""

import functools
import importlib
import pathlib
import sys
import time

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from contrastive_jax import build, sharding
from contrastive_jax.data import pipeline
from contrastive_jax.evals import query_key

DATA = flags.DEFINE_string("data", None, "Prepared dataset.", required=True)
OUT = flags.DEFINE_string("out", "batch_size.png", "Where the plot goes.")
RECIPE = flags.DEFINE_string("recipe", "bag", "A recipe of configs/.")
STEPS = flags.DEFINE_integer("steps", 300, "Steps of each run.")
BATCHES = flags.DEFINE_list("batches", ["32", "64", "128", "256", "512", "1024", "2048"], "Pairs of a batch.")
MICRO_BATCH = flags.DEFINE_integer("micro_batch", 256, "Pairs of a micro-batch; smaller batches are direct.")


def train(batch: int) -> dict[str, float]:
    """Trains with this batch; returns the query-key scores."""
    config = importlib.import_module(f"configs.{RECIPE.value}").get_config()
    config.steps = STEPS.value
    config.optim.warmup_steps = STEPS.value // 10
    config.data.update(dir=DATA.value, batch_size=batch)
    config.micro_batch = MICRO_BATCH.value if batch > MICRO_BATCH.value else 0
    windows, held_out = (pipeline.open_split(DATA.value, split) for split in ("train", "validation"))
    pairs = query_key.make_pairs(held_out, config.eval, config.data)
    mesh = sharding.make_mesh(config.mesh)
    run = build.build(config, mesh, windows.manifest["vocab_size"])
    state, rows = run.init(), sharding.rows_of_process(batch, mesh)
    stream = pipeline.batches(windows, config.data, config.seed, rows)
    for _ in range(config.steps):
        state, metrics, _ = run.train_step(state, sharding.to_global(next(stream), rows, batch, mesh))
    jax.block_until_ready(metrics)
    return query_key.evaluate(functools.partial(run.encode, state.params), pairs, config.eval.batch_size)["mean"]


def plot(batches: list[int], scores: list[dict[str, float]]) -> None:
    """Writes the figure."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label in (("mrr", "MRR"), ("top1", "top-1")):
        axis.plot(batches, [100 * score[name] for score in scores], marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [f"{b:,}" for b in batches])
    axis.set_xlabel("pairs in a batch")
    axis.set_ylabel("query-key test, %")
    axis.set_title(f"{RECIPE.value}, {STEPS.value} steps")
    axis.legend()
    figure.savefig(OUT.value, dpi=150)


def main(argv: list[str]) -> None:
    """Prints a line a batch."""
    del argv
    logging.set_verbosity(logging.WARNING)
    batches, scores = [int(b) for b in BATCHES.value], []
    print(f"{RECIPE.value}, {STEPS.value} steps\n{'batch':>7}{'top-1':>8}{'top-5':>8}{'MRR':>8}{'seconds':>9}")
    for batch in batches:
        begin = time.perf_counter()
        score = train(batch)
        scores.append(score)
        shown = "".join(f"{100 * score[name]:>8.1f}" for name in ("top1", "top5", "mrr"))
        print(f"{batch:>7}{shown}{time.perf_counter() - begin:>9.0f}", flush=True)
    plot(batches, scores)
    rising = np.diff([score["mrr"] for score in scores]) > 0
    print(f"MRR rises with {rising.sum()} of {len(rising)} doublings; plot: {OUT.value}")


if __name__ == "__main__":
    app.run(main)
