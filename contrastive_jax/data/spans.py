"""Samplers: where the spans of a window lie. Pure functions of the window's length and of given uniform numbers.

Dimensions: n windows, v views, u uniform numbers a window.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf
from ml_collections import ConfigDict


class Sampler(NamedTuple):
    """How views are cut from a window.

    Attributes:
      views: v, the spans cut from one window.
      uniforms: u, random numbers that `cut` uses a window.
      min_window: tokens a window must have; shorter ones are left out of the data.
      min_span: the shortest span `cut` gives.
      max_span: the longest.
      cut: (length int32[n], uniform float32[n u] in [0, 1)) → (start int32[n v], size int32[n v]).
    """

    views: int
    uniforms: int
    min_window: int
    min_span: int
    max_span: int
    cut: Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def between(uniform: tf.Tensor, low: tf.Tensor | int, high: tf.Tensor | int) -> tf.Tensor:
    """Maps uniform float32[n] in [0, 1) to integers in [low, high], each equally likely."""
    width = tf.cast(high - low + 1, tf.float32)
    # The product may round up to `width` itself: hence the minimum.
    return tf.minimum(low + tf.cast(uniform * width, tf.int32), high)


def neighbours(config: ConfigDict) -> Sampler:
    """Two spans of one document that never overlap, as in CPT-text (arXiv 2201.10005, §2).

    Lengths are uniform in [min_span, max_span], the gap in [min_gap, max_gap], the place in the window uniform. Windows that
    cannot hold two spans of min_span and min_gap between them are left out. In a window too short for the longest request the
    upper bounds shrink to what fits: max_span to (length - min_gap) / 2, then max_gap to what the spans leave.

    Raises:
      ValueError: bounds that are negative or out of order.
    """
    min_span, max_span, min_gap, max_gap = config.min_span, config.max_span, config.min_gap, config.max_gap
    if not 1 <= min_span <= max_span:
        raise ValueError(f"config.data.min_span={min_span}, max_span={max_span}: need 1 <= min_span <= max_span")
    if not 0 <= min_gap <= max_gap:
        raise ValueError(f"config.data.min_gap={min_gap}, max_gap={max_gap}: need 0 <= min_gap <= max_gap")
    if config.order not in ("random", "kept"):
        raise ValueError(f"config.data.order={config.order!r}: choose one of random, kept")

    def cut(length: tf.Tensor, uniform: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        u = tf.unstack(uniform, axis=1)
        longest = tf.minimum(max_span, (length - min_gap) // 2)
        first, second = between(u[0], min_span, longest), between(u[1], min_span, longest)
        gap = between(u[2], min_gap, tf.minimum(max_gap, length - first - second))
        start = between(u[3], tf.zeros_like(length), length - first - gap - second)
        starts = tf.stack([start, start + first + gap], axis=1)
        sizes = tf.stack([first, second], axis=1)
        if config.order == "kept":
            return starts, sizes
        swap = u[4][:, None] < 0.5
        return tf.where(swap, starts[:, ::-1], starts), tf.where(swap, sizes[:, ::-1], sizes)

    return Sampler(views=2, uniforms=5, min_window=2 * min_span + min_gap, min_span=min_span, max_span=max_span, cut=cut)


SAMPLERS: dict[str, Callable[[ConfigDict], Sampler]] = {"neighbours": neighbours}


def make(config: ConfigDict) -> Sampler:
    """The sampler of `config.data`.

    Raises:
      ValueError: unknown name, or values out of range.
    """
    if config.sampler not in SAMPLERS:
        raise ValueError(f"config.data.sampler={config.sampler!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[config.sampler](config)
