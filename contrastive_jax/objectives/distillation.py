"""Learning from the embeddings of another model.

Dimensions: b pairs, v views, n = b v rows, e and f the widths of the embeddings.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives.objective import NOTHING, Given, Metrics, Objective, PairIds, Params

SCALE = 100.0


def gram(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x' y, of x[n e] and y[n f]: [e f]. A difference of such sums follows, which needs all of float32."""
    return jnp.einsum("ne,nf->ef", x, y, precision=jax.lax.Precision.HIGHEST)


def mean_square(v: jax.Array, t: jax.Array) -> jax.Array:
    r"""Returns the mean square of :math:`V V^\top - T T^\top`, of V[n e] and T[n f], whose n × n cosines are never stored.

    .. math::
      \|V V^\top - T T^\top\|^2 = \|V^\top V\|^2 - 2 \|V^\top T\|^2 + \|T^\top T\|^2
    """
    squares = [jnp.square(gram(x, y)).sum() for x, y in ((v, v), (v, t), (t, t))]
    return (squares[0] - 2 * squares[1] + squares[2]) / len(v) ** 2


def similarity(config: ConfigDict, views: int, dim: int) -> Objective:
    r"""The cosines among all rows of a batch follow those of a target, whose embeddings may have another width.

    With the rows' unit vectors V, and the target's T:

    .. math::
      \frac{100}{n^2} \sum_{ij} (V V^\top - T T^\top)_{ij}^2

    References:
      Su, RoFormer-Sim (its second stage), https://kexue.fm/archives/8454, https://github.com/ZhuiyiTechnology/roformer-sim

    Raises:
      UserError: there is no target that embeds all views.
    """
    del views, dim
    if config.memory.kind not in ("frozen", "average"):
        raise UserError("config.objective.name='similarity': needs a target; set config.memory.kind='frozen' and memory.source")

    def loss(z: jax.Array, ids: PairIds, params: Params, given: Given = NOTHING) -> tuple[jax.Array, Metrics]:
        assert given.z is not None  # frozen and average give it
        error = mean_square(*(x.reshape(-1, x.shape[2]) for x in (z, given.z)))
        return SCALE * error, jax.lax.stop_gradient({"similarity_error": jnp.sqrt(jnp.maximum(error, 0))})

    return Objective(lambda rng: {}, loss)
