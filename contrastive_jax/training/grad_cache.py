"""Gradient caching: the embeddings of a batch whose activations do not fit into memory, computed in micro-batches.

Use it where a batch is too large: the loss is that of the whole batch, at the price of one more forward pass. Where the batch
fits, direct encoding is faster. In the way of Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup, arXiv 2101.06983: a first pass keeps the embeddings alone, the loss sees all of them, and a second pass recomputes the
activations of each micro-batch with the gradient of its embeddings at hand. In JAX that is a checkpointed function under
`lax.map`; whatever else the encoder returns per row (a token loss, say) is cached alike. The result equals the direct one,
dropout included: its masks depend on the number of a row, not on its position in the micro-batch.

Dimensions: b rows of the global batch, m rows of a micro-batch; a row may be a group of pairs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = Any


def cached(
    encode: Callable[[Tree, Tree], Tree], micro_batch: int, mesh: Mesh | None = None, axes: tuple[str, ...] = ()
) -> Callable[[Tree, Tree], Tree]:
    """Wraps an encoder so that it runs in micro-batches.

    Args:
      encode: (params, arrays [m ...]) → arrays [m ...], row by row. Nothing may depend on a row's position in the micro-batch.
      micro_batch: m, the most rows encoded at once over all devices. All micro-batches have one size; if the batch does not
        divide by their number, the last one is padded with zeros.
      mesh: the mesh; None: one device.
      axes: the mesh axes over which rows are spread: each micro-batch stays spread over all of them.

    Returns:
      (params, arrays [b ...]) → arrays [b ...], equal to `encode` in value and gradient.

    Raises:
      ValueError: a micro-batch does not divide over the devices.
    """
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
    if micro_batch < 1 or micro_batch % shards:
        raise ValueError(f"a micro-batch of {micro_batch} rows must be a positive multiple of the {shards} shards of the batch")
    per_shard = micro_batch // shards

    def constrain(x: jax.Array, *spec: Any) -> jax.Array:
        return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def wrapped(params: Tree, batch: Tree) -> Tree:
        b = len(jax.tree.leaves(batch)[0])
        local = b // shards
        count = -(-local // per_shard)
        size = -(-local // count)  # of a device: even micro-batches, as many as there would be of `micro_batch` rows

        def split(x: jax.Array) -> jax.Array:
            """[b ...] → [count m ...]: every device cuts its own rows, so that none moves."""
            x = constrain(x.reshape(shards, local, *x.shape[1:]), axes)
            x = jnp.pad(x, [(0, 0), (0, count * size - local)] + [(0, 0)] * (x.ndim - 2))
            x = x.reshape(shards, count, size, *x.shape[2:]).swapaxes(0, 1)
            return constrain(x.reshape(count, shards * size, *x.shape[3:]), None, axes)

        def join(x: jax.Array) -> jax.Array:
            """[count m ...] → [b ...], without the padding."""
            x = x.reshape(count, shards, size, *x.shape[2:]).swapaxes(0, 1)
            x = x.reshape(shards, count * size, *x.shape[3:])[:, :local]
            return constrain(x.reshape(b, *x.shape[2:]), axes)

        recomputed = jax.checkpoint(lambda part: encode(params, part))
        return jax.tree.map(join, jax.lax.map(recomputed, jax.tree.map(split, batch)))

    return wrapped
