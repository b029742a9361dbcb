"""The text encoder: a Transformer, pooling, optional dense layers, and division by the length of the vector.

Packing: the spans of p pairs share r rows, a group; without packing p = r = 1, and a row is a group.

Dimensions: n rows, l tokens per row, g groups, r = n / g rows per group, t = r · l tokens per group, p spans per group,
d width, e embedding size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.config.dense import dense_layers
from contrastive_jax.models.attention import Attend, make_attend
from contrastive_jax.models.attention_kernel import MASKED
from contrastive_jax.models.dropout import Noise
from contrastive_jax.models.layers import Linear, parameter
from contrastive_jax.models.mixers import FIXED_LENGTH, check_mixer
from contrastive_jax.models.transformer import Transformer
from contrastive_jax.runtime.layout import Layout

Params = Any  # nested dict of arrays

ONE_DEVICE = Layout()


class Encoding(NamedTuple):
    """What the encoder makes of rows.

    Attributes:
      z: unit vectors float32[g·p e].
      states: the token states [n l d], in `config.dtype`.
      table: the embedding table float32[vocab d], for heads that predict tokens.
    """

    z: jax.Array
    states: jax.Array
    table: jax.Array


class Encoder(NamedTuple):
    """The encoder as pure functions of its parameters.

        encoder = make_encoder(config.model, vocab_size=8192)
        params = encoder.init(jax.random.key(0))
        z = encoder.apply(params, tokens, mask)  # [n e]

    Attributes:
      init: random key → params, a nested dict of float32 arrays.
      apply: (params, tokens int32[n l], segment [n l], rng=None, row=None, packing=(1, 1), joined=False) → unit vectors
        float32[g·p e].
        `segment` is int32: it numbers the spans of a group 1 ... p, and is 0 on padding. Without packing it may be a bool mask,
        and the padding of a row must come last.
        `rng` is a random key for dropout; None: no dropout. `row`, int32[n], is each row's index in the global batch, on which
        its dropout depends; None: 0 ... n - 1. `packing` is (p, r): every r consecutive rows are a group of p spans. `joined`:
        segments 1 and 2 of a row are two texts, and the vector is that of the first.
      encode: takes what `apply` takes, and states=True → Encoding, for token losses. states=False: as in `TextEncoder`.
      axes: the logical axes of each parameter, a nested dict like params.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    encode: Callable[..., Encoding]
    axes: Params


class TextEncoder(nnx.Module):
    """Maps tokens to a unit vector per span."""

    def __init__(self, config: ConfigDict, vocab_size: int, attend: Attend, layout: Layout, rngs: nnx.Rngs):
        self.config = config
        self.transformer = Transformer(config, vocab_size, attend, layout, rngs)
        self.token_weight = parameter(rngs, initializers.zeros, (vocab_size,), ("vocab",)) if config.token_weights else None
        size = config.d_model
        for number, (name, layer) in enumerate(dense_layers(config).items()):
            axis = None if number else "embed"
            setattr(self, name, Linear(config, layout, (size, layer.width), (axis, None), rngs, bias=layer.bias))
            size = layer.width

    def __call__(
        self,
        tokens: jax.Array,
        segment: jax.Array,
        noise: Noise | None = None,
        packing: tuple[int, int] = (1, 1),
        joined: bool = False,
        states: bool = True,
    ) -> Encoding:
        """Encodes the spans of n rows.

        Args:
          tokens: int32[n l].
          segment: int32[n l], the number of each token's span in its group, 1 ... p; 0 is padding.
          noise: the randomness of dropout. None: no dropout.
          packing: (p, r).
          joined: the rows have two parts, segments 1 and 2, and the vector is that of the first.
          states: whether the token states are asked for. False: where a vector is the state of one token, the last block
            computes no other, and the Encoding has it alone, [n 1 d].

        Returns:
          An Encoding, whose vectors are group by group, in each group in the order of the spans' numbers.
        """
        p, r = packing
        only = None
        if not states and p * r == 1 and pools_one_token(self.config):
            only = pooled_token(segment[:, :, None] == 1, self.config.pooling)[:, 0]  # [n 1] -> [n]
        x, latents = self.transformer(tokens, segment, position_in_span(segment) if p > 1 else None, noise, joined, only)
        token_states = x
        with jax.named_scope("pooling"):
            x = x.reshape(-1, r * x.shape[1], x.shape[2])  # [n l d] -> [g t d]
            mask = segment.reshape(len(x), -1, 1) == jnp.arange(1, p + 1)  # [n l] -> [g t p]
            x = jnp.tanh(x) if self.config.pool_tanh == "before" else x
            if only is not None:
                x = x[:, 0].astype(jnp.float32)  # [n 1 d] -> [n d]
            elif latents is None:
                weight = None if self.token_weight is None else jnp.exp(self.token_weight[...])[tokens].reshape(x.shape[:2])
                x = pool(x, mask, self.config.pooling, weight).astype(jnp.float32).reshape(-1, x.shape[2])  # [g p d] -> [g·p d]
            else:
                x = latents
            x = jnp.tanh(x) if self.config.pool_tanh == "after" else x
            for name, layer in dense_layers(self.config).items():
                x = getattr(self, name)(x)
                x = jnp.tanh(x) if layer.activation == "tanh" else x
            z = x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
        return Encoding(z, token_states, self.transformer.table())


