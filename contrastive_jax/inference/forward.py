"""The encoder's forward pass on host arrays, spread over all devices.

Dimensions: n rows, l tokens, e embedding, s shards of the rows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from contrastive_jax.runtime import sharding

# (params of the encoder, tokens int32[n l], mask bool[n l]) → unit vectors float32[n e] on the host
Forward = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]

# Bytes of embeddings that a device holds for other devices, on their way to the hosts of several processes.
PIECE_BYTES = 32 * 2**20


def compile_forward(apply: Callable[..., jax.Array], mesh: Mesh) -> jax.stages.Wrapped:
    """Jits an encoder: (params, {"tokens": int32[n l], "mask": bool[n l]}) → float32[n e], sharded as the rows are."""

    def forward(params: Any, rows: dict[str, jax.Array]) -> jax.Array:
        return apply(params, rows["tokens"], rows["mask"])

    return jax.jit(forward, out_shardings=NamedSharding(mesh, sharding.BATCH))


def make_forward(apply: Callable[..., jax.Array], mesh: Mesh) -> Forward:
    """Makes the forward pass for rows that every process holds in full; every process must call it, and gets all vectors.

    On the devices the vectors stay sharded.

    Args:
      apply: (params, tokens int32[n l], mask bool[n l]) → float32[n e], as `models.encoder.Encoder.apply`.
      mesh: the mesh; rows are repeated up to a multiple of its batch shards, and the repeats are dropped from the result.
    """
    compiled = compile_forward(apply, mesh)
    shards = sharding.batch_shards(mesh)

    def forward(params: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        n = len(tokens)
        total = -(-n // shards) * shards
        rows = {"tokens": np.resize(tokens, (total, *tokens.shape[1:])), "mask": np.resize(mask, (total, *mask.shape[1:]))}
        return to_host(compiled(params, sharding.to_global(rows, np.arange(total), total, mesh)), mesh)[:n]

    return forward


def to_host(z: jax.Array, mesh: Mesh) -> np.ndarray:
    """Copies embeddings [n ...], sharded by rows, to the host of every process, PIECE_BYTES at a time between processes."""
    if z.is_fully_addressable:
        return np.asarray(jax.device_get(z))
    shards, shape = sharding.batch_shards(mesh), z.shape[1:]
    per_shard = len(z) // shards
    size = min(max(PIECE_BYTES // (shards * math.prod(shape) * z.dtype.itemsize), 1), per_shard)
    result = np.empty((shards, per_shard, *shape), z.dtype)
    for start in range(0, per_shard, size):
        first = min(start, per_shard - size)  # pieces have one size; the last may overlap the one before it
        piece = replicate_piece(mesh, size, z, np.int32(first))
        result[:, first : first + size] = jax.device_get(piece.addressable_data(0))
    return result.reshape(-1, *shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def replicate_piece(mesh: Mesh, size: int, z: jax.Array, first: jax.Array) -> jax.Array:
    """Returns `size` rows of each shard of z[n ...], from row `first` of the shard on, on every device: [s size ...]."""
    by_shard = z.reshape(sharding.batch_shards(mesh), -1, *z.shape[1:])
    by_shard = jax.lax.with_sharding_constraint(by_shard, NamedSharding(mesh, sharding.BATCH))
    piece = jax.lax.dynamic_slice_in_dim(by_shard, first, size, axis=1)
    return jax.lax.with_sharding_constraint(piece, NamedSharding(mesh, P()))
