"""MTEB (Muennighoff et al., arXiv 2210.07316): its own tasks, of the mteb package, on an encoder of ours."""

import types
from typing import Any

import numpy as np
from etils import epath

from contrastive_jax import text_model
from contrastive_jax.evals import sts

SPLITS = {"dev": "validation"}  # what mteb calls the parts of the STS benchmark


def package() -> types.ModuleType:
    """The mteb package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import mteb
    except ImportError as error:
        raise ValueError("--tasks=mteb: the mteb package is not installed; pip install 'contrastive_jax[mteb]'") from error
    return mteb


class MtebModel:
    """A `TextModel` as mteb's EncoderProtocol: `mteb.evaluate(MtebModel(model), tasks)`."""

    def __init__(self, model: text_model.TextModel):
        self._model = model
        meta = package().models.ModelMeta
        name = epath.Path(model.protocol["model"].removeprefix("hf:")).expanduser().resolve().name
        self.mteb_model_meta = meta.create_empty(
            {
                "name": f"contrastive_jax/{name}",
                "revision": model.protocol["parameters"],
                "max_tokens": model.protocol["max_tokens"],
                "framework": ["JAX"],
            }
        )

    def encode(self, inputs: Any, *, prompt_type: str | None = None, **_: Any) -> np.ndarray:
        """Unit vectors float32[n e] of the texts of all batches; view 1 for mteb's documents, else 0."""
        return self._model.encode([text for batch in inputs for text in batch["text"]], int(prompt_type == text_model.VIEWS[1]))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines [n m] of a[n e] and b[m e]."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines [n] of a[n e] and b[n e], row by row."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def give_data(task: Any, data: epath.Path) -> None:
    """Lets a task read local data: .tsv of score, text, text (`sts`) for one of similarity, else a copy of its repository.

    Raises:
      ValueError: there is no such folder, or a part that the task is scored on is missing.
    """
    name = task.metadata.name
    if not data.is_dir():
        raise ValueError(f"--data={data}: no such folder; give the data of {name}, or none to have mteb download them")
    files = sorted(data.glob("*.tsv"))
    if not files or task.metadata.type != "STS":
        task.metadata = task.metadata.model_copy(update={"dataset": dict(task.metadata.dataset) | {"path": str(data)}})
        return
    import datasets

    parts = {SPLITS.get(file.stem, file.stem): sts.read(file) for file in files}
    if missing := set(task.eval_splits) - parts.keys():
        raise ValueError(f"--data={data}: {name} is scored on {', '.join(sorted(missing))}; that .tsv is not there")
    tables = {
        part: datasets.Dataset.from_dict(dict(zip(("score", *task.column_names), pairs, strict=True)))
        for part, pairs in parts.items()
    }
    task.dataset, task.data_loaded = datasets.DatasetDict(tables), True


def run(model: text_model.TextModel, names: list[str], data: epath.Path | None = None) -> dict[str, dict[str, float]]:
    """Scores a model on tasks of mteb.

    Args:
      model: the encoder.
      names: of tasks, as STSBenchmark.
      data: where their data are, in DATA/NAME or for all in DATA; None: mteb downloads them.

    Returns:
      Task → its main score.

    Raises:
      ValueError: mteb is not installed, has no such task, or the data are not as they should be.
    """
    mteb = package()
    adapted, rows = MtebModel(model), {}
    for name in names:
        try:
            task = mteb.get_task(name)
        except KeyError as error:
            raise ValueError(f"--mteb={name}: {error.args[0].removeprefix('KeyError: ')}") from error
        if data is not None:
            give_data(task, data / name if (data / name).is_dir() else data)
        found = mteb.evaluate(adapted, task, cache=None, co2_tracker=False, show_progress_bar=False)
        rows[name] = {"main_score": float(found.task_results[0].get_score())}
    return rows
