"""What a layer knows about its rows besides the activations.

Dimensions: n rows, l tokens per row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_jax.models.dropout import Noise


class LayerContext(NamedTuple):
    """What a layer knows about its rows besides the activations.

    `segment`, `position`, `span_length`, `joined` and `noise.row` are the same in all layers, the rest differs between them.

    Attributes:
      segment: int32[n l], the number of each token's span, from 1; 0 is padding. Tokens attend within their segment.
      position: int32[n l] or [1 l], the index of each token in its span.
      span_length: int32[n], the tokens of each row's span, where every row is one span, from its first token on, and padding.
        None: spans may lie anywhere.
      window: int32[], how many tokens on either side this layer attends to. None: no layer has a window.
      input_is_normed: bool[], skip this layer's attention norm (ModernBERT's first block, whose norm is the embedding norm).
        None: no layer skips it.
      theta: the base of this layer's rotary positions.
      noise: the randomness of this layer's dropout. None: no dropout.
      joined: whether segments 1 and 2 of a row are two texts that see of each other what `config.model.part_mask` says.
      only: int32[n 1], the one token of each row whose state this layer computes, from those of all tokens. None: it computes
        all.
      passes: bool[], whether the first token passes from the first text to the second with `config.part_mask` "bottleneck".
        None: it does in all layers.
    """

    segment: jax.Array
    position: jax.Array
    span_length: jax.Array | None = None
    window: jax.Array | None = None
    input_is_normed: jax.Array | None = None
    theta: jax.Array | float = 0.0
    noise: Noise | None = None
    joined: bool = False
    only: jax.Array | None = None
    passes: jax.Array | None = None

    def chosen(self, x: jax.Array) -> jax.Array:
        """Returns the rows of x[n l d] that this layer computes: x itself, or [n 1 d] of `only`."""
        return x if self.only is None else jnp.take_along_axis(x, self.only[:, :, None], axis=1)

    def zero_padding(self, x: jax.Array) -> jax.Array:
        """Returns x[n l d] with zeros on padding."""
        return jnp.where(self.segment[:, :, None] > 0, x, 0)
