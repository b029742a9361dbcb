"""The objective of the pair losses, with its trainable temperature and its metrics.

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
from contrastive_jax.objectives import negatives, pairing
from contrastive_jax.objectives.dense import normalize
from contrastive_jax.objectives.losses import LOSSES, PairLoss, dcl, information, moving_average, pool, smooth
from contrastive_jax.objectives.objective import NOTHING, Given, Keys, Metrics, Objective, PairIds, Params
from contrastive_jax.objectives.tiles import EXP, MASKED, MaskIds, NegativeSums, Sweep


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
    if config.matryoshka and LOSSES[config.name].average:
        raise UserError(f"config.objective.matryoshka: config.objective.name={config.name!r} has one moving average; take 'dv'")


def first_occurrence(span_hash: jax.Array) -> jax.Array:
    """Whether no earlier pair of span_hash int32[b v] has the same spans, bool[b]."""
    *columns, order = jax.lax.sort((*span_hash.T, jnp.arange(len(span_hash))), num_keys=span_hash.shape[1] + 1)
    same = jnp.stack([column[1:] == column[:-1] for column in columns]).all(0)
    return jnp.ones(len(span_hash), bool).at[order[1:]].set(~same)


class BatchMask:
    """Decides who is whose negative in a batch: the ids of its anchors and of its own keys, by `config.objective`.

    Args:
      config: `config.objective`.
      ids: of the batch.
      positives: p, the positives of an anchor.
      repeats: how many anchors a pair has, each with p positives; their rows follow one another.
    """

    def __init__(self, config: ConfigDict, ids: PairIds, positives: int, repeats: int = 1):
        b, views = ids.span_hash.shape
        self._margin, spans = config.mask_margin, jnp.repeat(ids.span_hash, repeats, axis=0)
        self.positives, self.repeats = positives, repeats
        valid = first_occurrence(ids.span_hash) if config.mask_duplicates else jnp.ones(b, bool)
        self.valid = jnp.repeat(valid, repeats)
        self._row = jnp.repeat(jnp.arange(b, dtype=jnp.int32), repeats)
        self._document = jnp.repeat(ids.document, repeats) if config.mask_same_document else None
        of_pair, self._hard = jnp.split(spans, [views - config.hard_negatives], axis=1)
        self._span_hash = of_pair if config.mask_duplicates else None  # of the anchor and all its positives

    def _limit(self, similarity: jax.Array) -> jax.Array | None:
        """The similarity above which a pair is not a negative, or None; `similarity` is a positive's."""
        return None if self._margin is None else jax.lax.stop_gradient(similarity) + self._margin

    def anchors(self, similarity: jax.Array) -> MaskIds:
        """Returns the ids of the anchors, from their similarity float32[b p] to their positives."""
        return MaskIds(self._row, self.valid, self._document, self._span_hash, self._limit(similarity.max(1)))

    def keys(self, similarity: jax.Array) -> MaskIds:
        """Returns the ids [b p + hard] of the positives, which have the hashes of their pair, and of the hard negatives."""
        p, hard = self.positives, self._hard.shape[1]

        def widen(of_pair: jax.Array, of_hard: Any) -> jax.Array:
            """[b ...] → [b p + hard ...]: the pair's value for its positives, `of_hard` for its hard negatives."""
            value = jnp.broadcast_to(of_pair[:, None], (len(of_pair), p, *of_pair.shape[1:]))
            rest = jnp.broadcast_to(jnp.asarray(of_hard, of_pair.dtype), (len(of_pair), hard, *of_pair.shape[1:]))
            return jnp.concatenate([value, rest], axis=1)

        limit = self._limit(similarity)
        if limit is not None:
            limit = jnp.pad(limit, ((0, 0), (0, hard)), constant_values=jnp.inf)
        valid = jnp.broadcast_to(self.valid[:, None], (len(self.valid), p + hard))
        document = None if self._document is None else widen(self._document, -1)
        span_hash = None if self._span_hash is None else widen(self._span_hash, self._hard[..., None])
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
        possible = flat.ids.valid.sum() / self.key_shards - p * mask.repeats
        return Scores(similarity, logits, directions, weight, possible)


