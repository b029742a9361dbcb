"""Attention within the spans of a row: plain, or fused (a Pallas kernel on TPU, cuDNN on GPU), equal in value and gradient.

A token attends to the tokens of its own segment. Dimensions: n rows, l query tokens, s key tokens, h heads, g key-value heads,
r = h / g, k head width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.models.attention_kernel import LANES, MASKED, fused
from contrastive_jax.models.layout import Layout
from contrastive_jax.models.rows import Rows, dropout

# (query [n l h k], key [n s g k], value [n s g k], rows) → [n l h k].
Attend = Callable[[jax.Array, jax.Array, jax.Array, Rows], jax.Array]


def make(config: ConfigDict, layout: Layout) -> Attend:
    """The attention of `config.attention`: "plain", "fused", or "auto", the fused one where the device has it and it pays.

    Raises:
      ValueError: a fused attention is asked for that the device does not have; the message names the key.
    """
    platform, kind = layout.platform, config.attention
    if kind == "auto":
        # The kernel's lanes hold whole heads. cuDNN has no dropout that is ours, and no float32.
        on_tpu = platform == "tpu" and (config.num_kv_heads // layout.parts[1] * config.head_dim) % LANES == 0
        on_gpu = platform in ("gpu", "cuda") and config.dtype == "bfloat16" and not config.attention_dropout
        kind = "fused" if on_tpu or on_gpu else "plain"
    if kind == "plain":
        return functools.partial(plain, config)
    if platform in ("gpu", "cuda"):
        if config.dtype != "bfloat16" or config.attention_dropout:
            raise ValueError(
                "config.model.attention='fused' on GPU is cuDNN's: it needs config.model.dtype='bfloat16' and "
                "config.model.attention_dropout=0; or choose 'plain'"
            )
        return functools.partial(cudnn, config, implementation="cudnn")
    return functools.partial(fused, config, layout)


def plain(config: ConfigDict, query: jax.Array, key: jax.Array, value: jax.Array, rows: Rows) -> jax.Array:
    """The definition: softmax(q kᵀ / √k) v, in XLA; scores are float32 and stored.

    Heads come before tokens, and the softmax is divided by its sum after the product with v: both make it up to four times as
    fast on CPU. The maximum cancels, so no gradient goes through it.
    """
    n, length, h, k = query.shape
    grouped = query.reshape(n, length, config.num_kv_heads, h // config.num_kv_heads, k).transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("ngrlk,ngsk->ngrls", grouped, key, preferred_element_type=jnp.float32) / k**0.5
    scores = jnp.where(allowed(config.causal, rows)[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    weights = dropout(weights.astype(query.dtype), config.attention_dropout, rows.noise)
    mixed = jnp.einsum("ngrls,ngsk->ngrlk", weights, value, preferred_element_type=jnp.float32) / total
    return mixed.astype(query.dtype).transpose(0, 3, 1, 2, 4).reshape(n, length, h, k)


def allowed(causal: bool, rows: Rows) -> jax.Array:
    """Who may attend to whom, bool[n l s]: the same segment, no later token if causal, none further than `window`."""
    segment, window = rows.segment, rows.window
    mask = segment[:, :, None] == segment[:, None, :]
    distance = jnp.arange(segment.shape[1])[:, None] - jnp.arange(segment.shape[1])
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= jnp.abs(distance) <= window
    return mask


def cudnn(config: ConfigDict, query: jax.Array, key: jax.Array, value: jax.Array, rows: Rows, implementation: str) -> jax.Array:
    """The flash attention of cuDNN through jax.nn.dot_product_attention."""
    mask = allowed(config.causal, rows)[:, None]  # no dropout: `make` saw to it
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)  # type: ignore[call-overload]
