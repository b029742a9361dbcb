"""The spread-out regulariser: embeddings of different texts are as far from one another as random directions are.

Random unit vectors have cosines whose mean is 0 and whose mean square is 1/e. The means over all pairs of rows follow from sums
over rows, so that the b × b cosines are never stored.

References:
  Zhang et al., Learning Spread-out Local Feature Descriptors, https://arxiv.org/abs/1708.06320
  Schechter Vera et al., EmbeddingGemma, https://arxiv.org/abs/2509.20354

Dimensions: b pairs, v views, e embedding.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.objectives.objective import NOTHING, Given, Metrics, Objective, PairIds, Params


def of_view(value: Callable[[jax.Array], jax.Array]) -> Callable[..., Objective]:
    """Makes the builder of the mean over the views of a function of each view's embeddings z[b e]."""

    def build(config: ConfigDict, views: int, dim: int) -> Objective:
        del config, views, dim

        def loss(z: jax.Array, ids: PairIds, params: Params, given: Given = NOTHING) -> tuple[jax.Array, Metrics]:
            del ids, params, given
            return jax.vmap(value, in_axes=1)(z).mean(), {}

        return Objective(lambda rng: {}, loss)

    return build


@of_view
def spread_mean(z: jax.Array) -> jax.Array:
    r"""The square of the mean cosine of two rows of z[b e].

    .. math::
      M_1^2, \quad M_1 = \frac{1}{b (b - 1)} \sum_{i \ne j} z_i \cdot z_j = \frac{|\sum_i z_i|^2 - \sum_i |z_i|^2}{b (b - 1)}
    """
    total = jnp.square(z.sum(0)).sum() - jnp.square(z).sum()
    return jnp.square(total / max(len(z) * (len(z) - 1), 1))


@of_view
def spread_square(z: jax.Array) -> jax.Array:
    r"""By how much the mean square cosine of two rows of z[b e] exceeds that of random directions.

    .. math::
      \max(0, M_2 - 1/e), \quad
      M_2 = \frac{1}{b (b - 1)} \sum_{i \ne j} (z_i \cdot z_j)^2 = \frac{\|Z^\top Z\|^2 - \sum_i |z_i|^4}{b (b - 1)}
    """
    gram = jnp.einsum("be,bf->ef", z, z, precision=jax.lax.Precision.HIGHEST)
    total = jnp.square(gram).sum() - jnp.square(jnp.square(z).sum(1)).sum()
    return jax.nn.relu(total / max(len(z) * (len(z) - 1), 1) - 1 / z.shape[1])
