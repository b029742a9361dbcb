"""Measures transfer against the information that the two views of a pair share, as they move apart (InfoMin's curve).

  python -m benchmarks.views --data=DIR --output=build/views --tasks=sts=STSB,probe=TREC

Tian et al. (https://arxiv.org/abs/2005.10243) found a reverse U: views that share too much or too little give worse features.
Trains one bag of embeddings per distance of --distances, in tokens between spans of 62; "copies" are views of the same span.
I_NCE = log K - loss is the mean of the last tenth of the training, in nats, and at most log K = 5.5 with 256 pairs. Records too
short for a distance are left out of its data. A distance that is done is kept in OUTPUT/results.json. Writes views.md and
views.png. A distance takes 1 to 3 minutes on one core.
"""

import json
import pathlib
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags, logging

from benchmarks import common

DATA = flags.DEFINE_string("data", None, "Prepared dataset.", required=True)
OUTPUT = flags.DEFINE_string("output", "build/views", "Folder of the runs, the results, the table and the plot.")
TASKS = flags.DEFINE_string("tasks", "", "More tasks to score, as in config.eval.tasks: sts=DIR,probe=DIR.")
DISTANCES = flags.DEFINE_list("distances", ["copies", "0", "62", "124", "248", "496"], "Tokens between views, or copies.")
STEPS = flags.DEFINE_integer("steps", 300, "Steps of each run.")
PAIRS = flags.DEFINE_integer("pairs", 1000, "Pairs of the query-key test, which are neighbours at every distance.")
INFORMATION = "mutual_information"


def run(distance: str) -> dict[str, float]:
    """Trains and scores a bag whose views are so far apart; returns its scores and I_NCE."""
    copies = {"data.sampler": "span", "data.copies": 2}
    views = copies if distance == "copies" else {"data.min_gap": int(distance), "data.max_gap": int(distance)}
    budget = {"data.dir": DATA.value, "eval.tasks": TASKS.value, "eval.pairs": PAIRS.value, "steps": STEPS.value}
    every = {"log_every": max(STEPS.value // 50, 1), "eval_every": STEPS.value}
    lines = common.train_bag(budget | every | views, pathlib.Path(OUTPUT.value) / distance)
    last = [line[INFORMATION] for line in lines if INFORMATION in line and line["step"] > 0.9 * STEPS.value]
    return {name: value for name, value in lines[-1].items() if "/" in name} | {INFORMATION: float(np.mean(last))}


def plot(rows: Mapping[str, Mapping[str, float]], titles: Mapping[str, str], path: pathlib.Path) -> None:
    """Writes the plot of each score against I_NCE, a point per distance."""
    plt.switch_backend("Agg")  # needs no display
    figure, axes = plt.subplots(1, len(titles), figsize=(4 * len(titles), 3.5), layout="constrained", squeeze=False)
    order = sorted(rows, key=lambda distance: rows[distance][INFORMATION])
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        points = [(rows[distance][INFORMATION], 100 * rows[distance][name]) for distance in order]
        axis.plot(*zip(*points, strict=True), marker="o")
        for distance, point in zip(order, points, strict=True):
            axis.annotate(distance, point, textcoords="offset points", xytext=(4, 4))
        axis.set(xlabel="I_NCE, nats", ylabel=f"{title}, %")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def shape(rows: Mapping[str, Mapping[str, float]], name: str) -> str:
    """Says where a score is best, in the order of I_NCE: at an end, or between the ends as in a reverse U."""
    order = sorted(rows, key=lambda distance: rows[distance][INFORMATION])
    best = max(order, key=lambda distance: rows[distance][name])
    place = {order[0]: "the least information", order[-1]: "the most information"}.get(best, "a point between: a reverse U")
    return f"best at {best}, {place}"


def main(argv: list[str]) -> None:
    """Runs what has not run yet, then writes the table and the plot and says which shape each curve has."""
    del argv
    logging.set_verbosity(logging.ERROR)
    folder = pathlib.Path(OUTPUT.value)
    kept = folder / "results.json"
    stored = common.open_results(kept, {"data": DATA.value, "steps": STEPS.value, "pairs": PAIRS.value, "tasks": TASKS.value})
    for distance in DISTANCES.value:
        if distance not in stored["rows"]:
            stored["rows"][distance] = run(distance)
            kept.write_text(json.dumps(stored, indent=1))
    rows = {distance: stored["rows"][distance] for distance in DISTANCES.value}
    titles = common.columns(rows.values())
    cells = [[d, f"{row[INFORMATION]:.2f}", *(f"{100 * row[name]:.1f}" for name in titles)] for d, row in rows.items()]
    text = common.table(["distance", "I_NCE, nats", *titles.values()], cells)
    (folder / "views.md").write_text(text)
    plot(rows, titles, folder / "views.png")
    print(text, *(f"{title}: {shape(rows, name)}" for name, title in titles.items()), sep="\n")


if __name__ == "__main__":
    app.run(main)
