"""One Transformer, which its config turns into a BERT-, GPT- or ModernBERT-like model, or one that mixes tokens otherwise.

Dimensions: n rows, l tokens per row, d width, f feed-forward width.
"""

import functools
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
from contrastive_jax.models.latent import Latent
from contrastive_jax.models.layer_context import LayerContext
from contrastive_jax.models.layers import Linear, Norm, parameter
from contrastive_jax.models.mixers import FIXED_LENGTH, MIXERS, Parts
from contrastive_jax.models.ngrams import Ngrams
from contrastive_jax.runtime.layout import Layout

EXACT_GELU = functools.partial(jax.nn.gelu, approximate=False)
PLAIN: dict[str, Callable] = {
    "gelu": jax.nn.gelu,
    "gelu_exact": EXACT_GELU,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # Sparse Transformer (Child et al., arXiv 1904.10509)
}
GATED: dict[str, Callable] = {"geglu": jax.nn.gelu, "geglu_exact": EXACT_GELU, "swiglu": jax.nn.silu}


def unchanged(function: Callable) -> Callable:
    """Returns the function as it is."""
    return function


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
            y = checkpoint_name(self.up(x), "up")
            return self.down(self.activation(y) if self.gate is None else self.activation(self.gate(x)) * y)


class Block(nnx.Module):
    """A mixer and a feed-forward, each on a residual branch whose norm stands before ("pre") or after it ("post").

    The mixer is called `attention` in the parameters, whatever it is. With `config.mlp` "none" it is the only branch.
    """

    def __init__(self, config: ConfigDict, attend: Attend, layout: Layout, rngs: nnx.Rngs):
        # GPT-2 scales the outputs of the branches down with depth. With 0 the block starts as the identity.
        out_std = 0.0 if config.zero_init_branches else config.init_std / (2 * config.num_layers) ** 0.5
        self.config = config
        self.attention_norm = Norm(config, rngs)
        self.attention: Any = MIXERS[config.mixer](Parts(config, layout, attend, out_std), rngs)
        self.mlp_norm: Any = Norm(config, rngs) if config.mlp != "none" else None
        self.mlp = Mlp(config, layout, out_std, rngs) if config.mlp != "none" else None
        self.latent = Latent(config, layout, rngs) if config.latent else None

    def __call__(self, x: jax.Array, context: LayerContext, checkpoint: Callable = unchanged) -> jax.Array:
        """Maps x[n l d] to [n l d], or with `context.only` to [n 1 d], with dropout if `context.noise` is not None.

        Args:
          x: the states of the tokens.
          context: of the layer.
          checkpoint: what wraps each half of the block, `mix` and `finish`: jax.checkpoint with a policy.
        """
        mixed = checkpoint(lambda x: self.mix(x, context))(x)
        return checkpoint(lambda x, mixed: self.finish(x, mixed, context))(x, mixed)

    def mix(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Returns what the mixer makes of x[n l d], of attention without its projection: [n l m], or [n l d] of the others."""
        noise = context.noise
        if noise is not None:
            context = context._replace(noise=noise._replace(rng=jax.random.split(noise.rng, 3)[0]))
        y = self.attention_norm(x) if self.config.norm_position == "pre" else x
        y = y if context.input_is_normed is None else jnp.where(context.input_is_normed, x, y)
        if self.config.mixer == "attention":
            return self.attention.mix(y, context)
        # Attention can leave out the tokens that are not asked for; the others compute all.
        return context.chosen(self.attention(y, context._replace(only=None)))

    def finish(self, x: jax.Array, mixed: jax.Array, context: LayerContext) -> jax.Array:
        """Adds the result of `mix` to x[n l d], then the feed-forward: [n l d], or with `context.only` [n 1 d]."""
        rate, noise = self.config.dropout, context.noise
        attention_noise = mlp_noise = None
        if noise is not None:
            attention_noise, mlp_noise = (Noise(rng, noise.row) for rng in jax.random.split(noise.rng, 3)[1:])
        branch = self.attention.project(mixed) if self.config.mixer == "attention" else mixed
        x = checkpoint_name(context.chosen(x) + dropout(branch, rate, attention_noise), "middle")
        if self.config.norm_position == "pre":
            return x if self.mlp is None else x + dropout(self.mlp(self.mlp_norm(x)), rate, mlp_noise)
        x = self.attention_norm(x)
        return x if self.mlp is None else self.mlp_norm(x + dropout(self.mlp(x), rate, mlp_noise))


class Transformer(nnx.Module):
    """Maps token ids to contextual vectors.

    The parameters of all blocks are stacked and the blocks are scanned, so that compile time does not grow with depth.
    """

    def __init__(self, config: ConfigDict, vocab_size: int, attend: Attend, layout: Layout, rngs: nnx.Rngs):
        self.config, self.layout = config, layout
        init = initializers.normal(config.init_std)
        self.embedding = parameter(rngs, init, (vocab_size, config.d_model), ("vocab", "embed"))
        self.ngrams = Ngrams(config, layout, rngs) if config.ngrams else None
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
        self,
        tokens: jax.Array,
        segment: jax.Array,
        position: jax.Array | None = None,
        noise: Noise | None = None,
        joined: bool = False,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Computes a vector per token.

        Args:
          tokens: int32[n l]; l is at most `encoder.longest_row(config)`.
          segment: int32[n l], the number of each token's span, from 1; 0 is padding.
          position: int32[n l], the index of each token in its span. None: each row is one span, and its padding comes last.
          noise: the randomness of dropout. None: no dropout.
          joined: see `LayerContext`.
          only: int32[n], the one token of each row whose state is asked for: the last block computes no other. None: all.

        Returns:
          The token states [n l d], or [n 1 d], in `config.dtype`; for the pooling "first_last" their mean with those of the
          first block; and the mean directions of the latents float32[n latent_layers·k], or None.
        """
        config, length = self.config, tokens.shape[1]
        if self.blocks is not None and config.mixer in FIXED_LENGTH:
            tokens, segment = (jnp.pad(y, ((0, 0), (0, config.max_length - length))) for y in (tokens, segment))
        embedding_noise = block_noise = None
        if noise is not None:
            rngs = jax.random.split(noise.rng, config.num_layers + 1)
            embedding_noise, block_noise = Noise(rngs[-1], noise.row), Noise(rngs[:-1], noise.row)
        with jax.named_scope("embedding"):
            x = self.embed(tokens, segment, position)
            x = dropout(x.astype(config.dtype), config.dropout, embedding_noise)
        first = latents = None
        if self.blocks is not None:
            span_length = (segment > 0).sum(1, dtype=jnp.int32) if position is None and not joined else None
            position = jnp.arange(tokens.shape[1])[None] if position is None else position
            context = LayerContext(segment, position, span_length, noise=block_noise, joined=joined)
            x, first, latents = self.apply_blocks(x, context, None if only is None else only[:, None])
        x = x if self.final_norm is None else self.final_norm(x)
        latents = None if latents is None else latents.reshape(len(x), -1)
        return (x if first is None else (x + first) / 2)[:, :length], latents

    def table(self) -> jax.Array:
        """Returns the embedding table float32[vocab d], whole on each device in its `embed` axis."""
        return self.layout.gather(self.embedding[...], ("vocab", "embed"))

    def embed(self, tokens: jax.Array, segment: jax.Array, position: jax.Array | None) -> jax.Array:
        """Returns token plus n-gram and position embeddings, normalised where the model says so: float32[n l d]."""
        x = self.layout.rows(self.table()[tokens])
        x = x if self.ngrams is None else x + self.ngrams(tokens, segment)
        if self.position_embedding is not None:
            table = self.position_embedding[...]
            x = x + (ops.repeat_table(table[: tokens.shape[1]], len(x)) if position is None else table[position])
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def apply_blocks(
        self, x: jax.Array, context: LayerContext, only: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Applies all blocks to x[n l d]; `context.noise.rng` has one random key per layer.

        Args:
          x: the embeddings of the tokens.
          context: what all layers know.
          only: int32[n 1], `LayerContext.only` of the last block. None: it computes all tokens.

        Returns:
          The states of the last block, [n l d] or [n 1 d]; for the pooling "first_last" those of the first, else None; and the
          mean directions of the latents float32[n latent_layers k], or None.
        """
        config = self.config
        without_latent = config.num_layers - config.latent_layers
        graphdef, stacked_params = nnx.split(self.blocks)

        def apply_block(
            states: tuple, layer: Any, only: jax.Array | None = None, checkpoint: Callable = unchanged
        ) -> tuple[tuple, None]:
            (x, first, latents), (params, rng, number) = states, layer
            block: Any = nnx.merge(graphdef, params)
            noise = None if context.noise is None else Noise(rng, context.noise.row)
            own = context._replace(noise=noise, theta=config.rope_theta, only=only)
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
            if latents is not None:
                passes = number >= without_latent
                own = own._replace(passes=passes)
                latent_noise = None if noise is None else noise._replace(rng=jax.random.fold_in(noise.rng, 1))
                replaced, mean = checkpoint(lambda x: block.latent(x, latent_noise))(x)
                x = jnp.where(passes, replaced, x)
                latents = jnp.where(passes, latents.at[:, number - without_latent].set(mean), latents)
            x = self.layout.rows(block(x, own, checkpoint))
            return (x, first if first is None else jnp.where(number == 0, x, first), latents), None

        rngs = None if context.noise is None else context.noise.rng
        layers = (stacked_params, rngs, jnp.arange(config.num_layers))
        latents = jnp.zeros((len(x), config.latent_layers, config.latent)) if config.latent else None
        states: Any = (x, x if config.pooling == "first_last" else None, latents)
        looped = config.num_layers - (only is not None) if config.scan else 0
        if looped:
            loop = jax.tree.map(lambda leaf: leaf[:looped], layers)
            states, _ = jax.lax.scan(rematerialize(apply_block, config, 0), states, loop)
        for number in range(looped, config.num_layers):
            block = functools.partial(apply_block, only=only if number == config.num_layers - 1 else None)
            states, _ = rematerialize(block, config, number)(states, jax.tree.map(lambda leaf, i=number: leaf[i], layers))
        return states


def rematerialize(apply_block: Callable, config: ConfigDict, number: int) -> Callable:
    """Makes the backward pass of block `number` recompute what neither `config.remat` nor `config.saved` saves.

    The statistics of norms are always saved: two numbers per token spare a pass over the token states. Unless `config.remat` is
    "full", the mixer's result is saved too, since it passes from one checkpoint of the block to the other. If a policy saved
    it by name, within one checkpoint, JAX would put a reduce_precision behind attention's kernel: on TPU a pass over it.
    """
    if config.remat == "none":
        return apply_block
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(ops.STATISTICS, *(name for name, blocks in config.saved if number < blocks))
    if config.remat == "dots":
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, policy)
    checkpoint = functools.partial(jax.checkpoint, policy=policy)
    return checkpoint(apply_block) if config.remat == "full" else functools.partial(apply_block, checkpoint=checkpoint)
