"""Packing: the spans of `pack_pairs` pairs share `pack_rows` rows per view, and no span is split over two rows.

Each span goes into the first row that has room for it, the longest span first. If the spans of a group do not fit, its longest
spans are shortened to the greatest common length found that fits.

Dimensions: b pairs, v views, g groups, p pairs of a group, r rows of a group per view, l tokens of a row; n groups of one view.
"""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.data import spans

# How often the interval in which the common length is searched is halved.
HALVINGS = 6


def check_rows(config: ConfigDict, min_span: int) -> None:
    """Checks that the rows of a group can hold its spans, whatever their sizes.

    Args:
      config: `config.data`.
      min_span: the tokens of the shortest span, without delimiters; longer spans may be shortened to it.

    Raises:
      UserError: the values contradict each other; the message names the key.
    """
    pairs, rows, batch, length = config.pack_pairs, config.pack_rows, config.batch_size, config.length
    min_size = min_span + spans.delimiter_count(config)
    if rows > pairs:
        raise UserError(f"config.data.pack_rows={rows}: must not be above config.data.pack_pairs={pairs}; lower it")
    if batch % pairs:
        raise UserError(f"config.data.pack_pairs={pairs}: must divide config.data.batch_size={batch}; change either")
    if always_fits(pairs, rows, length) < min_size:
        raise UserError(
            f"config.data.pack_rows={rows}: {pairs} spans of at least {min_size} tokens (with delimiters) need more rows of "
            f"config.data.length={length}; raise it, or lower config.data.pack_pairs"
        )


def always_fits(pairs: int, rows: int, length: int) -> int:
    """Returns the greatest size at which the spans of a group fit, whatever the sizes of the others."""
    return length // -(-pairs // rows)


class Positions(NamedTuple):
    """Where the spans of a batch lie: one position per span.

    Attributes:
      row: int64[g v p], the row among those of its group and view.
      start: int64[g v p], the first token of the span in that row.
    """

    row: np.ndarray
    start: np.ndarray


def first_fit(size: np.ndarray, rows: int, length: int) -> tuple[Positions, np.ndarray]:
    """Finds a position for each span, the longest first: each goes into the first row of its group that has room for it.

    Args:
      size: int32[n p], the sizes of the p spans of n groups.
      rows: r, the rows of a group.
      length: l, the tokens of a row.

    Returns:
      The positions, each [n p], and fits bool[n]: whether every span of the group has a position. The positions of a group that
      does not fit are meaningless.
    """
    n, p = size.shape
    order = np.argsort(-size, axis=1, kind="stable")
    by_size = np.take_along_axis(size, order, axis=1).T
    free, fits = np.full((n, rows), length), np.ones(n, bool)
    row, start = np.empty((2, p, n), np.int64)
    groups = np.arange(n)
    for i, next_size in enumerate(by_size):  # over the spans of a group, for all groups at once
        room = free >= next_size[:, None]
        row[i] = room.argmax(axis=1)
        start[i] = length - free[groups, row[i]]
        fits &= room[groups, row[i]]
        free[groups, row[i]] -= next_size
    original_order = np.argsort(order, axis=1)
    return Positions(*(np.take_along_axis(x.T, original_order, axis=1) for x in (row, start))), fits


def shorten(size: np.ndarray, rows: int, length: int) -> np.ndarray:
    """Returns sizes int32[n p] at which n groups that do not fit do: the longest spans of a group get one common length."""
    low = np.full(len(size), always_fits(size.shape[1], rows, length))
    high = size.max(axis=1)
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        _, fits = first_fit(np.minimum(size, middle[:, None]), rows, length)
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return np.minimum(size, low[:, None])


def fit(size: np.ndarray, pairs: int, rows: int, length: int) -> tuple[np.ndarray, Positions]:
    """Decides how long the spans of a batch are and where they lie.

    Args:
      size: int32[b v], the tokens asked for each span, delimiters included.
      pairs: p, the pairs of a group; it divides b.
      rows: r, the rows of a group per view.
      length: l, the tokens of a row.

    Returns:
      Sizes int64[b v], none greater than asked for, and the positions [g v p] of spans of these sizes.
    """
    views = size.shape[1]
    if (pairs, rows) == (1, 1):
        zeros = np.zeros((len(size), views, 1), np.int64)
        return size.astype(np.int64), Positions(zeros, zeros)
    # [b v] → [g v p] → [g·v p]: each view is packed alone, so that it can be encoded without the others.
    by_view = size.astype(np.int64).reshape(-1, pairs, views).transpose(0, 2, 1).reshape(-1, pairs)
    positions, fits = first_fit(by_view, rows, length)
    if not fits.all():
        by_view[~fits] = shorten(by_view[~fits], rows, length)
        positions, _ = first_fit(by_view, rows, length)
    row, start = (x.reshape(-1, views, pairs) for x in positions)
    return by_view.reshape(-1, views, pairs).transpose(0, 2, 1).reshape(-1, views), Positions(row, start)
