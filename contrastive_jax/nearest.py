"""Exact nearest neighbours on all devices: a block of keys is spread over them, each finds its best, the best are merged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from contrastive_jax import sharding


@functools.partial(jax.jit, static_argnums=(0,))
def best(
    mesh: Mesh, scores: jax.Array, places: jax.Array, queries: jax.Array, block: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Merges the best of block[m e], whose first `count` rows are keys, into scores and places [q k]."""
    k, axes = scores.shape[1], sharding.BATCH[0]

    def local(queries: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        place = jax.lax.axis_index(axes) * len(block) + jnp.arange(len(block), dtype=jnp.int32)
        found = jnp.einsum("qe,me->qm", queries, block, precision=jax.lax.Precision.HIGHEST)
        found = jnp.where(place < count, found, -jnp.inf)
        top, index = jax.lax.top_k(found, min(k, len(block)))
        return top, place[index]

    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(axes)), out_specs=(P(None, axes), P(None, axes)))
    found, where = spread(queries, block)
    found, where = jnp.concatenate([scores, found], axis=1), jnp.concatenate([places, where], axis=1)
    top, index = jax.lax.top_k(found, k)
    return top, jnp.take_along_axis(where, index, axis=1)


def merge(
    scores: np.ndarray, places: np.ndarray, queries: np.ndarray, block: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Takes a block of keys in: see `evals.retrieval.search`, of which this is the `merge`.

    Places are int64 on the host and int32 within a block: what was there before is numbered below 0.
    """
    mesh = sharding.make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
    count, k = len(block), scores.shape[1]
    total = max(-(-count // mesh.size), 1) * mesh.size
    # Blocks of one shape but for the last: few compilations.
    padded = np.pad(block, [(0, total - count), (0, 0)])
    before = np.broadcast_to(np.arange(-k, 0, dtype=np.int32), scores.shape)
    top, where = map(np.asarray, best(mesh, scores, before, queries, padded, np.int32(count)))
    old = np.take_along_axis(places, np.clip(where + k, 0, k - 1), axis=1)
    return top, np.where(where < 0, old, where.astype(np.int64) + first)
