"""The views of a batch: spans cut out of the records, set between delimiters, and laid into rows.

Dimensions: n pairs, v views, g groups of pack_pairs pairs, r rows of a group per view, l tokens of a row, t tokens of the
records; s spans of a block.
"""

import functools
from typing import NamedTuple

import numpy as np

from contrastive_jax.data import packing
from contrastive_jax.data.tokenizer_json import DELIMITERS

# Spans are copied in blocks of about this many tokens, so that the arrays of a block stay in the processor's cache.
BLOCK = 1 << 16


class Views(NamedTuple):
    """The views of some pairs, as the fields of these names in `batch.Batch`.

    Attributes:
      tokens: int32[g v r l], 0 on padding.
      segment: int32[g v r l], 1 to pack_pairs on the spans of a group, in the order of its pairs, and 0 on padding.
      span_hash: int32[n v]; equal spans have equal hashes.
    """

    tokens: np.ndarray
    segment: np.ndarray
    span_hash: np.ndarray


def delimiter_ids(manifest: dict, views: int) -> np.ndarray:
    """Returns int32[v 2]: the ids of the opening and the closing delimiter of each view, -1 where the tokenizer has none.

    View 0 is x, all others are y.
    """
    names = [DELIMITERS[min(view, 1)] for view in range(views)]
    return np.array([[manifest["reserved"].get(name, -1) for name in of_view] for of_view in names], np.int32)


def make_views(
    tokens: np.ndarray,
    begin: np.ndarray,
    size: np.ndarray,
    length: int,
    delimiters: np.ndarray | None = None,
    pack_pairs: int = 1,
    pack_rows: int = 1,
) -> Views:
    """Cuts spans out of records and lays them into rows.

    Records that lie one after another in one array, with their offsets, need no copy of their own:

        start, size = sampler.sample(lengths, uniform)
        make_views(tokens, offsets[record][:, None] + start, size, config.length, delimiter_ids(manifest, v))

    Args:
      tokens: uint16 or int32 [t], the tokens of all records.
      begin: int64[n v], the position in `tokens` of each span's first token.
      size: int32[n v], the tokens of each span, at least 1. With its delimiters a span fits into a row.
      length: l, the tokens of a row.
      delimiters: int32[v 2], from `delimiter_ids`; -1, or None for all: the spans have none there.
      pack_pairs: the pairs of a group; it divides n. If the spans of a group do not fit, the longest are shortened.
      pack_rows: r, the rows of a group per view.
    """
    n, v = size.shape
    delimiters = np.full((v, 2), -1, np.int32) if delimiters is None else delimiters
    edges = (delimiters >= 0).astype(np.int64)  # [v 2], how many tokens stand before a span, and after it
    size, positions = packing.fit(size + edges.sum(1, dtype=np.int32), pack_pairs, pack_rows, length)
    size -= edges.sum(1)
    shape = (n // pack_pairs, v, pack_rows, length)
    all_tokens, all_segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    flat_tokens, flat_segments = all_tokens.reshape(-1), all_segments.reshape(-1)
    first_row = np.arange(0, shape[0] * v * pack_rows, pack_rows).reshape(shape[0], v, 1)  # of each group and view
    target = ((first_row + positions.row) * length + positions.start).transpose(0, 2, 1).reshape(n, v) + edges[:, 0]
    segment = np.broadcast_to(np.arange(n, dtype=np.int32)[:, None] % pack_pairs + 1, (n, v))
    for edge, position in enumerate((target - 1, target + size)):
        has = edges[:, edge] > 0
        flat_tokens[position[:, has]], flat_segments[position[:, has]] = delimiters[has, edge], segment[:, has]
    spans = Spans(*(x.reshape(-1) for x in (begin, size, target, segment)))
    factors, step = hash_factors(length), max(1, BLOCK // int(size.max()))
    blocks = [Spans(*(x[i : i + step] for x in spans)) for i in range(0, n * v, step)]
    hashes = [copy_spans(tokens, block, factors, flat_tokens, flat_segments) for block in blocks]
    return Views(all_tokens, all_segments, np.concatenate(hashes).reshape(n, v))


class Spans(NamedTuple):
    """Spans and where they go.

    Attributes:
      begin: int64[s], the position of each span's first token among the tokens of all records.
      size: int64[s], the tokens of each span.
      target: int64[s], the position of its first token among the tokens of all rows.
      segment: int32[s], its number within its group.
    """

    begin: np.ndarray
    size: np.ndarray
    target: np.ndarray
    segment: np.ndarray


def copy_spans(
    tokens: np.ndarray, spans: Spans, factors: np.ndarray, row_tokens: np.ndarray, row_segments: np.ndarray
) -> np.ndarray:
    """Copies and hashes a block of spans, all at once: a loop over the spans would keep other threads from running Python.

    Args:
      tokens: uint16 or int32 [t], the tokens of all records.
      spans: the block.
      factors: uint64[l], from `hash_factors`.
      row_tokens: int32[g · v · r · l], which gets the tokens.
      row_segments: int32[g · v · r · l], which gets the segments.

    Returns:
      int32[s], the hash of each span.
    """
    begin, size, target, segment = spans
    offset = np.cumsum(size) - size  # where each span would begin if the spans lay one after another
    position = np.arange(offset[-1] + size[-1]) - np.repeat(offset, size)  # of each token in its span
    span_tokens = tokens.take(position + np.repeat(begin, size))
    to = position + np.repeat(target, size)
    row_tokens[to], row_segments[to] = span_tokens, np.repeat(segment, size)
    # Multiply-shift hashing (Dietzfelbinger): the upper half of a sum of products with fixed random numbers, modulo 2**64.
    sums = np.add.reduceat(factors.take(position) * span_tokens.astype(np.uint64), offset)
    return (sums >> np.uint64(32)).astype(np.uint32).view(np.int32)


@functools.cache
def hash_factors(length: int) -> np.ndarray:
    """Returns uint64[l], the fixed random odd numbers by which the tokens of a span are multiplied for its hash."""
    return np.random.default_rng(0).integers(1 << 64, size=length, dtype=np.uint64) | np.uint64(1)
