"""What a block knows of its rows besides the activations, and dropout, which depends on it.

Dimensions: n rows, l tokens, d width.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Noise(NamedTuple):
    """Where dropout takes its randomness from: a key, and row int32[n], the number of each row in the global batch."""

    key: jax.Array
    row: jax.Array


class Rows(NamedTuple):
    """What a block knows of its rows besides the activations.

    Attributes:
      segment: int32[n l], the span of each token, from 1; 0 is padding.
      position: int32[n l] or [1 l], the place of each token in its span.
      window: int32[] or None: how far a token of this layer attends; None: any distance in any layer.
      normed: bool[] or None: whether the input of this layer's attention has its norm already; None: in no layer.
      theta: the base of the rotary positions of this layer.
      noise: dropout's, or None.
    """

    segment: jax.Array
    position: jax.Array
    window: jax.Array | None = None
    normed: jax.Array | None = None
    theta: jax.Array | float = 0.0
    noise: Noise | None = None


def hash32(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that changes half of the bits when any one changes (Wellons, "lowbias32")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def seeds(noise: Noise) -> tuple[jax.Array, jax.Array]:
    """What an element's fate is hashed from: uint32[n], one a row, and uint32[], for the last axis."""
    first, second = jax.random.bits(noise.key, (2,), jnp.uint32)
    return hash32(noise.row.astype(jnp.uint32) ^ first), second


def kept(row: jax.Array, inner: jax.Array, last: jax.Array, second: jax.Array, rate: float) -> jax.Array:
    """Whether dropout keeps an element, from `seeds` and its place: inner among the middle axes, last on the last one."""
    return hash32(hash32(hash32(row + inner) + last ^ second)) >= jnp.uint32(rate * 2**32)


def dropout(x: jax.Array, rate: float, noise: Noise | None) -> jax.Array:
    """Zeroes a share `rate` of x[n ... d] and scales the rest by 1 / (1 - rate); the identity where `noise` is None.

    An element's fate is a hash of the key, its row's number and its place in the row: the same on any mesh and in any
    micro-batch, and fused into what surrounds it. Threefry would take four fifths of a step of the debug recipe.
    """
    if noise is None or rate == 0.0:
        return x
    row, second = seeds(noise)
    inner = jax.lax.iota(jnp.uint32, math.prod(x.shape[1:-1])).reshape(1, *x.shape[1:-1], 1)
    last = jax.lax.iota(jnp.uint32, x.shape[-1])
    keep = kept(row.reshape(-1, *(1,) * (x.ndim - 1)), inner, last, second, rate)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
