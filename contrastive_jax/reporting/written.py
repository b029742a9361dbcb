"""What training and evaluate wrote, read again: results with their protocols, and the curves of metrics.jsonl."""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging
from etils import epath

from contrastive_jax import results
from contrastive_jax.results import Result

Curves = dict[str, tuple[list[int], list[float]]]  # metric → (steps, values)


class Run(NamedTuple):
    """A workdir."""

    label: str
    path: epath.Path
    curves: Curves


def read_curves(path: epath.Path) -> Curves:
    """The numbers of a metrics.jsonl by name; {} where there is none.

    Raises:
      ValueError: a line is no object with a step; the message names it.
    """
    curves: Curves = {}
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            continue  # a run is writing it, or was killed there
        try:
            found = json.loads(line)
            step = int(found.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: not an object with step") from error
        for name, value in found.items():
            if isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value if math.isfinite(value) else math.nan)
    return curves


def read(names: Sequence[str]) -> tuple[list[Run], list[Result]]:
    """The runs among the arguments, and all results, each called by the end of its path that no other has.

    Raises:
      ValueError: an argument is neither; the message names it.
    """
    if not names:
        raise ValueError("nothing to report: give workdirs of runs, or .json that evaluate wrote")
    paths = list(dict.fromkeys(epath.Path(name).expanduser().resolve() for name in names))
    ends = [path.name if [other.name for other in paths].count(path.name) == 1 else str(path) for path in paths]
    runs, found = [], []
    for path, label in zip(paths, ends, strict=True):
        if not path.is_dir():
            found.append(results.read(path, label))
            continue
        if not (path / "config.json").exists():
            raise ValueError(f"{path}: no config.json there; give the workdir of a training run")
        runs.append(Run(label, path, read_curves(path / "metrics.jsonl")))
        written = [file for file in sorted(path.glob("*.json")) if '"protocol_hash"' in file.read_text()]
        # A task on several data has several files.
        found += [results.read(file, label if len(written) == 1 else f"{label}, {file.stem}") for file in written]
        logging.info("%s: %d curves, %d results", path, len(runs[-1].curves), len(written))
    return runs, found
