"""Trains small encoders on the same data for the same minutes, and draws their query-key top-1 against minutes.

  GLIBC_TUNABLES=... python -m benchmarks.small_encoders --data=DIR --minutes=3       with the value that launch/local.sh sets
  GLIBC_TUNABLES=... python -m benchmarks.small_encoders --data=DIR --recipe=pile_small --minutes=120 --evaluations=12

Candidates of `local` change one thing in the recipe each, those of `pile_small` are encoders with layers and without. The steps
of a candidate, and so its schedule, are as many as the minutes hold by a short run before it: only the time of steps counts,
neither compilation nor evaluation. Writes OUTPUT/small_encoders.md and .png; a candidate that is done is not run again. It also
takes two starts with compilation, and the evaluations.
"""

import json
import pathlib
import shutil
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags, logging

import contrastive_jax
from benchmarks import common
from configs import pile_small

DATA = flags.DEFINE_string("data", None, "Prepared dataset.", required=True)
OUTPUT = flags.DEFINE_string("output", "build/small_encoders", "Folder of the runs, the table and the plot.")
MINUTES = flags.DEFINE_float("minutes", 3.0, "Minutes of steps per candidate and seed.")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of each candidate.")
ONLY = flags.DEFINE_list("only", None, "Candidates to run; by default all.")
TASKS = flags.DEFINE_string("tasks", "", "Further tasks to score, as in config.eval.tasks: sts=DIR,probe=DIR.")
PAIRS = flags.DEFINE_integer("pairs", 1000, "Pairs of the query-key test.")
EVALUATIONS = flags.DEFINE_integer("evaluations", 5, "Points of a curve, after that of the start.")
PROBE_STEPS = 12

# It has no states that should fit the cache: it is faster with the whole batch at once.
BAG = {
    "model.num_layers": 0,
    "model.position": "none",
    "model.final_norm": False,
    "model.token_weights": False,
    "micro_batch": 0,
}
LOCAL: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "bag": BAG,
    "bag, spans of one length": BAG | {"data.min_span": 62},
    "all tokens count alike": {"model.token_weights": False},
    "no final norm": {"model.final_norm": False},
    "two heads": {"model.num_heads": 2},
    "whole heads": {"model.num_heads": 4, "model.num_kv_heads": 4, "model.head_dim": 64},
    "wide feed-forward": {"model.d_ff": 512},
    "two layers": {"model.num_layers": 2},
    "convolution": {"model.mixer": "conv", "model.local_window": 2, "model.position": "none", "model.mlp": "none"},
    "branches begin random": {"model.zero_init_branches": False},
    "layers at the full rate": {"optim.learning_rate_rules": (("token_weight", 5.0), (".*", 1.0))},
    "negatives of one side": {"objective.pairing": "first"},
    "half the batch": {"data.batch_size": 256},
    "twice the batch": {"data.batch_size": 1024},
    "no dropout": {"model.dropout": 0.0},
    "more dropout": {"model.dropout": 0.2},
    "spans of one length": {"data.min_span": 62},
    "the whole batch at once": {"micro_batch": 0},
    "products in float32": {"model.products": "float32"},
}
NGRAMS = pile_small.VARIANTS["ngrams"]
# What a block is in `local`, and a rate at which it does not learn the training spans by heart.
SMALL_BLOCK: dict[str, Any] = {
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.head_dim": 32,
    "model.d_ff": 64,
}
SMALL_BLOCK |= {"model.zero_init_branches": True, "model.token_weights": True, "model.products": "bfloat16"}
SMALL_BLOCK |= {"optim.learning_rate_rules": (("token_weight", 5.0), ("ngrams", 0.3), ("blocks", 0.1), (".*", 1.0))}
CONVOLUTION = SMALL_BLOCK | {"model.mixer": "conv", "model.local_window": 2, "model.mlp": "none"}
PILE_SMALL: dict[str, dict[str, Any]] = {
    "bag": {},
    "n-grams": NGRAMS,
    "convolution over n-grams": NGRAMS | CONVOLUTION,
    "convolution": CONVOLUTION,
    "Transformer block": SMALL_BLOCK | {"model.position": "rotary", "model.final_norm": True, "micro_batch": 16},
}
# Recipe → candidate → what it changes in the recipe.
CANDIDATES = {"local": LOCAL, "pile_small": PILE_SMALL}
RECIPE = flags.DEFINE_enum("recipe", "local", list(CANDIDATES), "The recipe of configs/ whose candidates run.")


