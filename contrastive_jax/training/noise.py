"""Noise on the tokens of a row, on the devices: masked, replaced, deleted and moved tokens, by a hash of the row's number.

An operation gives each place a new token and, where it moves or deletes tokens, a sort key: one stable sort of (span, key) then
moves them all, so that the spans of packed rows stay contiguous, and what is deleted becomes padding. Delimiters and padding
are never touched. Operations follow one another, each on what the one before it has left. What is picked is counted in units,
tokens or words; at least one unit stays.

Dimensions: n rows, l tokens per row, u <= l units of a row.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from contrastive_jax.data import pieces
from contrastive_jax.models.dropout import Noise, row_uniform
from contrastive_jax.models.encoder import position_in_span
from contrastive_jax.objectives.tokens import Targets

# The ids after the vocabulary that "sentinel" puts in the place of spans: as many as T5 has.
SENTINELS = 100
# SpanBERT's lengths of spans, P(1 ... 10): geometric with p = 0.2, clipped at 10 words (arXiv 1907.10529, §3.1).
GEOMETRIC = 0.2 * 0.8 ** np.arange(10)


class Vocabulary(NamedTuple):
    """The ids of a tokenizer.

    Attributes:
      size: the number of ids.
      reserved: {name: id} of those that no text has, "mask" among them.
      tables: where words begin and sentences end. None: each token is a word, and a row one sentence.
    """

    size: int
    reserved: Mapping[str, int]
    tables: pieces.Tables | None = None


class Text(NamedTuple):
    """What an operation sees of rows.

    Attributes:
      tokens: int32[n l].
      free: bool[n l], the places that it may change.
      words: bool[n l], where words begin.
      sentences: bool[n l], where sentences begin.
      position: int32[n l], the index of each token in its span, delimiters included.
      size: int32[n l], the tokens of its span.
      noise: a random key and the number of each row.
      pair: the same key and the number of each row's pair.
      view: int32[n], the view of each row.
    """

    tokens: jax.Array
    free: jax.Array
    words: jax.Array
    sentences: jax.Array
    position: jax.Array
    size: jax.Array
    noise: Noise
    pair: Noise
    view: jax.Array

    @property
    def place(self) -> jax.Array:
        """The index of each token in its row, int32[1 l]."""
        return jnp.arange(self.tokens.shape[1])[None]

    def uniform(self, number: int, of_pair: bool = False) -> jax.Array:
        """Returns random numbers in [0, 1), float32[n l]; others for each `number`."""
        noise = self.pair if of_pair else self.noise
        return row_uniform(noise._replace(rng=jax.random.fold_in(noise.rng, number)), self.tokens.shape[1:])

    def of_span(self, x: jax.Array) -> jax.Array:
        """Returns the value of x[n l] at the first place of each token's span."""
        return take(x, self.place - self.position)


class Change(NamedTuple):
    """What an operation does.

    Attributes:
      tokens: int32[n l], the new tokens.
      picked: bool[n l], where they have to be predicted.
      key: int32[n l], the new order of the free places within their span. None: none moves.
      gone: bool[n l], which places are deleted. None: none is.
    """

    tokens: jax.Array
    picked: jax.Array
    key: jax.Array | None = None
    gone: jax.Array | None = None


