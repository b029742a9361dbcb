"""The rows of a batch as the encoder takes them.

Dimensions: g groups of pairs that share rows, v views, r rows of a group per view, l tokens of a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_jax.data.batch import Batch


class Rows(NamedTuple):
    """Token rows with their numbers.

    Attributes:
      tokens: int32[g v r l].
      segment: int32[g v r l], see `Batch`.
      row: int32[g v r], the index of each row in the global batch. Dropout depends on it, so that a row has the same dropout
        mask on any mesh and in any micro-batch.
    """

    tokens: jax.Array
    segment: jax.Array
    row: jax.Array

    def views(self, first: int, last: int | None) -> "Rows":
        """Returns the rows of views `first` to `last` (exclusive; None: all that follow)."""
        return jax.tree.map(lambda x: x[:, first:last], self)


def rows_of_batch(batch: Batch) -> Rows:
    """Returns all rows of a global batch, numbered in order."""
    shape = batch.tokens.shape[:-1]
    count = batch.tokens.size // batch.tokens.shape[-1]
    return Rows(batch.tokens, batch.segment, jnp.arange(count, dtype=jnp.int32).reshape(shape))
