"""UniVAE's bottleneck: in the last layers the first token's state passes through a few random numbers on a sphere.

Dimensions: n rows, l tokens per row, d width, k numbers of a latent.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from contrastive_jax.models.dropout import Noise, row_uniform
from contrastive_jax.models.layers import Linear
from contrastive_jax.runtime.layout import Layout

# Entries of the inverse distribution function of a cosine, and places at which its density is summed up for it.
ENTRIES, PLACES = 1 << 12, 1 << 18


class Latent(nnx.Module):
    """Replaces the state h of the first token by Out(z), z ~ vMF(In(h) / |In(h)|, κ); without noise z is the mean direction.

    As κ is fixed and the prior uniform, the KL term of a variational autoencoder is a constant (Su, kexue.fm/archives/8475).
    """

    def __init__(self, config: ConfigDict, layout: Layout, rngs: nnx.Rngs):
        self.kappa = config.latent_kappa
        self.enter = Linear(config, layout, (config.d_model, config.latent), ("embed", None), rngs)
        self.leave = Linear(config, layout, (config.latent, config.d_model), (None, "embed"), rngs)

    def __call__(self, x: jax.Array, noise: Noise | None) -> tuple[jax.Array, jax.Array]:
        """Maps x[n l d] to the same with new first states, and the mean directions float32[n k]."""
        mean = self.enter(x[:, :1])[:, 0].astype(jnp.float32)
        mean *= jax.lax.rsqrt(jnp.maximum(jnp.square(mean).sum(-1, keepdims=True), 1e-12))
        z = mean if noise is None else sample_direction(mean, self.kappa, noise)
        return jnp.concatenate([self.leave(z[:, None].astype(x.dtype)), x[:, 1:]], axis=1), mean


def sample_direction(mean: jax.Array, kappa: float, noise: Noise) -> jax.Array:
    r"""Draws from the von Mises-Fisher distribution, whose density at z is proportional to exp(κ mean · z).

    z = w · mean + √(1 - w²) · ν, with ν uniform among the unit vectors orthogonal to the mean, and w its cosine.

    Args:
      mean: unit vectors float32[n k].
      kappa: κ.
      noise: a random key and the number of each row.

    Returns:
      Unit vectors float32[n k].
    """
    uniform = row_uniform(noise, (mean.shape[1] + 1,))
    w = jnp.asarray(cosine_table(mean.shape[1], kappa))[(uniform[:, :1] * ENTRIES).astype(jnp.int32)]
    normal = jax.scipy.special.ndtri(uniform[:, 1:] + 2.0**-25)
    normal -= (normal * mean).sum(-1, keepdims=True) * mean
    nu = normal * jax.lax.rsqrt(jnp.maximum(jnp.square(normal).sum(-1, keepdims=True), 1e-12))
    return w * mean + jnp.sqrt(1 - w * w) * nu


@functools.cache
def cosine_table(k: int, kappa: float) -> np.ndarray:
    """Returns quantiles float32[ENTRIES] of the cosine w to the mean, of density ∝ exp(κ w) (1 - w²)^((k - 3) / 2)."""
    w = (np.arange(PLACES) + 0.5) * 2 / PLACES - 1
    log_density = kappa * w + (k - 3) / 2 * np.log1p(-w * w)
    share = np.cumsum(np.exp(log_density - log_density.max()))
    return np.interp((np.arange(ENTRIES) + 0.5) / ENTRIES, share / share[-1], w).astype(np.float32)