def batch_metrics(z: jax.Array, mask: BatchMask, scores: Scores) -> Metrics:
    """Measures what one wants to see of a batch; no gradient flows through it."""
    (b, p), repeats = scores.similarity.shape, mask.repeats
    anchor, positive = (x.reshape(b // repeats, -1, z.shape[-1]).sum(1) for x in (z[:, 0], z[:, 1 : 1 + p]))
    masked = 1 - (scores.directions[0].number * scores.weight * p).sum() / jnp.maximum(scores.possible, 1)
    metrics = {
        "in_batch_top1": scores.mean(lambda sums: scores.logits >= sums.largest),
        "positive_similarity": (scores.similarity * scores.weight).sum(),
        # Σ_ij x_i·y_j = (Σ x)·(Σ y): the mean over all pairs but those of one row of the batch, masked or not.
        "negative_similarity": (anchor.sum(0) @ positive.sum(0) - (anchor * positive).sum())
        / max(float(b * (b - repeats) * p), 1.0),
        "dropped_share": 1 - mask.valid.mean(),
        "masked_share": masked,
    }
    return jax.lax.stop_gradient(metrics)


def loss_of_scores(config: ConfigDict, kind: PairLoss, scores: Scores, params: Params) -> tuple[jax.Array, Metrics]:
    """Returns the loss of a scored batch, and the metrics that belong to its kind."""
    metrics = {}
    if config.name == "flatnce":  # the loss is always 1: this is what falls
        metrics["log_ratio"] = scores.mean(lambda sums: dcl(scores.logits, sums))
    if kind.term is EXP:
        metrics["mutual_information"] = scores.mean(lambda sums: information(scores.logits, sums))

    def finish(sums: NegativeSums) -> jax.Array:
        sums = pool(kind.term, sums) if kind.pooled else sums
        if kind.average:
            sums, metrics["log_average"] = moving_average(sums, params["log_average"], config.average_decay)
        return smooth(kind.finish(scores.logits, sums), scores.logits, sums, config.label_smoothing)

    value = scores.mean(finish)
    return value, jax.lax.stop_gradient(metrics)


def loss_of_prefix(
    config: ConfigDict, scorer: Scorer, size: int, z: jax.Array, mask: BatchMask, params: Params, keys: Keys | None
) -> tuple[jax.Array, Metrics]:
    """Returns loss and metrics of the first `size` coordinates of z float32[b v e], at unit length again (Matryoshka)."""
    if size < z.shape[-1]:
        z = normalize(z[..., :size])
        keys = keys._replace(z=normalize(keys.z[..., :size])) if keys else None
    affine = jnp.stack([jnp.exp(-params["log_temperature"]), params.get("bias", jnp.float32(0))])
    scores = scorer(z, mask, affine, keys)
    value, metrics = loss_of_scores(config, LOSSES[config.name], scores, params)
    return value, batch_metrics(z, mask, scores) | metrics


def loss_of_sizes(
    config: ConfigDict, scorer: Scorer, z: jax.Array, mask: BatchMask, params: Params, keys: Keys | None
) -> tuple[jax.Array, Metrics]:
    """Returns the weighted mean of the losses of all prefixes of z float32[b v e] (Matryoshka), and their metrics."""
    prefixes = tuple(config.matryoshka) or ((z.shape[-1], 1.0),)
    by_size = {size: loss_of_prefix(config, scorer, size, z, mask, params, keys) for size, _ in prefixes}
    total = jnp.float32(0)
    for size, weight in prefixes:
        total += weight * by_size[size][0]
    metrics = dict(by_size[max(by_size)][1])
    if len(by_size) > 1:
        for size, (value, of_prefix) in by_size.items():
            metrics |= {f"loss_{size}": value, f"in_batch_top1_{size}": of_prefix["in_batch_top1"]}
    return total / sum(weight for _, weight in prefixes), metrics


def make_objective(config: ConfigDict, views: int, dim: int, mesh: Mesh | None = None, axes: tuple[str, ...] = ()) -> Objective:
    """Builds the objective of `config.objective`.

    Args:
      config: `config.objective`.
      views: v, the spans of a pair; z has these and then `config.locals` token states.
      dim: e, the width of an embedding.
      mesh: the mesh; None: one device.
      axes: the mesh axes over which the batch is spread.

    Raises:
      UserError: two config keys do not go together; the message names them.
    """
    check_objective(config, views, dim)
    pairing.check_pairing(config, views)
    kind = LOSSES[config.name]
    columns = config.symmetric and kind.directions == 2 and config.pairing != "both"
    sweep = Sweep(kind.term, columns, config.label_smoothing > 0, config.dtype, config.block, config.where)
    local = mesh is not None and config.where == "local"
    key_shards = math.prod(mesh.shape[axis] for axis in axes) if mesh is not None and local else 1
    scorer = Scorer(config.dtype, negatives.on_mesh(sweep, mesh, axes), key_shards)
    low, start, high = (math.log(config[key]) for key in ("temperature_min", "temperature", "temperature_max"))

    def init(rng: jax.Array) -> Params:
        bias = {"bias": jnp.float32(config.bias)} if kind.bias else {}
        average = {"log_average": jnp.float32(MASKED)} if kind.average else {}
        context = {"context": pairing.init_context(config, views, dim, rng)} if config.context else {}
        return {"log_temperature": jnp.float32(start)} | bias | average | context

    def loss(z: jax.Array, ids: PairIds, params: Params, given: Given = NOTHING) -> tuple[jax.Array, Metrics]:
        if not config.temperature_trainable:
            params = params | {"log_temperature": jax.lax.stop_gradient(params["log_temperature"])}
        problems, repeats = pairing.arrange(config, z, params)
        mask = BatchMask(config, ids, problems[0].shape[1] - 1 - config.hard_negatives, repeats)
        losses = [loss_of_sizes(config, scorer, problem, mask, params, given.keys) for problem in problems]
        metrics = jax.tree.map(lambda *values: jnp.stack(values).mean(0), *(of_problem for _, of_problem in losses))
        metrics["temperature"] = jnp.exp(params["log_temperature"])
        metrics |= {name: params[name] for name in ("bias",) if name in params}
        return jnp.stack([value for value, _ in losses]).sum(), metrics

    def project(params: Params, metrics: Metrics) -> Params:
        average = {name: metrics[name] for name in ("log_average",) if name in params}
        return params | {"log_temperature": jnp.clip(params["log_temperature"], low, high)} | average

    return Objective(init, loss, project)
