"""Sentence similarity: cosines against people's scores, as in the STS benchmark (Cer et al., arXiv 1708.00055)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath
from scipy import stats


class Sentences(NamedTuple):
    """Pairs of sentences with the similarity that people gave them."""

    score: np.ndarray
    first: list[str]
    second: list[str]


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


def correlations(score: np.ndarray, cosine: np.ndarray) -> dict[str, float]:
    """Spearman's and Pearson's, as fractions; ties have their mean rank."""
    return {
        "spearman": float(stats.spearmanr(score, cosine).statistic),
        "pearson": float(stats.pearsonr(score, cosine).statistic),
    }


def evaluate(encode: Callable[[list[str]], np.ndarray], data: epath.Path) -> dict[str, dict[str, float]]:
    """Scores a model on each .tsv of a folder.

    Returns:
      File → correlations; of several files also "all", of their pairs in one list, and "mean", of the files' figures: the two
      differ by points, and papers do not always say which they give (SimCSE's appendix B).

    Raises:
      ValueError: there is no .tsv.
    """
    files = sorted(data.glob("*.tsv"))
    if not files:
        raise ValueError(f"--data={data}: no .tsv of score, text, text there")
    results, every = {}, []
    for file in files:
        pairs = read(file)
        z = encode([*pairs.first, *pairs.second])
        cosine = (z[: len(pairs.score)] * z[len(pairs.score) :]).sum(-1)
        results[file.stem] = correlations(pairs.score, cosine)
        every.append((pairs.score, cosine))
    if len(files) > 1:
        mean = {name: float(np.mean([found[name] for found in results.values()])) for name in ("spearman", "pearson")}
        results |= {"all": correlations(*map(np.concatenate, zip(*every, strict=True))), "mean": mean}
    return results
