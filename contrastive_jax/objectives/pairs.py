"""The objective: from the embeddings of a batch to a loss over pairs, with its trainable temperature and its metrics.

Dimensions: b pairs, v views (anchor, positives, hard negatives), p positives of an anchor, k keys of a pair, e embedding.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives import negatives
from contrastive_jax.objectives.dense import normalize
from contrastive_jax.objectives.losses import LOSSES, PairLoss, dcl, smooth
from contrastive_jax.objectives.tiles import MaskIds, NegativeSums, Sweep

Params = Any  # nested dict of arrays
Metrics = dict[str, jax.Array]


class PairIds(NamedTuple):
    """What a loss knows of a batch besides its embeddings.

    Attributes:
      document: int32[b], the number of each pair's document.
      span_hash: int32[b v], a hash of each span; equal spans have equal hashes.
      label: int32[b], the class of each pair, or None; pair losses do not use it.
    """

    document: jax.Array
    span_hash: jax.Array
    label: jax.Array | None = None


class Keys(NamedTuple):
    """What anchors are scored against: z float32[b k e], and their ids with [b k]."""

    z: jax.Array
    ids: MaskIds


class Objective(NamedTuple):
    """A loss with trainable parameters of its own.

    Attributes:
      init: rng → params, a dict of float32 arrays (the optimiser trains them beside the encoder's).
      loss: (z float32[b v e], PairIds, params, Keys or None) → (loss, metrics), means over the global batch. Without `Keys` the
        other pairs' positives and hard negatives are the negatives.
      project: params → params, applied after each optimiser step to keep them in their range. Clamping the parameter rather
        than its use keeps the gradient alive at the boundary (as CLIP does, arXiv 2103.00020 §2.5).
    """

    init: Callable[[jax.Array], Params]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    project: Callable[[Params], Params]


def check_objective(config: ConfigDict, views: int, dim: int) -> None:
    """Checks `config.objective` for v views and embeddings of size `dim`.

    Raises:
      UserError: two keys do not go together; the message names them.
    """
    low, start, high = config.temperature_min, config.temperature, config.temperature_max
    if not low <= start <= high:
        raise UserError(f"config.objective.temperature={start} must lie in [temperature_min, temperature_max]=[{low}, {high}]")
    if config.label_smoothing and config.name != "infonce":
        raise UserError(f"config.objective.label_smoothing={config.label_smoothing}: must be 0 for any loss but infonce")
    if any(not 1 <= size <= dim or weight <= 0 for size, weight in config.matryoshka):
        raise UserError(f"config.objective.matryoshka={config.matryoshka}: (size, weight) with 1 <= size <= {dim}, weight > 0")
    if config.queue and (config.symmetric or views != 2):
        raise UserError("config.objective.queue: needs config.objective.symmetric=False and pairs of two views")


def first_occurrence(span_hash: jax.Array) -> jax.Array:
    """Whether no earlier pair of span_hash int32[b v] has the same spans, bool[b]."""
    *columns, order = jax.lax.sort((*span_hash.T, jnp.arange(len(span_hash))), num_keys=span_hash.shape[1] + 1)
    same = jnp.stack([column[1:] == column[:-1] for column in columns]).all(0)
    return jnp.ones(len(span_hash), bool).at[order[1:]].set(~same)


class BatchMask:
    """Decides who is whose negative in a batch: the ids of its anchors and of its own keys, by `config.objective`."""

    def __init__(self, config: ConfigDict, ids: PairIds, hard_negatives: int = 0):
        b, views = ids.span_hash.shape
        self._margin, self._hard = config.mask_margin, hard_negatives
        self.positives = views - 1 - hard_negatives
        self.valid = first_occurrence(ids.span_hash) if config.mask_duplicates else jnp.ones(b, bool)
        self._row = jnp.arange(b, dtype=jnp.int32)
        self._document = ids.document if config.mask_same_document else None
        self._span_hash = ids.span_hash if config.mask_duplicates else None

    def _limit(self, similarity: jax.Array) -> jax.Array | None:
        """The similarity above which a pair is not a negative, or None; `similarity` is a positive's."""
        return None if self._margin is None else jax.lax.stop_gradient(similarity) + self._margin

    def anchors(self, similarity: jax.Array) -> MaskIds:
        """Returns the ids of the anchors, from their similarity float32[b p] to their positives."""
        span_hash = None if self._span_hash is None else self._span_hash[:, : 1 + self.positives]
        return MaskIds(self._row, self.valid, self._document, span_hash, self._limit(similarity.max(1)))

    def keys(self, similarity: jax.Array) -> MaskIds:
        """Returns the ids [b p + hard] of the positives, which have the hash of their anchor too, and of the hard negatives."""
        p, hard = self.positives, self._hard

        def widen(of_pair: jax.Array, of_hard: Any) -> jax.Array:
            """[b] → [b p + hard]: the pair's value for its positives, `of_hard` for its hard negatives."""
            rest = jnp.full((len(of_pair), hard), of_hard, of_pair.dtype)
            return jnp.concatenate([jnp.broadcast_to(of_pair[:, None], (len(of_pair), p)), rest], axis=1)

        span_hash = self._span_hash
        if span_hash is not None:
            anchor = jnp.broadcast_to(span_hash[:, :1], (len(span_hash), p))
            second = jnp.concatenate([anchor, span_hash[:, 1 + p :]], axis=1)
            span_hash = jnp.stack([span_hash[:, 1:], second], axis=2)
        limit = self._limit(similarity)
        if limit is not None:
            limit = jnp.pad(limit, ((0, 0), (0, hard)), constant_values=jnp.inf)
        valid = jnp.broadcast_to(self.valid[:, None], (len(self.valid), p + hard))
        document = None if self._document is None else widen(self._document, -1)
        return MaskIds(widen(self._row, -1), valid, document, span_hash, limit)


class Scores(NamedTuple):
    """A batch scored.

    Attributes:
      similarity: float32[b p], of anchors to their positives.
      logits: float32[b p], of the same.
      directions: NegativeSums of the anchors [b 1] and, for a symmetric loss, of the positives [b p].
      weight: float32[b 1], of a positive in a mean over all that count.
      possible: float32[], the keys that an anchor would have as negatives if nothing were masked.
    """

    similarity: jax.Array
    logits: jax.Array
    directions: list[NegativeSums]
    weight: jax.Array
    possible: jax.Array

    def mean(self, value: Callable[[NegativeSums], jax.Array]) -> jax.Array:
        """Returns the mean over pairs and directions of a function of each direction's sums."""
        return jnp.stack([(value(sums) * self.weight).sum() for sums in self.directions]).mean()


class Scorer(NamedTuple):
    """Scores embeddings against keys.

    Attributes:
      dtype: type of the embeddings in products.
      sums: from `negatives.on_mesh`.
      key_shards: into how many sets the keys fall, of which an anchor sees one (more than 1 with where="local").
    """

    dtype: str
    sums: Callable
    key_shards: int

    def __call__(self, z: jax.Array, mask: BatchMask, affine: jax.Array, other: Keys | None) -> Scores:
        """Scores z float32[b v e] against the batch's own keys or `other` ones; a logit is affine[0] · x·y + affine[1]."""
        p = mask.positives
        z = z.astype(self.dtype).astype(jnp.float32)
        similarity = jnp.einsum("be,bpe->bp", z[:, 0], z[:, 1 : 1 + p], precision=jax.lax.Precision.HIGHEST)
        keys = Keys(z[:, 1:], mask.keys(similarity)) if other is None else other
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), keys)  # [b k ...] -> [b·k ...]
        rows, columns = self.sums(z[:, 0], flat.z, affine, mask.anchors(similarity), flat.ids)
        directions = [jax.tree.map(lambda x: x[:, None], rows)]
        if columns is not None:
            directions.append(jax.tree.map(lambda x: x.reshape(len(z), -1)[:, :p], columns))
        weight = mask.valid[:, None] / (mask.valid.sum() * p)
        logits = similarity * affine[0] + affine[1]
        return Scores(similarity, logits, directions, weight, flat.ids.valid.sum() / self.key_shards - p)


