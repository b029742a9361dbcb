"""Evaluation during training, every `eval_every` steps: the query-key test and the tasks of `config.eval.tasks`.

A run that learns labels is also scored on those of its held-out pairs: labels/validation/accuracy, or /label_correlation.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.data import prepared, tokenizer
from contrastive_jax.evals import query_key
from contrastive_jax.evals.labels import LabelledPairs
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.task import Options, Task
from contrastive_jax.inference import forward as forward_lib
from contrastive_jax.inference import text_model
from contrastive_jax.objectives import labels
from contrastive_jax.training.build import Run

Scores = dict[str, float]  # TASK/ROW/MEASURE → fraction: "query_key/mean/top5", "sts-stsb/test/spearman"
OPTIONS = Options()


class Evaluator:
    """Scores the parameters of a run; called with (params, step), it returns {TASK/ROW/MEASURE: fraction}.

    Data are opened once. A task of `config.eval.tasks` is named TASK-FOLDER in the scores.

    Raises:
      UserError: the held-out data do not fit, or a task or its data are missing.
    """

    def __init__(self, config: ConfigDict, run: Run):
        self._config = config
        self._model = text_model.TextModel(
            name=config.data.dir,
            model_config=config.model,
            encoder=run.encoder,
            params=None,  # each evaluation brings its own
            forward_with=forward_lib.make_forward(run.encoder.apply, run.mesh),
            tokenize_views=text_model.make_run_tokenize(
                config,
                functools.partial(tokenizer.load, prepared.folders(config.data.dir)[0]),
                prompts=prepared.prompts_of(prepared.load_manifest(config.data.dir)),
            ),
            config=config,
        )
        tasks = {"query_key": (query_key.TASK, "")} | parse_tasks(config.eval.tasks)
        if prepared.load_manifest(config.data.dir).get("fields") == 1:
            del tasks["query_key"]  # a single text, which has a class, has no other to be found by
        self._labels = LabelledPairs(config, run) if labels.learns_labels(config) else None
        check_keep_best(config, [*tasks, *["labels"] * bool(self._labels)])
        self._tasks = {name: (task, self._open(task, data)) for name, (task, data) in tasks.items()}

    def _open(self, task: Task, data: str) -> Any:
        """Opens the data of a task; an error names the config key."""
        try:
            return task.open_data(self._model, data, OPTIONS)
        except UserError as error:
            if not data:
                raise  # of the run's own data: the message names their key
            raise UserError(f"config.eval.tasks={self._config.eval.tasks}: {error}") from error

    def _rows(self, model: text_model.TextModel, params: Any) -> Iterator[tuple[str, Rows]]:
        """Yields the name and the rows of each task."""
        for name, (task, data) in self._tasks.items():
            yield name, task.score(model, data, OPTIONS)
        if self._labels:
            yield "labels", {"validation": self._labels.score(params)}

    def __call__(self, params: Any, step: int) -> Scores:
        """Scores the parameters at a step; every process must call it."""
        model = dataclasses.replace(self._model, params=params["encoder"], step=step)
        scores: Scores = {}
        with jax.transfer_guard("allow"):  # tasks copy between host and devices as they like: this is not a step
            for name, rows in self._rows(model, params):
                for row, measures in rows.items():
                    scores |= {f"{name}/{row}/{measure}": value for measure, value in measures.items()}
                    shown = "  ".join(f"{measure} {100 * value:.1f}" for measure, value in measures.items())
                    logging.info("step %d  %s %s  %s", step, name, row, shown)
        best = self._config.keep_best
        if best and best not in scores:
            raise UserError(f"config.keep_best={best}: no such score; there are {', '.join(scores)}")
        return scores


def parse_tasks(text: str) -> dict[str, tuple[Task, str]]:
    """Parses config.eval.tasks, "sts=DIR,retrieval=DIR", to tasks with their data, by name: "sts-DIR".

    Raises:
      UserError: there is no such task, or it cannot run in training.
    """
    if not text:
        return {}
    from contrastive_jax.evals.tasks import TASKS  # scikit-learn and others take seconds to import

    named = {}
    for part in filter(None, text.split(",")):
        name, _, data = part.partition("=")
        if name not in TASKS or not TASKS[name].in_training:
            names = ", ".join(task.name for task in TASKS.values() if task.in_training)
            raise UserError(f"config.eval.tasks={text}: no task {name!r} in training; give TASK=DATA of {names}")
        if not data:
            raise UserError(f"config.eval.tasks={text}: give the data of {name}, {name}=DATA")
        key = f"{name}-{data.rstrip('/').rpartition('/')[2]}"
        if key in named:
            raise UserError(f"config.eval.tasks={text}: two tasks would be called {key}; name their last folders differently")
        named[key] = TASKS[name], data
    return named


def check_keep_best(config: ConfigDict, names: Collection[str]) -> None:
    """Checks that `config.keep_best` can be a score of this run, and is known wherever a checkpoint is saved.

    Raises:
      UserError: it is not; the message names the key.
    """
    best = config.keep_best
    if not best:
        return
    if best.partition("/")[0] not in names:
        raise UserError(f"config.keep_best={best}: no such score; they begin with {', '.join(names)}")
    if best.count("/") < 2:
        raise UserError(f"config.keep_best={best}: a score is TASK/ROW/MEASURE, for example query_key/mean/top5")
    if config.checkpoint_every and config.checkpoint_every % config.eval_every:
        raise UserError(
            f"config.checkpoint_every={config.checkpoint_every} must be a multiple of config.eval_every={config.eval_every}: "
            "config.keep_best needs a score of each checkpoint"
        )
