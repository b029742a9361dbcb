"""Samplers choose where the spans of a record begin and end, from nothing but its length and uniform random numbers.

Dimensions: n records, v views, u uniform numbers per record.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from contrastive_jax.config import UserError


class Sampler(NamedTuple):
    """How the views of a pair are cut from a record.

    Attributes:
      views: v, the spans cut from one record.
      uniforms: u, the random numbers that `sample` uses per record.
      min_record: the tokens that a record must have; shorter records are left out of the data.
      max_record: the tokens of the shortest record that has room for every pair that may be asked for.
      min_span: the tokens of the shortest span that `sample` returns.
      max_span: the tokens of the longest.
      sample: (length int32[n], uniform float32[n u] in [0, 1)) → (start int32[n v], size int32[n v]), a pure function.
    """

    views: int
    uniforms: int
    min_record: int
    max_record: int
    min_span: int
    max_span: int
    sample: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def uniform_numbers(seed: int, step: int, pairs: int, numbers: int) -> np.ndarray:
    """Draws the random numbers of a step, for all pairs of the global batch.

    Each process draws them all and uses those of its own pairs, so that the spans of a pair do not depend on the process that
    cuts them.

    Args:
      seed: of the run.
      step: the number of the batch.
      pairs: of the global batch.
      numbers: u, per pair.

    Returns:
      float32[pairs u] in [0, 1), a pure function of the arguments.
    """
    return np.random.Generator(np.random.Philox(key=[seed, step])).random((pairs, numbers), np.float32)


def between(uniform: np.ndarray, low: np.ndarray | int, high: np.ndarray | int) -> np.ndarray:
    """Maps uniform float32[n] in [0, 1) to integers int32[n] in [low, high], each equally likely."""
    width = np.asarray(high - low + 1, np.float32)
    # The product may round up to `width` itself: hence the minimum.
    return np.minimum(low + (uniform * width).astype(np.int32), high)


def neighbours(config: ConfigDict) -> Sampler:
    """Two spans of one record that never overlap, as in CPT-text (Neelakantan et al., arXiv 2201.10005, §2).

    Span lengths are uniform in [min_span, max_span], the gap between the spans is uniform in [min_gap, max_gap], and so is the
    position of the two in the record. Records that cannot hold two spans of min_span with min_gap between them are left out. In
    a record too short for the longest spans, the upper bounds shrink to what fits: max_span to (length - min_gap) / 2, then
    max_gap to what the spans leave.

    Raises:
      UserError: a minimum is above its maximum.
    """
    min_span, max_span, min_gap, max_gap = config.min_span, config.max_span, config.min_gap, config.max_gap
    if min_span > max_span:
        raise UserError(f"config.data.min_span={min_span}: must not be above config.data.max_span={max_span}; lower it")
    if min_gap > max_gap:
        raise UserError(f"config.data.min_gap={min_gap}: must not be above config.data.max_gap={max_gap}; lower it")

    def sample(length: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        longest = np.minimum(max_span, (length - min_gap) // 2)
        first, second = between(uniform[:, 0], min_span, longest), between(uniform[:, 1], min_span, longest)
        gap = between(uniform[:, 2], min_gap, np.minimum(max_gap, length - first - second))
        start = between(uniform[:, 3], 0, length - first - gap - second)
        starts = np.stack([start, start + first + gap], axis=1)
        sizes = np.stack([first, second], axis=1)
        if config.order == "kept":
            return starts, sizes
        swap = uniform[:, 4:] < 0.5
        return np.where(swap, starts[:, ::-1], starts), np.where(swap, sizes[:, ::-1], sizes)

    shortest, longest = 2 * min_span + min_gap, 2 * max_span + max_gap
    return Sampler(2, 5, shortest, longest, min_span, max_span, sample)


SAMPLERS: dict[str, Callable[[ConfigDict], Sampler]] = {"neighbours": neighbours}


def make_sampler(config: ConfigDict) -> Sampler:
    """Returns the sampler that `config.data` names.

    Raises:
      UserError: its bounds contradict each other.
    """
    return SAMPLERS[config.sampler](config)


def delimiter_count(config: ConfigDict) -> int:
    """Returns how many delimiter tokens stand around each span: 2, or 0 where `config.data.delimiters` is False."""
    return 2 if config.delimiters else 0


def check_length(config: ConfigDict, span_tokens: int, key: str) -> None:
    """Checks that a row of `config.data.length` tokens can hold a span and its delimiters.

    Args:
      config: `config.data`.
      span_tokens: the number of tokens of the span.
      key: the config key that sets this number, for the message.

    Raises:
      UserError: the row is too short.
    """
    needed = span_tokens + delimiter_count(config)
    if needed > config.length:
        with_delimiters = " with its delimiters" if config.delimiters else ""
        raise UserError(
            f"config.data.length={config.length}: {key}={span_tokens} needs {needed} tokens{with_delimiters}; "
            f"raise config.data.length, or lower {key}"
        )
