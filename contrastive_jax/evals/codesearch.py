"""Code search as in CodeSearchNet (Husain et al., arXiv 1909.09436, §4.1): a docstring finds its function among 1,000.

Data: a folder of .jsonl or .jsonl.gz. Each line is an object with docstring_tokens and code_tokens, or else docstring and code,
and perhaps its language.

Dimensions: n functions, q docstrings.
"""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.evals import baselines
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.vectors import Encode, make_vector_task
from contrastive_jax.runtime.progress import Progress

BATCH = 1000  # a function and 999 distractors
SEED = 0  # of the order in which functions are grouped into batches, the one of the authors' code

Pair = tuple[str, str]  # docstring, code
Score = Callable[[list[str], list[str]], np.ndarray]  # (q docstrings, n functions) → float[q n]


def parse_pair(location: str, value: dict[str, Any]) -> Pair:
    """Returns the docstring and the code of one JSON line; `location` ("FILE:LINE") is for the error message.

    The keys docstring_tokens and code_tokens are preferred: `code` contains the docstring in CodeSearchNet's Python files.

    Raises:
      UserError: a text is missing, empty or not a string, or its tokens are not a list of strings.
    """
    texts = []
    for name in ("docstring", "code"):
        text = value.get(name)
        if f"{name}_tokens" in value:
            tokens = value[f"{name}_tokens"]
            text = " ".join(tokens) if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{location}: no text in {name} or {name}_tokens; give a docstring and its code in each line")
        texts.append(text)
    return texts[0], texts[1]


def read_folder(folder: epath.Path) -> dict[str, list[Pair]]:
    """Reads the pairs of a folder by their language, which is by default the beginning of the file's name.

    Raises:
      UserError: there are no files, or a line is not as it should be.
    """
    by_language = collections.defaultdict(list)
    for path in sorted((*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz"))):
        for location, value in files.read_json_lines(path):
            language = str(value.get("language") or path.name.split(".")[0])
            by_language[language].append(parse_pair(location, value))
    if not by_language:
        raise UserError(f"--data={folder}: no .jsonl or .jsonl.gz of docstring and code there")
    return dict(sorted(by_language.items()))


def all_texts(folder: epath.Path) -> list[str]:
    """Returns all docstrings and functions of a folder."""
    return [text for pairs in read_folder(folder).values() for pair in pairs for text in pair]


def bm25_scores(docstrings: list[str], functions: list[str]) -> np.ndarray:
    """Scores the functions of a batch for its docstrings by BM25."""
    return baselines.Bm25(functions).scores(docstrings)


def reciprocal_ranks(scores: np.ndarray) -> np.ndarray:
    """Returns float[n] from scores[n n], whose diagonal is right; functions with an equal score rank before the right one."""
    return 1 / (scores >= np.diagonal(scores)[:, None]).sum(1)


def score_folder(score: Score, folder: epath.Path) -> Rows:
    """Ranks the functions of a folder for each docstring.

    Returns:
      Language → the mean reciprocal rank of the right function in batches of 1,000. The last, smaller batch is dropped; with
      fewer than 1,000 functions they are one batch. For several languages also "mean", of their figures.

    Raises:
      UserError: the data are not as they should be.
    """
    rows: Rows = {}
    for language, pairs in read_folder(folder).items():
        size = min(BATCH, len(pairs))
        if size < BATCH:
            logging.warning("%s: only %d pairs; figures among %d are higher than among %d", language, size, size, BATCH)
        order = np.random.RandomState(SEED).permutation(len(pairs))
        means: list[float] = []
        with Progress(f"code search, {language}", total=len(pairs) // size, unit="batches") as progress:
            for start in range(0, len(pairs) - size + 1, size):
                docstrings, functions = zip(*(pairs[index] for index in order[start : start + size]), strict=True)
                means.append(float(reciprocal_ranks(score(list(docstrings), list(functions))).mean()))
                progress.advance(note=f"MRR {100 * np.mean(means):.2f}")
        rows[language] = {"mrr": float(np.mean(means))}
    if len(rows) > 1:
        rows["mean"] = {"mrr": float(np.mean([row["mrr"] for row in rows.values()]))}
    return rows


def score_encoder(encode: Encode, folder: epath.Path) -> Rows:
    """Scores an encoder: ranks the functions by the dot products of their vectors with each docstring's."""

    def score(docstrings: list[str], functions: list[str]) -> np.ndarray:
        return baselines.dot_products(encode(docstrings, "query"), encode(functions, "document"))

    return score_folder(score, folder)


TASK = make_vector_task(
    name="codesearch",
    score=score_encoder,
    all_texts=all_texts,
    files=("*.jsonl", "*.jsonl.gz"),
    protocol={
        "similarity": "cosine",
        "candidates": BATCH,
        "order": f"permuted by seed {SEED}",
        "ties": "count against",
        "left over": "dropped",
        "texts": "docstring_tokens and code_tokens where given, else docstring and code",
    },
    own_baselines={"BM25": lambda folder: score_folder(bm25_scores, folder)},
)
