"""Attention within the spans of a row: plain, or fused (a Pallas kernel on TPU, cuDNN on GPU), with equal values and gradients.

A token attends to the tokens of its own segment. Dimensions: n rows, l query tokens, s key tokens, h heads, g key-value heads,
r = h / g heads per key-value head, k head width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.models.attention_kernel import MASKED
from contrastive_jax.models.dropout import dropout
from contrastive_jax.models.fused_attention import fills_lanes, fused
from contrastive_jax.models.layer_context import LayerContext
from contrastive_jax.runtime.layout import Layout

# (query [n l h k], key [n s g k], value [n s g k], context) → [n l h k].
Attend = Callable[[jax.Array, jax.Array, jax.Array, LayerContext], jax.Array]


def make_attend(config: ConfigDict, layout: Layout) -> Attend:
    """Returns the attention that `config.attention` names: "plain", "fused", or "auto".

    "auto" is the fused one where the device has it and it pays.

    Args:
      config: `config.model`.
      layout: how rows and heads lie on the mesh.
    """
    if config.attention != "plain" and layout.platform in ("gpu", "cuda"):
        return functools.partial(cudnn_or_plain, config, layout)
    if runs_kernel(config, layout):
        return functools.partial(fused_or_plain, config, layout)
    return functools.partial(plain, config)


def runs_kernel(config: ConfigDict, layout: Layout) -> bool:
    """Returns whether attention is the Pallas kernel, as `config.attention` and the devices decide."""
    if config.attention == "plain" or layout.platform in ("gpu", "cuda"):
        return False
    return config.attention == "fused" or (layout.platform == "tpu" and fills_lanes(config, layout))


def projects_with_kernel(config: ConfigDict, layout: Layout) -> bool:
    """Returns whether `fused_attention.project_and_attend` can stand for the projections and the attention."""
    plain_products = not config.bias and config.products == "float32"
    own_keys = config.num_kv_heads == config.num_heads
    return runs_kernel(config, layout) and config.position != "rotary" and plain_products and own_keys


def fused_or_plain(
    config: ConfigDict, layout: Layout, query: jax.Array, key: jax.Array, value: jax.Array, context: LayerContext
) -> jax.Array:
    """The Pallas kernel, or the plain attention for joined rows, whose masks it does not have; arguments as in `plain`.

    Raises:
      UserError: the rows are joined, and `config.attention` is "fused".
    """
    if not context.joined:
        return fused(config, layout, query, key, value, context)
    if config.attention == "fused":
        raise UserError("config.model.attention='fused': it has no masks for config.data.join; choose 'plain' or 'auto'")
    warn_once("attention is plain, which is slower and stores the scores: the fused one has no masks for config.data.join")
    return plain(config, query, key, value, context)


def plain(config: ConfigDict, query: jax.Array, key: jax.Array, value: jax.Array, context: LayerContext) -> jax.Array:
    """The definition, softmax(q kᵀ / √k) v, in XLA; the scores are float32 and stored.

    Heads come before tokens, and the softmax is divided by its sum after the product with v: both together make it up to four
    times as fast on CPU. The maximum cancels, so no gradient flows through it.

    Args:
      config: `config.model`.
      query: [n l h k].
      key: [n s g k].
      value: [n s g k].
      context: of the layer.

    Returns:
      [n l h k] in the type of `query`.
    """
    n, length, h, k = query.shape
    g = config.num_kv_heads
    with jax.named_scope("scores"):
        # [n l h k] -> [n l g r k] -> [n g r l k]
        grouped = query.reshape(n, length, g, h // g, k).transpose(0, 2, 3, 1, 4)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [n s g k] -> [n g s k]
        scores = jnp.einsum("ngrlk,ngsk->ngrls", grouped, key, preferred_element_type=jnp.float32)
        mask = attention_mask(config, context)[:, None, None]
        weights, total = softmax_of(config, scores, mask, context, query.dtype)
        mixed = jnp.einsum("ngrls,ngsk->ngrlk", weights, value, preferred_element_type=jnp.float32) / total
        # [n g r l k] -> [n l g r k] -> [n l h k]
        return mixed.astype(query.dtype).transpose(0, 3, 1, 2, 4).reshape(n, length, h, k)


def softmax_of(
    config: ConfigDict, products: jax.Array, mask: jax.Array, context: LayerContext, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Returns exp of the scores, with dropout, and its sums without dropout: the softmax is their quotient.

    Args:
      config: `config.model`.
      products: of queries and keys, float32[n ... s]; the scores are these divided by √k.
      mask: which key each query attends to, a bool array that broadcasts to `products`.
      context: of the layer.
      dtype: of the first result.

    Returns:
      [n ... s] in `dtype` and float32[n ... 1].
    """
    scores = jnp.where(mask, products / config.head_dim**0.5, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return dropout(weights.astype(dtype), config.attention_dropout, context.noise), weights.sum(-1, keepdims=True)


def attention_mask(config: ConfigDict, context: LayerContext) -> jax.Array:
    """Returns which token attends to which, bool[n l s]: the same segment, no later token if causal, none beyond the window.

    With `context.only` it has the one row of each token of that: bool[n 1 s].

    In a joined row with `config.part_mask` "full" all tokens of both parts attend to each other. With "prefix" (UniLM, Dong et
    al., arXiv 1905.03197, §2.3) the second part is causal and attends to the first, which does not attend to the second; with
    "bottleneck" it attends to the first token of the first part alone.
    """
    segment, window = context.segment, context.window
    query, key = segment[:, :, None], segment[:, None, :]
    place = jnp.arange(segment.shape[1])
    distance = place[:, None] - place
    if context.only is not None:
        query = jnp.take_along_axis(query, context.only[:, :, None], axis=1)
        distance = context.only[:, :, None] - place
    mask = query == key
    if context.joined and config.part_mask == "full":
        mask |= (query > 0) & (key > 0)
    elif context.joined:
        first = (place == 0) & (True if context.passes is None else context.passes)
        seen = (key == 1) & (first | (config.part_mask == "prefix"))
        mask = jnp.where(query == 2, (mask & (distance >= 0)) | seen, mask)
    if config.causal:
        mask &= distance >= 0
    if window is not None:
        mask &= jnp.abs(distance) <= window
    return mask


def why_not_cudnn(config: ConfigDict, length: int, masked: bool, dropout: bool, compute_capability: str) -> str:
    """Returns why the attention of cuDNN cannot be used, or "" if it can.

    Args:
      config: `config.model`.
      length: the tokens of a row.
      masked: whether it needs a mask array: the rows are packed, or the layers have windows.
      dropout: whether attention weights are dropped.
      compute_capability: of the GPU, such as "9.0"; "": unknown, which counts as an A100's.
    """
    capability = tuple(int(part) for part in (compute_capability or "8.0").split("."))
    widest_head = 256 if capability >= (9, 0) else 128
    if capability < (8, 0):
        return f"this GPU has compute capability {compute_capability}: cuDNN's needs 8.0 (A100) or newer"
    if config.dtype != "bfloat16":
        return f"config.model.dtype={config.dtype!r}: cuDNN has it in 'bfloat16' only"
    if dropout:
        return (
            f"config.model.attention_dropout={config.attention_dropout}: cuDNN's dropout cannot be repeated elsewhere; take 0"
        )
    if config.head_dim % 8 or config.head_dim > widest_head:
        return f"config.model.head_dim={config.head_dim}: cuDNN's needs a multiple of 8 up to {widest_head} on this GPU"
    if masked and length % 2:
        return f"rows of {length} tokens: with packing or local windows cuDNN's needs an even number"
    return ""


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning the first time that this process has it."""
    logging.warning("%s", message)


def cudnn_or_plain(
    config: ConfigDict, layout: Layout, query: jax.Array, key: jax.Array, value: jax.Array, context: LayerContext
) -> jax.Array:
    """The attention of cuDNN, or the plain one where cuDNN refuses; arguments as in `plain`.

    Raises:
      UserError: cuDNN refuses, and `config.attention` is "fused".
    """
    masked = context.span_length is None or context.window is not None
    dropout = context.noise is not None and config.attention_dropout > 0
    reason = why_not_cudnn(config, query.shape[1], masked, dropout, layout.compute_capability)
    if not reason:
        return cudnn(config, query, key, value, context, implementation="cudnn")
    if config.attention == "fused":
        raise UserError(f"config.model.attention='fused': {reason}; or choose 'plain' or 'auto'")
    warn_once(f"attention is plain, which is slower and stores the scores: {reason}")
    return plain(config, query, key, value, context)


def cudnn(
    config: ConfigDict, query: jax.Array, key: jax.Array, value: jax.Array, context: LayerContext, implementation: str
) -> jax.Array:
    """The flash attention of cuDNN, through jax.nn.dot_product_attention; arguments as in `plain`, but without dropout.

    cuDNN skips what a causal mask and the length of a row hide, and needs memory for neither. An array as a mask becomes a bias
    [n 1 l s] that is read, and whose gradient is written: it is passed only for packed rows and local windows. Where a mask
    hides padding from the tokens of a span, outputs on the padding itself may differ from those of `plain`; nothing reads them.
    """
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    with jax.named_scope("kernel"):
        if context.span_length is None or context.window is not None:
            mask = attention_mask(config, context)[:, None]  # [n l s] -> [n 1 l s]
            return attend(query, key, value, mask=mask, is_causal=config.causal)  # type: ignore[call-overload]
        if config.causal:  # the padding comes after the span, so that no token of the span looks at it
            return attend(query, key, value, is_causal=True)  # type: ignore[call-overload]
        # A row without tokens attends to its first padding: over no key at all the softmax would not be finite.
        lengths = jnp.maximum(context.span_length, 1)
        return attend(query, key, value, key_value_seq_lengths=lengths)  # type: ignore[call-overload]
