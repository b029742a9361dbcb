"""A momentum encoder and a queue of its keys: negatives of past batches (MoCo; CERT is MoCo for text).

The queue is [b s e]: s slots, each a whole batch of keys, spread over devices like the batch. A step writes its keys over the
oldest slot before it scores, so that the s · b keys include those of the batch itself and the first step has negatives too.

References:
  He et al., Momentum Contrast for Unsupervised Visual Representation Learning, https://arxiv.org/abs/1911.05722
  Fang et al., CERT: Contrastive Self-supervised Learning for Language Understanding, https://arxiv.org/abs/2005.12766

Dimensions: b pairs, s slots, e embedding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.objectives.distributed import Ids
from contrastive_jax.objectives.pairs import Keys

Params = Any  # nested dict of arrays


class Queue(NamedTuple):
    """What MoCo remembers: a part of the training state.

    Attributes:
      encoder: parameters of the momentum encoder.
      z: float32[b s e], unit vectors.
      doc: int32[b s], their documents.
      text: int32[b s 2], hashes of the key and of its anchor.
    """

    encoder: Params
    z: jax.Array
    doc: jax.Array
    text: jax.Array


def check(config: ConfigDict, views: int) -> None:
    """Raises ValueError, naming the key, if the objective cannot have a queue."""
    if config.queue < 0:
        raise ValueError(f"config.objective.queue={config.queue}: slots, must not be negative")
    if not 0 <= config.momentum < 1:
        raise ValueError(f"config.objective.momentum={config.momentum}: must be in [0, 1)")
    if config.queue and (config.symmetric or views != 2):
        raise ValueError("config.objective.queue: needs one positive an anchor, no hard negatives, objective.symmetric=False")


def init(config: ConfigDict, encoder: Params, b: int, e: int) -> Queue:
    """An empty queue, and a momentum encoder equal to the encoder."""
    s = config.queue
    ints = jnp.zeros((b, s, 2), jnp.int32)
    return Queue(jax.tree.map(jnp.copy, encoder), jnp.zeros((b, s, e), jnp.float32), ints[:, :, 0], ints)


def push(queue: Queue, z: jax.Array, ids: dict[str, jax.Array], step: jax.Array) -> Queue:
    """Writes the keys z[b e] of a step over the oldest slot."""
    slot = step % queue.z.shape[1]

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new[:, None].astype(old.dtype), slot, axis=1)

    key_and_anchor = ids["text"][:, ::-1]
    return Queue(queue.encoder, write(queue.z, z), write(queue.doc, ids["doc"]), write(queue.text, key_and_anchor))


def keys(config: ConfigDict, queue: Queue, step: jax.Array) -> Keys:
    """The keys of a step, its own included. Slots not yet written are not valid."""
    b, s, _ = queue.z.shape
    slot = jnp.arange(s, dtype=jnp.int32)
    row = jnp.where(slot == step % s, jnp.arange(b, dtype=jnp.int32)[:, None], -1)
    valid = jnp.broadcast_to(slot <= step, (b, s))
    doc = queue.doc if config.mask_same_document else None
    return Keys(queue.z, Ids(row, valid, doc, queue.text if config.mask_duplicates else None))


def follow(config: ConfigDict, queue: Queue, encoder: Params) -> Queue:
    """Moves the momentum encoder towards the encoder: m ← momentum · m + (1 - momentum) · encoder (equation 2)."""
    mu = config.momentum
    return queue._replace(encoder=jax.tree.map(lambda m, p: mu * m + (1 - mu) * p, queue.encoder, encoder))
