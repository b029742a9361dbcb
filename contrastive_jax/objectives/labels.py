"""Objectives of labelled pairs: a softmax over classes with R-Drop, CoSENT, and cosine regression.

A label is a class or a score. A pair without one has NaN; it counts in the divergence of R-Drop alone. All sums run over the
global batch.

Dimensions: b pairs, v = k · f views, k copies of a pair, f fields (texts) of a pair, e embedding, c classes, n scored pairs.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives.objective import NOTHING, Given, Metrics, Objective, PairIds, Params
from contrastive_jax.objectives.tiles import MASKED


def fields_of_views(config: ConfigDict, views: int, allowed: Sequence[int]) -> int:
    """Returns f, the fields of a pair; `config` is that of the run.

    Raises:
      UserError: the pairs have no labels, or the objective does not take so many fields.
    """
    name, fields = config.objective.name, views // config.data.copies
    if config.data.sampler != "fields" and not config.data.random_next:
        raise UserError(
            f"config.objective.name={name!r} needs labels: prepare the data with --pairs, and set config.data.sampler='fields'"
        )
    if fields not in allowed:
        numbers = " or ".join(map(str, allowed))
        raise UserError(f"config.data.views={fields}: config.objective.name={name!r} takes {numbers}")
    return fields


def learns_labels(config: ConfigDict) -> bool:
    """Returns whether a run learns the labels of its data, by an objective of this module."""
    named = config.objective.name in ("softmax", "cosent", "cosine")
    return named and bool(config.objective.weight) and not config.data.random_next


def check_labels(config: ConfigDict, labels: Sequence[float]) -> None:
    """Checks that the data has the labels that the objective of the run needs.

    Args:
      config: of the run.
      labels: the lowest and the highest label of the data; empty: it has none.

    Raises:
      UserError: it has not.
    """
    name, classes = config.objective.name, sum(config.labels.classes)
    if not learns_labels(config):
        return
    if not labels:
        raise UserError(f"config.objective.name={name!r}: the pairs of config.data.dir={config.data.dir} have no labels")
    if name == "softmax" and round(max(labels)) >= classes:
        raise UserError(
            f"config.labels.classes={tuple(config.labels.classes)}: they are {classes}, but the data has the label "
            f"{max(labels):g}; raise it"
        )


def mean_where(values: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns the mean of those values that count; 0 where none does."""
    return jnp.where(counts, values, 0).sum() / jnp.maximum(counts.sum(), 1)


def features(z: jax.Array, product: bool) -> jax.Array:
    """Returns what a linear classifier sees of the fields of a pair.

    It is [u, v, |u - v|] of two fields (Reimers and Gurevych, arXiv 1908.10084, equation of §3), with u · v elementwise too
    where `product` (Conneau et al., arXiv 1705.02364, §3.1), and u of one field.

    Args:
      z: float32[... f e], unit vectors.
      product: whether to add u · v.

    Returns:
      float32[... m · e], m = 1, 3 or 4, scaled so that the entries of u have a mean square of 1, as layer norm gives them.
    """
    z = z * np.sqrt(z.shape[-1])
    u, v = z[..., 0, :], z[..., -1, :]
    if z.shape[-2] == 1:
        return u
    return jnp.concatenate([u, v, jnp.abs(u - v), *[u * v] * product], axis=-1)


def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    r"""Returns R-Drop's term of two passes over the same rows, float32[b], from log probabilities float32[b c].

    .. math::
      \frac12 [KL(p \| q) + KL(q \| p)] = \frac12 \sum_c (p_c - q_c) (\log p_c - \log q_c)
    """
    return ((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q)).sum(-1) / 2


