"""A run that has learned to write the second text of a pair (tokens.name="seq2seq") writes texts like those it is given.

SimBERT's way to pairs: many samples of a text, of which the encoder keeps those nearest to it (Su, kexue.fm/archives/7427). A
row has a static length, and every step encodes it anew, without a cache.

Dimensions: n rows, l tokens of a row, w ids of the vocabulary.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.data import spans
from contrastive_jax.data.tokenizer_json import DELIMITERS
from contrastive_jax.files import transfer
from contrastive_jax.inference import encode_file, text_model
from contrastive_jax.inference.text_model import TextModel
from contrastive_jax.objectives import tokens as token_losses
from contrastive_jax.runtime.model_name import parse_model_name, read_params
from contrastive_jax.runtime.progress import Progress

# (joined rows int32[n l], segment int32[n l]) → logits of the token after the last one float32[n w]
NextToken = Callable[[jax.Array, jax.Array], jax.Array]


class Options(NamedTuple):
    """How texts are written.

    Attributes:
      samples: texts that are written for each text.
      keep: the most of them that are kept, those nearest to it.
      top_k: draw each token from so many likeliest ones; 0: from all; 1: always the likeliest.
      top_p: draw it from the likeliest ones that together have this probability.
      tokens: the most tokens of a text, given or written.
      batch: texts at once.
      seed: of the draws.
    """

    samples: int = 100
    keep: int = 1
    top_k: int = 5
    top_p: float = 1.0
    tokens: int = 64
    batch: int = 1
    seed: int = 0


def draw(logits: jax.Array, top_k: int, top_p: float, rng: jax.Array) -> jax.Array:
    """Draws tokens int32[n] from the likeliest ones of logits [n w]: see `Options`; the nucleus is Holtzman's, 1904.09751."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    share = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    count = 1 + (share < top_p).sum(-1, keepdims=True)  # the fewest that reach top_p
    count = jnp.minimum(count, top_k or logits.shape[-1])
    least = jnp.take_along_axis(ordered, count - 1, axis=-1)
    return jax.random.categorical(rng, jnp.where(logits >= least, logits, -jnp.inf)).astype(jnp.int32)


