"""Losses over pairs of embeddings, each a reduction over the negatives of a row.

Dimensions: b pairs, v views (anchor, positives, hard negatives), p positives of an anchor, k keys of a row, e embedding.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from contrastive_jax.objectives import distributed
from contrastive_jax.objectives.distributed import Ids, Stats

Params = Any  # nested dict of arrays
Metrics = dict[str, jax.Array]


class Keys(NamedTuple):
    """What anchors are scored against: z float32[b k e], and Ids with [b k]."""

    z: jax.Array
    ids: Ids


class Objective(NamedTuple):
    """A loss with trainable parameters of its own.

    Attributes:
      init: key → params, a dict of float32 arrays (they join the encoder's in the optimiser).
      loss: (z float32[b v e], {"doc": int32[b], "text": int32[b v]}, params, Keys or None) → (loss, metrics), means over the
        global batch. Without `Keys` the other rows' positives and hard negatives are the negatives.
      project: params → params, applied after each optimiser step to keep them in their range. Clamping the parameter rather
        than its use keeps the gradient alive at the boundary (as CLIP does, arXiv 2103.00020 §2.5).
    """

    init: Callable[[jax.Array], Params]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    project: Callable[[Params], Params]


class PairLoss(NamedTuple):
    """One kind of loss.

    Attributes:
      term: what a negative adds to the total of its row.
      finish: (positive logit, Stats of its row's negatives) → loss; elementwise.
      directions: 2 if anchors (rows) and positives (columns) each have a loss, 1 if the rows' holds every pair already.
    """

    term: distributed.Term
    finish: Callable[[jax.Array, Stats], jax.Array]
    directions: int


def log_ratio(positive: jax.Array, negatives: Stats) -> jax.Array:
    r"""The log of Σ_j exp(s_j - s⁺) over the negatives j; about -1e30 without any.

    Taken from the largest logit, not from a rounded log-sum-exp, so that logits of hundreds lose nothing.
    """
    some = negatives.number > 0
    return jax.lax.stop_gradient(negatives.top) - positive + jnp.log(jnp.where(some, negatives.total, 1.0))


def info_nce(positive: jax.Array, negatives: Stats) -> jax.Array:
    r"""InfoNCE: cross-entropy of the positive against it and the negatives.

    .. math::
      -\log \frac{e^{s^+}}{e^{s^+} + \sum_j e^{s_j}} = \mathrm{softplus}(\log \sum_j e^{s_j - s^+})

    References:
      van den Oord et al., Representation Learning with Contrastive Predictive Coding, https://arxiv.org/abs/1807.03748
      Neelakantan et al., Text and Code Embeddings by Contrastive Pre-Training, https://arxiv.org/abs/2201.10005, figure 4
    """
    return jax.nn.softplus(log_ratio(positive, negatives))


def dcl(positive: jax.Array, negatives: Stats) -> jax.Array:
    r"""Decoupled contrastive learning: InfoNCE without the positive in its denominator; 0 for a row without negatives.

    .. math::
      -s^+ + \log \sum_j e^{s_j}

    References:
      Yeh et al., Decoupled Contrastive Learning, https://arxiv.org/abs/2110.06848, equation 6
    """
    return jnp.where(negatives.number > 0, log_ratio(positive, negatives), 0.0)


def flat_nce(positive: jax.Array, negatives: Stats) -> jax.Array:
    r"""FlatNCE: identically 1; its gradient is that of :math:`\log \sum_j e^{s_j - s^+}`, hence equal to DCL's.

    .. math::
      \frac{\sum_j e^{s_j - s^+}}{\mathrm{stop\_gradient}(\sum_j e^{s_j - s^+})}

    References:
      Chen et al., Simpler, Faster, Stronger: Breaking The log-K Curse On Contrastive Learners With FlatNCE,
      https://arxiv.org/abs/2107.01152, equation 8
    """
    ratio = dcl(positive, negatives)
    return jnp.exp(ratio - jax.lax.stop_gradient(ratio))


def siglip(positive: jax.Array, negatives: Stats) -> jax.Array:
    r"""The sigmoid loss: each pair is a two-class problem of its own; logits carry a trainable bias.

    .. math::
      \mathrm{softplus}(-s^+) + \sum_j \mathrm{softplus}(s_j)

    References:
      Zhai et al., Sigmoid Loss for Language Image Pre-Training, https://arxiv.org/abs/2303.15343, equation 2
    """
    return jax.nn.softplus(-positive) + negatives.total


LOSSES = {
    "infonce": PairLoss(distributed.EXP, info_nce, directions=2),
    "flatnce": PairLoss(distributed.EXP, flat_nce, directions=2),
    "dcl": PairLoss(distributed.EXP, dcl, directions=2),
    "siglip": PairLoss(distributed.SOFTPLUS, siglip, directions=1),
}


def smooth(loss: jax.Array, positive: jax.Array, negatives: Stats, amount: float) -> jax.Array:
    """Label smoothing of a cross-entropy: a share `amount` of the target is spread evenly over positive and negatives.

    References:
      Szegedy et al., Rethinking the Inception Architecture, https://arxiv.org/abs/1512.00567, §7
    """
    if negatives.linear is None:
        return loss
    return loss + amount * (positive - (negatives.linear + positive) / (negatives.number + 1))


def check(config: ConfigDict, views: int, dim: int) -> None:
    """Raises ValueError, naming the key, for an objective that cannot be."""
    for key, choices in (("name", LOSSES), ("where", distributed.WHERE), ("dtype", ("float32", "bfloat16"))):
        if config[key] not in choices:
            raise ValueError(f"config.objective.{key}={config[key]!r}: choose one of {', '.join(choices)}")
    low, start, high = config.temperature_min, config.temperature, config.temperature_max
    if not 0 < low <= start <= high:
        raise ValueError(
            f"config.objective.temperature={start} must lie in [temperature_min, temperature_max]=[{low}, {high}], above 0"
        )
    if config.block < 1:
        raise ValueError(f"config.objective.block={config.block}: must be at least 1")
    if not 0 <= config.hard_negatives <= views - 2:
        raise ValueError(
            f"config.objective.hard_negatives={config.hard_negatives}: of {views} views two are anchor and positive; "
            f"must be in [0, {views - 2}]"
        )
    if not 0 <= config.label_smoothing < 1 or (config.label_smoothing and config.name != "infonce"):
        raise ValueError(
            f"config.objective.label_smoothing={config.label_smoothing}: must be in [0, 1), and 0 for any loss but infonce"
        )
    if any(not 1 <= size <= dim or weight <= 0 for size, weight in config.matryoshka):
        raise ValueError(f"config.objective.matryoshka={config.matryoshka}: (size, weight) with 1 <= size <= {dim}, weight > 0")


def first_occurrence(text: jax.Array) -> jax.Array:
    """Whether no earlier row of text int32[b v] has the same texts, bool[b]."""
    *columns, order = jax.lax.sort((*text.T, jnp.arange(len(text))), num_keys=text.shape[1] + 1)
    same = jnp.stack([column[1:] == column[:-1] for column in columns]).all(0)
    return jnp.ones(len(text), bool).at[order[1:]].set(~same)


def unit(z: jax.Array) -> jax.Array:
    """z[... e] over its length."""
    return z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(-1, keepdims=True), 1e-12))


class Labels:
    """Who is whose negative: the ids of anchors and of the batch's own keys, from `config.objective`."""

    def __init__(self, config: ConfigDict, ids: dict[str, jax.Array]):
        self.config = config
        doc, text = ids["doc"], ids["text"]
        b, views = text.shape
        self.p = views - 1 - config.hard_negatives
        self.row = jnp.arange(b, dtype=jnp.int32)
        self.valid = first_occurrence(text) if config.mask_duplicates else jnp.ones(b, bool)
        self.doc = doc if config.mask_same_document else None
        self.text = text if config.mask_duplicates else None

    def limit(self, similarity: jax.Array) -> jax.Array | None:
        """The similarity above which a pair is no negative, or None; similarity is a positive's."""
        return None if self.config.mask_margin is None else jax.lax.stop_gradient(similarity) + self.config.mask_margin

    def anchors(self, similarity: jax.Array) -> Ids:
        """Ids of the anchors; similarity float32[b p] to their positives."""
        text = None if self.text is None else self.text[:, : 1 + self.p]
        return Ids(self.row, self.valid, self.doc, text, self.limit(similarity.max(1)))

    def keys(self, similarity: jax.Array) -> Ids:
        """Ids [b p + hard] of the positives, which carry their anchor's text too, and of the hard negatives."""
        p, hard = self.p, self.config.hard_negatives

        def spread(positive: jax.Array, other: Any) -> jax.Array:
            rest = jnp.full((len(positive), hard), other, positive.dtype)
            return jnp.concatenate([jnp.broadcast_to(positive[:, None], (len(positive), p)), rest], axis=1)

        text = self.text
        if text is not None:
            anchor = jnp.broadcast_to(text[:, :1], (len(text), p))
            text = jnp.stack([text[:, 1:], jnp.concatenate([anchor, text[:, 1 + p :]], axis=1)], axis=2)
        limit = self.limit(similarity)
        if limit is not None:
            limit = jnp.pad(limit, ((0, 0), (0, hard)), constant_values=jnp.inf)
        valid = jnp.broadcast_to(self.valid[:, None], (len(self.valid), p + hard))
        return Ids(spread(self.row, -1), valid, None if self.doc is None else spread(self.doc, -1), text, limit)


class Scores(NamedTuple):
    """A batch scored.

    Attributes:
      similarity: float32[b p], anchors to their positives.
      logits: float32[b p], of the same.
      sides: Stats of the negatives of the rows [b 1] and, for a symmetric loss, of the columns [b p].
      weight: float32[b 1], of a positive in a mean over all that count.
      others: float32[], the keys an anchor could have as negatives if nothing were masked.
    """

    similarity: jax.Array
    logits: jax.Array
    sides: list[Stats]
    weight: jax.Array
    others: jax.Array

    def mean(self, value: Callable[[Stats], jax.Array]) -> jax.Array:
        """The mean of a function of each side's Stats."""
        return jnp.stack([(value(side) * self.weight).sum() for side in self.sides]).mean()


def score(
    config: ConfigDict, sums: Callable, apart: int, z: jax.Array, labels: Labels, affine: jax.Array, other: Keys | None
) -> Scores:
    """Scores z[b v e] against the batch's own keys, or others; `apart`: into how many shares the keys fall."""
    p = labels.p
    z = z.astype(config.dtype).astype(jnp.float32)
    similarity = jnp.einsum("be,bpe->bp", z[:, 0], z[:, 1 : 1 + p], precision=jax.lax.Precision.HIGHEST)
    keys = Keys(z[:, 1:], labels.keys(similarity)) if other is None else other
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), keys)
    rows, columns = sums(z[:, 0], flat.z, affine, labels.anchors(similarity), flat.ids)
    sides = [jax.tree.map(lambda x: x[:, None], rows)]
    if columns is not None:
        sides.append(jax.tree.map(lambda x: x.reshape(len(z), -1)[:, :p], columns))
    weight = labels.valid[:, None] / (labels.valid.sum() * p)
    return Scores(similarity, similarity * affine[0] + affine[1], sides, weight, flat.ids.valid.sum() / apart - p)