def softmax(config: ConfigDict, views: int, dim: int) -> Objective:
    r"""Classifies pairs, or single texts, by a linear layer and a softmax; R-Drop where `config.labels.rdrop` is above 0.

    .. math::
      \mathrm{mean}_{labelled} \sum_k -\log p_k(y) + \alpha \; \mathrm{mean}_{all} \frac12 [KL(p_1 \| p_2) + KL(p_2 \| p_1)]

    The two copies of a pair differ by dropout. Of several label spaces (RoFormer-Sim), whose classes follow one another, a pair
    sees the logits of the space that its label is of.

    Raises:
      UserError: the data has no labels or too many fields, or R-Drop has not two copies.

    References:
      Liang et al., R-Drop: Regularized Dropout for Neural Networks, https://arxiv.org/abs/2106.14448, equations 2 to 4
    """
    labels, copies, spaces = config.labels, config.data.copies, tuple(config.labels.classes)
    fields = fields_of_views(config, views, (1, 2))
    if labels.rdrop and copies != 2:
        raise UserError(f"config.labels.rdrop={labels.rdrop}: compares two copies; set config.data.copies=2, not {copies}")
    space_of_class = np.repeat(np.arange(len(spaces)), spaces)
    width, classes = dim * (1 if fields == 1 else 3 + labels.product), sum(spaces)

    def init(rng: jax.Array) -> Params:
        bias = {"bias": jnp.zeros(classes)} if labels.bias else {}
        return {"kernel": jax.random.normal(rng, (width, classes)) / np.sqrt(width)} | bias

    def loss(z: jax.Array, ids: PairIds, params: Params, given: Given = NOTHING) -> tuple[jax.Array, Metrics]:
        del given
        x = features(z.reshape(len(z), copies, fields, dim), labels.product)
        logits = jnp.matmul(x, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params.get("bias", 0)  # [b k c]
        assert ids.label is not None  # data.sampler "fields" or data.random_next gives it
        labelled = ids.label >= 0
        target = jnp.where(labelled, jnp.round(ids.label), 0).astype(jnp.int32)  # a score is of the nearest class
        space_of = jnp.asarray(space_of_class)  # made here: a device array from outside would be fetched at lowering
        allowed = (space_of == space_of[target][:, None]) | ~labelled[:, None]
        log_p = jax.nn.log_softmax(jnp.where(allowed[:, None], logits, MASKED))
        picked = jnp.take_along_axis(log_p, target[:, None, None], axis=-1)[..., 0]  # [b k]
        value = mean_where(-picked.sum(1), labelled)
        metrics = {"accuracy": mean_where((log_p.argmax(-1) == target[:, None]).mean(1), labelled)}
        if labels.rdrop:
            metrics["divergence"] = divergence(log_p[:, 0], log_p[:, 1]).mean()
            value += labels.rdrop * metrics["divergence"]
        return value, jax.lax.stop_gradient(metrics)

    return Objective(init, loss)


def cosent_loss(logits: jax.Array, label: jax.Array) -> jax.Array:
    r"""Computes CoSENT, which asks that pairs with a higher label are more similar, in O(n log n).

    .. math::
      \log \Bigl(1 + \sum_{y_i > y_j} e^{s_j - s_i}\Bigr)

    Sorted by label, the pairs below the i-th are a prefix, whose log-sum-exp is one of a cumulative sum.

    Args:
      logits: float32[n], s: the cosines divided by the temperature.
      label: float32[n], y; pairs of equal labels, and those with NaN, are not compared.

    Returns:
      float32[].

    References:
      Su, https://kexue.fm/archives/8847
    """
    label = jnp.where(jnp.isnan(label), jnp.inf, label)  # the last, below nobody
    order = jnp.argsort(label)
    label, logits = label[order], logits[order]
    begins = jnp.concatenate([jnp.ones(1, bool), label[1:] != label[:-1]])
    first = jax.lax.cummax(jnp.where(begins, jnp.arange(len(label)), 0))  # of the pairs with the same label
    below = jax.lax.cumlogsumexp(logits)[jnp.maximum(first - 1, 0)]
    terms = jnp.where((first > 0) & jnp.isfinite(label), below - logits, MASKED)
    return jax.nn.logsumexp(jnp.concatenate([jnp.zeros(1), terms]))


def correlation(similarity: jax.Array, label: jax.Array) -> jax.Array:
    """Returns Pearson's correlation of the similarities float32[n] with the labels, where these are not NaN."""
    counts = ~jnp.isnan(label)
    x, y = (value - mean_where(value, counts) for value in (similarity, jnp.where(counts, label, 0)))
    xy, xx, yy = (mean_where(a * b, counts) for a, b in ((x, y), (x, x), (y, y)))
    return xy / jnp.sqrt(jnp.maximum(xx * yy, 1e-12))


def of_similarity(value: Callable[[ConfigDict, jax.Array, jax.Array], jax.Array]) -> Callable[..., Objective]:
    """Makes the builder of a loss of cosines, without parameters, from (config, cosine [n], label [n]) → loss.

    Copies of a pair, which differ by dropout, count as pairs of their own.
    """

    def build(config: ConfigDict, views: int, dim: int) -> Objective:
        fields = fields_of_views(config, views, (2,))

        def loss(z: jax.Array, ids: PairIds, params: Params, given: Given = NOTHING) -> tuple[jax.Array, Metrics]:
            del params, given
            assert ids.label is not None  # data.sampler "fields" or data.random_next gives it
            pairs = z.reshape(-1, fields, dim)
            similarity, label = (pairs[:, 0] * pairs[:, 1]).sum(-1), jnp.repeat(ids.label, views // fields)
            metrics = {"label_correlation": correlation(similarity, label)}
            return value(config, similarity, label), jax.lax.stop_gradient(metrics)

        return Objective(lambda rng: {}, loss)

    return build


@of_similarity
def cosent(config: ConfigDict, similarity: jax.Array, label: jax.Array) -> jax.Array:
    """CoSENT with the temperature of the config, which is not trained; see `cosent_loss`."""
    return cosent_loss(similarity / config.objective.temperature, label)


@of_similarity
def cosine(config: ConfigDict, similarity: jax.Array, label: jax.Array) -> jax.Array:
    """The mean of (cosine - label / `config.labels.scale`)², as in SBERT (arXiv 1908.10084, §3)."""
    counts = ~jnp.isnan(label)
    wanted = jnp.where(counts, label, 0) / config.labels.scale
    return mean_where(jnp.square(similarity - wanted), counts)
