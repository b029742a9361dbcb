"""One Transformer, which its config turns into a BERT-, GPT- or ModernBERT-like model.

Dimensions: n rows, l query tokens, s key tokens, d width, h heads, g key-value heads, r = h / g, k head width, f feed-forward.
Parameters carry the names of their logical axes in the metadata `axes`; `sharding.py` maps these to the mesh.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from ml_collections import ConfigDict

from contrastive_jax.models.attention import Attend
from contrastive_jax.models.layout import Layout
from contrastive_jax.models.rows import Noise, Rows, dropout

EXACT_GELU = functools.partial(jax.nn.gelu, approximate=False)
ACTIVATIONS: dict[str, Callable] = {"gelu": jax.nn.gelu, "gelu_exact": EXACT_GELU}
GATED: dict[str, Callable] = {"geglu": jax.nn.gelu, "geglu_exact": EXACT_GELU, "swiglu": jax.nn.silu}


def parameter(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter with one logical axis name (or None) a dimension."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def rotate(x: jax.Array, position: jax.Array, theta: jax.Array | float) -> jax.Array:
    """Rotary positions (Su et al., arXiv 2104.09864), halves as in GPT-NeoX: x[n l h k], position int32[n l] or [1 l]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[:, :, None, None] * frequency
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeated(table: jax.Array, n: int) -> jax.Array:
    """Table [l d] for each of n rows.

    Its gradient is summed by a product: XLA's sum over the first axis is 20 × as slow on CPU.
    """
    return jnp.broadcast_to(table, (n, *table.shape))


