"""Losses over pairs of embeddings.

Dimensions: b pairs, v = 2 views (anchor, positive), e embedding.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

Params = Any  # nested dict of arrays
Metrics = dict[str, jax.Array]
MASKED = -1e30  # finite, so that a gradient through it is 0 and not NaN


class Objective(NamedTuple):
    """A loss with trainable parameters of its own.

    Attributes:
      init: key → params, a dict of float32 arrays (they join the encoder's in the optimiser).
      loss: (z float32[b v e], doc int32[b], params) → (loss, metrics), means over the global batch.
      project: params → params, applied after each optimiser step to keep them in their range. Clamping the parameter rather
        than its use keeps the gradient alive at the boundary (as CLIP does, arXiv 2103.00020 §2.5).
    """

    init: Callable[[jax.Array], Params]
    loss: Callable[[jax.Array, jax.Array, Params], tuple[jax.Array, Metrics]]
    project: Callable[[Params], Params]


def info_nce(logits: jax.Array) -> jax.Array:
    r"""Symmetric InfoNCE: cross-entropy of the diagonal over rows and over columns, averaged.

    .. math::
      L = \frac{1}{2b} \sum_i \left[ \log \sum_j e^{s_{ij}} + \log \sum_j e^{s_{ji}} - 2 s_{ii} \right]

    Args:
      logits: float32[b b], similarity of anchor i and positive j over the temperature.

    Returns:
      The mean loss in nats, float32[].

    References:
      van den Oord et al., Representation Learning with Contrastive Predictive Coding, https://arxiv.org/abs/1807.03748
      Neelakantan et al., Text and Code Embeddings by Contrastive Pre-Training, https://arxiv.org/abs/2201.10005, figure 4
    """
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"info_nce needs logits [b b], got {logits.shape}")
    positive = jnp.diagonal(logits)
    rows = jax.nn.logsumexp(logits, axis=1) - positive
    columns = jax.nn.logsumexp(logits, axis=0) - positive
    return (rows.mean() + columns.mean()) / 2


def make(config: ConfigDict, gather: Callable[[jax.Array], jax.Array] = lambda x: x) -> Objective:
    """Builds the objective of `config.objective`.

    Args:
      config: `config.objective`.
      gather: replicates keys over the mesh, with its true gradient; the identity on one device.

    Raises:
      ValueError: a value is out of range.
    """
    low, start, high = config.temperature_min, config.temperature, config.temperature_max
    if config.name != "infonce":
        raise ValueError(f"config.objective.name={config.name!r}: choose one of infonce")
    if not 0 < low <= start <= high:
        raise ValueError(
            f"config.objective.temperature={start} must lie in [temperature_min, temperature_max]=[{low}, {high}], above 0"
        )

    def init(key: jax.Array) -> Params:
        del key
        return {"log_temperature": jnp.asarray(math.log(start), jnp.float32)}

    def loss(z: jax.Array, doc: jax.Array, params: Params) -> tuple[jax.Array, Metrics]:
        log_temperature = params["log_temperature"]
        if not config.temperature_trainable:
            log_temperature = jax.lax.stop_gradient(log_temperature)
        anchor, positive = z[:, 0], gather(z[:, 1])
        # Full float32: on a TPU the default would round the unit vectors to bfloat16, and logits are large.
        similarity = jnp.einsum("be,ne->bn", anchor, positive, precision=jax.lax.Precision.HIGHEST)
        same = jnp.eye(len(doc), dtype=bool)
        ignored = (doc[:, None] == gather(doc)[None, :]) & ~same if config.mask_same_document else jnp.zeros_like(same)
        logits = jnp.where(ignored, MASKED, similarity * jnp.exp(-log_temperature))
        value = info_nce(logits)
        return value, pair_metrics(similarity, logits, same, ignored) | {"temperature": jnp.exp(log_temperature)}

    def project(params: Params) -> Params:
        return {"log_temperature": jnp.clip(params["log_temperature"], math.log(low), math.log(high))}

    return Objective(init, loss, project)


def pair_metrics(similarity: jax.Array, logits: jax.Array, same: jax.Array, ignored: jax.Array) -> Metrics:
    """In-batch top-1 (both directions), mean cosine of positives and of negatives, and the share of pairs ignored."""
    similarity, logits = jax.lax.stop_gradient((similarity, logits))
    diagonal = jnp.diagonal(logits)
    top1 = ((diagonal >= logits.max(1)).mean() + (diagonal >= logits.max(0)).mean()) / 2
    negatives = ~same & ~ignored
    return {
        "in_batch_top1": top1,
        "positive_similarity": jnp.diagonal(similarity).mean(),
        "negative_similarity": jnp.where(negatives, similarity, 0).sum() / jnp.maximum(negatives.sum(), 1),
        "ignored_share": ignored.mean(),
    }
