"""MoCo's queue: keys of past batches as negatives (MoCo; CERT applies it to text).

A key is the embedding of a positive by the momentum encoder. The queue is [b s e]: s slots, each with the keys of a whole
batch, sharded over devices along b as the batch is. A step writes its keys over the oldest slot before it computes
similarities, so that the s · b keys include those of its own batch and the first step has negatives too; slots not yet written
are masked.

References:
  He et al., Momentum Contrast for Unsupervised Visual Representation Learning, https://arxiv.org/abs/1911.05722
  Fang et al., CERT: Contrastive Self-supervised Learning for Language Understanding, https://arxiv.org/abs/2005.12766

Dimensions: b pairs, s slots, e embedding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.objectives.objective import Keys, PairIds
from contrastive_jax.objectives.tiles import MaskIds


class Queue(NamedTuple):
    """Keys of the last s steps.

    Attributes:
      z: float32[b s e], unit vectors.
      document: int32[b s], their documents.
      span_hash: int32[b s 2], hashes of the key and of its anchor.
    """

    z: jax.Array
    document: jax.Array
    span_hash: jax.Array


def empty_queue(b: int, s: int, e: int) -> Queue:
    """Returns a queue of s empty slots; `queue_keys` treats slots that were not written yet as not valid."""
    ints = jnp.zeros((b, s, 2), jnp.int32)
    return Queue(jnp.zeros((b, s, e), jnp.float32), ints[:, :, 0], ints)


def push(queue: Queue, z: jax.Array, ids: PairIds, step: jax.Array) -> Queue:
    """Returns the queue with its oldest slot replaced by a step's keys and their ids.

    Args:
      queue: before the step.
      z: float32[b e], the embeddings of the batch's positives.
      ids: of the batch; the queue keeps them to mask keys that share a document or a span with an anchor.
      step: int32[], from 0. Each step pushes once, so that slot step % s is the oldest.
    """
    slot = step % queue.z.shape[1]

    def write(array: jax.Array, of_batch: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, of_batch[:, None].astype(array.dtype), slot, axis=1)

    key_and_anchor = ids.span_hash[:, ::-1]  # a batch has the anchor's hash first, the queue the key's own
    return Queue(write(queue.z, z), write(queue.document, ids.document), write(queue.span_hash, key_and_anchor))


def queue_keys(config: ConfigDict, queue: Queue, step: jax.Array) -> Keys:
    """Returns the keys of step `step`, those of its own batch included.

    Args:
      config: `config.objective`.
      queue: after `push`.
      step: int32[].
    """
    b, s, _ = queue.z.shape
    slot = jnp.arange(s, dtype=jnp.int32)
    row = jnp.where(slot == step % s, jnp.arange(b, dtype=jnp.int32)[:, None], -1)
    valid = (queue.z != 0).any(-1)  # a step that was skipped has left its slot as it was, at first empty
    # Documents of sources without in-batch negatives, below -1, are compared all the same; -1 equals nothing.
    document = queue.document if config.mask_same_document else jnp.where(queue.document < -1, queue.document, -1)
    return Keys(queue.z, MaskIds(row, valid, document, queue.span_hash if config.mask_duplicates else None))
