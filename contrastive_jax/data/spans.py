"""Samplers choose where the spans of a record begin and end, from nothing but its length and uniform random numbers.

Dimensions: n records, v views, u uniform numbers per record.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.data.pieces import Texts, Units


class Sampler(NamedTuple):
    """How the views of a pair are cut from a record.

    Attributes:
      views: v, the spans cut from one record.
      uniforms: u, the random numbers that `sample` uses per record.
      min_record: the tokens that a record must have; shorter records are left out of the data.
      max_record: the tokens of the shortest record that has room for every pair that may be asked for.
      min_span: the tokens of the shortest span that `sample` returns.
      max_span: the tokens of the longest.
      sample: (length int32[n], uniform float32[n u] in [0, 1)) → (start int32[n v], size int32[n v]), a pure function. Where
        `ends` is set, the units of the records come third.
      keys: what has bounds of its own, `config.data.min_KEY` and `max_KEY`.
      ends: the units that `sample` cuts between: "sentence", "field" of a pair, or "" for any token.
      min_units: the units of a record without which it is cut at its middle instead.
      max_units: the units of the shortest record that has room for every pair that may be asked for.
    """

    views: int
    uniforms: int
    min_record: int
    max_record: int
    min_span: int
    max_span: int
    sample: Callable[..., tuple[np.ndarray, np.ndarray]]
    keys: tuple[str, ...] = ("span",)
    ends: str = ""
    min_units: int = 0
    max_units: int = 0


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
    """Maps uniform float32 in [0, 1) to integers in [low, high], each equally likely; the arguments broadcast."""
    width = np.asarray(high - low + 1, np.float32)
    # The product may round up to `width` itself: hence the minimum.
    return np.minimum(low + (uniform * width).astype(np.int32), high)


def check_bounds(config: ConfigDict, *keys: str) -> None:
    """Checks that the minimum of each key is not above its maximum.

    Raises:
      UserError: one is.
    """
    for key in keys:
        low, high = config[f"min_{key}"], config[f"max_{key}"]
        if high is not None and low > high:
            raise UserError(f"config.data.min_{key}={low}: must not be above config.data.max_{key}={high}; lower it")


def neighbours(config: ConfigDict) -> Sampler:
    """`config.views` spans of one record that never overlap, as in CPT-text (Neelakantan et al., arXiv 2201.10005, §2).

    Span lengths are uniform in [min_span, max_span], gaps between spans are uniform in [min_gap, max_gap], and so is the
    position of them all in the record. Records that cannot hold spans of min_span with min_gap between them are left out. In a
    record too short for the longest spans, the upper bounds shrink to what fits: max_span to an equal share of what min_gap
    leaves, then max_gap, from the first gap to the last, to what the spans leave.

    Raises:
      UserError: a minimum is above its maximum.
    """
    return _in_a_row(config, config.views, ("span", "gap"))


def span(config: ConfigDict) -> Sampler:
    """One span of a record, of a length that is uniform in [min_span, max_span], anywhere in it with equal chance.

    Raises:
      UserError: min_span is above max_span.
    """
    return _in_a_row(config, 1, ("span",))


def _in_a_row(config: ConfigDict, views: int, keys: tuple[str, ...]) -> Sampler:
    """The sampler of `views` spans that follow one another, or in the other order."""
    check_bounds(config, *keys)
    min_span, max_span, min_gap, max_gap, gaps = config.min_span, config.max_span, config.min_gap, config.max_gap, views - 1

    def sample(length: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        longest = np.minimum(max_span, (length - gaps * min_gap) // views)
        each_size = [between(uniform[:, i], min_span, longest) for i in range(views)]
        free = length - sum(each_size) - gaps * min_gap  # the tokens that neither spans nor the shortest gaps take
        offsets = [np.zeros_like(free)]
        for i in range(gaps):
            gap = between(uniform[:, views + i], min_gap, np.minimum(max_gap, min_gap + free))
            free = free - (gap - min_gap)
            offsets.append(offsets[i] + each_size[i] + gap)
        start = between(uniform[:, views + gaps], 0, free)
        starts, sizes = np.stack([start + offset for offset in offsets], axis=1), np.stack(each_size, axis=1)
        if config.order == "kept":
            return starts, sizes
        swap = uniform[:, -1:] < 0.5
        return np.where(swap, starts[:, ::-1], starts), np.where(swap, sizes[:, ::-1], sizes)

    shortest, longest = views * min_span + gaps * min_gap, views * max_span + gaps * max_gap
    return Sampler(views, 2 * views + 1, shortest, longest, min_span, max_span, sample, keys)


def declutr(config: ConfigDict) -> Sampler:
    """An anchor and `config.views` - 1 positives around it, as in DeCLUTR (Giorgi et al., arXiv 2006.03659, §3.1).

    The length of the anchor is min_span + Beta(4, 2) · (max_span - min_span), that of a positive the same with Beta(2, 4), and
    the anchor lies anywhere in the record with equal chance. By `config.strategy`, a positive overlaps or touches the anchor
    ("default"), lies inside it ("subsuming", no longer than the anchor) or borders on it ("adjacent", on either side that has
    room). Records of less than twice min_span ("adjacent": three times, less 1) are left out, and in others of less than twice
    max_span the upper bounds shrink to what fits.

    The k-th smallest of 5 uniform numbers has the distribution Beta(k, 6 - k).

    Raises:
      UserError: min_span is above max_span.
    """
    check_bounds(config, "span")
    min_span, max_span, strategy = config.min_span, config.max_span, config.strategy
    views, shortest = config.views, 3 * min_span - 1 if strategy == "adjacent" else 2 * min_span

    def sample(length: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length, numbers = length[:, None], uniform.reshape(len(length), views, 6)
        ranked, place = np.sort(numbers[:, :, :5], axis=2), numbers[:, :, 5]
        anchor = between(ranked[:, :1, 3], min_span, np.minimum(max_span, length - (shortest - min_span)))
        start = between(place[:, :1], 0, length - anchor)
        end, beta, place = start + anchor, ranked[:, 1:, 1], place[:, 1:]
        if strategy == "subsuming":
            size = between(beta, min_span, anchor)
            first = between(place, start, end - size)
        elif strategy == "adjacent":
            size = between(beta, min_span, np.minimum(max_span, np.maximum(start, length - end)))
            before, after = start >= size, end + size <= length
            first = np.where(before & (~after | (place < 0.5)), start - size, end)
        else:
            size = between(beta, min_span, np.minimum(max_span, length))
            first = between(place, np.maximum(0, start - size), np.minimum(end, length - size))
        return np.concatenate([start, first], axis=1), np.concatenate([anchor, size], axis=1)

    return Sampler(views, 6 * views, shortest, 2 * max_span, min_span, max_span, sample)


def sentences(config: ConfigDict) -> Sampler:
    """Two runs of `config.sentences` sentences of one record, as in CoLE's `PairChooser`.

    Of the sentences that have a partner, the first run begins at any with equal chance. The second begins at any with equal
    chance of those before or after it that leave min_separation to max_separation sentences between the two. Where a record
    has too few sentences for that, a run has (sentences - min_separation) // 2 of them; where that is none, the record is cut
    at its middle. Runs of more than max_span tokens lose their end. Records of less than twice min_span tokens are left out,
    and a run of short sentences may have fewer than min_span.

    Raises:
      UserError: a minimum is above its maximum.
    """
    check_bounds(config, "span", "separation")
    low, high, wanted, max_span = config.min_separation, config.max_separation, config.sentences, config.max_span

    def sample(length: np.ndarray, uniform: np.ndarray, units: Units) -> tuple[np.ndarray, np.ndarray]:
        length, count, first = length[:, None], np.diff(units.first)[:, None], units.first[:-1, None]
        chunk = np.minimum(wanted, (count - low) // 2)  # the sentences of each chunk
        halved = chunk < 1
        chunk, count = np.maximum(chunk, 1), np.maximum(count, 2 + low)  # so that there is a first chunk and a second
        number = choose_apart(uniform, count - chunk, chunk + low, None if high is None else chunk + high)
        if config.order == "kept":
            number.sort(axis=1)
        unit = np.where(halved, 0, first + number)
        begin, end = units.start[unit], units.start[unit + chunk]
        half = length // 2
        start = np.where(halved, np.where(number > 0, half, 0), begin - units.start[first])
        size = np.where(halved, np.where(number > 0, length - half, half), end - begin)
        return start, np.minimum(size, max_span)

    record = 2 * config.min_span
    return Sampler(2, 2, record, record, 1, max_span, sample, ("span",), "sentence", 2 + low, 2 * wanted + low)


def fields(config: ConfigDict) -> Sampler:
    """The query of a prepared pair, positives and `config.hard_negatives` hard negatives, `config.views` texts in all.

    Of a pair with more positives or hard negatives, any are drawn with equal chance; they stay in their order. Of a longer text
    the first max_span tokens are taken, of a query what fits into query_length, where that is set.
    """
    views = config.views

    def sample(length: np.ndarray, uniform: np.ndarray, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        del length
        begin, size = cut_texts(texts, choose_texts(config, texts, uniform), config)
        return begin - texts.start[texts.first[:-1]][:, None], size

    return Sampler(views, views - 1, 2 * views, 2 * views, 1, config.max_span, sample, ("span",), "field")


def choose_texts(config: ConfigDict, texts: Texts, uniform: np.ndarray) -> np.ndarray:
    """Returns int64[n v], the numbers of the texts of pairs that are their views, see `fields`; uniform is float32[n v - 1]."""
    hard, first, positives = config.hard_negatives, texts.first[:-1, None], texts.positives[:, None]
    wanted = config.views - 1 - hard
    negatives = np.diff(texts.first)[:, None] - 1 - positives
    chosen = [first, first + 1 + draw(uniform[:, :wanted], positives)]
    chosen.append(first + 1 + positives + draw(uniform[:, wanted:], negatives))
    return np.concatenate(chosen, axis=1)


def draw(uniform: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns int64[n k], k different numbers below count int64[n 1], any with equal chance, ascending; uniform is [n k]."""
    drawn = np.zeros((len(uniform), 0), np.int64)
    for column in range(uniform.shape[1]):
        number = between(uniform[:, column], 0, count[:, 0] - 1 - column).astype(np.int64)
        for before in drawn.T:  # ascending: each number before it that is not above it moves it up
            number += number >= before
        drawn = np.sort(np.concatenate([drawn, number[:, None]], axis=1), axis=1)
    return drawn


