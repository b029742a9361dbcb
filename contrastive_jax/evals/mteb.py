"""MTEB (Muennighoff et al., arXiv 2210.07316): tasks of the mteb package on an encoder of this project.

Dimensions: n, m texts, e embedding.
"""

import importlib.metadata
import types
from typing import Any

import numpy as np
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.evals import sts
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.task import Options, Task, hash_files
from contrastive_jax.files import transfer
from contrastive_jax.inference.text_model import TextModel

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

    def encode(self, inputs: Any, *, prompt_type: str | None = None, **_: Any) -> np.ndarray:
        """Returns unit vectors float32[n e] of the texts of all batches; what mteb calls a document is encoded as one."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self._model.encode(texts, prompt_type or "query")

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


def score_tasks(model: TextModel, folder: epath.Path | None, options: Options) -> Rows:
    """Scores a model on the tasks `options.mteb` of mteb.

    Args:
      model: the encoder.
      folder: has their data, in FOLDER/NAME or for all in FOLDER; None: mteb downloads them.
      options: names the tasks.

    Returns:
      MTEB's name of each task → its main score.

    Raises:
      UserError: mteb is not installed, has no such task, or the data are not as they should be.
    """
    mteb = import_mteb()
    adapted, rows = MtebModel(model), {}
    for name in options.mteb:
        try:
            task = mteb.get_task(name)
        except KeyError as error:
            raise UserError(f"--mteb={name}: {error.args[0].removeprefix('KeyError: ')}") from error
        if folder is not None:
            use_local_data(task, folder / name if (folder / name).is_dir() else folder)
        result = mteb.evaluate(adapted, task, cache=None, co2_tracker=False, show_progress_bar=False)
        rows[name] = {"main_score": float(result.task_results[0].get_score())}
    return rows


def protocol_of(model: TextModel, folder: epath.Path | None, options: Options) -> dict[str, Any]:
    """Returns the version of mteb, the names of its tasks, and their data."""
    data = "as downloaded" if folder is None else hash_files(folder, ("*",))
    return {"mteb": importlib.metadata.version("mteb"), "names": list(options.mteb), "data": data}


TASK = Task("mteb", open_folder, score_tasks, protocol_of, in_training=False)
