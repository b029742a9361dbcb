"""The objective of the pair losses, with its trainable temperature and its metrics.

A direction says who looks for whom. An anchor has sums over its negatives among the keys, a positive over its negatives among
the anchors ("document_query"), from the same tiles. "query_query" and "document_document" stay on one side.

Dimensions: b pairs, v views (anchor, positives, hard negatives), p positives of an anchor, k keys of a pair, e embedding, f
embedding of a guide.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives import negatives, pairing, tiles
from contrastive_jax.objectives.dense import normalize
from contrastive_jax.objectives.losses import LOSSES, PairLoss, dcl, information, moving_average, pool, smooth
from contrastive_jax.objectives.objective import NOTHING, Given, Keys, Metrics, Objective, PairIds, Params
from contrastive_jax.objectives.tiles import EXP, MASKED, MaskIds, NegativeSums, Sweep


def pair_config(config: ConfigDict) -> ConfigDict:
    """Returns the `config.objective` of a run with `hard_negatives`, which its data decides."""
    objective = config.objective.copy_and_resolve_references()
    with objective.unlocked():
        objective.hard_negatives = config.data.hard_negatives
    return objective


def check_objective(config: ConfigDict, views: int, dim: int) -> None:
    """Checks `pair_config` for v views and embeddings of size `dim`.

    Raises:
      UserError: two keys do not go together; the message names them.
    """
    low, start, high = config.temperature_min, config.temperature, config.temperature_max
    if not low <= start <= high:
        raise UserError(f"config.objective.temperature={start} must lie in [temperature_min, temperature_max]=[{low}, {high}]")
    if config.joint and (config.name != "infonce" or config.symmetric or config.pairing != "first" or config.locals):
        raise UserError(
            f"config.objective.joint={tuple(config.joint)}: is one softmax over several directions; set "
            "config.objective.name='infonce', symmetric=False, pairing='first' and locals=0"
        )
    if config.hardness_own and not config.hard_negatives:
        raise UserError(f"config.objective.hardness_own={config.hardness_own}: set config.data.hard_negatives")
    for key in ("mask_guide", "mask_relative"):
        if config[key] and config.mask_margin is None:
            raise UserError(f"config.objective.{key}: set config.objective.mask_margin, such as 0.0")
    if config.mask_guide and (config.locals or config.context):
        raise UserError("config.objective.mask_guide: needs config.objective.locals=0 and config.objective.context=0")
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
      config: from `pair_config`.
      ids: of the batch.
      positives: p, the positives of an anchor.
      repeats: how many anchors a pair has, each with p positives; their rows follow one another.
      guide: float32[b v f], the embeddings by a guide, whose similarity the margin is about; None: that of the run itself.
    """

    def __init__(self, config: ConfigDict, ids: PairIds, positives: int, repeats: int = 1, guide: jax.Array | None = None):
        b, views = ids.span_hash.shape
        self._margin, self._relative = config.mask_margin, config.mask_relative
        self._guide = None if guide is None else guide.astype(config.dtype).astype(jnp.float32)
        spans = jnp.repeat(ids.span_hash, repeats, axis=0)
        self.positives, self.repeats = positives, repeats
        valid = first_occurrence(ids.span_hash) if config.mask_duplicates else jnp.ones(b, bool)
        self.valid = jnp.repeat(valid, repeats)
        self._row = jnp.repeat(jnp.arange(b, dtype=jnp.int32), repeats)
        self._alone = jnp.where(ids.document < -1, ids.document, -1)  # of a source without in-batch negatives, see `MaskIds`
        compared = ids.document if config.mask_same_document else self._alone
        # Without labels, these are spans of documents, whose sources all have in-batch negatives.
        is_compared = config.mask_same_document or ids.label is not None
        self._document = jnp.repeat(compared, repeats) if is_compared else None
        of_pair, self._hard = jnp.split(spans, [views - config.hard_negatives], axis=1)
        self._span_hash = of_pair if config.mask_duplicates else None  # of the anchor and all its positives

    def _limit(self, similarity: jax.Array) -> jax.Array | None:
        """The similarity above which a pair is not a negative, or None; `similarity` float32[b p] is the run's to positives."""
        if self._margin is None:
            return None
        judged = jax.lax.stop_gradient(similarity if self._guide is None else positive_similarity(self._guide, self.positives))
        return judged + self._margin * (jnp.abs(judged) if self._relative else 1)

    def anchors(self, similarity: jax.Array) -> MaskIds:
        """Returns the ids of the anchors, from their similarity float32[b p] to their positives."""
        limit, guide = self._limit(similarity), None if self._guide is None else self._guide[:, 0]
        highest = None if limit is None else limit.max(1)
        return MaskIds(self._row, self.valid, self._document, self._span_hash, highest, guide=guide)

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
        document = None if self._document is None else widen(self._document, jnp.repeat(self._alone, self.repeats)[:, None])
        span_hash = None if self._span_hash is None else widen(self._span_hash, self._hard[..., None])
        row = jnp.broadcast_to(self._row[:, None], valid.shape)
        is_hard = jnp.broadcast_to(jnp.arange(p + hard) >= p, valid.shape) if hard else None
        return MaskIds(row, valid, document, span_hash, limit, is_hard, None if self._guide is None else self._guide[:, 1:])