def continue_rows(
    next_token: NextToken, tokens: jax.Array, segment: jax.Array, end: int, options: Options, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Appends tokens to rows until each has its end, or `options.tokens` of them; returns the rows and their segments [n l].

    Args:
      next_token: the model.
      tokens: int32[n l], with room for the new tokens.
      segment: int32[n l], 1 on the first text, 2 on what begins the second, 0 on what is to be written.
      end: the id that ends a text.
      options: how tokens are drawn.
      rng: a random key.
    """
    column = jnp.arange(tokens.shape[1])[None]

    def unfinished(state: tuple) -> jax.Array:
        number, _, _, done = state
        return (number < options.tokens) & ~done.all()

    def append(state: tuple) -> tuple:
        number, tokens, segment, done = state
        new = draw(next_token(tokens, segment), options.top_k, options.top_p, jax.random.fold_in(rng, number))
        here = (column == (segment > 0).sum(1, keepdims=True)) & ~done[:, None]
        tokens, segment = jnp.where(here, new[:, None], tokens), jnp.where(here, 2, segment)
        return number + 1, tokens, segment, done | (new == end)

    state = (jnp.int32(0), tokens, segment, jnp.zeros(len(tokens), bool))
    return jax.lax.while_loop(unfinished, append, state)[1:3]


def make_next_token(model: TextModel, params: Any, forbidden: Sequence[int]) -> NextToken:
    """Makes the model of the next token from a run's parameters {"encoder", "tokens"}; forbidden ids have no chance."""

    def next_token(tokens: jax.Array, segment: jax.Array) -> jax.Array:
        encoding = model.encoder.encode(params["encoder"], tokens, segment, joined=True)
        last = jnp.maximum((segment > 0).sum(1) - 1, 0)
        x = token_losses.hidden(params["tokens"]["hidden"], encoding.states[jnp.arange(len(last)), last][:, None])
        logits = token_losses.logits_of(x, encoding.table, params["tokens"]["bias"])[:, 0]
        return logits.at[:, np.array(forbidden)].set(-jnp.inf)

    return next_token


class Writer:
    """Writes texts with a run.

    Args:
      name: of the run.
      options: how.

    Raises:
      UserError: it is no run that learns to write the second text of a pair, or its rows are shorter than two texts.
    """

    def __init__(self, name: str, options: Options):
        for flag in ("samples", "keep", "tokens", "batch"):
            if getattr(options, flag) < 1:
                raise UserError(f"--{flag}={getattr(options, flag)}: must be at least 1")
        model, self.options = text_model.load(name), options
        config = model.config
        if config is None or config.tokens.name != "seq2seq":
            raise UserError(f"--model={name}: only a run with config.tokens.name='seq2seq' has learned to write texts")
        length = 2 * options.tokens + 4
        if config.model.position == "learned" and config.model.max_length < length:
            raise UserError(
                f"--tokens={options.tokens}: the run has {config.model.max_length} positions, not {length}; lower it"
            )
        shortened = dataclasses.replace(model.tokenize_views, max_tokens=options.tokens + 2)
        self.model = dataclasses.replace(model, tokenize_views=shortened)
        _, params = read_params(parse_model_name(name), functools.partial(text_model.shardings_on_all_devices, config.model))
        tokenizer = self.model.tokenizer
        second = DELIMITERS[min(spans.make_sampler(config.data).views - 1, 1)]  # copies are all x
        if not set(second) <= tokenizer.reserved.keys():
            raise UserError(f"--model={name}: its tokenizer marks no begin and end of a text; train with one that does")
        self.begin, end = (tokenizer.reserved[edge] for edge in second)
        reserved = [index for index in tokenizer.reserved.values() if index != end]
        self._forbidden = [*reserved, *range(tokenizer.vocab_size, len(params["tokens"]["bias"]))]
        self._end, self._params = end, params

    @functools.cached_property
    def _continue(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        def run(params: Any, tokens: jax.Array, segment: jax.Array, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
            return continue_rows(
                make_next_token(self.model, params, self._forbidden), tokens, segment, self._end, self.options, rng
            )

        return jax.jit(run)

    def sample(self, texts: Sequence[str], number: int = 0) -> list[list[str]]:
        """Returns `options.samples` new texts for each text; `number` is that of the batch, for its random key."""
        rows = self.model.tokenize(texts)
        rows += [rows[0]] * (self.options.batch - len(rows))
        tokens = np.zeros((len(rows), 2 * self.options.tokens + 4), np.int32)
        segment = np.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, : len(row) + 1], segment[i, : len(row)], segment[i, len(row)] = [*row, self.begin], 1, 2
        repeated = [np.repeat(x, self.options.samples, axis=0) for x in (tokens, segment)]
        rng = jax.random.fold_in(jax.random.key(self.options.seed), number)
        written = zip(*jax.device_get(self._continue(self._params, *repeated, rng)), strict=True)
        decoded = [self.model.tokenizer.decode(row[parts == 2]).strip() for row, parts in written]
        return [
            decoded[i : i + self.options.samples] for i in range(0, len(texts) * self.options.samples, self.options.samples)
        ]

    def nearest(self, text: str, samples: Sequence[str]) -> list[str]:
        """Returns the samples that are nearest to a text, `options.keep` at most; neither itself, nor one twice, nor ""."""
        others = [*dict.fromkeys(sample for sample in samples if sample not in ("", text.strip()))]
        if not others:
            return []
        cosines = self.model.encode(others) @ self.model.encode([text])[0]
        return [others[i] for i in np.argsort(-cosines, kind="stable")[: self.options.keep]]


def generate(name: str, source: epath.Path, target: epath.Path, options: Options) -> None:
    """Writes a .jsonl of pairs {"text1", "text2"}: each text of a file with texts that a run writes for it.

    Args:
      name: of the run.
      source: lines of text, or a .jsonl.
      target: the .jsonl, which `prepare --pairs` takes; it appears when it is whole.
      options: how texts are written.

    Raises:
      UserError: from `Writer`; the source has no text, or the target cannot be written.
    """
    if not source.exists() or source.is_dir():
        raise UserError(f"--input={source}: no such file; give lines of text, or a .jsonl")
    transfer.check_output(target, ".jsonl")
    texts = [text for text in encode_file.read_texts(source) if text.strip()]
    if not texts:
        raise UserError(f"--input={source}: it has no text; give lines of text, or a .jsonl")
    writer, count = Writer(name, options), 0
    with transfer.new_file(target) as path, path.open("w") as file, Progress("writing", len(texts), "texts") as progress:
        for number, start in enumerate(range(0, len(texts), options.batch)):
            batch = texts[start : start + options.batch]
            for text, samples in zip(batch, writer.sample(batch, number), strict=True):
                for other in writer.nearest(text, samples):
                    file.write(json.dumps({"text1": text, "text2": other}, ensure_ascii=False) + "\n")
                    count += 1
            progress.advance(len(batch))
    logging.info("%d pairs written to %s", count, target)
