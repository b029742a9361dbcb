"""What a step sees of a batch: its views, made on the devices.

A batch from the pipeline has the views that its sampler cut. Here each view can be repeated (`data.copies`): the copies have
the same text, and differ by dropout, since each row has a number of its own. Then noise changes tokens (`noise.ops`). What is
random depends on a random key of the step and on a row's number alone, so that it is the same on any mesh, in any micro-batch
and after any restart. At last two views can be joined in one row (`data.join`), the second one at times of another document
(`data.random_next`).

Dimensions: b pairs, g groups of pairs that share rows, v views, r rows of a group per view, l tokens of a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.data import spans
from contrastive_jax.data.batch import Batch
from contrastive_jax.models.dropout import Noise, row_uniform
from contrastive_jax.objectives.objective import PairIds
from contrastive_jax.objectives.tokens import Targets
from contrastive_jax.runtime.randomness import step_key
from contrastive_jax.training import noise as noise_lib
from contrastive_jax.training.noise import Vocabulary


class Rows(NamedTuple):
    """Token rows with their numbers.

    Attributes:
      tokens: int32[g v r l].
      segment: int32[g v r l], see `Batch`.
      row: int32[g v r], the index of each row in the global batch. Dropout and noise depend on it.
      targets: what the rows have to tell, [g v r l] each; None without a token loss.
    """

    tokens: jax.Array
    segment: jax.Array
    row: jax.Array
    targets: Targets | None = None

    def views(self, first: int, last: int | None) -> "Rows":
        """Returns the rows of views `first` to `last` (exclusive; None: all that follow)."""
        return jax.tree.map(lambda x: x[:, first:last], self)


# The token losses that predict the next token of a row as the encoder sees it.
NEXT_TOKEN = ("lm", "seq2seq")
MakeViews = Callable[[Batch, jax.Array], tuple[Rows, PairIds]]


def view_count(config: ConfigDict) -> int:
    """Returns v, the views of a pair, copies included; `config` is `config.data`."""
    return spans.make_sampler(config).views * config.copies


def cut_tokens(config: ConfigDict) -> int:
    """Returns the padding of a query's row that the encoder does not see; `config` is `config.data`."""
    return config.length - config.query_length if config.query_length else 0


def views_with_targets(config: ConfigDict, count: int) -> list[int]:
    """Returns which of the first `count` views may have tokens to predict: those with noise, and all in a language model."""
    noised = config.noise.views if config.noise.ops and not config.data.join and config.tokens.name not in NEXT_TOKEN else ()
    return [view for view in range(count) if not noised or view in noised]


def encoded_views(config: ConfigDict) -> int:
    """Returns how many rows of a pair the encoder sees, each of which has an embedding; `config` is `config.data`."""
    return 1 if config.join == "next" else view_count(config)


def rows_of_batch(batch: Batch) -> Rows:
    """Returns all rows of a global batch, numbered in order."""
    shape = batch.tokens.shape[:-1]
    count = batch.tokens.size // batch.tokens.shape[-1]
    return Rows(batch.tokens, batch.segment, jnp.arange(count, dtype=jnp.int32).reshape(shape))


def copy_views(batch: Batch, copies: int) -> Batch:
    """Repeats all views of a batch: (x, y) becomes (x, y, x, y)."""
    tokens, segment, span_hash = (jnp.concatenate([x] * copies, axis=1) for x in (batch.tokens, batch.segment, batch.span_hash))
    return batch._replace(tokens=tokens, segment=segment, span_hash=span_hash)