def cut_texts(texts: Texts, number: np.ndarray, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Returns int64[n v] each, the position of the texts of these numbers among the tokens of all, and their sizes."""
    begin, end = texts.start[number], texts.start[number + 1]
    longest = np.full(number.shape[1], config.max_span)
    if config.query_length:
        longest[0] = min(config.max_span, config.query_length - delimiter_count(config))
    return begin, np.minimum(end - begin - 1, longest)  # without the id that ends it


def choose_apart(uniform: np.ndarray, last: np.ndarray, low: np.ndarray | int, high: np.ndarray | int | None) -> np.ndarray:
    """Draws two numbers that lie apart.

    Args:
      uniform: float32[n 2].
      last: int64[n 1], the greatest number that may be drawn; the least is 0.
      low: int64[n 1], by how much they differ at least; not above `last`.
      high: int64[n 1], by how much they differ at most; None: by any number.

    Returns:
      int64[n 2]: the first is any number that has a partner, with equal chance, the second any of its partners.
    """
    # From `low` on there is a partner below, up to last - low one above, and between these there may be numbers without any.
    lonely = np.maximum(0, 2 * low - last - 1)
    number = between(uniform[:, :1], 0, last - lonely)
    number = np.where(number > last - low, number + lonely, number)
    lowest, highest = (0, last) if high is None else (np.maximum(0, number - high), np.minimum(last, number + high))
    below, above = np.maximum(0, number - low - lowest + 1), np.maximum(0, highest - number - low + 1)
    rank = between(uniform[:, 1:], 0, below + above - 1)
    return np.concatenate([number, np.where(rank < below, lowest + rank, number + low + rank - below)], axis=1)


SAMPLERS: dict[str, Callable[[ConfigDict], Sampler]] = {
    "neighbours": neighbours,
    "span": span,
    "declutr": declutr,
    "sentences": sentences,
    "fields": fields,
}


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