def train(changes: dict[str, Any], seed: int, steps: int, workdir: pathlib.Path, evaluate: bool) -> list[dict[str, Any]]:
    """Trains so many steps of the recipe with {key: value} laid over it; returns the lines of its metrics.jsonl."""
    config = common.load_recipe(RECIPE.value)
    config.update_from_flattened_dict(changes)
    every = max(steps // EVALUATIONS.value, 1)
    config.update(seed=seed, steps=steps, eval_every=every if evaluate else 0, checkpoint_every=0)
    config.log_every = max(every // 4, 1) if evaluate else PROBE_STEPS // 2
    config.data.dir, config.eval.tasks, config.eval.pairs = DATA.value, TASKS.value, PAIRS.value
    config.optim.warmup_steps = min(steps // 10, config.optim.warmup_steps)
    contrastive_jax.train(config, workdir)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def run(changes: dict[str, Any], seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a candidate for the minutes; returns its curve [minutes, top-1], its minutes, pairs and last scores."""
    shutil.rmtree(workdir, ignore_errors=True)  # a run that was interrupted
    probe = train(changes, seed, PROBE_STEPS, workdir / "probe", evaluate=False)
    seconds = probe[-1]["step_seconds"] / (PROBE_STEPS - 1)  # the first step compiles, and does not count
    lines = train(changes, seed, max(int(60 * MINUTES.value / seconds), EVALUATIONS.value), workdir / "run", evaluate=True)
    minutes, curve = 0.0, []
    scores: dict[str, float] = {}
    for line in lines:
        minutes = line.get("step_seconds", 60 * minutes) / 60
        if "query_key/mean/top1" in line:
            curve.append([minutes, 100 * line["query_key/mean/top1"]])
            scores |= {name: value for name, value in line.items() if "/" in name}
    batch_size = changes.get("data.batch_size", common.load_recipe(RECIPE.value).data.batch_size)
    return scores | {"curve": curve, "minutes": minutes, "pairs": batch_size * lines[-1]["step"]}


def write_report(results: dict[str, dict[str, Any]], folder: pathlib.Path) -> str:
    """Writes the plot and the table of all runs, {"candidate, seed": result}; returns the table."""
    titles = common.columns(results.values())
    rows: list[list[str]] = []
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for name in CANDIDATES[RECIPE.value]:
        runs = [result for key, result in results.items() if key.rpartition(", seed ")[0] == name]
        if not runs:
            continue
        for number, result in enumerate(runs):
            color = f"C{len(rows) % 10}"
            style = "-" if len(rows) < 10 else "--"  # the colours repeat
            axis.plot(*zip(*result["curve"], strict=True), style, color=color, label=name if number == 0 else None)
        figures = [f"{np.mean([100 * result[title] for result in runs]):.1f}" for title in titles]
        top1 = [100 * result["query_key/mean/top1"] for result in runs]
        millions = np.mean([result["pairs"] for result in runs]) / 1e6
        minutes = np.mean([result["minutes"] for result in runs])
        rows.append([name, str(len(runs)), f"{minutes:.1f}", f"{millions:.2f}", *figures, f"{max(top1) - min(top1):.1f}"])
    header = ["candidate", "seeds", "minutes", "million pairs", *titles.values(), "spread of top-1"]
    text = common.table(header, rows)
    (folder / "small_encoders.md").write_text(text)
    axis.set(xlabel="minutes of steps", ylabel="query-key top-1, %")
    axis.legend(fontsize="small")
    figure.savefig(folder / "small_encoders.png", dpi=150)
    plt.close(figure)
    return text


def main(argv: list[str]) -> None:
    """Runs the candidates that are not done yet, and reports all."""
    del argv
    candidates = CANDIDATES[RECIPE.value]
    unknown = [name for name in ONLY.value or [] if name not in candidates]
    if unknown:
        raise app.UsageError(f"--only={unknown[0]}: choose from {', '.join(candidates)}")
    logging.set_verbosity(logging.ERROR)
    plt.switch_backend("Agg")  # needs no display
    folder = pathlib.Path(OUTPUT.value)
    protocol = {"data": DATA.value, "recipe": RECIPE.value, "minutes": MINUTES.value}
    protocol |= {"tasks": TASKS.value, "pairs": PAIRS.value, "evaluations": EVALUATIONS.value}
    stored = common.open_results(folder / "results.json", protocol)
    for seed in SEEDS.value:
        for name in ONLY.value or candidates:
            key = f"{name}, seed {seed}"
            if key not in stored["rows"]:
                result = run(candidates[name], int(seed), folder / "runs" / key.replace(" ", "-"))
                stored["rows"][key] = result
                (folder / "results.json").write_text(json.dumps(stored, indent=1))
                top1 = result["query_key/mean/top1"]
                print(f"{key}: top-1 {100 * top1:.1f} % after {result['minutes']:.1f} minutes", flush=True)
    print(write_report(stored["rows"], folder), end="")


if __name__ == "__main__":
    app.run(main)