def position_in_span(segment: jax.Array) -> jax.Array:
    """Returns the index of each token in its span, from segment int32[n l] whose spans are contiguous: int32[n l]."""
    index = jax.lax.broadcasted_iota(jnp.int32, segment.shape, 1)
    begins = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def pool(x: jax.Array, mask: jax.Array, pooling: str, weight: jax.Array | None = None) -> jax.Array:
    """Makes one vector of the token states of each span.

    Args:
      x: [g t d].
      mask: bool[g t p], which tokens belong to which span.
      pooling: "mean" of the tokens ("first_last": likewise), "max" (in each channel), "cls" (the first token) or "eos" (the
        last token).
      weight: float32[g t], of each token in a mean; None: all count alike.

    Returns:
      [g p d]: float32 for means, else in the type of x. A span without tokens has mean and maximum 0.
    """
    if pooling == "max":
        of_span = [jnp.where(mask[:, :, i : i + 1], x, MASKED).max(1) for i in range(mask.shape[2])]
        return jnp.where(mask.any(1)[:, :, None], jnp.stack(of_span, axis=1), 0)
    if pooling in ("mean", "first_last"):
        count: jax.Array = jnp.maximum(mask.sum(1)[:, :, None], 1)
        if weight is not None:
            x = x * weight[:, :, None]
            count = jnp.maximum((mask * weight[:, :, None]).sum(1)[:, :, None], 1e-9)
        if mask.shape[2] == 1:  # faster than the product: the gradient of a sum is a broadcast, that of a product a transpose
            total = jnp.where(mask, x, 0).sum(1, keepdims=True, dtype=jnp.float32)
        else:
            total = jnp.einsum("gtp,gtd->gpd", mask.astype(x.dtype), x, preferred_element_type=jnp.float32)
        return total / count
    return jnp.take_along_axis(x, pooled_token(mask, pooling)[:, :, None], axis=1)


def pooled_token(mask: jax.Array, pooling: str) -> jax.Array:
    """Returns the first ("cls") or the last ("eos") token of each span, int32[g p], from bool[g t p]."""
    token = jnp.arange(mask.shape[1])[:, None]
    return jnp.where(mask, token, mask.shape[1] - 1).min(1) if pooling == "cls" else jnp.where(mask, token, 0).max(1)


def pools_one_token(config: ConfigDict) -> bool:
    """Returns whether a vector is the last block's state of one token, in an encoder with this `config.model`."""
    return bool(config.num_layers) and config.pooling in ("cls", "eos") and not config.latent


def pads_rows(config: ConfigDict) -> bool:
    """Returns whether an encoder with this `config.model` pads all rows to `config.max_length` tokens."""
    return config.num_layers > 0 and config.mixer in FIXED_LENGTH


