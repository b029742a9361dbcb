"""Reads what a report is made of: the curves of training runs, and the results that `evaluate` wrote."""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.evals import results as results_lib
from contrastive_jax.evals.results import Result

Curves = dict[str, tuple[list[int], list[float]]]  # metric → (steps, values)


class TrainingRun(NamedTuple):
    """A run on the page.

    Attributes:
      label: the name under which the page shows it.
      workdir: its folder.
      curves: the metrics that it logged.
    """

    label: str
    workdir: epath.Path
    curves: Curves


def metric_name(name: str) -> str:
    """Returns today's name of a logged metric: "query_key/top1", as older runs have it, is "query_key/mean/top1"."""
    task, _, measure = name.partition("/")
    return f"{task}/mean/{measure}" if task == "query_key" and "/" not in measure else name


def read_curves(path: epath.Path) -> Curves:
    """Returns the numbers in a metrics.jsonl by metric; {} if there is no such file.

    A value that is not finite becomes NaN. A last line without its end is skipped: the run is still writing it, or was killed.

    Raises:
      UserError: a line is not a JSON object with a step; the message names the line.
    """
    curves: Curves = {}
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            continue
        try:
            metrics = json.loads(line)
            step = int(metrics.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}:{number}: not a JSON object with a step; delete the line") from error
        for name, value in metrics.items():
            if isinstance(value, int | float):
                steps, values = curves.setdefault(metric_name(name), ([], []))
                steps.append(step)
                values.append(value if math.isfinite(value) else math.nan)
    return curves


def read_inputs(names: Sequence[str]) -> tuple[list[TrainingRun], list[Result]]:
    """Reads the arguments of a report.

    Args:
      names: workdirs of runs, and .json files that `evaluate` wrote. Each is labelled by the last part of its path, or by the
        whole path where two end alike.

    Returns:
      The runs, and all results: those given, and those found in the workdirs.

    Raises:
      UserError: there are no names, or one is neither a run nor a result; the message names it.
    """
    if not names:
        raise UserError("nothing to report: give workdirs of runs, or .json files that evaluate wrote")
    paths = list(dict.fromkeys(files.absolute(name) for name in names))
    last_parts = [path.name for path in paths]
    runs, results = [], []
    for path in paths:
        label = path.name if last_parts.count(path.name) == 1 else str(path)
        if not path.is_dir():
            results.append(results_lib.read_result(path, label))
            continue
        if not (path / "config.json").exists():
            raise UserError(f"{path}: no config.json there; give the workdir of a training run")
        runs.append(TrainingRun(label, path, read_curves(path / "metrics.jsonl")))
        found = [file for file in sorted(path.glob("*.json")) if '"protocol_hash"' in file.read_text()]
        for file in found:  # one per task, and per dataset of a task
            results.append(results_lib.read_result(file, label if len(found) == 1 else f"{label}, {file.stem}"))
        logging.info("%s: %d curves, %d results", path, len(runs[-1].curves), len(found))
    return runs, results
