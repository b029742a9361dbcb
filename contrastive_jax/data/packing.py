"""Several spans in a row: the spans of `pack_pairs` pairs share `pack_rows` rows in each view, none is cut in two.

Which rows is decided by first fit, longest first. A group too long for its rows has its longest spans cut to a common length,
the greatest found that fits. Dimensions: n groups, g spans of a group, r rows of a group, v views, l tokens of a row.
"""

from typing import NamedTuple

import tensorflow as tf
from ml_collections import ConfigDict

# Halvings of the interval in which the common length is searched.
HALVINGS = 6


def check(config: ConfigDict, min_size: int) -> None:
    """Raises ValueError, naming the key, if spans of at least `min_size` tokens cannot be packed as `config.data` says."""
    pairs, rows, batch, length = config.pack_pairs, config.pack_rows, config.batch_size, config.length
    if not 1 <= rows <= pairs:
        raise ValueError(f"config.data.pack_rows={rows}, pack_pairs={pairs}: need 1 <= pack_rows <= pack_pairs")
    if batch % pairs:
        raise ValueError(f"config.data.pack_pairs={pairs} must divide config.data.batch_size={batch}")
    if always_fits(pairs, rows, length) < min_size:
        raise ValueError(
            f"config.data.pack_rows={rows}: {pairs} spans of {min_size} tokens (with delimiters) and more need more rows of "
            f"config.data.length={length}; raise it, or lower config.data.pack_pairs"
        )


def always_fits(pairs: int, rows: int, length: int) -> int:
    """The greatest size of a span that fits whatever the others are."""
    return length // -(-pairs // rows)


class Places(NamedTuple):
    """Where the spans of each group lie.

    Attributes:
      row: int32[n g], the row of the group.
      start: int32[n g], the first token in it.
      fits: bool[n], whether all of the group found a place; the places of a group that does not are meaningless.
    """

    row: tf.Tensor
    start: tf.Tensor
    fits: tf.Tensor


def first_fit(size: tf.Tensor, rows: int, length: int) -> Places:
    """Places spans of int32[n g] tokens, the longest first, each in the first of `rows` rows that has room."""
    n, g = tf.unstack(tf.shape(size))
    order = tf.argsort(size, axis=1, direction="DESCENDING", stable=True)
    by_size = tf.transpose(tf.gather(size, order, batch_dims=1))

    def place(before: tuple, one: tf.Tensor) -> tuple:
        free, _, _, fits = before
        room = free >= one[:, None]
        row = tf.argmax(room, axis=1, output_type=tf.int32)
        start = length - tf.gather(free, row, batch_dims=1)
        left = free - tf.one_hot(row, rows, dtype=tf.int32) * one[:, None]
        return left, row, start, fits & tf.reduce_any(room, axis=1)

    nothing = tf.zeros([n], tf.int32)
    steps = tf.scan(place, by_size, (tf.fill([n, rows], length), nothing, nothing, tf.fill([n], True)))
    back = tf.argsort(order, axis=1)
    row, start = (tf.gather(tf.transpose(x), back, batch_dims=1) for x in steps[1:3])
    return Places(row, start, steps[3][g - 1])


def shorten(size: tf.Tensor, rows: int, length: int) -> tf.Tensor:
    """Sizes int32[n g] that fit: those of a group that does not are cut to the greatest common length found."""
    fits = first_fit(size, rows, length).fits
    low = tf.fill(tf.shape(fits), always_fits(size.shape[1], rows, length))
    high = tf.reduce_max(size, axis=1)

    def halve(low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        middle = (low + high) // 2
        fit = first_fit(tf.minimum(size, middle[:, None]), rows, length).fits
        return tf.where(fit, middle, low), tf.where(fit, high, middle)

    low, _ = tf.while_loop(lambda *_: True, halve, (low, high), maximum_iterations=HALVINGS)
    return tf.where(fits[:, None], size, tf.minimum(size, low[:, None]))


def pack(tokens: tf.Tensor, mask: tf.Tensor, pairs: int, rows: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Puts spans into rows.

    Args:
      tokens: int32[n·g v l], one span a row; the spans of each g rows, cut by `shorten`, go together.
      mask: bool[n·g v l], True on the span, which begins at 0.
      pairs: g.
      rows: r.

    Returns:
      tokens int32[n·r v l] and segment int32[n·r v l]: 1 … g where a span of the group lies, 0 where none does.
    """
    if (pairs, rows) == (1, 1):
        return tokens, tf.cast(mask, tf.int32)
    views, length = tokens.shape[1:]
    # [n·g v l] → [n·v g l]: views are packed apart, so that either can be encoded without the other.
    apart = [
        tf.reshape(tf.transpose(tf.reshape(x, [-1, pairs, views, length]), [0, 2, 1, 3]), [-1, pairs, length])
        for x in (tokens, mask)
    ]
    places = first_fit(tf.reduce_sum(tf.cast(apart[1], tf.int32), axis=2), rows, length)
    which = tf.cast(tf.where(apart[1]), tf.int32)  # [t 3]: group and view, span, token
    group, span, token = tf.unstack(which, axis=1)
    at = which[:, :2]
    index = tf.stack([group, tf.gather_nd(places.row, at), tf.gather_nd(places.start, at) + token], axis=1)
    shape = [tf.shape(tokens)[0] // pairs * views, rows, length]
    filled = (tf.scatter_nd(index, values, shape) for values in (tf.gather_nd(apart[0], which), span + 1))
    packed = [
        tf.reshape(tf.transpose(tf.reshape(x, [-1, views, rows, length]), [0, 2, 1, 3]), [-1, views, length]) for x in filled
    ]
    return packed[0], packed[1]
