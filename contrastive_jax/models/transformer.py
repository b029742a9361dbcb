"""One Transformer, which its config turns into a BERT-, GPT- or ModernBERT-like model.

Dimensions: n rows, l tokens per row, d width, h heads, g key-value heads, k head width, f feed-forward width.
Each parameter carries the names of its logical axes as metadata `axes`; `runtime.sharding` maps them to axes of the mesh.
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

from contrastive_jax.models import ops
from contrastive_jax.models.attention import Attend
from contrastive_jax.models.dropout import Noise, dropout
from contrastive_jax.models.layer_context import LayerContext
from contrastive_jax.runtime.layout import Layout

EXACT_GELU = functools.partial(jax.nn.gelu, approximate=False)
PLAIN: dict[str, Callable] = {"gelu": jax.nn.gelu, "gelu_exact": EXACT_GELU}
GATED: dict[str, Callable] = {"geglu": jax.nn.gelu, "geglu_exact": EXACT_GELU, "swiglu": jax.nn.silu}

# The name of attention's output before its projection, for the policies of `rematerialize`.
ATTENTION_OUTPUT = "attention_output"


def parameter(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """Returns a float32 parameter; `axes` has one logical axis name, or None, per dimension."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, with statistics in float32."""

    def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
        self.centred, self.eps = config.norm == "layernorm", config.norm_eps
        self.scale = parameter(rngs, initializers.ones, (config.d_model,), (None,))
        self.bias = parameter(rngs, initializers.zeros, (config.d_model,), (None,)) if self.centred and config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x[... d]."""
        return ops.normalize(self.centred, self.eps, x, self.scale[...], None if self.bias is None else self.bias[...])


class Linear(nnx.Module):
    """A linear map in the type of its input: y[n l out] = x[n l in] · kernel[in out] (+ bias[out]).

    Args:
      config: `config.model`.
      layout: how parameters lie on the mesh.
      shape: of the kernel: the input dimensions, then the output dimensions. In x and y, heads × width is one axis.
      axes: a logical axis name, or None, per dimension of the kernel.
      rngs: for the initial values.
      contract: the number of input dimensions of the kernel.
      init_std: standard deviation of the kernel's initial values. None: `config.init_std`.
    """

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
        # A product with more than two axes would leave its result in a memory layout that attention would have to copy.
        kernel = kernel.reshape(math.prod(kernel.shape[: self.contract]), -1)  # e.g. [d h k] -> [d h·k], [h k d] -> [h·k d]
        y = x @ kernel
        return y if self.bias is None else y + self.bias[...].astype(x.dtype).reshape(-1)  # e.g. [h k] -> [h·k]


class Attention(nnx.Module):
    """Multi-head attention, full or grouped, with rotary positions if `config.position` says so."""

    def __init__(self, config: ConfigDict, attend: Attend, layout: Layout, out_std: float, rngs: nnx.Rngs):
        self.config, self.attend = config, attend
        d, h, g, k = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.query = Linear(config, layout, (d, h, k), ("embed", "heads", None), rngs)
        self.key = Linear(config, layout, (d, g, k), ("embed", "kv_heads", None), rngs)
        self.value = Linear(config, layout, (d, g, k), ("embed", "kv_heads", None), rngs)
        self.out = Linear(config, layout, (h, k, d), ("heads", None, "embed"), rngs, contract=2, init_std=out_std)

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        with jax.named_scope("attention"):
            with jax.named_scope("qkv"):
                projections = (self.query(x), self.key(x), self.value(x))
                # [n l h·k] -> [n l h k]; key and value [n l g·k] -> [n l g k]
                query, key, value = (y.reshape(*x.shape[:2], -1, self.config.head_dim) for y in projections)
            if self.config.position == "rotary":
                with jax.named_scope("rope"):
                    query = ops.rotate(query, context.position, context.theta)
                    key = ops.rotate(key, context.position, context.theta)
            mixed = self.attend(query, key, value, context).reshape(*x.shape[:2], -1)  # [n l h k] -> [n l h·k]
            with jax.named_scope("out"):
                return self.out(checkpoint_name(mixed, ATTENTION_OUTPUT))


class Mlp(nnx.Module):
    """The feed-forward branch: GELU (BERT, GPT) or a gated linear unit (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ConfigDict, layout: Layout, out_std: float, rngs: nnx.Rngs):
        d, f = config.d_model, config.d_ff
        activation = (PLAIN | GATED)[config.mlp]
        # Store the activation's input only, and compute its output again in the backward pass. The other policies of
        # config.remat recompute it anyway.
        self.activation = jax.checkpoint(activation) if config.remat == "none" else activation
        self.up = Linear(config, layout, (d, f), ("embed", "mlp"), rngs)
        self.gate = Linear(config, layout, (d, f), ("embed", "mlp"), rngs) if config.mlp in GATED else None
        self.down = Linear(config, layout, (f, d), ("mlp", "embed"), rngs, init_std=out_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        with jax.named_scope("mlp"):
            y = self.up(x)
            return self.down(self.activation(y) if self.gate is None else self.activation(self.gate(x)) * y)


class Block(nnx.Module):
    """Attention and feed-forward, each on a residual branch whose norm stands before ("pre") or after it ("post")."""

    def __init__(self, config: ConfigDict, attend: Attend, layout: Layout, rngs: nnx.Rngs):
        # GPT-2 scales the outputs of the branches down with depth. With 0 the block starts as the identity.
        out_std = 0.0 if config.zero_init_branches else config.init_std / (2 * config.num_layers) ** 0.5
        self.config = config
        self.attention_norm = Norm(config, rngs)
        self.attention = Attention(config, attend, layout, out_std, rngs)
        self.mlp_norm = Norm(config, rngs)
        self.mlp = Mlp(config, layout, out_std, rngs)

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Maps x[n l d] to [n l d], with dropout if `context.noise` is not None."""
        rate, noise = self.config.dropout, context.noise
        weights_noise = attention_noise = mlp_noise = None
        if noise is not None:
            weights_noise, attention_noise, mlp_noise = (Noise(rng, noise.row) for rng in jax.random.split(noise.rng, 3))
        inner = context._replace(noise=weights_noise)
        if self.config.norm_position == "pre":
            y = self.attention_norm(x)
            y = y if context.input_is_normed is None else jnp.where(context.input_is_normed, x, y)
            x = x + dropout(self.attention(y, inner), rate, attention_noise)
            return x + dropout(self.mlp(self.mlp_norm(x)), rate, mlp_noise)
        x = self.attention_norm(x + dropout(self.attention(x, inner), rate, attention_noise))
        return self.mlp_norm(x + dropout(self.mlp(x), rate, mlp_noise))


class Transformer(nnx.Module):
    """Maps token ids to contextual vectors.

    The parameters of all blocks are stacked and the blocks are scanned, so that compile time does not grow with depth.
    """

    def __init__(self, config: ConfigDict, vocab_size: int, attend: Attend, layout: Layout, rngs: nnx.Rngs):
        self.config, self.layout = config, layout
        init = initializers.normal(config.init_std)
        self.embedding = parameter(rngs, init, (vocab_size, config.d_model), ("vocab", "embed"))
        self.position_embedding = (
            parameter(rngs, init, (config.max_length, config.d_model), (None, "embed"))
            if config.position == "learned"
            else None
        )
        self.embedding_norm = Norm(config, rngs) if config.embedding_norm else None
        blocks = nnx.vmap(lambda block_rngs: Block(config, attend, layout, block_rngs))
        self.blocks = blocks(rngs.split(config.num_layers)) if config.num_layers else None
        self.final_norm = Norm(config, rngs) if config.final_norm else None

    def __call__(
        self, tokens: jax.Array, segment: jax.Array, position: jax.Array | None = None, noise: Noise | None = None
    ) -> jax.Array:
        """Computes a vector per token.

        Args:
          tokens: int32[n l]; with learned positions l is at most `config.max_length`.
          segment: int32[n l], the number of each token's span, from 1; 0 is padding.
          position: int32[n l], the index of each token in its span. None: each row is one span, and its padding comes last.
          noise: the randomness of dropout. None: no dropout.

        Returns:
          The token states [n l d] in `config.dtype`.
        """
        config = self.config
        embedding_noise = block_noise = None
        if noise is not None:
            rngs = jax.random.split(noise.rng, config.num_layers + 1)
            embedding_noise, block_noise = Noise(rngs[-1], noise.row), Noise(rngs[:-1], noise.row)
        with jax.named_scope("embedding"):
            x = self.embed(tokens, position)
            x = dropout(x.astype(config.dtype), config.dropout, embedding_noise)
        if self.blocks is not None:
            span_length = (segment > 0).sum(1, dtype=jnp.int32) if position is None else None
            position = jnp.arange(tokens.shape[1])[None] if position is None else position
            x = self.apply_blocks(x, LayerContext(segment, position, span_length, noise=block_noise))
        return x if self.final_norm is None else self.final_norm(x)

    def embed(self, tokens: jax.Array, position: jax.Array | None) -> jax.Array:
        """Returns the sum of token and position embeddings, normalised if the model has an embedding norm: float32[n l d]."""
        x = self.layout.rows(self.layout.gather(self.embedding[...], ("vocab", "embed"))[tokens])
        if self.position_embedding is not None:
            table = self.position_embedding[...]
            x = x + (ops.repeat_table(table[: tokens.shape[1]], len(x)) if position is None else table[position])
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def apply_blocks(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Applies all blocks to x[n l d]; `context.noise.rng` has one random key per layer."""
        config = self.config
        graphdef, stacked_params = nnx.split(self.blocks)

        def apply_block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            params, rng, number = layer
            block: Any = nnx.merge(graphdef, params)
            noise = None if context.noise is None else Noise(rng, context.noise.row)
            own = context._replace(noise=noise, theta=config.rope_theta)
            if (
                config.embedding_norm and config.norm_position == "pre"
            ):  # ModernBERT: it is the first block's attention norm too
                own = own._replace(input_is_normed=number == 0)
            if config.local_window:
                is_global = number % config.global_every == 0  # ModernBERT's order: the first of every `global_every` layers
                own = own._replace(
                    window=jnp.where(is_global, x.shape[1], config.local_window),
                    theta=jnp.where(is_global, config.rope_theta, config.local_rope_theta),
                )
            return self.layout.rows(block(x, own)), None

        rngs = None if context.noise is None else context.noise.rng
        layers, apply_block = (stacked_params, rngs, jnp.arange(config.num_layers)), rematerialize(apply_block, config.remat)
        if config.scan:
            return jax.lax.scan(apply_block, x, layers)[0]
        for number in range(config.num_layers):
            x, _ = apply_block(x, jax.tree.map(lambda leaf, i=number: leaf[i], layers))
        return x


def rematerialize(apply_block: Callable, policy: str) -> Callable:
    """Makes the backward pass of a block recompute what `policy`, a value of `config.remat`, does not save."""
    if policy == "none":
        return apply_block
    policies = jax.checkpoint_policies
    save_attention = policies.save_only_these_names(ATTENTION_OUTPUT)
    chosen = {
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, save_attention),
        "attention": save_attention,
        "full": policies.nothing_saveable,
    }[policy]
    return jax.checkpoint(apply_block, policy=chosen)
