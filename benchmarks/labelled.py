"""Trains the objectives of pairs with two classes from one run, and compares their held-out accuracy after each epoch.

  python -m benchmarks.labelled --data=BOOLQ --start=RUN --output=build/labelled

BOOLQ is prepared by `prepare --pairs=boolq/train.jsonl --validation=boolq/dev.jsonl --text_field=hypothesis,premise
--label_field=label --labels=False,True --tokenizer=RUN`. A softmax head has its own accuracy; of a cosine it is that of the
threshold, among 1,001 quantiles, which is best on the training pairs. Writes OUTPUT/labelled.md. Each row takes 4 minutes on
one core of a busy machine.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict

from benchmarks import common
from contrastive_jax.data import prepared
from contrastive_jax.evals.labels import LabelledPairs
from contrastive_jax.training import build, loop

DATA = flags.DEFINE_string("data", None, "Prepared pairs with the classes 0 and 1.", required=True)
START = flags.DEFINE_string("start", "", "The run to start from; empty: from nothing.")
OUTPUT = flags.DEFINE_string("output", "build/labelled", "Folder of the runs and of the table.")
EPOCHS = flags.DEFINE_integer("epochs", 5, "Epochs of each run.")
LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a row; texts are cut there.")
RATE = flags.DEFINE_float("rate", 2e-3, "Learning rate of all parameters.")
SEED = flags.DEFINE_integer("seed", 1000, "Of each run.")
ROWS = flags.DEFINE_list("rows", [], "The rows to run; empty: all.")

CLASSES = {"labels.classes": (2,)}
# Name → variant of configs/labelled.py, and what is laid over it.
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", CLASSES),
    "softmax product": ("softmax", CLASSES | {"labels.product": True}),
    "softmax dropout 0.3": ("softmax", CLASSES | {"model.dropout": 0.3}),
    "rdrop": ("rdrop", CLASSES | {"model.dropout": 0.3}),
    "cosent": ("cosent", {}),
    "cosine": ("cosine", {"labels.scale": 1.0}),
}


def config_of(name: str, epoch: int) -> ConfigDict:
    """Returns the config of a row, for data of so many steps an epoch."""
    variant, changes = SYSTEMS[name]
    config = common.load_recipe(f"labelled:{variant}")
    config.update(init_from=START.value, seed=SEED.value, steps=EPOCHS.value * epoch, eval_every=epoch, checkpoint_every=0)
    config.data.update(dir=DATA.value, length=LENGTH.value, max_span=LENGTH.value - 2)
    config.optim.update(learning_rate=RATE.value, warmup_steps=config.steps // 10, learning_rate_rules=((r".*", 1.0),))
    config.update_from_flattened_dict(changes)
    return config


def accuracies(config: ConfigDict, run: build.Run) -> loop.Evaluate:
    """Makes the evaluation of a run: the accuracy of the training and of the held-out pairs, without dropout."""
    splits = {split: LabelledPairs(config, run, split) for split in ("train", "validation")}

    def evaluate(params: Any, step: int) -> dict[str, float]:
        with jax.transfer_guard("allow"):
            if config.objective.name == "softmax":
                found = {split: pairs.score(params)["accuracy"] for split, pairs in splits.items()}
            else:
                embedded = {split: pairs.embed(params["encoder"]) for split, pairs in splits.items()}
                cosines = {split: ((z[:, 0] * z[:, 1]).sum(-1), label == 1) for split, (z, label) in embedded.items()}
                t = common.threshold(*cosines["train"])
                found = {split: float(((cosine > t) == positive).mean()) for split, (cosine, positive) in cosines.items()}
        return {f"labels/{split}/accuracy": value for split, value in found.items()}

    return evaluate


def run(name: str, epoch: int) -> list[dict[str, float]]:
    """Trains a row, or goes on with it; returns the line of metrics.jsonl of each epoch."""
    workdir = epath.Path(OUTPUT.value) / name
    setup = loop.set_up(config_of(name, epoch), workdir, make_evaluate=accuracies)
    loop.train(setup, setup.config.steps)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] and "labels/validation/accuracy" in line]


def main(argv: list[str]) -> None:
    """Runs all rows and prints the table."""
    del argv
    logging.set_verbosity(logging.ERROR)
    pathlib.Path(OUTPUT.value).mkdir(parents=True, exist_ok=True)
    epoch = max(len(prepared.open_split(DATA.value, "train")) // 64, 1)
    held_out = prepared.open_split(DATA.value, "validation")
    label = held_out.read_records(np.arange(len(held_out))).label
    lines = [
        f"| objective | held-out accuracy after each of {EPOCHS.value} epochs | training pairs, at the end |",
        "|---|---|---|",
        f"| majority class | {100 * max(label.mean(), 1 - label.mean()):.1f} | |",
    ]
    print(*lines, sep="\n", flush=True)
    for name in ROWS.value or SYSTEMS:
        scores = run(name, epoch)
        shown = ", ".join(f"{100 * line['labels/validation/accuracy']:.1f}" for line in scores)
        lines.append(f"| {name} | {shown} | {100 * scores[-1]['labels/train/accuracy']:.1f} |")
        print(lines[-1], flush=True)
    (pathlib.Path(OUTPUT.value) / "labelled.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
