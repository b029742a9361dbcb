"""Embeddings of n-grams: word order for the price of a look-up.

Each n-gram of token ids is hashed to a row of a table, which is added to the embedding of the n-gram's last token: fastText
(Bojanowski et al., arXiv 1607.04606) and sent2vec (Pagliardini et al., arXiv 1703.02507) average such rows, the Over-Tokenized
Transformer (Huang et al., arXiv 2501.16975) puts them under its blocks. N-grams that share a row by chance share its vector.

Dimensions: n rows of the batch, l tokens per row, d width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from ml_collections import ConfigDict

from contrastive_jax.models.layers import parameter
from contrastive_jax.runtime.layout import Layout

FACTOR = np.uint32(0x9E3779B1)  # odd, and without a pattern in its bits: 2^32 divided by the golden ratio


class Ngrams(nnx.Module):
    """The tables of `config.ngrams`, (order, rows) pairs. They begin at 0: a run may add them to a model that has none."""

    def __init__(self, config: ConfigDict, layout: Layout, rngs: nnx.Rngs):
        self.sizes, self.layout = config.ngrams, layout
        for order, rows in config.ngrams:
            setattr(self, f"order_{order}", parameter(rngs, initializers.zeros, (rows, config.d_model), ("vocab", "embed")))

    def __call__(self, tokens: jax.Array, segment: jax.Array) -> jax.Array:
        """Returns the sum of the embeddings of the n-grams that end at each token, float32[n l d].

        Args:
          tokens: int32[n l].
          segment: int32[n l], the number of each token's span. No n-gram reaches from one span into another.
        """
        total = jnp.zeros(())
        for order, rows in self.sizes:
            table = self.layout.gather(getattr(self, f"order_{order}")[...], ("vocab", "embed"))
            found = table.at[ngram_rows(tokens, segment, order, rows)].get(mode="fill", fill_value=0)
            total = total + self.layout.rows(found)
        return total


def ngram_rows(tokens: jax.Array, segment: jax.Array, order: int, rows: int) -> jax.Array:
    """Hashes the n-gram that ends at each token to a row of a table.

    Args:
      tokens: int32[n l].
      segment: int32[n l], the number of each token's span, whose tokens are contiguous.
      order: how many tokens an n-gram has.
      rows: of the table.

    Returns:
      int32[n l], `rows` where the span has fewer than `order` tokens up to this one.
    """

    def shifted(x: jax.Array, by: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (by, 0)))[:, : x.shape[1]]

    hashed = jnp.zeros(tokens.shape, jnp.uint32)
    for back in reversed(range(order)):
        hashed = (hashed ^ shifted(tokens.astype(jnp.uint32), back)) * FACTOR
        hashed ^= hashed >> 15  # the low bits of a product know only the low bits of its factors
    begins_inside = segment == shifted(segment, order - 1)
    return jnp.where(begins_inside, (hashed % rows).astype(jnp.int32), rows)