def longest_row(config: ConfigDict) -> int | None:
    """Returns how many tokens of a row an encoder with this `config.model` has positions for; None: any number."""
    return config.max_length if config.position == "learned" or pads_rows(config) else None


def check_model(config: ConfigDict) -> None:
    """Checks the rules that involve more than one key of `config.model`; `config.check` has the rules of single keys.

    Raises:
      UserError: the model cannot be built; the message names the keys.
    """
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"config.model.num_kv_heads={config.num_kv_heads} must divide config.model.num_heads={config.num_heads}"
        )
    if config.position == "rotary" and config.head_dim % 2:
        raise UserError(f"config.model.head_dim={config.head_dim} must be even because config.model.position='rotary'")
    check_mixer(config)
    check_saved(config)
    if config.dense and config.embedding_dim:
        raise UserError(f"config.model.embedding_dim={config.embedding_dim}: config.model.dense decides the width; set it to 0")
    if config.token_weights and (config.pooling != "mean" or config.latent):
        raise UserError("config.model.token_weights: needs config.model.pooling='mean' and config.model.latent=0")
    if config.latent and (config.latent_layers > config.num_layers or dense_layers(config) or config.mixer != "attention"):
        raise UserError(
            f"config.model.latent={config.latent}: needs config.model.latent_layers={config.latent_layers} or more layers of "
            "attention, and config.model.embedding_dim=0 and config.model.dense=()"
        )


def check_saved(config: ConfigDict) -> None:
    """Raises UserError if `config.saved` has a name that no block has, or could have no effect."""
    names = [*("query", "key", "value") * (config.mixer == "attention"), *("middle", "up") * (config.mlp != "none")]
    shares = [blocks for _, blocks in config.saved]
    for wrong, need in (
        (any(name not in names for name, _ in config.saved), f"names among {', '.join(names)}"),
        (config.remat == "none", "config.model.remat='full', 'attention' or 'dots': 'none' saves everything"),
        (config.scan and min(shares, default=config.num_layers) < config.num_layers, "config.model.scan=False, or all blocks"),
    ):
        if config.saved and wrong:
            raise UserError(f"config.model.saved={config.saved}: needs {need}")


def make_encoder(config: ConfigDict, vocab_size: int, layout: Layout = ONE_DEVICE) -> Encoder:
    """Builds the encoder without allocating anything.

    Args:
      config: `config.model`.
      vocab_size: the number of rows of the embedding table: larger than any token id.
      layout: how activations and parameters lie on the mesh.

    Raises:
      UserError: from `check_model` or `attention.make_attend`.
    """
    check_model(config)
    attend = make_attend(config, layout)

    def make_module(rngs: nnx.Rngs) -> TextEncoder:
        return TextEncoder(config, vocab_size, attend, layout, rngs)

    def init(rng: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.split(make_module(nnx.Rngs(params=rng)), nnx.Param)[1])

    graphdef, abstract_state = nnx.split(nnx.eval_shape(lambda: make_module(nnx.Rngs(0))), nnx.Param)

    def encode(
        params: Params,
        tokens: jax.Array,
        segment: jax.Array,
        rng: jax.Array | None = None,
        row: jax.Array | None = None,
        packing: tuple[int, int] = (1, 1),
        joined: bool = False,
        states: bool = True,
    ) -> Encoding:
        row = jnp.arange(len(tokens), dtype=jnp.int32) if row is None else row
        noise = None if rng is None else Noise(rng, row)
        return nnx.merge(graphdef, params)(tokens, segment.astype(jnp.int32), noise, packing, joined, states)

    def apply(*inputs: Any, **more: Any) -> jax.Array:
        return encode(*inputs, **(more | {"states": False})).z

    def axes_of(variable: nnx.Variable) -> tuple[str | None, ...]:
        names = variable.get_metadata()["axes"]
        return ("layers",) * (len(variable.shape) - len(names)) + names  # the parameters of blocks are stacked on a first axis

    variables = nnx.to_flat_state(abstract_state)
    axes = nnx.to_pure_dict(nnx.from_flat_state([(path, axes_of(variable)) for path, variable in variables]))
    return Encoder(init, apply, encode, axes)
