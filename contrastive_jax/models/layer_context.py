"""What a layer knows about its rows besides the activations.

Dimensions: n rows, l tokens per row.
"""

from typing import NamedTuple

import jax

from contrastive_jax.models.dropout import Noise


class LayerContext(NamedTuple):
    """What a layer knows about its rows besides the activations.

    `segment`, `position`, `span_length` and `noise.row` are the same in all layers, the rest differs from layer to layer.

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
    """

    segment: jax.Array
    position: jax.Array
    span_length: jax.Array | None = None
    window: jax.Array | None = None
    input_is_normed: jax.Array | None = None
    theta: jax.Array | float = 0.0
    noise: Noise | None = None
