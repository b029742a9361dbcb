"""Random numbers that are a hash of a random key, a row's number and a position in the row; and the dropout made of them.

They are therefore the same on any mesh and in any micro-batch, and their computation fuses with its surroundings. With JAX's
own generator (Threefry), the masks would take 80 % of a step's time in the debug recipe.

Dimensions: n rows, d size of the last axis.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Noise(NamedTuple):
    """What determines a dropout mask: a random key, and the index of each row.

    Attributes:
      rng: a random key; for a stack of blocks, one key per block.
      row: int32[n], the index of each row in the global batch.
    """

    rng: jax.Array
    row: jax.Array


def dropout(x: jax.Array, rate: float, noise: Noise | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the others by 1 / (1 - rate), which keeps the mean.

    Args:
      x: [n ... d].
      rate: in [0, 1).
      noise: the random key and the index of each of the n rows in the global batch; None outside training.

    Returns:
      An array like x; x itself if `noise` is None or `rate` is 0.
    """
    if noise is None or rate == 0.0:
        return x
    row_seed, last_seed = hash_seeds(noise)
    middle_index = jax.lax.iota(jnp.uint32, math.prod(x.shape[1:-1])).reshape(1, *x.shape[1:-1], 1)
    last_index = jax.lax.iota(jnp.uint32, x.shape[-1])
    row_seed = row_seed.reshape(-1, *(1,) * (x.ndim - 1))  # [n] -> [n 1 ... 1]
    keep = keep_mask(row_seed, middle_index, last_index, last_seed, rate)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def hash_seeds(noise: Noise) -> tuple[jax.Array, jax.Array]:
    """Returns what `keep_mask` hashes: a seed per row, uint32[n], and one seed for the last axis, uint32[]."""
    first_seed, last_seed = jax.random.bits(noise.rng, (2,), jnp.uint32)
    return hash32(noise.row.astype(jnp.uint32) ^ first_seed), last_seed


def row_uniform(noise: Noise, shape: tuple[int, ...]) -> jax.Array:
    """Returns uniform random numbers in [0, 1) for each row, float32[n *shape], which depend on its number alone.

    They are multiples of 2⁻²⁴. Purposes that must not have the same numbers need keys of their own (`jax.random.fold_in`).
    """
    row_seed, last_seed = hash_seeds(noise)
    index = jax.lax.iota(jnp.uint32, math.prod(shape))
    bits = hash32(hash32(row_seed[:, None] + index) ^ last_seed)
    return (bits >> 8).astype(jnp.float32).reshape(-1, *shape) * 2.0**-24


def keep_mask(
    row_seed: jax.Array, middle_index: jax.Array, last_index: jax.Array, last_seed: jax.Array, rate: float
) -> jax.Array:
    """Decides which elements dropout keeps; the arguments broadcast against each other.

    Args:
      row_seed: uint32, from `hash_seeds`.
      middle_index: uint32, an element's index among all middle axes together.
      last_index: uint32, an element's index on the last axis.
      last_seed: uint32, from `hash_seeds`.
      rate: the fraction to drop.
    """
    return hash32(hash32(hash32(row_seed + middle_index) + last_index ^ last_seed)) >= jnp.uint32(rate * 2**32)


def hash32(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each input bit flips about half of the output bits (Wellons, "lowbias32")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
