"""Scores a model on tasks, with the baselines asked for, and prints and writes the results."""

import json
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.evals import results
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.task import Options, Task
from contrastive_jax.evals.tasks import TASKS
from contrastive_jax.files import transfer
from contrastive_jax.inference import text_model
from contrastive_jax.inference.text_model import TextModel
from contrastive_jax.runtime import processes
from contrastive_jax.runtime.model_name import parse_model_name

DEFAULTS = Options()


def assign_data(names: Sequence[str], data: Sequence[str]) -> list[tuple[Task, str]]:
    """Returns each task with its data: one folder per task, one folder for all, or none ("").

    Raises:
      UserError: there is no such task, or the numbers of tasks and folders differ.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks={name}: choose one of {', '.join(TASKS)}")
    if len(data) not in (0, 1, len(names)):
        raise UserError(f"--data names {len(data)} folders, --tasks {len(names)} tasks; give one per task, or one")
    folders = list(data) if len(data) == len(names) else [*data, ""][:1] * len(names)
    return [(TASKS[name], folder) for name, folder in zip(names, folders, strict=True)]


def score_task(
    model: TextModel, task: Task, data: str, options: Options, with_baselines: bool = False
) -> tuple[Rows, dict[str, Any]]:
    """Scores a model by a task.

    Returns:
      Its rows, those of baselines named "BASELINE: ROW", and the protocol that decided them.

    Raises:
      UserError: the data are not as they should be.
    """
    opened = task.open_data(model, data, options)
    model.truncation.reset()
    rows = dict(task.score(model, opened, options))
    protocol = model.protocol() | task.protocol(model, opened, options)
    if model.truncation.texts:
        protocol["truncated"] = model.truncation.share
    for name, score in task.baselines.items() if with_baselines else ():
        logging.info("%s: %s", task.name, name)
        rows |= {f"{name}: {row}": measures for row, measures in score(model, opened, options).items()}
    return rows, protocol


def result_path(model: str, task: str, data: str) -> epath.Path | None:
    """Returns where a result goes by default: WORKDIR/TASK-DATA.json, and nowhere for a model that is not a run."""
    folder, is_run, _ = parse_model_name(model)
    name = f"{task}-{epath.Path(data).name.replace(':', '-')}" if data else task
    return folder / f"{name}.json" if is_run and (folder / "checkpoints").is_dir() else None


def evaluate_model(
    name: str,
    tasks: Sequence[str],
    data: Sequence[str] = (),
    options: Options = DEFAULTS,
    with_baselines: bool = False,
    output: str | None = None,
    max_tokens: int | None = None,
    precision: str | None = None,
) -> None:
    """Scores a model on tasks and prints a table for each; writes each result as JSON. Every process must call it.

    Args:
      name: the model, as `text_model.load` takes it: a workdir, an exported folder, hf:FOLDER, ...
      tasks: names in TASKS.
      data: one folder per task, one folder for all tasks, or none.
      options: the settings of single tasks.
      with_baselines: whether to score the baselines of each task on the same data.
      output: the file for the result, of a single task; None: `result_path` decides, and only results of runs are written.
      max_tokens: the longest text in tokens; None: as long as the model says.
      precision: see `text_model.load`.

    Raises:
      UserError: a task is unknown, an argument does not fit the others, or the model or the data cannot be read.
    """
    assigned = assign_data(tasks, data)
    if output and len(tasks) > 1:
        raise UserError(f"--output={output}: one file holds one task; give one of --tasks={','.join(tasks)}")
    if precision == "int8" and any(task.name == "glue" for task, _ in assigned):
        raise UserError("--precision=int8: glue trains, and int8 products have no gradient; take another precision")
    target = files.absolute(output) if output else None
    first = jax.process_index() == 0  # of several processes all score, and the first one prints and writes
    if target and first:
        transfer.check_output(target)
    if jax.process_count() > 1:
        options = options._replace(cache=None)  # each process would find other vectors in its own
    model = text_model.load(name, max_tokens, precision)
    for task, folder in assigned:
        rows, protocol = score_task(model, task, folder, options, with_baselines)
        processes.check_agreement(**{f"protocol of {task.name}": json.dumps(protocol)})
        if not first:
            continue
        print(results.format_table(f"{' '.join(filter(None, [task.name, folder]))}, × 100", rows))
        if path := target or result_path(name, task.name, folder):
            results.write_result(path, task.name, rows, protocol)
            logging.info("written to %s", path)


def compare_files(paths: Sequence[str], any_protocol: bool) -> str:
    """Returns tables of results side by side.

    Raises:
      UserError: a file is not a result, or two were measured differently (without `any_protocol`).
    """
    return results.compare_results([results.read_result(epath.Path(path), path) for path in paths], any_protocol)
