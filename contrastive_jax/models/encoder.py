"""The text encoder: a Transformer, a pooling, an optional projection, unit length.

Dimensions: n rows, l tokens of a row, g texts that share r rows, t = r · l, d width, e embedding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from contrastive_jax.models import attention, transformer
from contrastive_jax.models.layout import Layout
from contrastive_jax.models.rows import Noise

Params = Any  # nested dict of arrays

ONE_DEVICE = Layout()

CHOICES = {
    "mlp": (*transformer.ACTIVATIONS, *transformer.GATED),
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
      apply: (params, tokens int32[n l], segment int32[n l], key=None, row=None, packing=(1, 1)) → unit vectors float32[m e].
        Each r rows hold the spans of g texts, (g, r) = packing, m = n / r · g: `segment` is 1 … g on them and 0 beside them (a
        mask, where a row is a text). Dropout where a key is given, by row int32[n], the number of each row in the global batch
        (None: its place).
      axes: nested dict like params: the logical axis names of each parameter.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    axes: Params


class TextEncoder(nnx.Module):
    """Tokens to one unit vector a text."""

    def __init__(
        self,
        config: ConfigDict,
        vocab_size: int,
        length: int,
        attend: attention.Attend,
        layout: Layout,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.transformer = transformer.Transformer(config, vocab_size, length, attend, layout, rngs)
        self.projection = (
            transformer.Linear(config, layout, (config.d_model, config.embedding_dim), ("embed", None), rngs)
            if config.embedding_dim
            else None
        )

    def __call__(
        self,
        tokens: jax.Array,
        segment: jax.Array,
        noise: Noise | None = None,
        packing: tuple[int, int] = (1, 1),
    ) -> jax.Array:
        """Tokens and segment int32[n l], (g, r) = packing → unit vectors float32[n/r·g e]; dropout where `noise` is given."""
        spans, rows = packing
        x = self.transformer(tokens, segment, places(segment) if spans > 1 else None, noise)
        x = x.reshape(-1, rows * x.shape[1], x.shape[2])
        mask = segment.reshape(*x.shape[:2], 1) == jnp.arange(1, spans + 1)
        x = pool(x, mask, self.config.pooling).astype(jnp.float32).reshape(-1, x.shape[2])
        if self.projection is not None:
            x = self.projection(x)
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def places(segment: jax.Array) -> jax.Array:
    """The place of each token in its span, from segment int32[n l], whose spans are contiguous."""
    index = jax.lax.broadcasted_iota(jnp.int32, segment.shape, 1)
    begins = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def pool(x: jax.Array, mask: jax.Array, pooling: str) -> jax.Array:
    """x[n t d], mask bool[n t g] of the tokens of each text → [n g d]: their mean, the first ("cls") or the last ("eos")."""
    if pooling == "mean":
        if mask.shape[2] == 1:  # the gradient of a sum is a broadcast, that of a product is transposed
            total = jnp.where(mask, x, 0).sum(1, keepdims=True, dtype=jnp.float32)
        else:
            total = jnp.einsum("ntg,ntd->ngd", mask.astype(x.dtype), x, preferred_element_type=jnp.float32)
        return total / jnp.maximum(mask.sum(1)[:, :, None], 1)
    place = jnp.arange(x.shape[1])[:, None]
    index = jnp.where(mask, place, x.shape[1] - 1).min(1) if pooling == "cls" else jnp.where(mask, place, 0).max(1)
    return jnp.take_along_axis(x, index[:, :, None], axis=1)


LEAST = dict.fromkeys(("d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "global_every"), 1) | dict.fromkeys(
    ("num_layers", "embedding_dim", "local_window", "init_std"), 0
)


def check(config: ConfigDict) -> None:
    """Raises ValueError, naming the key, for a model that cannot be built."""
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            raise ValueError(f"config.model.{key}={config[key]!r}: choose one of {', '.join(choices)}")
    for key, least in LEAST.items():
        if config[key] < least:
            raise ValueError(f"config.model.{key}={config[key]}: must be at least {least}")
    for key in ("rope_theta", "local_rope_theta", "norm_eps"):
        if config[key] <= 0:
            raise ValueError(f"config.model.{key}={config[key]}: must be above 0")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"config.model.num_kv_heads={config.num_kv_heads} must divide config.model.num_heads={config.num_heads}"
        )
    if config.position == "rotary" and config.head_dim % 2:
        raise ValueError(f"config.model.head_dim={config.head_dim}: rotary positions need an even one")
    for key in ("dropout", "attention_dropout"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"config.model.{key}={config[key]}: must be in [0, 1)")


def make(config: ConfigDict, vocab_size: int, length: int, layout: Layout = ONE_DEVICE) -> Encoder:
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
        params: Params,
        tokens: jax.Array,
        segment: jax.Array,
        key: jax.Array | None = None,
        row: jax.Array | None = None,
        packing: tuple[int, int] = (1, 1),
    ) -> jax.Array:
        row = jnp.arange(len(tokens), dtype=jnp.int32) if row is None else row
        noise = None if key is None else Noise(key, row)
        return nnx.merge(graphdef, params)(tokens, segment.astype(jnp.int32), noise, packing)

    flat = nnx.to_flat_state(abstract)
    return Encoder(
        init=lambda key: nnx.to_pure_dict(construct(key)[1]),
        apply=apply,
        axes=nnx.to_pure_dict(nnx.from_flat_state([(path, axes(variable)) for path, variable in flat])),
    )
