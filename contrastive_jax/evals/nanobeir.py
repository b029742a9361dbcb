"""NanoBEIR: retrieval over each data set of a folder, and the mean, as sentence-transformers' NanoBEIREvaluator has it."""

from collections.abc import Callable

import numpy as np
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.evals import retrieval
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.vectors import Encode, make_vector_task


def data_sets(folder: epath.Path) -> list[epath.Path]:
    """Returns the folders of the data sets in a folder, by name.

    Raises:
      UserError: there are none.
    """
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in ("corpus", "queries", "qrels")]
    found = [path for path in found if retrieval.is_nano(path) or (path / "corpus.jsonl").exists()]
    if not found:
        raise UserError(f"--data={folder}: no data set there; give the folder of several, or one of them to the task retrieval")
    return found


def score_each(score: Callable[[epath.Path], Rows], folder: epath.Path) -> Rows:
    """Returns what `score` says of each data set, and the means over them."""
    rows = {path.name: score(path)["test"] for path in data_sets(folder)}
    measures = next(iter(rows.values()))
    return rows | {"mean": {name: float(np.mean([row[name] for row in rows.values()])) for name in measures}}


def score_encoder(encode: Encode, folder: epath.Path) -> Rows:
    """Scores exact search with the vectors of an encoder."""
    return score_each(lambda path: retrieval.score_encoder(encode, path), folder)


TASK = make_vector_task(
    name="nanobeir",
    score=score_encoder,
    all_texts=lambda folder: [text for path in data_sets(folder) for text in retrieval.all_documents(path)],
    files=[f"*/{pattern}" for pattern in retrieval.FILES],
    protocol=retrieval.PROTOCOL,
    own_baselines={
        "TF-IDF": lambda folder: score_each(retrieval.score_tfidf, folder),
        "BM25": lambda folder: score_each(retrieval.score_bm25, folder),
    },
)
