"""One Transformer, which its config turns into a BERT-, GPT- or ModernBERT-like model.

Dimensions: n rows, l query tokens, s key tokens, d width, h heads, g key-value heads, r = h / g, k head width, f feed-forward.
Parameters carry the names of their logical axes in the metadata `axes`; `sharding.py` maps these to the mesh.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from ml_collections import ConfigDict

# Large, finite: exp underflows to exactly 0 beside any real score, and a row without keys gives no NaN.
MASKED = -1e30

ACTIVATIONS: dict[str, Callable] = {"gelu": jax.nn.gelu, "geglu": jax.nn.gelu, "swiglu": jax.nn.silu}


def parameter(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter with one logical axis name (or None) a dimension."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def hash32(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that changes half of the bits when any one changes (Wellons, "lowbias32")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


class Noise(NamedTuple):
    """Where dropout takes its randomness from: a key, and row int32[n], the number of each row in the global batch."""

    key: jax.Array
    row: jax.Array


def dropout(x: jax.Array, rate: float, noise: Noise | None) -> jax.Array:
    """Zeroes a share `rate` of x[n ... d] and scales the rest by 1 / (1 - rate); the identity where `noise` is None.

    An element's fate is a hash of the key, its row's number and its place in the row: the same on any mesh and in any
    micro-batch, and fused into what surrounds it. Threefry would take four fifths of a step of the debug recipe.
    """
    if noise is None or rate == 0.0:
        return x
    first, second = jax.random.bits(noise.key, (2,), jnp.uint32)
    inner = jax.lax.iota(jnp.uint32, math.prod(x.shape[1:-1])).reshape(1, *x.shape[1:-1], 1)
    row = hash32(noise.row.astype(jnp.uint32) ^ first).reshape(-1, *(1,) * (x.ndim - 1))
    place = hash32(hash32(row + inner) + jax.lax.iota(jnp.uint32, x.shape[-1]) ^ second)
    keep = hash32(place) >= jnp.uint32(rate * 2**32)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding of x[n l ... k] (Su et al., arXiv 2104.09864), halves rotated as in GPT-NeoX."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency
    angle = angle.reshape(x.shape[1], *(1,) * (x.ndim - 3), half)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, statistics in float32."""

    def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
        self.centred = config.norm == "layernorm"
        self.scale = parameter(rngs, initializers.ones, (config.d_model,), (None,))
        self.bias = parameter(rngs, initializers.zeros, (config.d_model,), (None,)) if self.centred and config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x[... d]."""
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5) * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class Linear(nnx.Module):
    """y[n l *out] = x[n l *in] · kernel[*in *out] (+ bias[*out]), computed in the type of x."""

    def __init__(
        self,
        config: ConfigDict,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        rngs: nnx.Rngs,
        contract: int = 1,
        init_std: float | None = None,
    ):
        std = config.init_std if init_std is None else init_std
        init = initializers.normal(std) if std else initializers.zeros
        self.contract = contract
        self.kernel = parameter(rngs, init, shape, axes)
        self.bias = parameter(rngs, initializers.zeros, shape[contract:], axes[contract:]) if config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[n l *in] to [n l *out]."""
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), self.contract)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention, full or grouped, with rotary positions where the config says so."""

    def __init__(self, config: ConfigDict, out_std: float, rngs: nnx.Rngs):
        self.config = config
        d, h, g, k = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.query = Linear(config, (d, h, k), ("embed", "heads", None), rngs)
        self.key = Linear(config, (d, g, k), ("embed", "kv_heads", None), rngs)
        self.value = Linear(config, (d, g, k), ("embed", "kv_heads", None), rngs)
        self.out = Linear(config, (h, k, d), ("heads", None, "embed"), rngs, contract=2, init_std=out_std)

    def __call__(self, x: jax.Array, attend: jax.Array, noise: Noise | None) -> jax.Array:
        """Maps x[n l d], attend bool[n l s] → [n l d]."""
        c = self.config
        query, keys, value = self.query(x), self.key(x), self.value(x)
        if c.position == "rotary":
            query, keys = rotate(query, c.rope_theta), rotate(keys, c.rope_theta)
        n, length, h, k = query.shape
        query = query.reshape(n, length, c.num_kv_heads, h // c.num_kv_heads, k)
        scores = jnp.einsum("nlgrk,nsgk->ngrls", query, keys, preferred_element_type=jnp.float32) / k**0.5
        scores = jnp.where(attend[:, None, None], scores, MASKED)
        weights = dropout(jax.nn.softmax(scores, axis=-1).astype(x.dtype), c.attention_dropout, noise)
        mixed = jnp.einsum("ngrls,nsgk->nlgrk", weights, value)
        return self.out(mixed.reshape(n, length, h, k))


class Mlp(nnx.Module):
    """Feed-forward branch: GELU (BERT, GPT) or gated (GLU variants, Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ConfigDict, out_std: float, rngs: nnx.Rngs):
        d, f = config.d_model, config.d_ff
        self.activation = ACTIVATIONS[config.mlp]
        self.up = Linear(config, (d, f), ("embed", "mlp"), rngs)
        self.gate = Linear(config, (d, f), ("embed", "mlp"), rngs) if config.mlp != "gelu" else None
        self.down = Linear(config, (f, d), ("mlp", "embed"), rngs, init_std=out_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        y = self.up(x)
        return self.down(self.activation(y) if self.gate is None else self.activation(self.gate(x)) * y)


class Block(nnx.Module):
    """Attention and feed-forward, each on a residual branch with its norm before (pre) or after (post) it."""

    def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
        # GPT-2's scaling of the branches' outputs, or zero: the block then starts as the identity.
        out_std = 0.0 if config.zero_init_branches else config.init_std / (2 * config.num_layers) ** 0.5
        self.config = config
        self.attention_norm = Norm(config, rngs)
        self.attention = Attention(config, out_std, rngs)
        self.mlp_norm = Norm(config, rngs)
        self.mlp = Mlp(config, out_std, rngs)

    def __call__(self, x: jax.Array, attend: jax.Array, noise: Noise | None) -> jax.Array:
        """Maps x[n l d], attend bool[n l s] to [n l d]; dropout where `noise` is given."""
        c = self.config
        each = [None] * 3 if noise is None else [Noise(key, noise.row) for key in jax.random.split(noise.key, 3)]
        if c.norm_position == "pre":
            x = x + dropout(self.attention(self.attention_norm(x), attend, each[0]), c.dropout, each[1])
            return x + dropout(self.mlp(self.mlp_norm(x)), c.dropout, each[2])
        x = self.attention_norm(x + dropout(self.attention(x, attend, each[0]), c.dropout, each[1]))
        return self.mlp_norm(x + dropout(self.mlp(x), c.dropout, each[2]))


class Transformer(nnx.Module):
    """Token ids to contextual vectors; blocks are stacked and scanned, so compile time does not grow with depth."""

    def __init__(self, config: ConfigDict, vocab_size: int, length: int, rngs: nnx.Rngs):
        self.config = config
        init = initializers.normal(config.init_std)
        self.embedding = parameter(rngs, init, (vocab_size, config.d_model), ("vocab", "embed"))
        self.position_embedding = (
            parameter(rngs, init, (length, config.d_model), (None, "embed")) if config.position == "learned" else None
        )
        self.embedding_norm = Norm(config, rngs) if config.embedding_norm else None
        self.blocks = nnx.vmap(lambda r: Block(config, r))(rngs.split(config.num_layers)) if config.num_layers else None
        self.final_norm = Norm(config, rngs) if config.final_norm else None

    def __call__(self, tokens: jax.Array, mask: jax.Array, noise: Noise | None = None) -> jax.Array:
        """Tokens int32[n l], mask bool[n l] → [n l d]; dropout where `noise` is given."""
        c = self.config
        first = later = None
        if noise is not None:
            keys = jax.random.split(noise.key, c.num_layers + 1)
            first, later = Noise(keys[-1], noise.row), Noise(keys[:-1], noise.row)
        x = self.embedding[...][tokens]
        if self.position_embedding is not None:
            x = x + self.position_embedding[: tokens.shape[1]]
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = dropout(x.astype(c.dtype), c.dropout, first)
        if self.blocks is not None:
            x = self.apply_blocks(x, mask, later)
        return x if self.final_norm is None else self.final_norm(x)

    def apply_blocks(self, x: jax.Array, mask: jax.Array, noise: Noise | None) -> jax.Array:
        """Runs all blocks on x[n l d]; one key of `noise` a layer."""
        length = x.shape[1]
        attend = jnp.broadcast_to(mask[:, None, :], (x.shape[0], length, length))
        if self.config.causal:
            attend = attend & jnp.tril(jnp.ones((length, length), bool))
        graphdef, stacked = nnx.split(self.blocks)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            params, key = layer
            block: Any = nnx.merge(graphdef, params)
            return block(x, attend, None if noise is None else Noise(key, noise.row)), None

        saved = jax.checkpoint_policies
        policy = {"dots": saved.dots_with_no_batch_dims_saveable, "full": saved.nothing_saveable}.get(self.config.remat)
        return jax.lax.scan(
            jax.checkpoint(body, policy=policy) if policy else body, x, (stacked, None if noise is None else noise.key)
        )[0]