# (text, its rate in `noise.ops`, config.noise, vocabulary) → Change
Op = Callable[[Text, float, ConfigDict, Vocabulary], Change]


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns x[i, index[i, j]] of x[n l] and index[n l]."""
    return jnp.take_along_axis(x, index, axis=1)


def lowest(x: jax.Array, count: jax.Array) -> jax.Array:
    """Returns which of x[n l] are the `count` lowest of their row, count int32[n 1]."""
    return jnp.argsort(jnp.argsort(x, axis=1), axis=1) < count


def composition(uniform: jax.Array, total: jax.Array, parts: jax.Array) -> jax.Array:
    """Writes totals as sums of parts >= 1, each way equally likely (as T5's `random_segmentation`).

    Args:
      uniform: random numbers [n k] in [0, 1).
      total: int32[n 1], at most k.
      parts: int32[n 1], at most `total`.

    Returns:
      The parts in order, int32[n k], followed by zeros.
    """
    place = jnp.arange(uniform.shape[1])[None]
    inner = (place > 0) & (place < total)
    ends = jnp.sort(jnp.where(inner & lowest(jnp.where(inner, uniform, 2.0), parts - 1), place, total), axis=1)
    return jnp.diff(ends, axis=1, prepend=0)


def units(text: Text, config: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Returns the number of each place's unit from 0, int32[n l], and how many there are, int32[n 1]."""
    starts = text.free if config.unit == "token" else text.words
    return jnp.maximum(jnp.cumsum(starts, axis=1) - 1, 0), starts.sum(1, keepdims=True)


def budget(rate: float, count: jax.Array) -> jax.Array:
    """Returns how many of so many units are picked, int32: the rounded share, but at least one, and one stays."""
    return jnp.clip(jnp.floor(rate * count + 0.5).astype(jnp.int32), 1, jnp.maximum(count - 1, 0))


def spread(text: Text, unit: jax.Array, gaps: jax.Array, sizes: jax.Array) -> jax.Array:
    """Numbers spans from 1 in the places that they take, int32[n l]; 0 elsewhere.

    Args:
      text: the rows.
      unit: int32[n l], the unit of each place.
      gaps: int32[n k], the units before each span, since the one before it.
      sizes: int32[n k], the units of each span; 0 after the last.
    """
    starts = jnp.cumsum(gaps, axis=1) + jnp.cumsum(sizes, axis=1) - sizes
    number = jax.vmap(lambda edges, x: jnp.searchsorted(edges, x, side="right"))(starts, unit)
    ends = jnp.pad(starts + sizes, ((0, 0), (1, 0)))
    return jnp.where(text.free & (unit < take(ends, number)), number, 0)


def pick_spans(text: Text, rate: float, config: ConfigDict, chances: np.ndarray) -> jax.Array:
    """Picks spans of units that fill the budget, the last one cut to it, at places that are equally likely; see `spread`.

    Args:
      text: the rows.
      rate: the share of the units.
      config: `config.noise`.
      chances: P(1), P(2), ..., up to a factor, of a span's units.
    """
    unit, count = units(text, config)
    wanted = budget(rate, count)
    lengths = 1 + jnp.searchsorted(
        jnp.asarray(np.cumsum(chances) / np.sum(chances), jnp.float32), text.uniform(0), side="right"
    )
    sizes = jnp.clip(wanted - jnp.cumsum(lengths, axis=1) + lengths, 0, jnp.minimum(lengths, wanted))
    parts = (sizes > 0).sum(1, keepdims=True) + 1
    uniform = jnp.concatenate([text.uniform(1), text.uniform(2)[:, :2]], axis=1)
    gaps = composition(uniform, count - wanted + parts, parts)[:, : sizes.shape[1]] - 1
    return spread(text, unit, jnp.maximum(gaps, 0), sizes)


def pick(text: Text, rate: float, config: ConfigDict) -> jax.Array:
    """Picks units, or spans of words: numbers what is picked from 1 on, int32[n l]; 0 elsewhere."""
    if config.unit == "span":
        return pick_spans(text, rate, config, GEOMETRIC)
    unit, count = units(text, config)
    uniform = jnp.where(text.place < count, text.uniform(0), 2.0)
    by_chance = jnp.minimum((uniform < rate).sum(1, keepdims=True), count - 1)
    chosen = lowest(uniform, budget(rate, count) if config.exact else by_chance)
    return jnp.where(text.free & take(chosen, unit), unit + 1, 0)


def begins(text: Text, number: jax.Array) -> jax.Array:
    """Returns the first place of each numbered group within its span, bool[n l]."""
    before = jnp.pad(number[:, :-1], ((0, 0), (1, 0)))
    return (number > 0) & ((number != before) | (text.position == 0))


def random_tokens(text: Text, vocabulary: Vocabulary) -> jax.Array:
    """Draws tokens int32[n l], evenly from all that a text may have."""
    ids = np.setdiff1d(np.arange(vocabulary.size), list(vocabulary.reserved.values())).astype(np.int32)
    return jnp.asarray(ids)[(text.uniform(3) * len(ids)).astype(jnp.int32)]


def mask(text: Text, rate: float, config: ConfigDict, vocabulary: Vocabulary) -> Change:
    """BERT's: most picked tokens become the mask, some a random token, some stay (arXiv 1810.04805, §3.1).

    What becomes of it is decided for each token, and with noise.unit="span" for each span, as in SpanBERT.
    """
    number, uniform = pick(text, rate, config), text.uniform(4)
    if config.unit == "span":
        uniform = take(uniform, number)
    noised = jnp.where(uniform < config.random_share, random_tokens(text, vocabulary), vocabulary.reserved["mask"])
    kept = (number == 0) | (uniform >= 1 - config.kept_share)
    return Change(jnp.where(kept, text.tokens, noised), number > 0)


def replace(text: Text, rate: float, config: ConfigDict, vocabulary: Vocabulary) -> Change:
    """Puts random tokens in the picked places."""
    picked = pick(text, rate, config) > 0
    return Change(jnp.where(picked, random_tokens(text, vocabulary), text.tokens), picked)


def delete(text: Text, rate: float, config: ConfigDict, vocabulary: Vocabulary) -> Change:
    """Deletes what is picked (TSDAE, arXiv 2104.06979; CLEAR, arXiv 2012.15466)."""
    gone = pick(text, rate, config) > 0
    return Change(text.tokens, jnp.zeros_like(gone), gone=gone)


def infill(text: Text, rate: float, config: ConfigDict, vocabulary: Vocabulary) -> Change:
    """BART's: spans of Poisson lengths become one mask each, and a span of length 0 inserts a mask (arXiv 1910.13461, §2.2).

    An inserted mask takes the place of a token that is gone, so that rows get no longer; their number is right on average.
    """
    mean = config.span_mean
    chances = np.cumprod(mean / np.arange(1, int(3 * mean) + 10)) * math.exp(-mean)  # P(1), P(2), ...
    number = pick_spans(text, rate, config, chances)
    first, unit = begins(text, number), units(text, config)[0]
    first_unit = take(unit, jax.lax.cummax(jnp.where(first, text.place, 0), axis=1))
    starts = unit != jnp.pad(unit[:, :-1], ((0, 0), (1, 0)))
    second = (number > 0) & starts & (unit == first_unit + 1)  # the first token of a span's second unit
    inserted = second & (text.uniform(3) < math.exp(-mean) / (1 - (1 + mean) * math.exp(-mean)))
    after = text.place - text.position + (text.uniform(4) * (text.size - 1)).astype(jnp.int32)
    key = jnp.where(inserted, 2 * after + 1, 2 * text.place)
    masks = first | inserted
    return Change(jnp.where(masks, vocabulary.reserved["mask"], text.tokens), masks, key, (number > 0) & ~masks)


def sentinel(text: Text, rate: float, config: ConfigDict, vocabulary: Vocabulary) -> Change:
    """T5's: spans of `span_mean` units on average become sentinels, from the last id down (arXiv 1910.10683, §3.1.4).

    View 0 has sentinels in place of the spans, and all others have them in place of what view 0 keeps: T5's target. All views
    of a pair draw alike, so they must be copies. A row begins with kept units and ends with a span, as in the reference.
    """
    unit, count = units(text, config)
    wanted = budget(rate, count)
    parts = jnp.clip(jnp.round(wanted / config.span_mean).astype(jnp.int32), 1, count - wanted)  # each has kept units before it
    sizes = composition(text.uniform(0, of_pair=True), wanted, parts)
    gaps = composition(text.uniform(1, of_pair=True), count - wanted, parts)
    number = spread(text, unit, gaps, sizes)
    kept = jnp.where(text.free, spread(text, unit, jnp.pad(sizes, ((0, 0), (1, 0)))[:, :-1], gaps), 0)
    number = jnp.where(text.view[:, None] == 0, number, kept)
    first = begins(text, number)
    ids = vocabulary.size + SENTINELS - jnp.minimum(number, SENTINELS)
    return Change(jnp.where(first, ids, text.tokens), first, gone=(number > 0) & ~first)


def ngram(text: Text, rate: float, config: ConfigDict, vocabulary: Vocabulary) -> Change:
    """InfoWord's: view 0 has one n-gram masked, and all others keep only it, up to `rate` units (arXiv 1910.08350, §3).

    All views of a pair draw alike, so they must be copies.
    """
    unit, count = units(text, config)
    length, start = (text.uniform(i, of_pair=True)[:, :1] for i in (0, 1))
    length = jnp.minimum(1 + (length * int(rate)).astype(jnp.int32), jnp.maximum(count - 1, 1))
    start = (start * (count - length + 1)).astype(jnp.int32)
    inside = text.free & (unit >= start) & (unit < start + length)
    picked = inside & (text.view[:, None] == 0)
    gone = text.free & ~inside & (text.view[:, None] > 0)
    return Change(jnp.where(picked, vocabulary.reserved["mask"], text.tokens), picked, gone=gone)


def permute(text: Text, rate: float, config: ConfigDict, vocabulary: Vocabulary) -> Change:
    """Puts a share of the sentences in a random order; the others stay where they are (BART)."""
    number, uniform = jnp.maximum(jnp.cumsum(text.sentences, axis=1) - 1, 0), text.uniform(0)
    count = text.sentences.sum(1, keepdims=True)
    real = text.place < count
    chosen = lowest(jnp.where(real, uniform, 2.0), jnp.floor(rate * count + 0.5).astype(jnp.int32))
    slots = jnp.sort(jnp.where(chosen, text.place, text.tokens.shape[1]), axis=1)
    rank = jnp.argsort(jnp.argsort(jnp.where(chosen, text.uniform(1), 2.0), axis=1), axis=1)
    moved = jnp.where(chosen, take(slots, rank), text.place)
    return Change(text.tokens, jnp.zeros_like(text.free), key=take(moved, number))


def rotate(text: Text, rate: float, config: ConfigDict, vocabulary: Vocabulary) -> Change:
    """Lets a share of the texts begin at a random token, with what stood before it at the end (BART)."""
    rotated = text.of_span(text.uniform(0)) < rate
    start = (text.of_span(text.uniform(1)) * text.size).astype(jnp.int32)
    late = rotated & (text.position < start)
    return Change(text.tokens, jnp.zeros_like(text.free), key=text.place + text.tokens.shape[1] * late)


OPS: dict[str, Op] = {
    "mask": mask,
    "replace": replace,
    "delete": delete,
    "infill": infill,
    "sentinel": sentinel,
    "ngram": ngram,
    "permute": permute,
    "rotate": rotate,
}


# The operations that only move or delete tokens, so that there is nothing to predict.
WITHOUT_TARGETS = {"delete", "permute", "rotate"}


def reads_text(config: ConfigDict) -> bool:
    """Returns whether `config.noise` needs to know where words begin or sentences end."""
    return bool(config.ops) and (config.unit != "token" or any(name == "permute" for name, _ in config.ops))


def vocabulary_size(config: ConfigDict, size: int) -> int:
    """Returns the ids of a run: those of its tokenizer and, after them, the sentinels of `config.noise.ops`."""
    return size + SENTINELS * any(name == "sentinel" for name, _ in config.ops)


def read_rows(tokens: jax.Array, segment: jax.Array, noised: jax.Array, vocabulary: Vocabulary) -> dict[str, jax.Array]:
    """Returns the fields of `Text` that tokens and segments [n l] decide; noised[n] says which rows may be changed."""
    delimiters = [index for name, index in vocabulary.reserved.items() if name != "mask"]
    free = (segment > 0) & ~jnp.isin(tokens, np.array(delimiters, np.int32)) & noised[:, None]
    position = position_in_span(segment)
    size = position + jnp.flip(position_in_span(jnp.flip(segment, 1)), 1) + 1
    first = free & ((position == 0) | ~jnp.pad(free[:, :-1], ((0, 0), (1, 0))))
    words, sentences = free, first
    if vocabulary.tables is not None:
        kinds = jnp.asarray(pieces.kinds(vocabulary.tables))[tokens]
        both = jnp.pad(kinds[:, :-1] << 3 | kinds[:, 1:], ((0, 0), (1, 0)))
        words, sentences = (first | free & jnp.asarray(table)[both] for table in (pieces.WORD_BEGINS, pieces.ENDS_BEFORE))
    return dict(tokens=tokens, free=free, words=words, sentences=sentences, position=position, size=size)


def move(change: Change, text: Text, segment: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Sorts tokens, segment and other arrays [n l] as an operation says; opening delimiters stay first, closing ones last."""
    key = jnp.broadcast_to(text.place if change.key is None else change.key, segment.shape)
    key = jnp.where(text.free, key, jnp.where(text.position == 0, -1, jnp.iinfo(jnp.int32).max))
    span = jnp.cumsum(text.position == 0, axis=1)  # by its place in the row
    gone = (segment == 0) if change.gone is None else (segment == 0) | change.gone
    span = jnp.where(gone, jnp.iinfo(jnp.int32).max, span)
    order = jax.lax.sort((span, key, jnp.broadcast_to(text.place, key.shape)), num_keys=2, is_stable=True)[2]
    return tuple(take(jnp.where(gone, jnp.zeros_like(x), x), order) for x in (change.tokens, segment, *others))


def apply_noise(
    config: ConfigDict,
    tokens: jax.Array,
    segment: jax.Array,
    noise: Noise,
    vocabulary: Vocabulary,
    view: jax.Array | None = None,
    pair: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Targets]:
    """Applies the operations of `config.noise`, one after another.

    Args:
      config: `config.noise`.
      tokens: int32[n l].
      segment: int32[n l], 0 on padding.
      noise: a random key and the number of each row.
      vocabulary: of the tokens.
      view: int32[n], the view of each row; None: 0.
      pair: int32[n], the same for all views of a pair; None: the number of the row.

    Returns:
      The tokens and segments with noise, and the targets.
    """
    view = jnp.zeros(len(tokens), jnp.int32) if view is None else view
    pair = noise.row if pair is None else pair
    noised = jnp.isin(view, np.array(config.views, np.int32)) if config.views else view >= 0
    if config.clean_rows:
        noised &= row_uniform(Noise(jax.random.fold_in(noise.rng, len(config.ops)), noise.row), ()) >= config.clean_rows
    before, picked = tokens, jnp.zeros(tokens.shape, bool)
    for number, (name, rate) in enumerate(config.ops):
        if not rate:
            continue
        rng = jax.random.fold_in(noise.rng, number)
        of_rows = read_rows(tokens, segment, noised, vocabulary)
        text = Text(noise=Noise(rng, noise.row), pair=Noise(rng, pair), view=view, **of_rows)
        change = OPS[name](text, rate, config, vocabulary)
        tokens, picked = change.tokens, picked | change.picked
        if change.key is not None or change.gone is not None:
            tokens, segment, before, picked = move(change, text, segment, before, picked)
    return tokens, segment, Targets(picked, before, (segment > 0) & noised[:, None])
