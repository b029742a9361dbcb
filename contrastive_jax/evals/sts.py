"""Sentence similarity: cosines against people's scores, as in the STS benchmark (Cer et al., arXiv 1708.00055)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath
from scipy import stats

from contrastive_jax.evals.baselines import Bm25, Encode

Similarity = Callable[[list[str], list[str]], np.ndarray]  # of n texts and their partners → float[n]


class Sentences(NamedTuple):
    """Pairs of sentences with the similarity that people gave them."""

    score: np.ndarray
    first: list[str]
    second: list[str]


Read = Callable[[epath.Path], Sentences]  # of one file


def read(path: epath.Path) -> Sentences:
    """Reads a .tsv of score, text, text.

    Raises:
      ValueError: a line that is not so; the message names it.
    """
    scores, first, second = [], [], []
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if line:
            try:
                score, a, b = line.rstrip("\r").split("\t")
                scores.append(float(score))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not score, text, text between tabs") from error
            first.append(a)
            second.append(b)
    return Sentences(np.array(scores), first, second)


def correlations(score: np.ndarray, similarity: np.ndarray) -> dict[str, float]:
    """Spearman's and Pearson's, as fractions; ties have their mean rank."""
    return {
        "spearman": float(stats.spearmanr(score, similarity).statistic),
        "pearson": float(stats.pearsonr(score, similarity).statistic),
    }


def cosines(encode: Encode) -> Similarity:
    """The cosine of two texts' vectors."""

    def similarity(first: list[str], second: list[str]) -> np.ndarray:
        z = encode([*first, *second])
        return np.asarray((z[: len(first)] * z[len(first) :]).sum(-1))

    return similarity


def bm25(first: list[str], second: list[str]) -> np.ndarray:
    """BM25 of each text for its partner, among all of a file, the mean of both directions."""
    both = (Bm25(second).scores(first), Bm25(first).scores(second))
    return np.mean([np.diagonal(scores) for scores in both], axis=0)


def texts(data: epath.Path, read: Read = read, pattern: str = "*.tsv") -> list[str]:
    """All texts of a folder."""
    return [text for file in sorted(data.glob(pattern)) for pairs in [read(file)] for text in (*pairs.first, *pairs.second)]


def evaluate(
    similarity: Similarity, data: epath.Path, read: Read = read, pattern: str = "*.tsv"
) -> dict[str, dict[str, float]]:
    """Scores a similarity on each of the files of a folder.

    Returns:
      File → correlations; of several files also "all", of their pairs in one list, and "mean", of the files' figures: the two
      differ by points, and papers do not always say which they give (SimCSE's appendix B).

    Raises:
      ValueError: there is none.
    """
    files = sorted(data.glob(pattern))
    if not files:
        raise ValueError(f"--data={data}: no {pattern} there")
    results, every = {}, []
    for file in files:
        pairs = read(file)
        found = similarity(pairs.first, pairs.second)
        results[file.stem] = correlations(pairs.score, found)
        every.append((pairs.score, found))
    if len(files) > 1:
        mean = {name: float(np.mean([row[name] for row in results.values()])) for name in ("spearman", "pearson")}
        results |= {"all": correlations(*map(np.concatenate, zip(*every, strict=True))), "mean": mean}
    return results