def positive_similarity(z: jax.Array, p: int) -> jax.Array:
    """Returns the similarity float32[b p] of anchors to their positives, of z float32[b v e]."""
    return jnp.einsum("be,bpe->bp", z[:, 0], z[:, 1 : 1 + p], precision=jax.lax.Precision.HIGHEST)


class Scores(NamedTuple):
    """A batch scored.

    Attributes:
      similarity: float32[b p], of anchors to their positives.
      logits: float32[b p], of the same.
      directions: NegativeSums of the anchors [b 1] and, for a symmetric loss, of the positives [b p]; or joint ones [b p].
      weight: float32[b 1], of a positive in a mean over all that count.
      masked: float32[], the share of an anchor's keys that a mask keeps from being its negatives.
    """

    similarity: jax.Array
    logits: jax.Array
    directions: list[NegativeSums]
    weight: jax.Array
    masked: jax.Array

    def mean(self, value: Callable[[NegativeSums], jax.Array]) -> jax.Array:
        """Returns the mean over pairs and directions of a function of each direction's sums."""
        return jnp.stack([(value(sums) * self.weight).sum() for sums in self.directions]).mean()


def flatten(keys: Keys) -> Keys:
    """[b k ...] → [b·k ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), keys)


class Scorer(NamedTuple):
    """Scores embeddings against keys.

    Attributes:
      sweep: how to sum.
      sums: of anchors against keys, from `negatives.on_mesh`.
      one_side: the same of vectors of one side, without sums of the keys and without hardness.
      joint: the directions whose sums join those of the anchors.
      key_shards: into how many sets the keys fall, of which an anchor sees one (more than 1 with where="local").
    """

    sweep: Sweep
    sums: Callable
    one_side: Callable
    joint: tuple[str, ...]
    key_shards: int

    def __call__(self, z: jax.Array, mask: BatchMask, affine: jax.Array, other: Keys | None) -> Scores:
        """Scores z float32[b v e] against the batch's own keys or `other` ones; a logit is affine[0] · x·y + affine[1]."""
        p = mask.positives
        z = z.astype(self.sweep.dtype).astype(jnp.float32)
        similarity = positive_similarity(z, p)
        anchors = Keys(z[:, 0], mask.anchors(similarity))
        keys = flatten(Keys(z[:, 1:], mask.keys(similarity)) if other is None else other)
        rows, columns = self.sums(anchors.z, keys.z, affine, anchors.ids, keys.ids)
        directions = [jax.tree.map(lambda x: x[:, None], rows)]
        if columns is not None:
            directions.append(jax.tree.map(lambda x: x.reshape(len(z), -1)[:, :p], columns))
        weight = mask.valid[:, None] / (mask.valid.sum() * p)
        logits = similarity * affine[0] + affine[1]
        possible = keys.ids.valid.sum() / self.key_shards - p * mask.repeats
        masked = 1 - (rows.number[:, None] * weight * p).sum() / jnp.maximum(possible, 1)
        if self.joint:
            directions = [self.join(directions, logits, anchors, keys, affine)]
        return Scores(similarity, logits, directions, weight, masked)

    def join(
        self, directions: list[NegativeSums], logits: jax.Array, anchors: Keys, keys: Keys, affine: jax.Array
    ) -> NegativeSums:
        """Joins the sums of all directions in `joint`: [b p].

        The positive is in "document_query" once more, as in GTE (Li et al., https://arxiv.org/abs/2308.03281).

        Args:
          directions: the sums of anchors [b 1] and, with "document_query", of positives [b p].
          logits: float32[b p], of the positives.
          anchors: [b ...].
          keys: [b·k ...].
          affine: as above.
        """
        if "document_query" in self.joint:
            directions = [*directions, tiles.sums_of_one(self.sweep, logits)]
        if "query_query" in self.joint:
            sums, _ = self.one_side(anchors.z, anchors.z, affine, anchors.ids, anchors.ids)
            directions = [*directions, jax.tree.map(lambda x: x[:, None], sums)]
        if "document_document" in self.joint:
            b, p = logits.shape
            positives = flatten(jax.tree.map(lambda x: x.reshape(b, -1, *x.shape[1:])[:, :p], keys))
            # Without the mark of hard negatives, which are none of the positives of their own pair.
            ids = keys.ids._replace(hard=None)
            sums, _ = self.one_side(positives.z, keys.z, affine, positives.ids, ids)
            directions = [*directions, jax.tree.map(lambda x: x.reshape(b, p), sums)]
        fixed = [sums._replace(largest=jax.lax.stop_gradient(sums.largest)) for sums in directions]
        return functools.reduce(functools.partial(tiles.join_sums, self.sweep.term), fixed)