def measure(z: jax.Array, labels: Labels, scores: Scores) -> Metrics:
    """What one wants to see of a batch; no gradient flows through it."""
    b, p = scores.similarity.shape
    anchor, positive = z[:, 0], z[:, 1 : 1 + p]
    masked = 1 - (scores.sides[0].number * scores.weight * p).sum() / jnp.maximum(scores.others, 1)
    metrics = {
        "in_batch_top1": scores.mean(lambda side: scores.logits >= side.top),
        "positive_similarity": (scores.similarity * scores.weight).sum(),
        # Σ_ij x_i·y_j = (Σ x)·(Σ y): the mean over all pairs but the positives, masked or not.
        "negative_similarity": (anchor.sum(0) @ positive.sum((0, 1)) - scores.similarity.sum())
        / max(float(b * (b - 1) * p), 1.0),
        "dropped_share": 1 - labels.valid.mean(),
        "masked_share": masked,
    }
    return jax.lax.stop_gradient(metrics)


def make(config: ConfigDict, views: int, dim: int, mesh: Mesh | None = None, axes: tuple[str, ...] = ()) -> Objective:
    """Builds the objective of `config.objective`.

    Args:
      config: `config.objective`.
      views: v, the spans of a row.
      dim: e, the width of an embedding.
      mesh: the mesh; None: one device.
      axes: the mesh axes over which the batch is spread.

    Raises:
      ValueError: a value is out of range; the message names the key.
    """
    check(config, views, dim)
    kind = LOSSES[config.name]
    columns, linear = config.symmetric and kind.directions == 2, config.label_smoothing > 0
    sums = distributed.negatives(
        distributed.Sweep(kind.term, columns, linear, config.dtype, config.block, config.where), mesh, axes
    )
    apart = math.prod(mesh.shape[axis] for axis in axes) if mesh is not None and config.where == "local" else 1
    low, start, high = (math.log(config[key]) for key in ("temperature_min", "temperature", "temperature_max"))

    def init(key: jax.Array) -> Params:
        del key
        bias = {"bias": jnp.float32(config.bias)} if config.name == "siglip" else {}
        return {"log_temperature": jnp.float32(start)} | bias

    def one(z: jax.Array, labels: Labels, affine: jax.Array, keys: Keys | None) -> tuple[jax.Array, Metrics]:
        scores = score(config, sums, apart, z, labels, affine, keys)
        metrics = measure(z, labels, scores)
        if config.name == "flatnce":  # the loss is always 1: this is what falls
            metrics["log_ratio"] = jax.lax.stop_gradient(scores.mean(lambda side: dcl(scores.logits, side)))

        def finish(side: Stats) -> jax.Array:
            return smooth(kind.finish(scores.logits, side), scores.logits, side, config.label_smoothing)

        return scores.mean(finish), metrics

    def loss(z: jax.Array, ids: dict[str, jax.Array], params: Params, keys: Keys | None = None) -> tuple[jax.Array, Metrics]:
        log_temperature = params["log_temperature"]
        if not config.temperature_trainable:
            log_temperature = jax.lax.stop_gradient(log_temperature)
        affine = jnp.stack([jnp.exp(-log_temperature), params.get("bias", jnp.float32(0))])
        labels, total = Labels(config, ids), jnp.float32(0)
        prefixes = tuple(config.matryoshka) or ((dim, 1.0),)
        for size, weight in prefixes:
            cut = [unit(x[..., :size]) if size < dim else x for x in (z, *([keys.z] if keys else []))]
            value, metrics = one(cut[0], labels, affine, keys._replace(z=cut[1]) if keys else None)
            total += weight * value
            if len(prefixes) > 1:
                metrics = {f"loss_{size}": value} | metrics
        extra = {"temperature": jnp.exp(log_temperature)} | {name: params[name] for name in ("bias",) if name in params}
        return total / sum(weight for _, weight in prefixes), metrics | extra

    def project(params: Params) -> Params:
        return params | {"log_temperature": jnp.clip(params["log_temperature"], low, high)}

    return Objective(init, loss, project)
