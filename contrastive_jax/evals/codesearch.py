"""Code search as in CodeSearchNet (Husain et al., arXiv 1909.09436, §4.1): a docstring finds its function among 1,000.

Data: a folder of .jsonl or .jsonl.gz, an object with docstring_tokens and code_tokens, or else docstring and code, a line, and
perhaps its language.
"""

import collections
import gzip
import json
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from absl import logging
from etils import epath

from contrastive_jax.evals import baselines

BATCH = 1000  # a function and 999 distractors
SEED = 0  # of the order that is cut into batches; it is that of the authors' code

Score = Callable[[list[str], list[str]], np.ndarray]  # of q docstrings for n functions → float[q n]
Pair = tuple[str, str]  # docstring, code


def parse(line: bytes, language: str) -> tuple[str, Pair]:
    """The language of an object, by default this one, and its pair.

    Raises:
      ValueError, TypeError, KeyError, AttributeError: it is no such object.
    """
    found = json.loads(line)
    # Tokens first: in CodeSearchNet's Python the docstring is a part of the code.
    pair = [" ".join(found[f"{name}_tokens"]) if f"{name}_tokens" in found else found[name] for name in ("docstring", "code")]
    if not all(isinstance(text, str) and text.strip() for text in pair):
        raise ValueError
    return str(found.get("language") or language), (pair[0], pair[1])


def lines(path: epath.Path) -> Iterator[tuple[str, Pair]]:
    """The language, by default the file's name, and the pair of each line.

    Raises:
      ValueError: a line that is not so, or a damaged file; the message names it.
    """
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
        numbered = enumerate(file, 1)
        while True:
            try:
                number, line = next(numbered, (0, b""))
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path}: damaged: {error}") from error
            if not number:
                return
            try:
                yield parse(line, path.name.split(".")[0])
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}:{number}: not an object with docstring(_tokens) and code(_tokens)") from error


def read(data: epath.Path) -> dict[str, list[Pair]]:
    """Language → the pairs of a folder.

    Raises:
      ValueError: there are none, or a line is not as it should be.
    """
    found = collections.defaultdict(list)
    for path in sorted((*data.glob("*.jsonl"), *data.glob("*.jsonl.gz"))):
        for language, pair in lines(path):
            found[language].append(pair)
    if not found:
        raise ValueError(f"--data={data}: no .jsonl or .jsonl.gz of docstring and code there")
    return dict(sorted(found.items()))


def texts(data: epath.Path) -> list[str]:
    """All docstrings and functions of a folder."""
    return [text for pairs in read(data).values() for pair in pairs for text in pair]


def products(encode: Callable[[list[str], int], np.ndarray]) -> Score:
    """The products of the vectors of docstrings (view 0) and functions (view 1)."""
    return lambda docstrings, functions: baselines.products(encode(docstrings, 0), encode(functions, 1))


def bm25(docstrings: list[str], functions: list[str]) -> np.ndarray:
    """BM25 over the functions of a batch."""
    return baselines.Bm25(functions).scores(docstrings)


def reciprocal_ranks(scores: np.ndarray) -> np.ndarray:
    """float[n] from scores[n n], whose diagonal is right; what scores as much as that stands before it."""
    return 1 / (scores >= np.diagonal(scores)[:, None]).sum(1)


def evaluate(score: Score, data: epath.Path) -> dict[str, dict[str, float]]:
    """Scores a model on a folder.

    Returns:
      Language → the mean reciprocal rank of the right function, each in a batch of 1,000; what is left over is dropped, and
      where there are fewer they are one batch. Of several languages also "mean", of their figures.

    Raises:
      ValueError: the data are not as they should be.
    """
    rows: dict[str, dict[str, float]] = {}
    for language, pairs in read(data).items():
        size = min(BATCH, len(pairs))
        if size < BATCH:
            logging.warning("%s: %d pairs only; figures among %d are higher than among %d", language, size, size, BATCH)
        order = np.random.RandomState(SEED).permutation(len(pairs))
        found = []
        for start in range(0, len(pairs) - size + 1, size):
            docstrings, functions = zip(*(pairs[place] for place in order[start : start + size]), strict=True)
            found.append(reciprocal_ranks(score(list(docstrings), list(functions))).mean())
            logging.info("%s: %d of %d, MRR %.2f", language, start + size, len(pairs), 100 * np.mean(found))
        rows[language] = {"mrr": float(np.mean(found))}
    if len(rows) > 1:
        rows["mean"] = {"mrr": float(np.mean([row["mrr"] for row in rows.values()]))}
    return rows