def batch_metrics(z: jax.Array, mask: BatchMask, scores: Scores) -> Metrics:
    """Measures what one wants to see of a batch; no gradient flows through it."""
    (b, p), repeats = scores.similarity.shape, mask.repeats
    anchor, positive = (x.reshape(b // repeats, -1, z.shape[-1]).sum(1) for x in (z[:, 0], z[:, 1 : 1 + p]))
    metrics = {
        "in_batch_top1": scores.mean(lambda sums: scores.logits >= sums.largest),
        "positive_similarity": (scores.similarity * scores.weight).sum(),
        # Σ_ij x_i·y_j = (Σ x)·(Σ y): the mean over all pairs but those of one row of the batch, masked or not.
        "negative_similarity": (anchor.sum(0) @ positive.sum(0) - (anchor * positive).sum())
        / max(float(b * (b - repeats) * p), 1.0),
        "dropped_share": 1 - mask.valid.mean(),
        "masked_share": scores.masked,
    }
    return jax.lax.stop_gradient(metrics)


def loss_of_scores(config: ConfigDict, kind: PairLoss, scores: Scores, params: Params) -> tuple[jax.Array, Metrics]:
    """Returns the loss of a scored batch, and the metrics that belong to its kind."""
    metrics = {}
    if config.name == "flatnce":  # the loss is always 1: this is what falls
        metrics["log_ratio"] = scores.mean(lambda sums: dcl(scores.logits, sums))
    if kind.term is EXP and not (config.joint or config.hardness or config.hardness_own):
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
      config: from `pair_config`.
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
    columns = (config.symmetric and kind.directions == 2 and config.pairing != "both") or "document_query" in config.joint
    hardness = config.hardness, config.hardness_own
    sweep = Sweep(kind.term, columns, config.label_smoothing > 0, config.dtype, config.block, config.where, hardness)
    one_side = negatives.on_mesh(sweep._replace(columns=False, hardness=(0.0, 0.0)), mesh, axes)
    local = mesh is not None and config.where == "local"
    key_shards = math.prod(mesh.shape[axis] for axis in axes) if mesh is not None and local else 1
    scorer = Scorer(sweep, negatives.on_mesh(sweep, mesh, axes), one_side, tuple(config.joint), key_shards)
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
        guides: list[Any] = [None] * len(problems)
        if config.mask_guide:
            assert given.z is not None  # frozen and average give it
            guides, _ = pairing.arrange(config, given.z, params)
        positives = problems[0].shape[1] - 1 - config.hard_negatives
        masks = [BatchMask(config, ids, positives, repeats, guide) for guide in guides]
        losses = [
            loss_of_sizes(config, scorer, problem, mask, params, given.keys)
            for problem, mask in zip(problems, masks, strict=True)
        ]
        metrics = jax.tree.map(lambda *values: jnp.stack(values).mean(0), *(of_problem for _, of_problem in losses))
        metrics["temperature"] = jnp.exp(params["log_temperature"])
        metrics |= {name: params[name] for name in ("bias",) if name in params}
        return jnp.stack([value for value, _ in losses]).sum(), metrics

    def project(params: Params, metrics: Metrics) -> Params:
        average = {name: metrics[name] for name in ("log_average",) if name in params}
        return params | {"log_temperature": jnp.clip(params["log_temperature"], low, high)} | average

    return Objective(init, loss, project)