def draw_next(batch: Batch, share: float, rng: jax.Array) -> Batch:
    """Puts view 1 of the pair half a batch away in the place of a share of the views 1: their label is 1, all others' 0.

    A pair whose counterpart is of the same document keeps its own text, so that label 1 always means another document.

    References:
      Devlin et al., BERT, https://arxiv.org/abs/1810.04805, §3.1, task 2
    """
    count = len(batch.document)
    other = jax.tree.map(lambda x: jnp.roll(x, count // 2, axis=0), batch)
    coin = row_uniform(Noise(rng, jnp.arange(count, dtype=jnp.int32)), ())
    random = (coin < share) & (batch.document != other.document)

    def second(own: jax.Array, others: jax.Array) -> jax.Array:
        return own.at[:, 1].set(jnp.where(random.reshape(-1, *(1,) * (own.ndim - 2)), others[:, 1], own[:, 1]))

    tokens, segment, span_hash = map(
        second, (batch.tokens, batch.segment, batch.span_hash), (other.tokens, other.segment, other.span_hash)
    )
    return Batch(tokens, segment, batch.document, span_hash, random.astype(jnp.float32))


def add_noise(rows: Rows, config: ConfigDict, rng: jax.Array, vocabulary: Vocabulary) -> Rows:
    """Changes the tokens of all rows by `config.noise`, and notes what they were."""
    g, v, r, _ = rows.tokens.shape
    tokens, segment = (x.reshape(-1, x.shape[-1]) for x in (rows.tokens, rows.segment))  # [g v r l] -> [n l]
    view = jnp.broadcast_to(jnp.arange(v)[None, :, None], (g, v, r)).reshape(-1)
    pair = jnp.broadcast_to(jnp.arange(g * r).reshape(g, 1, r), (g, v, r)).reshape(-1)
    noised = noise_lib.apply_noise(config, tokens, segment, Noise(rng, rows.row.reshape(-1)), vocabulary, view, pair)
    tokens, segment, targets = jax.tree.map(lambda x: x.reshape(rows.tokens.shape), noised)
    return rows._replace(tokens=tokens, segment=segment, targets=targets)


def join_views(rows: Rows, both: bool, second: Rows | None = None) -> Rows:
    """Puts views 0 and 1 into one row, as segments 1 and 2, with the padding of both at its end: [g 2 r l] → [g 1 r 2l].

    With `both`, a second row has view 1 first, [g 2 r 2l]. The row numbers are those of the first part. Second parts are taken
    from the tokens of `second`, by default `rows` themselves.
    """
    length = rows.segment.shape[-1]
    second = rows if second is None else rows._replace(tokens=second.tokens, segment=second.segment)

    def beside(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.concatenate([x, y[:, ::-1]], axis=-1)

    tokens, segment, _, targets = jax.tree.map(beside, rows, second)
    segment = jnp.minimum(segment, 1) * (1 + (jnp.arange(2 * length) >= length))
    order = jnp.argsort(segment == 0, axis=-1, stable=True)
    tokens, segment, targets = jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=-1), (tokens, segment, targets))
    return rows._replace(tokens=tokens, segment=segment, targets=targets).views(0, 2 if both else 1)


def next_tokens(rows: Rows, joined: bool) -> Targets:
    """Returns the targets of a language model: at each place the next token of its span; in joined rows of the second part."""
    following = [jnp.pad(x[..., 1:], ((0, 0),) * 3 + ((0, 1),)) for x in (rows.tokens, rows.segment)]
    picked = (rows.segment == following[1]) & (rows.segment > (1 if joined else 0))
    return Targets(picked, following[0], picked)


def check_join(config: ConfigDict) -> None:
    """Raises UserError where `config.data.join` or a language model does not go with the rest; the message names the keys."""
    data, model, name = config.data, config.model, config.tokens.name if config.tokens.weight else ""
    if name == "lm" and not model.causal:
        raise UserError("config.tokens.name='lm': needs config.model.causal=True, or tokens would see what they predict")
    if name == "seq2seq" and (not data.join or (model.part_mask == "full" and not model.causal)):
        raise UserError("config.tokens.name='seq2seq': needs config.data.join and config.model.part_mask='prefix'")
    if data.random_next and (data.join != "next" or not config.objective.weight or tuple(config.labels.classes) != (2,)):
        raise UserError(
            f"config.data.random_next={data.random_next}: needs config.data.join='next', config.objective.name='softmax' with "
            "a weight, and config.labels.classes=(2,)"
        )
    if not data.join:
        return
    classified = data.join == "next" and config.objective.weight
    said = f"config.data.join={data.join!r}"
    for mistaken, need in (
        (view_count(data) != 2, "two views: config.data.views=2, or config.data.sampler='span' with config.data.copies=2"),
        (data.pack_pairs > 1, "config.data.pack_pairs=1: packed rows hold many texts already"),
        (not data.delimiters, "config.data.delimiters=True: they say where the second text begins"),
        (model.mixer != "attention", "config.model.mixer='attention': the others would mix the two texts"),
        (config.objective.locals, "config.objective.locals=0"),
        (
            classified and (config.objective.name != "softmax" or data.copies > 1),
            "config.objective.weight=0, since there is one row per pair, or config.objective.name='softmax' and data.copies=1; "
            "or 'both'",
        ),
        (
            classified and (model.part_mask != "full" or model.causal or not model.num_layers),
            "config.model.part_mask='full', blocks and no config.model.causal, or the embedding of the first text, which is "
            "classified, knows nothing of the second",
        ),
    ):
        if mistaken:
            raise UserError(f"{said}: needs {need}")


def check_noise(config: ConfigDict) -> None:
    """Raises UserError where `config.noise` does not go with the views of a run; the message names the keys."""
    ops, count = [name for name, _ in config.noise.ops], view_count(config.data)
    unknown = sorted(set(ops) - noise_lib.OPS.keys())
    if unknown:
        raise UserError(f"config.noise.ops: no operation {unknown[0]!r}; there are {', '.join(noise_lib.OPS)}")
    if not set(config.noise.views) <= set(range(count)):
        raise UserError(f"config.noise.views={config.noise.views}: there are the views 0 to {count - 1}")
    picks = any(rate for name, rate in config.noise.ops if name not in noise_lib.WITHOUT_TARGETS)
    if config.tokens.name in ("mlm", "replaced", "distil") and config.tokens.weight and not picks:
        raise UserError(
            f"config.tokens.name={config.tokens.name!r} predicts what noise has picked; set config.noise.ops, as in "
            "(('mask', 0.15),)"
        )
    for name, rate in config.noise.ops:
        if name != "ngram" and not 0 <= rate <= 1:
            raise UserError(f"config.noise.ops: {name!r} has a share of {rate}, and needs one in [0, 1]")
    if config.noise.random_share + config.noise.kept_share > 1:
        raise UserError(
            f"config.noise.random_share={config.noise.random_share}, config.noise.kept_share={config.noise.kept_share}: "
            "together they must not be above 1"
        )
    some_views = config.noise.views and len(set(config.noise.views)) < count
    for name in {"ngram", "sentinel"} & set(ops):
        if config.data.copies != count or count < 2 or config.data.pack_pairs > 1 or config.noise.clean_rows or some_views:
            raise UserError(
                f"config.noise.ops: {name!r} divides one text among its copies; set config.data.sampler='span', "
                "config.data.copies=2, config.data.pack_pairs=1, config.noise.views=() and config.noise.clean_rows=0"
            )


def make_views(config: ConfigDict, vocabulary: Vocabulary) -> MakeViews:
    """Returns the function (global batch, random key of the step) → (Rows, PairIds).

    Args:
      config: of the run.
      vocabulary: of its tokens.

    Raises:
      UserError: `config.noise` names an operation or a view that is not there, or one that needs copies, or two
        texts cannot be joined.
    """
    check_noise(config)
    check_join(config)
    join, language_model = config.data.join, config.tokens.name in NEXT_TOKEN
    # What is written is a text before noise, unless it is the sentinels' own.
    restores = language_model and not any(name == "sentinel" for name, _ in config.noise.ops)

    def views(batch: Batch, rng: jax.Array) -> tuple[Rows, PairIds]:
        # Noise comes after the copies, so that these differ; span_hash stays that of the text.
        batch = copy_views(batch, config.data.copies) if config.data.copies > 1 else batch
        if config.data.random_next:
            batch = draw_next(batch, config.data.random_next, step_key(rng, "next", jnp.int32(0)))
        rows = text = rows_of_batch(batch)
        if config.noise.ops or config.tokens.name:
            rows = add_noise(rows, config.noise, rng, vocabulary)
        rows = join_views(rows, join == "both", text if restores else rows) if join else rows
        rows = rows._replace(targets=next_tokens(rows, bool(join))) if language_model else rows
        return rows, PairIds(batch.document, batch.span_hash, batch.label, batch.scores)

    return views
