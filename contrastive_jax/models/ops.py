"""Functions of arrays, without parameters of their own: products, norms, rotary positions, a repeated table.

Norms, the repeated table and products in bfloat16 have gradients written by hand, which store less, run faster or are more
exact than the derived ones.

Dimensions: n rows, l tokens per row, h heads, k head width, d width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The name of a norm's mean and inverse deviation, one number per token each, for the policies of `transformer.rematerialize`.
STATISTICS = "statistics"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalize(centred: bool, eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    """LayerNorm (centred) or RMSNorm over the last axis, with statistics in float32.

    Args:
      centred: whether to subtract the mean.
      eps: added to the variance.
      x: [... d].
      scale: float32[d].
      bias: float32[d] or None.

    Returns:
      x with mean 0 (if centred) and variance 1, times `scale`, plus `bias`: [... d] in the type of x.
    """
    return _normalize_forward(centred, eps, x, scale, bias)[0]


def _normalize_forward(
    centred: bool, eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, tuple]:
    """Returns the value and what the backward pass needs, of which x alone is large.

    The variance is mean(x²) - mean(x)², so that one pass over x finds both statistics.
    """
    y = x.astype(jnp.float32)
    variance = jnp.square(y).mean(-1, keepdims=True)
    mean = y.mean(-1, keepdims=True) if centred else jnp.zeros_like(variance)
    inverse = jax.lax.rsqrt(jnp.maximum(variance - jnp.square(mean), 0) + eps)
    inverse = checkpoint_name(inverse, STATISTICS)
    mean = checkpoint_name(mean, STATISTICS) if centred else mean
    y = (y - mean) * inverse * scale
    return (y if bias is None else y + bias).astype(x.dtype), (x, scale, bias, mean, inverse)


def _normalize_backward(centred: bool, eps: float, saved: tuple, gradient: jax.Array) -> tuple:
    """Returns the gradients of x, scale and bias.

    With y = (x - mean) · inverse and t = gradient · scale, that of x is inverse · (t - mean(t) - y · mean(t · y)).
    """
    del eps
    x, scale, bias, mean, inverse = saved
    gradient, y = gradient.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    t, all_but_last = gradient * scale, tuple(range(x.ndim - 1))
    x_gradient = t - y * (t * y).mean(-1, keepdims=True)
    x_gradient = inverse * (x_gradient - t.mean(-1, keepdims=True) if centred else x_gradient)
    scale_gradient = (gradient * y).sum(all_but_last)
    return x_gradient.astype(x.dtype), scale_gradient, None if bias is None else gradient.sum(all_but_last)


normalize.defvjp(_normalize_forward, _normalize_backward)


def _bfloat16_dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Returns the product of a and b, rounded to bfloat16, over the axes `contract`, with sums in float32."""
    return jax.lax.dot_general(
        a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), (contract, ((), ())), preferred_element_type=jnp.float32
    )


@jax.custom_vjp
def bfloat16_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x[... i] · kernel[i o]: float32[... o], with factors rounded to bfloat16 and sums in float32.

    The gradients of both are such products too; the derived ones would be sums in bfloat16.
    """
    return _bfloat16_dot(x, kernel, ((x.ndim - 1,), (0,)))


def _bfloat16_product_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of x and kernel."""
    x, kernel = saved
    all_but_last = tuple(range(x.ndim - 1))
    of_x = _bfloat16_dot(gradient, kernel, ((x.ndim - 1,), (1,)))
    return of_x, _bfloat16_dot(x, gradient, (all_but_last, all_but_last))


bfloat16_product.defvjp(lambda x, kernel: (bfloat16_product(x, kernel), (x, kernel)), _bfloat16_product_backward)


def int8_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x[... i] · kernel[i o]: [... o] in the type of x, with factors rounded to int8 and exact sums; no gradient.

    Each vector of x and each output's column of the kernel has a scale of its own: its largest absolute value is 127.
    """

    def quantize(values: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        scale = jnp.maximum(jnp.abs(values).max(axis, keepdims=True), 1e-30).astype(jnp.float32) / 127
        return jnp.round(values / scale).astype(jnp.int8), scale

    (rows, of_rows), (columns, of_columns) = quantize(x, -1), quantize(kernel, 0)
    total = jax.lax.dot_general(rows, columns, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return (total * of_rows * of_columns).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat_table(table: jax.Array, n: int) -> jax.Array:
    """Repeats table[l d] for n rows: [n l d].

    The gradient is summed by a matrix product, because on CPU XLA's sum over the first axis is 20 times as slow.
    """
    return jnp.broadcast_to(table, (n, *table.shape))


repeat_table.defvjp(
    lambda table, n: (repeat_table(table, n), None),
    lambda n, _, gradient: (jnp.einsum("n,nld->ld", jnp.ones(n, gradient.dtype), gradient),),
)


def rotate(x: jax.Array, position: jax.Array, theta: jax.Array | float) -> jax.Array:
    """Applies rotary positions (Su et al., arXiv 2104.09864) in the layout of GPT-NeoX: element i is paired with i + k/2.

    Args:
      x: queries or keys [n l h k], k even.
      position: int32[n l] or [1 l].
      theta: the base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[:, :, None, None] * frequency  # [n l] -> [n l 1 k/2]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