repeated.defvjp(
    lambda table, n: (repeated(table, n), None),
    lambda n, _, gradient: (jnp.einsum("n,nld->ld", jnp.ones(n, gradient.dtype), gradient),),
)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, statistics in float32."""

    def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
        self.centred, self.eps = config.norm == "layernorm", config.norm_eps
        self.scale = parameter(rngs, initializers.ones, (config.d_model,), (None,))
        self.bias = parameter(rngs, initializers.zeros, (config.d_model,), (None,)) if self.centred and config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x[... d]."""
        return normalise(self.centred, self.eps, x, self.scale[...], None if self.bias is None else self.bias[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalise(centred: bool, eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x[... d] with mean 0 (if centred) and variance 1, times scale[d], plus bias[d]."""
    return normalise_forward(centred, eps, x, scale, bias)[0]


def normalise_forward(
    centred: bool, eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, tuple]:
    """The value and what its gradient needs: of the size of x, x alone. One pass over x finds both statistics."""
    y = x.astype(jnp.float32)
    variance = jnp.square(y).mean(-1, keepdims=True)
    mean = y.mean(-1, keepdims=True) if centred else jnp.zeros_like(variance)
    inverse = jax.lax.rsqrt(jnp.maximum(variance - jnp.square(mean), 0) + eps)
    y = (y - mean) * inverse * scale
    return (y if bias is None else y + bias).astype(x.dtype), (x, scale, bias, mean, inverse)


def normalise_backward(centred: bool, eps: float, saved: tuple, gradient: jax.Array) -> tuple:
    """With y = (x - mean) · inverse and t = gradient · scale: inverse · (t - mean(t) - y · mean(t · y))."""
    del eps
    x, scale, bias, mean, inverse = saved
    gradient, y = gradient.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    t, rows = gradient * scale, tuple(range(x.ndim - 1))
    change = t - y * (t * y).mean(-1, keepdims=True)
    change = inverse * (change - t.mean(-1, keepdims=True) if centred else change)
    return change.astype(x.dtype), (gradient * y).sum(rows), None if bias is None else gradient.sum(rows)


normalise.defvjp(normalise_forward, normalise_backward)


class Linear(nnx.Module):
    """y[n l out] = x[n l in] · kernel[in out] (+ bias[out]) in the type of x, where heads × width count as one axis."""

    def __init__(
        self,
        config: ConfigDict,
        layout: Layout,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        rngs: nnx.Rngs,
        contract: int = 1,
        init_std: float | None = None,
    ):
        std = config.init_std if init_std is None else init_std
        init = initializers.normal(std) if std else initializers.zeros
        self.contract, self.axes, self.layout = contract, axes, layout
        self.kernel = parameter(rngs, init, shape, axes)
        self.bias = parameter(rngs, initializers.zeros, shape[contract:], axes[contract:]) if config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[n l in] to [n l out]."""
        kernel = self.layout.gather(self.kernel[...].astype(x.dtype), self.axes)
        # A product with more than two axes would leave its result in a layout that must be copied for attention.
        y = x @ kernel.reshape(math.prod(kernel.shape[: self.contract]), -1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype).reshape(-1)


class Attention(nnx.Module):
    """Multi-head attention, full or grouped, with rotary positions where the config says so."""

    def __init__(self, config: ConfigDict, attend: Attend, layout: Layout, out_std: float, rngs: nnx.Rngs):
        self.config, self.attend = config, attend
        d, h, g, k = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.query = Linear(config, layout, (d, h, k), ("embed", "heads", None), rngs)
        self.key = Linear(config, layout, (d, g, k), ("embed", "kv_heads", None), rngs)
        self.value = Linear(config, layout, (d, g, k), ("embed", "kv_heads", None), rngs)
        self.out = Linear(config, layout, (h, k, d), ("heads", None, "embed"), rngs, contract=2, init_std=out_std)

    def __call__(self, x: jax.Array, rows: Rows) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        heads = (self.query(x), self.key(x), self.value(x))
        query, key, value = (y.reshape(*x.shape[:2], -1, self.config.head_dim) for y in heads)
        if self.config.position == "rotary":
            query, key = rotate(query, rows.position, rows.theta), rotate(key, rows.position, rows.theta)
        mixed = self.attend(query, key, value, rows).reshape(*x.shape[:2], -1)
        return self.out(checkpoint_name(mixed, "mixed"))


class Mlp(nnx.Module):
    """Feed-forward branch: GELU (BERT, GPT) or gated (GLU variants, Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ConfigDict, layout: Layout, out_std: float, rngs: nnx.Rngs):
        d, f = config.d_model, config.d_ff
        activation = (ACTIVATIONS | GATED)[config.mlp]
        # Only its argument is kept for the backward pass; where the block is recomputed, that is so already.
        self.activation = jax.checkpoint(activation) if config.remat == "none" else activation
        self.up = Linear(config, layout, (d, f), ("embed", "mlp"), rngs)
        self.gate = Linear(config, layout, (d, f), ("embed", "mlp"), rngs) if config.mlp in GATED else None
        self.down = Linear(config, layout, (f, d), ("mlp", "embed"), rngs, init_std=out_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        y = self.up(x)
        return self.down(self.activation(y) if self.gate is None else self.activation(self.gate(x)) * y)


class Block(nnx.Module):
    """Attention and feed-forward, each on a residual branch with its norm before (pre) or after (post) it."""

    def __init__(self, config: ConfigDict, attend: Attend, layout: Layout, rngs: nnx.Rngs):
        # GPT-2's scaling of the branches' outputs, or zero: the block then starts as the identity.
        out_std = 0.0 if config.zero_init_branches else config.init_std / (2 * config.num_layers) ** 0.5
        self.config = config
        self.attention_norm = Norm(config, rngs)
        self.attention = Attention(config, attend, layout, out_std, rngs)
        self.mlp_norm = Norm(config, rngs)
        self.mlp = Mlp(config, layout, out_std, rngs)

    def __call__(self, x: jax.Array, rows: Rows) -> jax.Array:
        """Maps x[n l d] to [n l d]; dropout where `rows.noise` is given."""
        c, noise = self.config, rows.noise
        each = [None] * 3 if noise is None else [Noise(key, noise.row) for key in jax.random.split(noise.key, 3)]
        inner = rows._replace(noise=each[0])
        if c.norm_position == "pre":
            y = self.attention_norm(x)
            y = y if rows.normed is None else jnp.where(rows.normed, x, y)
            x = x + dropout(self.attention(y, inner), c.dropout, each[1])
            return x + dropout(self.mlp(self.mlp_norm(x)), c.dropout, each[2])
        x = self.attention_norm(x + dropout(self.attention(x, inner), c.dropout, each[1]))
        return self.mlp_norm(x + dropout(self.mlp(x), c.dropout, each[2]))


class Transformer(nnx.Module):
    """Token ids to contextual vectors; blocks are stacked and scanned, so compile time does not grow with depth."""

    def __init__(self, config: ConfigDict, vocab_size: int, length: int, attend: Attend, layout: Layout, rngs: nnx.Rngs):
        self.config, self.layout = config, layout
        init = initializers.normal(config.init_std)
        self.embedding = parameter(rngs, init, (vocab_size, config.d_model), ("vocab", "embed"))
        self.position_embedding = (
            parameter(rngs, init, (length, config.d_model), (None, "embed")) if config.position == "learned" else None
        )
        self.embedding_norm = Norm(config, rngs) if config.embedding_norm else None
        blocks = nnx.vmap(lambda r: Block(config, attend, layout, r))
        self.blocks = blocks(rngs.split(config.num_layers)) if config.num_layers else None
        self.final_norm = Norm(config, rngs) if config.final_norm else None

    def __call__(
        self, tokens: jax.Array, segment: jax.Array, position: jax.Array | None = None, noise: Noise | None = None
    ) -> jax.Array:
        """Tokens int32[n l], segment int32[n l], position int32[n l] (None: one span a row) → [n l d]; dropout if `noise`."""
        c = self.config
        first = later = None
        if noise is not None:
            keys = jax.random.split(noise.key, c.num_layers + 1)
            first, later = Noise(keys[-1], noise.row), Noise(keys[:-1], noise.row)
        x = self.layout.rows(self.layout.gather(self.embedding[...], ("vocab", "embed"))[tokens])
        if self.position_embedding is not None:
            places = self.position_embedding[...]
            x = x + (repeated(places[: tokens.shape[1]], len(x)) if position is None else places[position])
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = dropout(x.astype(c.dtype), c.dropout, first)
        if self.blocks is not None:
            position = jnp.arange(tokens.shape[1])[None] if position is None else position
            x = self.apply_blocks(x, Rows(segment, position, noise=later))
        return x if self.final_norm is None else self.final_norm(x)

    def apply_blocks(self, x: jax.Array, rows: Rows) -> jax.Array:
        """Runs all blocks on x[n l d]; one key of `rows.noise` a layer."""
        c = self.config
        graphdef, stacked = nnx.split(self.blocks)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            params, key, number = layer
            block: Any = nnx.merge(graphdef, params)
            given = rows._replace(noise=None if rows.noise is None else Noise(key, rows.noise.row), theta=c.rope_theta)
            if c.embedding_norm and c.norm_position == "pre":  # ModernBERT: it is the first block's attention norm too
                given = given._replace(normed=number == 0)
            if c.local_window:
                everywhere = number % c.global_every == 0  # ModernBERT's order: the first of every `global_every`
                given = given._replace(
                    window=jnp.where(everywhere, x.shape[1], c.local_window),
                    theta=jnp.where(everywhere, c.rope_theta, c.local_rope_theta),
                )
            return self.layout.rows(block(x, given)), None

        keys = None if rows.noise is None else rows.noise.key
        layers, body = (stacked, keys, jnp.arange(c.num_layers)), remat(body, c.remat)
        if c.scan:
            return jax.lax.scan(body, x, layers)[0]
        for number in range(c.num_layers):
            x, _ = body(x, jax.tree.map(lambda leaf, i=number: leaf[i], layers))
        return x


def remat(body: Callable, policy: str) -> Callable:
    """A block whose backward pass recomputes what `policy` does not save."""
    saved = jax.checkpoint_policies
    if policy == "none":
        return body
    names = saved.save_only_these_names("mixed")
    chosen = {
        "dots": saved.save_from_both_policies(saved.dots_with_no_batch_dims_saveable, names),
        "attention": names,
        "full": saved.nothing_saveable,
    }
    return jax.checkpoint(body, policy=chosen[policy])
