"""Exact nearest neighbours on all devices: each device scores its part of a block of keys, and the best of all are merged.

Dimensions: q queries, k neighbours kept per query, m keys of a block, e embedding.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from contrastive_jax.runtime import sharding


def search(queries: np.ndarray, blocks: Iterable[np.ndarray], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the nearest keys of each query, exactly; only one block of keys is in memory at a time.

    Args:
      queries: float32[q e].
      blocks: of keys, float32[m e] each.
      depth: k, how many to find per query.

    Returns:
      scores float32[q k], inner products in descending order, and indices int64[q k] of keys, counted over all blocks. Where
      there are fewer than k keys, -inf and -1. Of equal scores the earlier key comes first.
    """
    scores = np.full((len(queries), depth), -np.inf, np.float32)
    indices = np.full((len(queries), depth), -1, np.int64)
    first = 0
    for block in blocks:
        scores, indices = merge_block(scores, indices, queries, block, first)
        first += len(block)
    return scores, indices


def merge_block(
    scores: np.ndarray, indices: np.ndarray, queries: np.ndarray, block: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merges a block of keys into the best so far.

    Args:
      scores: float32[q k], the best so far.
      indices: int64[q k], their keys.
      queries: float32[q e].
      block: float32[m e].
      first: index of the block's first key.

    Returns:
      The new scores and indices.
    """
    mesh = sharding.all_devices_mesh()
    count, k = len(block), scores.shape[1]
    total = max(-(-count // mesh.size), 1) * mesh.size
    # All blocks but the last have one shape: few compilations.
    padded = sharding.to_global(np.pad(block, [(0, total - count), (0, 0)]), np.arange(total), total, mesh)
    # Earlier results enter as ids -k..-1, so that ids within a block fit int32; they are mapped back to int64 below.
    earlier = np.broadcast_to(np.arange(-k, 0, dtype=np.int32), scores.shape)
    top, ids = map(np.asarray, best(mesh, scores, earlier, np.asarray(queries), padded, np.int32(count)))
    kept = np.take_along_axis(indices, np.clip(ids + k, 0, k - 1), axis=1)
    return top, np.where(ids < 0, kept, ids.astype(np.int64) + first)


@functools.partial(jax.jit, static_argnums=(0,))
def best(
    mesh: Mesh, scores: jax.Array, ids: jax.Array, queries: jax.Array, block: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Merges the best keys of block[m e], whose first `count` rows are keys, into scores[q k] and ids int32[q k]."""
    k, axes = scores.shape[1], sharding.BATCH_AXES

    def score_shard(queries: jax.Array, shard: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = jax.lax.axis_index(axes) * len(shard) + jnp.arange(len(shard), dtype=jnp.int32)
        products = jnp.einsum("qe,me->qm", queries, shard, precision=jax.lax.Precision.HIGHEST)
        products = jnp.where(index < count, products, -jnp.inf)
        top, position = jax.lax.top_k(products, min(k, len(shard)))
        return top, index[position]

    score = jax.shard_map(score_shard, mesh=mesh, in_specs=(P(), P(axes)), out_specs=(P(None, axes), P(None, axes)))
    new_scores, new_ids = score(queries, block)
    new_scores, new_ids = jnp.concatenate([scores, new_scores], axis=1), jnp.concatenate([ids, new_ids], axis=1)
    top, position = jax.lax.top_k(new_scores, k)
    found = top, jnp.take_along_axis(new_ids, position, axis=1)
    return jax.lax.with_sharding_constraint(found, sharding.replicated(mesh))