def batch_metrics(z: jax.Array, mask: BatchMask, scores: Scores) -> Metrics:
    """Measures what one wants to see of a batch; no gradient flows through it."""
    b, p = scores.similarity.shape
    anchor, positive = z[:, 0], z[:, 1 : 1 + p]
    masked = 1 - (scores.directions[0].number * scores.weight * p).sum() / jnp.maximum(scores.possible, 1)
    metrics = {
        "in_batch_top1": scores.mean(lambda sums: scores.logits >= sums.largest),
        "positive_similarity": (scores.similarity * scores.weight).sum(),
        # Σ_ij x_i·y_j = (Σ x)·(Σ y): the mean over all pairs but the positives, masked or not.
        "negative_similarity": (anchor.sum(0) @ positive.sum((0, 1)) - scores.similarity.sum())
        / max(float(b * (b - 1) * p), 1.0),
        "dropped_share": 1 - mask.valid.mean(),
        "masked_share": masked,
    }
    return jax.lax.stop_gradient(metrics)


def loss_of_scores(config: ConfigDict, kind: PairLoss, scores: Scores) -> tuple[jax.Array, Metrics]:
    """Returns the loss of a scored batch, and the metrics that belong to its kind."""
    metrics = {}
    if config.name == "flatnce":  # the loss is always 1: this is what falls
        metrics["log_ratio"] = jax.lax.stop_gradient(scores.mean(lambda sums: dcl(scores.logits, sums)))

    def finish(sums: NegativeSums) -> jax.Array:
        return smooth(kind.finish(scores.logits, sums), scores.logits, sums, config.label_smoothing)

    return scores.mean(finish), metrics


