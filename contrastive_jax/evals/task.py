"""What a task is: the one protocol that the query-key test, similarity, retrieval, probes, fine-tuning and MTEB follow."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.evals.results import Rows
from contrastive_jax.files import transfer
from contrastive_jax.inference.text_model import TextModel


class Options(NamedTuple):
    """What a user chooses beside model and data: the flags of `evaluate`. Each task reads those that concern it.

    Attributes:
      pairs: number of pairs of the query-key test; None: as in the model's run.
      span: tokens per span of the query-key test; None: as in the model's run.
      epochs: epochs of a fine-tuning (glue).
      seeds: number of fine-tunings (glue), each with its own seed.
      joined: whether a fine-tuning has both texts of a pair in one row (glue).
      mteb: names of MTEB's tasks and benchmarks (mteb).
      mteb_results: a folder for results as MTEB writes them (mteb); empty: WORKDIR/mteb of a run, and none for other models.
      cache: a file that keeps vectors of texts between evaluations; None: keep none.
    """

    pairs: int | None = None
    span: int | None = None
    epochs: int = 3
    seeds: int = 3
    joined: bool = False
    mteb: Sequence[str] = ("STSBenchmark",)
    mteb_results: str = ""
    cache: pathlib.Path | None = None


Score = Callable[[TextModel, Any, Options], Rows]  # (model, opened data, options) → rows


@dataclasses.dataclass(frozen=True)
class Task:
    """An evaluation.

    Scoring a model takes three calls::

        data = task.open_data(model, "DIR", options)
        rows = task.score(model, data, options)              # {"test": {"spearman": 0.82}}
        protocol = task.protocol(model, data, options)       # {"data": "1f3a…", "similarity": "cosine"}

    Attributes:
      name: the task's name in --tasks and in the names of scores, TASK/ROW/MEASURE.
      open_data: (model, the value of --data, options) → the data as `score` takes it; raises UserError where it does not fit.
      score: (model, data, options) → {row: {measure: fraction}}.
      protocol: (model, data, options) → what decides the figures, beside the model's own protocol.
      baselines: what the model is compared with on the same data, by name. A baseline that does not exist for a model returns
        no rows.
      in_training: whether a training run can score itself by the task as it goes along.
    """

    name: str
    open_data: Callable[[TextModel, str, Options], Any]
    score: Score
    protocol: Callable[[TextModel, Any, Options], dict[str, Any]]
    baselines: Mapping[str, Score] = dataclasses.field(default_factory=dict)
    in_training: bool = True


def data_folder(task: str, data: str, patterns: Sequence[str], tfds: bool = False) -> epath.Path | str:
    """Returns the folder that --data names, or "tfds:NAME" unchanged for a task that reads those (`tfds`).

    Of a folder on a bucket, the files that match the patterns are copied to the cache: a task reads them several times.

    Raises:
      UserError: there is no such folder.
    """
    if tfds and data.startswith("tfds:"):
        return data
    folder = epath.Path(data).expanduser()
    if not data or not folder.is_dir():
        kinds = "the folder of its data, or tfds:NAME" if tfds else "the folder of its data"
        raise UserError(f"--data={data}: --tasks={task} needs {kinds}")
    return epath.Path(transfer.local_copy(folder, patterns))


def hash_files(folder: epath.Path | pathlib.Path | str, patterns: Sequence[str]) -> str:
    """Returns 32 hexadecimal digits that identify the data: a SHA-256 of the paths and contents of the files that match.

    The name of a TFDS dataset ("tfds:NAME") is returned unchanged.
    """
    if isinstance(folder, str):
        return folder
    total = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if not path.is_dir()}):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:32]


def untrained(score: Score) -> Score:
    """Returns the baseline that scores the same encoder before training; no rows where `TextModel.untrained` gives None."""

    def score_untrained(model: TextModel, data: Any, options: Options) -> Rows:
        initial = model.untrained()
        # Vectors of an untrained encoder are not worth keeping.
        return {} if initial is None else score(initial, data, options._replace(cache=None))

    return score_untrained
