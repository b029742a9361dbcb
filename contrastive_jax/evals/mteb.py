"""MTEB (Muennighoff et al., arXiv 2210.07316): tasks and benchmarks of the mteb package on an encoder of this project.

Dimensions: n, m texts, e embedding.
"""

import importlib.metadata
import pathlib
import re
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.evals import sts
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.task import Options, Task, hash_files
from contrastive_jax.files import transfer
from contrastive_jax.inference.text_model import TextModel
from contrastive_jax.inference.tokenize import NO_SIDE

SPLITS = {"dev": "validation"}  # file of the STS benchmark → mteb's name of that part


def import_mteb() -> types.ModuleType:
    """Returns the mteb package.

    Raises:
      UserError: it is not installed.
    """
    try:
        import mteb
    except ImportError as error:
        raise UserError("--tasks=mteb: the mteb package is not installed; pip install 'contrastive_jax[mteb]'") from error
    return mteb


class MtebModel:
    """A `TextModel` as mteb's EncoderProtocol: `mteb.evaluate(MtebModel(model), tasks)`."""

    def __init__(self, model: TextModel):
        self._model = model
        meta = import_mteb().models.ModelMeta
        name = files.absolute(model.name.removeprefix("hf:")).name
        self.mteb_model_meta = meta.create_empty(
            {
                "name": f"contrastive_jax/{name}",
                "revision": model.parameters_digest,
                "max_tokens": model.max_tokens,
                "framework": ["JAX"],
            }
        )

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """Returns unit vectors float32[n e] of the texts of all batches.

        A folder's prompt for the task, its type or the side of the texts is chosen as mteb does it for sentence-transformers.
        Other texts are encoded on the side that mteb names, or on none.
        """
        from mteb.models.abs_encoder import get_prompt_name

        texts = [text for batch in inputs for text in batch["text"]]
        prompts = self._model.prompts
        name = get_prompt_name(dict(prompts), task_metadata, prompt_type) if isinstance(prompts, Mapping) else None
        return self._model.encode(texts, str(name or (prompt_type.value if prompt_type else NO_SIDE)))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosines [n m] of a[n e] and b[m e]."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosines [n] of a[n e] and b[n e], row by row."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def use_local_data(task: Any, folder: epath.Path) -> None:
    """Lets a task read local data: for similarity .tsv of score, text, text (`sts`), else a copy of the task's repository.

    Raises:
      UserError: a part that the task is scored on is missing.
    """
    name = task.metadata.name
    paths = sorted(folder.glob("*.tsv"))
    if not paths or task.metadata.type != "STS":
        task.metadata = task.metadata.model_copy(update={"dataset": dict(task.metadata.dataset) | {"path": str(folder)}})
        return
    import datasets

    parts = {SPLITS.get(path.stem, path.stem): sts.read_sts_file(path) for path in paths}
    if missing := set(task.eval_splits) - parts.keys():
        raise UserError(f"--data={folder}: {name} is scored on {', '.join(sorted(missing))}; that .tsv is not there")
    tables = {
        part: datasets.Dataset.from_dict(dict(zip(("score", *task.column_names), pairs, strict=True)))
        for part, pairs in parts.items()
    }
    task.dataset, task.data_loaded = datasets.DatasetDict(tables), True


def open_folder(model: TextModel, data: str, options: Options) -> epath.Path | None:
    """Returns the folder of --data, or None: mteb then downloads the data.

    Raises:
      UserError: there is no such folder.
    """
    if not data:
        return None
    folder = epath.Path(data).expanduser()
    if not folder.is_dir():
        names = ", ".join(options.mteb)
        raise UserError(f"--data={data}: no such folder; give the data of {names}, or none to have mteb download them")
    return epath.Path(transfer.local_copy(folder))


def split_names(text: str) -> list[str]:
    """Splits names at commas, but not at those in parentheses: "STS12,MTEB(eng, v2)" are two."""
    return [name.strip() for name in re.split(r",(?![^()]*\))", text) if name.strip()]


def find_tasks(name: str) -> list[Any]:
    """Returns mteb's task of a name, or the tasks of its benchmark of that name.

    Raises:
      UserError: there is no such task or benchmark.
    """
    mteb = import_mteb()
    reasons = []
    for find in (lambda: [mteb.get_task(name)], lambda: [*mteb.get_benchmark(name).tasks]):
        try:
            return find()
        except KeyError as error:
            reasons.append(error.args[0].removeprefix("KeyError: "))
    raise UserError(f"--mteb={name}: {next((reason for reason in reasons if 'Did you mean' in reason), reasons[0])}")


def open_results(model: TextModel, options: Options) -> Any:
    """Returns mteb's ResultCache, which writes results in MTEB's own format; None where none shall be written.

    Raises:
      UserError: `options.mteb_results` is on a bucket.
    """
    folder = options.mteb_results
    if files.on_bucket(folder):
        raise UserError(f"--mteb_results={folder}: mteb writes to local folders only; give one")
    if not folder and model.config is not None and not files.on_bucket(model.name):
        folder = f"{model.name}/mteb"
    return import_mteb().ResultCache(epath.Path(folder).expanduser()) if folder and jax.process_index() == 0 else None


def mean_scores(tasks: Any, scores: Mapping[str, float]) -> dict[str, float]:
    """Returns the means of a benchmark, over its tasks and over the means of their types, as on MTEB's board."""
    by_type: dict[str, list[float]] = {}
    for task in tasks:
        by_type.setdefault(task.metadata.type, []).append(scores[task.metadata.name])
    all_scores = [score for of_type in by_type.values() for score in of_type]
    return {"main_score": float(np.mean(all_scores)), "mean_of_types": float(np.mean([*map(np.mean, by_type.values())]))}


def score_tasks(model: TextModel, folder: epath.Path | None, options: Options) -> Rows:
    """Scores a model on the tasks and benchmarks `options.mteb` of mteb.

    Args:
      model: the encoder.
      folder: has their data, in FOLDER/NAME or for all in FOLDER; None: mteb downloads them.
      options: names the tasks.

    Returns:
      MTEB's name of each task → its main score, and of each benchmark → the means.

    Raises:
      UserError: mteb is not installed, has no such task, or the data are not as they should be.
    """
    mteb, cache = import_mteb(), open_results(model, options)
    found = {name: find_tasks(name) for name in options.mteb}
    adapted, scores = MtebModel(model), dict[str, float]()
    for task in {task.metadata.name: task for tasks in found.values() for task in tasks}.values():
        name = task.metadata.name
        if folder is not None:
            use_local_data(task, folder / name if (folder / name).is_dir() else folder)
        result = mteb.evaluate(
            adapted, task, cache=cache, overwrite_strategy="always", co2_tracker=False, show_progress_bar=False
        )
        scores[name] = float(result.task_results[0].get_score())
    rows = {name: {"main_score": score} for name, score in scores.items()}
    return rows | {name: mean_scores(tasks, scores) for name, tasks in found.items() if name not in rows}


def protocol_of(model: TextModel, folder: epath.Path | None, options: Options) -> dict[str, Any]:
    """Returns the version of mteb, the names of its tasks, and their data."""
    data = "as downloaded" if folder is None else hash_files(pathlib.Path(folder), ("**/*",))
    return {"mteb": importlib.metadata.version("mteb"), "names": list(options.mteb), "data": data}


TASK = Task("mteb", open_folder, score_tasks, protocol_of, in_training=False)
