"""The text encoder: a Transformer, a pooling, an optional projection, unit length."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from contrastive_jax.models import attention, transformer

Params = Any  # nested dict of arrays

ONE_DEVICE = attention.Layout()

CHOICES = {
    "mlp": ("gelu", "geglu", "swiglu"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "position": ("learned", "rotary", "none"),
    "pooling": ("mean", "cls", "eos"),
    "attention": ("auto", "plain", "fused"),
    "remat": ("none", "dots", "attention", "full"),
    "dtype": ("float32", "bfloat16"),
}


class Encoder(NamedTuple):
    """A pure view of the model.

    Attributes:
      init: key → params, a nested dict of float32 arrays.
      apply: (params, tokens int32[n l], mask bool[n l], key or None, row int32[n] or None) → unit vectors float32[n e]; dropout
        where a key is given, by the number of each row in the global batch (None: its place).
      axes: nested dict like params: the logical axis names of each parameter.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    axes: Params


class TextEncoder(nnx.Module):
    """Tokens to one unit vector a row."""

    def __init__(
        self,
        config: ConfigDict,
        vocab_size: int,
        length: int,
        attend: attention.Attend,
        layout: attention.Layout,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.transformer = transformer.Transformer(config, vocab_size, length, attend, layout, rngs)
        self.projection = (
            transformer.Linear(config, layout, (config.d_model, config.embedding_dim), ("embed", None), rngs)
            if config.embedding_dim
            else None
        )

    def __call__(self, tokens: jax.Array, mask: jax.Array, noise: attention.Noise | None = None) -> jax.Array:
        """Tokens int32[n l], mask bool[n l] → unit vectors float32[n e]; dropout where `noise` is given."""
        x = self.transformer(tokens, mask.astype(jnp.int32), noise=noise)
        x = pool(x, mask, self.config.pooling).astype(jnp.float32)
        if self.projection is not None:
            x = self.projection(x)
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def pool(x: jax.Array, mask: jax.Array, pooling: str) -> jax.Array:
    """x[n l d], mask bool[n l] → [n d]: mean over real tokens, the first ("cls") or the last real one ("eos")."""
    if pooling == "mean":
        total = jnp.einsum("nld,nl->nd", x, mask.astype(x.dtype), preferred_element_type=jnp.float32)
        return total / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    if pooling == "cls":
        return x[:, 0]
    return jnp.take_along_axis(x, jnp.maximum(mask.sum(-1) - 1, 0)[:, None, None], axis=1)[:, 0]


def check(config: ConfigDict) -> None:
    """Raises ValueError, naming the key, for a model that cannot be built."""
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            raise ValueError(f"config.model.{key}={config[key]!r}: choose one of {', '.join(choices)}")
    for key in ("d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
        if config[key] < 1:
            raise ValueError(f"config.model.{key}={config[key]}: must be at least 1")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"config.model.num_kv_heads={config.num_kv_heads} must divide config.model.num_heads={config.num_heads}"
        )
    if config.position == "rotary" and config.head_dim % 2:
        raise ValueError(f"config.model.head_dim={config.head_dim}: rotary positions need an even one")
    if config.local_window < 0 or config.global_every < 1:
        raise ValueError(
            f"config.model.local_window={config.local_window}: 0 or the tokens on either side, "
            f"config.model.global_every={config.global_every}: at least 1"
        )
    for key in ("dropout", "attention_dropout"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"config.model.{key}={config[key]}: must be in [0, 1)")


def make(config: ConfigDict, vocab_size: int, length: int, layout: attention.Layout = ONE_DEVICE) -> Encoder:
    """Builds the encoder without allocating anything.

    Args:
      config: `config.model`.
      vocab_size: ids the tokenizer can give.
      length: longest row, the size of a learned position table.
      layout: how activations lie on the mesh.

    Raises:
      ValueError: a key has a value that is not one of its choices, or two keys exclude each other.
    """
    check(config)
    attend = attention.make(config, layout)

    def model(rngs: nnx.Rngs) -> TextEncoder:
        return TextEncoder(config, vocab_size, length, attend, layout, rngs)

    def construct(key: jax.Array) -> tuple[Any, Any]:
        return nnx.split(model(nnx.Rngs(params=key)), nnx.Param)

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: model(nnx.Rngs(0))), nnx.Param)

    def axes(variable: nnx.Variable) -> tuple[str | None, ...]:
        names = variable.get_metadata()["axes"]
        return ("layers",) * (len(variable.shape) - len(names)) + names  # stacked blocks have one axis more

    def apply(
        params: Params, tokens: jax.Array, mask: jax.Array, key: jax.Array | None = None, row: jax.Array | None = None
    ) -> jax.Array:
        row = jnp.arange(len(tokens), dtype=jnp.int32) if row is None else row
        return nnx.merge(graphdef, params)(tokens, mask, None if key is None else attention.Noise(key, row))

    flat = nnx.to_flat_state(abstract)
    return Encoder(
        init=lambda key: nnx.to_pure_dict(construct(key)[1]),
        apply=apply,
        axes=nnx.to_pure_dict(nnx.from_flat_state([(path, axes(variable)) for path, variable in flat])),
    )
