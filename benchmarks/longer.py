"""Measures whether sentence similarity falls while search still rises in a longer training (CPT-text, figure 4).

  python -m benchmarks.longer --data=DIR --output=build/longer --tasks=sts=STSB

CPT-text (https://arxiv.org/abs/2201.10005) saw STS fall and search rise with more training. Trains one bag of embeddings,
scores it every --every steps, and writes OUTPUT/longer.md and longer.png. An interrupted run goes on at its last checkpoint.
The default takes 3 minutes on one core.
"""

import pathlib

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags, logging

from benchmarks import common

DATA = flags.DEFINE_string("data", None, "Prepared dataset.", required=True)
OUTPUT = flags.DEFINE_string("output", "build/longer", "Folder of the run, the table and the plot.")
TASKS = flags.DEFINE_string("tasks", None, "Tasks to score, as in config.eval.tasks: sts=DIR,probe=DIR.", required=True)
STEPS = flags.DEFINE_integer("steps", 3000, "Steps of the run.")
EVERY = flags.DEFINE_integer("every", 300, "Steps between two evaluations.")
PAIRS = flags.DEFINE_integer("pairs", 1000, "Pairs of the query-key test.")


def main(argv: list[str]) -> None:
    """Trains, then writes the table and the plot and says where each score was best."""
    del argv
    logging.set_verbosity(logging.ERROR)
    folder = pathlib.Path(OUTPUT.value)
    budget = {"data.dir": DATA.value, "eval.tasks": TASKS.value, "eval.pairs": PAIRS.value, "steps": STEPS.value}
    every = {"eval_every": EVERY.value, "checkpoint_every": EVERY.value}
    lines = [line for line in common.train_bag(budget | every, folder / "run") if "query_key/mean/top5" in line]
    steps, titles = [line["step"] for line in lines], common.columns(lines)
    text = common.table(
        ["steps", *titles.values()],
        [[f"{line['step']:,}", *(f"{100 * line[name]:.1f}" for name in titles)] for line in lines],
    )
    (folder / "longer.md").write_text(text)
    plt.switch_backend("Agg")  # needs no display
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, title in titles.items():
        axis.plot(steps, [100 * line[name] for line in lines], marker="o", label=title)
    axis.set(xlabel="steps", ylabel="%")
    axis.legend()
    figure.savefig(folder / "longer.png", dpi=150)
    print(text)
    for name, title in titles.items():
        scores = [100 * line[name] for line in lines]
        best = int(np.argmax(scores))
        print(f"{title}: best {scores[best]:.1f} at step {steps[best]:,}, {scores[-1]:.1f} at the end")


if __name__ == "__main__":
    app.run(main)
