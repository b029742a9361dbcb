"""The evaluations of a training run, every `eval_every` steps: the query-key test and the tasks of `config.eval.tasks`."""

import functools
from collections.abc import Collection
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from contrastive_jax import cli, text_model
from contrastive_jax.build import Run
from contrastive_jax.data import pipeline, tokenizer
from contrastive_jax.evals import query_key

Scores = dict[str, float]  # "query_key/top5", "sts-stsb/test/spearman" → fraction


class Evaluator:
    """What a run is scored by, opened once.

    Raises:
      ValueError: the held-out data do not fit, or a task or its data is not there.
    """

    def __init__(self, config: ConfigDict, run: Run):
        self._config, self._run = config, run
        self._pairs = query_key.make_pairs(pipeline.open_split(config.data.dir, "validation"), config.eval, config.data)
        self._tasks = parse_tasks(config.eval.tasks)
        self._tokenize = text_model.tokenizes(config, lambda: tokenizer.load(config.data.dir))
        check_best(config, self._tasks)

    def scores(self, params: Any, step: int) -> Scores:
        """Scores the parameters; every process must call it."""
        forward = functools.partial(self._run.encode, params)
        found = query_key.evaluate(forward, self._pairs, self._config.eval.batch_size)["mean"]
        scores = {f"query_key/{name}": value for name, value in found.items()}
        logging.info("step %d  query-key %s", step, "  ".join(f"{name} {100 * value:.1f}" for name, value in found.items()))
        with jax.transfer_guard("allow"):  # a task moves as it likes; it is no step
            encode = functools.partial(text_model.encode, forward, self._tokenize, self._config.data.length)
            for name, (task, place) in self._tasks.items():
                for row, figures in task.score(encode, place).items():
                    scores |= {f"{name}/{row}/{measure}": value for measure, value in figures.items()}
                    shown = "  ".join(f"{measure} {100 * value:.1f}" for measure, value in figures.items())
                    logging.info("step %d  %s %s  %s", step, name, row, shown)
        best = self._config.keep_best
        if best and best not in scores:
            cli.fail(f"config.keep_best={best}: no such score; there are {', '.join(scores)}")
        return scores


def parse_tasks(text: str) -> dict[str, tuple[Any, Any]]:
    """The tasks of "sts=DIR,retrieval=DIR" with the places of their data by name, "sts-DIR's name".

    Raises:
      ValueError: there is no such task, or its data is not there.
    """
    if not text:
        return {}
    from contrastive_jax import tasks  # scikit-learn and the like take seconds to import

    found = {}
    for part in filter(None, text.split(",")):
        task, _, data = part.partition("=")
        if task not in tasks.TASK_OF:
            raise ValueError(f"config.eval.tasks={text}: no task {task!r}; give TASK=DATA of {', '.join(tasks.TASK_OF)}")
        try:
            place = tasks.place_of(task, data)
        except ValueError as error:
            raise ValueError(f"config.eval.tasks={text}: {error}") from error
        found[f"{task}-{data.rstrip('/').rpartition('/')[2]}"] = tasks.TASK_OF[task], place
    return found


def check_best(config: ConfigDict, names: Collection[str]) -> None:
    """Raises ValueError if `config.keep_best` cannot be a score of this run, or is not known where checkpoints are made."""
    best = config.keep_best
    if not best:
        return
    if best.partition("/")[0] not in ("query_key", *names):
        raise ValueError(f"config.keep_best={best}: no such score; they begin with {', '.join(('query_key', *names))}")
    if config.checkpoint_every and config.checkpoint_every % config.eval_every:
        raise ValueError(
            f"config.checkpoint_every={config.checkpoint_every} must be a multiple of config.eval_every={config.eval_every}: "
            "config.keep_best needs a score of each checkpoint"
        )