def loss_of_prefix(
    config: ConfigDict, scorer: Scorer, size: int, z: jax.Array, mask: BatchMask, affine: jax.Array, keys: Keys | None
) -> tuple[jax.Array, Metrics]:
    """Returns loss and metrics of the first `size` coordinates of z float32[b v e], at unit length again (Matryoshka)."""
    if size < z.shape[-1]:
        z = normalize(z[..., :size])
        keys = keys._replace(z=normalize(keys.z[..., :size])) if keys else None
    scores = scorer(z, mask, affine, keys)
    value, metrics = loss_of_scores(config, LOSSES[config.name], scores)
    return value, batch_metrics(z, mask, scores) | metrics


def make_objective(
    config: ConfigDict, views: int, dim: int, mesh: Mesh | None = None, axes: tuple[str, ...] = (), hard_negatives: int = 0
) -> Objective:
    """Builds the objective of `config.objective`.

    Args:
      config: `config.objective`.
      views: v, the spans of a pair.
      dim: e, the width of an embedding.
      mesh: the mesh; None: one device.
      axes: the mesh axes over which the batch is spread.
      hard_negatives: how many of the last views are hard negatives; the others after the anchor are its positives.

    Raises:
      UserError: two config keys do not go together; the message names them.
      ValueError: fewer than two views are left for anchor and positive.
    """
    check_objective(config, views, dim)
    if not 0 <= hard_negatives <= views - 2:
        raise ValueError(f"hard_negatives={hard_negatives}: of {views} views two are anchor and positive")
    kind = LOSSES[config.name]
    columns, linear = config.symmetric and kind.directions == 2, config.label_smoothing > 0
    sweep = Sweep(kind.term, columns, linear, config.dtype, config.block, config.where)
    local = mesh is not None and config.where == "local"
    key_shards = math.prod(mesh.shape[axis] for axis in axes) if mesh is not None and local else 1
    scorer = Scorer(config.dtype, negatives.on_mesh(sweep, mesh, axes), key_shards)
    low, start, high = (math.log(config[key]) for key in ("temperature_min", "temperature", "temperature_max"))

    def init(rng: jax.Array) -> Params:
        del rng
        bias = {"bias": jnp.float32(config.bias)} if config.name == "siglip" else {}
        return {"log_temperature": jnp.float32(start)} | bias

    def loss(z: jax.Array, ids: PairIds, params: Params, keys: Keys | None = None) -> tuple[jax.Array, Metrics]:
        log_temperature = params["log_temperature"]
        if not config.temperature_trainable:
            log_temperature = jax.lax.stop_gradient(log_temperature)
        affine = jnp.stack([jnp.exp(-log_temperature), params.get("bias", jnp.float32(0))])
        mask, prefixes = BatchMask(config, ids, hard_negatives), tuple(config.matryoshka) or ((dim, 1.0),)
        by_size = {size: loss_of_prefix(config, scorer, size, z, mask, affine, keys) for size, _ in prefixes}
        total = jnp.float32(0)
        for size, weight in prefixes:
            total += weight * by_size[size][0]
        metrics = dict(by_size[max(by_size)][1])
        if len(by_size) > 1:
            for size, (value, of_prefix) in by_size.items():
                metrics |= {f"loss_{size}": value, f"in_batch_top1_{size}": of_prefix["in_batch_top1"]}
        metrics |= {"temperature": jnp.exp(log_temperature)} | {name: params[name] for name in ("bias",) if name in params}
        return total / sum(weight for _, weight in prefixes), metrics

    def project(params: Params) -> Params:
        return params | {"log_temperature": jnp.clip(params["log_temperature"], low, high)}

    return Objective(init, loss, project)
