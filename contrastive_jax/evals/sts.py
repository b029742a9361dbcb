"""Sentence similarity: cosines against people's scores, as in the STS benchmark (Cer et al., arXiv 1708.00055)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.evals.baselines import Bm25
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.task import Task
from contrastive_jax.evals.vectors import Encode, make_vector_task
from contrastive_jax.inference.tokenize import NO_SIDE

PROTOCOL = {"similarity": "cosine", "ties": "mean rank", "aggregation": "all: one list; mean: of the files' figures"}

Similarity = Callable[[list[str], list[str]], np.ndarray]  # (n texts, their n partners) → float[n]


class ScoredPairs(NamedTuple):
    """Pairs of texts with the similarity float[n] that people gave them."""

    score: np.ndarray
    first: list[str]
    second: list[str]


ReadFile = Callable[[epath.Path], ScoredPairs]


def read_sts_file(path: epath.Path) -> ScoredPairs:
    """Reads a .tsv with the columns score, text, text; empty lines are passed over.

    Raises:
      UserError: a line has other columns; the message names it.
    """
    scores, first, second = [], [], []
    for number, line in files.read_lines(path):
        if not line:
            continue
        try:
            score, left, right = line.split("\t")
            scores.append(float(score))
        except ValueError as error:
            raise UserError(f"{path}:{number}: not score, text, text between tabs") from error
        first.append(left)
        second.append(right)
    return ScoredPairs(np.array(scores), first, second)


def correlations(score: np.ndarray, similarity: np.ndarray) -> dict[str, float]:
    """Returns Spearman's and Pearson's correlation of score float[n] with similarity float[n], each in [-1, 1].

    Equal values get the mean of their ranks.
    """
    from scipy import stats  # takes a second, and few evaluations need it

    return {
        "spearman": float(stats.spearmanr(score, similarity).statistic),
        "pearson": float(stats.pearsonr(score, similarity).statistic),
    }


def cosines(encode: Encode) -> Similarity:
    """Returns the cosine similarity of an encoder: the texts of a pair are on no side."""

    def similarity(first: list[str], second: list[str]) -> np.ndarray:
        z = encode([*first, *second], NO_SIDE)
        return np.asarray((z[: len(first)] * z[len(first) :]).sum(-1))

    return similarity


def bm25_similarity(first: list[str], second: list[str]) -> np.ndarray:
    """Scores each text for its partner by BM25 over all partners, and the other way round; returns the mean of the two."""
    both = (Bm25(second).scores(first), Bm25(first).scores(second))
    return np.mean([np.diagonal(scores) for scores in both], axis=0)


def score_folder(similarity: Similarity, folder: epath.Path, read_file: ReadFile, pattern: str) -> Rows:
    """Scores a similarity on the files of a folder that match the pattern.

    Returns:
      File → correlations. For several files also "all", of their pairs in one list, and "mean", of the files' figures: the two
      differ by points, and papers do not always say which they report (SimCSE, arXiv 2104.08821, appendix B).

    Raises:
      UserError: there is no such file, or one has fewer than two pairs.
    """
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise UserError(f"--data={folder}: no {pattern} there")
    rows, lists = {}, []
    for path in paths:
        pairs = read_file(path)
        if len(pairs.score) < 2:
            raise UserError(
                f"{path}: {len(pairs.score)} pairs, and a correlation needs two or more; complete or remove the file"
            )
        similarities = similarity(pairs.first, pairs.second)
        rows[path.stem] = correlations(pairs.score, similarities)
        lists.append((pairs.score, similarities))
    if len(paths) > 1:
        mean = {name: float(np.mean([row[name] for row in rows.values()])) for name in ("spearman", "pearson")}
        scores, similarities = (np.concatenate(arrays) for arrays in zip(*lists, strict=True))
        rows |= {"all": correlations(scores, similarities), "mean": mean}
    return rows


def make_correlation_task(
    name: str, read_file: ReadFile, pattern: str, own_baselines: Mapping[str, Similarity] | None = None
) -> Task:
    """Makes a task that correlates cosines with people's scores in files that match the pattern."""

    def score(encode: Encode, folder: epath.Path) -> Rows:
        return score_folder(cosines(encode), folder, read_file, pattern)

    def all_texts(folder: epath.Path) -> list[str]:
        pairs = [read_file(path) for path in sorted(folder.glob(pattern))]
        return [text for part in pairs for text in (*part.first, *part.second)]

    def score_baseline(similarity: Similarity) -> Callable[[Any], Rows]:
        return lambda folder: score_folder(similarity, folder, read_file, pattern)

    others = {other: score_baseline(similarity) for other, similarity in (own_baselines or {}).items()}
    return make_vector_task(name, score, all_texts, (pattern,), PROTOCOL, others)


TASK = make_correlation_task("sts", read_sts_file, "*.tsv", {"BM25": bm25_similarity})
