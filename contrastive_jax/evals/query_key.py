"""The query-key test: find, among n keys, the span that follows the query in its document.

Dimensions: n pairs, v = 2 views, l tokens, e embedding.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from contrastive_jax.data import pipeline
from contrastive_jax.evals import embed as embed_lib

TOP = (1, 5, 10, 100)


class Pairs(NamedTuple):
    """Queries and their keys.

    Attributes:
      tokens: int32[n 2 l], with delimiters where the model was trained with them.
      mask: bool[n 2 l].
      spans: n pairs of token lists without delimiters: what a baseline reads.
      record: int64[n], the window of each pair.
    """

    tokens: np.ndarray
    mask: np.ndarray
    spans: list[tuple[list[int], list[int]]]
    record: np.ndarray


def make_pairs(windows: pipeline.Windows, config: ConfigDict, data: ConfigDict) -> Pairs:
    """Adjacent spans of `config.span` tokens, one pair a window, windows and places drawn by `config.seed`.

    Args:
      windows: a held-out split.
      config: `config.eval`.
      data: `config.data`.

    Raises:
      ValueError: a value is out of range, rows are too short for the span, or there are too few windows.
    """
    for key, least in (("pairs", 1), ("span", 1), ("batch_size", 1), ("seed", 0)):
        if config[key] < least:
            raise ValueError(f"config.eval.{key}={config[key]}: must be at least {least}")
    pipeline.check_length(data, config.span, "config.eval.span")
    rng = np.random.default_rng(config.seed)
    eligible = np.flatnonzero(windows.length >= 2 * config.span)
    if len(eligible) < config.pairs:
        raise ValueError(
            f"config.eval.pairs={config.pairs}: only {len(eligible)} held-out windows have {2 * config.span} tokens; lower it"
        )
    record = rng.permutation(eligible)[: config.pairs]
    begin = rng.integers(0, windows.length[record] - 2 * config.span + 1)
    start = np.stack([begin, begin + config.span], axis=1).astype(np.int32)
    whole = pipeline.read_tokens(windows, tf.constant(record, tf.int64))
    size = tf.fill(start.shape, config.span)
    tokens, mask = pipeline.gather_spans(whole, start, size, config.span)
    spans = [tuple(row) for row in tokens.numpy().tolist()]
    if data.delimiters:
        tokens, mask = pipeline.delimit(tokens, mask, pipeline.delimiter_ids(windows.manifest))
    return Pairs(tokens.numpy(), mask.numpy(), spans, record)


def ranks(similarity: np.ndarray) -> np.ndarray:
    """Rank of the diagonal in each row of similarity[n n], from 1; ties count against it."""
    return (similarity >= np.diagonal(similarity)[:, None]).sum(axis=1)


def score(similarity: np.ndarray) -> dict[str, dict[str, float]]:
    """Top-k and mean reciprocal rank, as fractions, query → key, key → query, and their mean.

    Args:
      similarity: [n n], row = query, column = key, the diagonal is right.
    """
    result = {}
    for direction, matrix in (("query_to_key", similarity), ("key_to_query", similarity.T)):
        rank = ranks(matrix)
        result[direction] = {f"top{k}": float((rank <= k).mean()) for k in TOP} | {"mrr": float((1 / rank).mean())}
    both = result.values()
    result["mean"] = {name: float(np.mean([scores[name] for scores in both])) for name in result["query_to_key"]}
    return result


def chance(n: int) -> dict[str, dict[str, float]]:
    """The expected score of a random order of n keys."""
    scores = {f"top{k}": min(k / n, 1.0) for k in TOP} | {"mrr": float((1 / np.arange(1, n + 1)).mean())}
    return {direction: dict(scores) for direction in ("query_to_key", "key_to_query", "mean")}


def evaluate(forward: embed_lib.Forward, pairs: Pairs, batch_size: int) -> dict[str, dict[str, float]]:
    """Scores a model on the pairs; see `score`."""
    n, v, length = pairs.tokens.shape
    rows = pairs.tokens.reshape(n * v, length), pairs.mask.reshape(n * v, length)
    z = embed_lib.embed(forward, *rows, batch_size=batch_size).reshape(n, v, -1)
    return score(z[:, 0] @ z[:, 1].T)


def baselines(pairs: Pairs, decode: Callable[[list[int]], str]) -> dict[str, dict[str, dict[str, float]]]:
    """TF-IDF and BM25 on the text of the same pairs, fitted on these texts."""
    from contrastive_jax.evals import baselines as others  # not in training: it takes a second to import

    queries, keys = ([decode(list(pair[view])) for pair in pairs.spans] for view in (0, 1))
    encode = others.tfidf(queries + keys)
    tfidf = others.products(encode(queries), encode(keys))
    forward, backward = score(others.Bm25(keys).scores(queries)), score(others.Bm25(queries).scores(keys))
    both = {"query_to_key": forward["query_to_key"], "key_to_query": backward["query_to_key"]}
    mean = {name: float(np.mean([scores[name] for scores in both.values()])) for name in both["query_to_key"]}
    return {"TF-IDF": score(tfidf), "BM25": both | {"mean": mean}}


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """A text table of percentages: a line a model and direction."""
    columns = [f"top{k}" for k in TOP] + ["mrr"]
    lines = [f"{'query-key, %':<24}{'direction':<14}" + "".join(f"{name:>8}" for name in columns)]
    for model, directions in rows.items():
        for direction, scores in directions.items():
            values = "".join(f"{100 * scores[name]:8.1f}" for name in columns)
            lines.append(f"{model:<24}{direction:<14}{values}")
    return "\n".join(lines)
