"""SimSiam and BYOL: each view predicts the other one, and there are no negatives.

Nothing but the stop-gradient keeps the embeddings of all texts from becoming one vector, so watch `embedding_std`; the guard
stops a run in which they do.

References:
  Chen and He, Exploring Simple Siamese Representation Learning, https://arxiv.org/abs/2011.10566
  Grill et al., Bootstrap Your Own Latent, https://arxiv.org/abs/2006.07733

Dimensions: b pairs, v views, e embedding, f output of the heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives.dense import normalize
from contrastive_jax.objectives.heads import Head
from contrastive_jax.objectives.objective import NOTHING, Given, Metrics, Objective, PairIds, Params, check_two_views


class Heads(NamedTuple):
    """The two heads: the projector on the encoder's embeddings, and the predictor on the projector's."""

    projector: Head
    predictor: Head

    def init(self, rng: jax.Array) -> Params:
        """Returns {"projector": ..., "predictor": ...}."""
        keys = jax.random.split(rng)
        return {name: head.init(key) for name, head, key in zip(self._fields, self, keys, strict=True)}


def make_heads(config: ConfigDict, views: int, dim: int, outputs: tuple[str, str]) -> Heads:
    """Builds the heads of `config.heads`.

    Args:
      config: of the run.
      views: v.
      dim: e.
      outputs: the kinds of the last layers of projector and predictor.

    Raises:
      UserError: there is one view only, there is no predictor, or it does not end at its own input's width.
    """
    projector, predictor = tuple(config.heads.projector), tuple(config.heads.predictor)
    check_two_views(config.objective, views)
    width = (dim, *projector)[-1]
    if not predictor or predictor[-1] != width:
        raise UserError(
            f"config.heads.predictor={predictor} must end at the width of the embeddings that it predicts, {width} "
            f"(config.heads.projector={projector})"
        )
    return Heads(Head((dim, *projector), outputs[0]), Head((width, *predictor), outputs[1]))


def agreement(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the mean cosine [v v] of prediction i of predicted[b v f] with target j of target[b v f], which is held fixed."""
    fixed = stop_gradient(normalize(target))
    return jnp.einsum("bif,bjf->ij", normalize(predicted), fixed, precision="highest") / len(predicted)


def of_others(agreement: jax.Array) -> jax.Array:
    """Returns the mean of agreement[v v] over predictions of another view: all but the diagonal."""
    v = len(agreement)
    return jnp.where(jnp.eye(v, dtype=bool), 0, agreement).sum() / (v * (v - 1))


def measure(z: jax.Array, projected: jax.Array) -> Metrics:
    """Returns the metrics of a batch: the cosine of its first two views, and how spread out the first view's projections are.

    That is √(1 - |mean|²) of their unit vectors: 0 where all are one, 1 where they are even.
    """
    projection_std = jnp.sqrt(jnp.maximum(1 - jnp.square(normalize(projected[:, 0]).mean(0)).sum(), 0))
    metrics = {"positive_similarity": (z[:, 0] * z[:, 1]).sum(-1).mean(), "projection_std": projection_std}
    return jax.lax.stop_gradient(metrics)


def simsiam(config: ConfigDict, views: int, dim: int) -> Objective:
    """Builds SimSiam (equation 2): L = -½ cos(p₁, sg z₂) - ½ cos(p₂, sg z₁), where z = projector(x) and p = predictor(z).

    More than two views predict one another in all ordered pairs.

    Raises:
      UserError: from `make_heads`.
    """
    heads = make_heads(config, views, dim, ("norm", "bias"))

    def loss(z: jax.Array, ids: PairIds, params: Params, given: Given = NOTHING) -> tuple[jax.Array, Metrics]:
        projected = heads.projector(params["projector"], z)
        predicted = heads.predictor(params["predictor"], projected)
        return -of_others(agreement(predicted, projected)), measure(z, projected)

    return Objective(heads.init, loss)


def byol(config: ConfigDict, views: int, dim: int) -> Objective:
    """Builds BYOL (equation 2): L = (2 - 2 cos(p₁, z′₂)) + (2 - 2 cos(p₂, z′₁)), where z′ is of the target.

    The target is a moving average of encoder and projector, `config.memory`; its batch norms take the statistics of the batch,
    as the published code does.

    Raises:
      UserError: from `make_heads`, or there is no target.
    """
    if config.memory.kind != "average":
        raise UserError(
            f"config.memory.kind={config.memory.kind!r}: config.objective.name='byol' predicts a moving average; set 'average'"
        )
    heads = make_heads(config, views, dim, ("linear", "linear"))

    def loss(z: jax.Array, ids: PairIds, params: Params, given: Given = NOTHING) -> tuple[jax.Array, Metrics]:
        assert given.z is not None  # kind "average" gives it
        projected = heads.projector(params["projector"], z)
        predicted = heads.predictor(params["predictor"], projected)
        target = heads.projector(given.params["projector"], given.z)
        return 4 - 4 * of_others(agreement(predicted, target)), measure(z, projected)

    return Objective(heads.init, loss)
