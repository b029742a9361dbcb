"""The evaluations of vectors: what each reads, how it scores, what decides its figures. Told by a name and a place of data."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from contrastive_jax import nearest
from contrastive_jax.evals import baselines, classify, codesearch, retrieval, sts, wordsim
from contrastive_jax.results import Rows

Encode = Callable[[Sequence[str], int], np.ndarray]  # texts, view → unit vectors float32[n e]


@dataclasses.dataclass(frozen=True)
class Task:
    """An evaluation of frozen vectors.

    Attributes:
      score: (encode, data) → rows; encode maps texts and view to vectors.
      texts: data → all its texts, on which TF-IDF is fitted.
      baselines: those that need more than vectors, data → rows each, by name.
      protocol: what decides its figures beside model and data.
      files: of the data, hashed for the protocol.
      tfds: whether the data may be "tfds:NAME".
    """

    score: Callable[[Any, Any], Rows]
    texts: Callable[[Any], list[str]]
    baselines: dict[str, Callable[[Any], Rows]]
    protocol: dict[str, Any]
    files: tuple[str, ...]
    tfds: bool = False


def score_sts(encode: Encode, data: epath.Path) -> Rows:
    """Correlation with people's scores."""
    return sts.evaluate(sts.cosines(lambda texts: encode(texts, 0)), data)


def score_retrieval(encode: Encode, data: epath.Path) -> Rows:
    """Exact search over a BEIR folder."""
    return retrieval.evaluate(encode, data, nearest.merge)


def retrieval_tfidf(data: epath.Path) -> Rows:
    """TF-IDF vectors are sparse: products with the whole corpus at once."""
    documents = retrieval.texts(data)
    encode = baselines.tfidf(documents)
    corpus = encode(documents)
    return retrieval.evaluate_scores(lambda queries: baselines.products(encode(queries), corpus), data)


def retrieval_bm25(data: epath.Path) -> Rows:
    """BM25 over the whole corpus."""
    return retrieval.evaluate_scores(baselines.Bm25(retrieval.texts(data)).scores, data)


def score_classify(task: str, encode: Encode, data: epath.Path | str) -> Rows:
    """A probe, nearest neighbours or the nearest label."""
    return classify.evaluate(lambda texts: encode(texts, 0), data, (task,))


def score_wordsim(encode: Encode, data: epath.Path) -> Rows:
    """Correlation with people's scores of pairs of words."""
    return sts.evaluate(sts.cosines(lambda texts: encode(texts, 0)), data, wordsim.read, wordsim.PATTERN)


def score_codesearch(encode: Encode, data: epath.Path) -> Rows:
    """Docstrings find their functions."""
    return codesearch.evaluate(codesearch.products(encode), data)


def classifier(task: str, **protocol: Any) -> Task:
    """A task on labelled texts."""
    return Task(functools.partial(score_classify, task), classify.texts, {}, protocol, ("*",), tfds=True)


CORRELATION = {"similarity": "cosine", "ties": "mean rank", "aggregation": "all: one list; mean: of the files' figures"}
TASK_OF = {
    "sts": Task(
        score_sts,
        sts.texts,
        {"BM25": functools.partial(sts.evaluate, sts.bm25)},
        CORRELATION,
        ("*.tsv",),
    ),
    "wordsim": Task(
        score_wordsim,
        functools.partial(sts.texts, read=wordsim.read, pattern=wordsim.PATTERN),
        {},
        CORRELATION,
        (wordsim.PATTERN,),
    ),
    "codesearch": Task(
        score_codesearch,
        codesearch.texts,
        {"BM25": functools.partial(codesearch.evaluate, codesearch.bm25)},
        {
            "similarity": "cosine",
            "candidates": codesearch.BATCH,
            "order": f"permuted by seed {codesearch.SEED}",
            "ties": "count against",
            "left over": "dropped",
            "texts": "docstring_tokens and code_tokens where given, else docstring and code",
        },
        ("*.jsonl", "*.jsonl.gz"),
    ),
    "retrieval": Task(
        score_retrieval,
        retrieval.texts,
        {"TF-IDF": retrieval_tfidf, "BM25": retrieval_bm25},
        {"similarity": "cosine", "document": "title and text", "gain": "linear"},
        ("*.jsonl", "qrels/test.tsv"),
    ),
    "probe": classifier(
        "probe",
        folds=classify.FOLDS,
        strengths=classify.STRENGTHS,
        chosen_on="the part to tune on, or a tenth of the training part",
    ),
    "knn": classifier("knn", folds=classify.FOLDS, k=classify.NEIGHBOURS, vote="majority"),
    "zero_shot": classifier("zero_shot", labels="labels.json or their names"),
}


def place_of(task: str, data: str) -> epath.Path | str:
    """The place of a task's data: a folder, or "tfds:NAME" where the task reads those.

    Raises:
      ValueError: the folder is not there.
    """
    if data.startswith("tfds:") and TASK_OF[task].tfds:
        return data
    folder = epath.Path(data).expanduser()
    if not data or not folder.is_dir():
        raise ValueError(f"--data={data}: --tasks={task} needs the folder of its data")
    return folder


def hash_of_data(place: epath.Path | str, patterns: Sequence[str]) -> str:
    """sha256 of the files of a folder and their names, its first half; a TFDS dataset is its name."""
    if isinstance(place, str):
        return place
    found = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in place.glob(pattern) if not path.is_dir()}):
        found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:32]
