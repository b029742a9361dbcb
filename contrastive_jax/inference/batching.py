"""Rows of token ids to embeddings, in batches of few shapes, so that little is compiled and nothing twice.

Dimensions: n rows, m rows of a batch, l tokens of a row, e embedding.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Forward = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Lengths to which rows are padded, four per doubling. A twelfth of the tokens is padding; each length is compiled for once.
LENGTHS = tuple(sorted({step * quarter // 4 for step in (16 << i for i in range(17)) for quarter in (4, 5, 6, 7)}))


class Limits(NamedTuple):
    """The sizes of batches.

    Attributes:
      tokens: the most tokens of a batch, padding included.
      rows: the most rows of a batch: each has a vector in memory, however short it is.
      least_tokens: a batch of few rows has a quarter of the tokens, or a quarter of that, and so on, but no fewer than this. If
        it equals `tokens`, all batches of rows of one length have one shape.
    """

    tokens: int = 2048
    rows: int = 2048
    least_tokens: int = 2048

    def times(self, factor: int) -> "Limits":
        """Returns limits that are `factor` times as high."""
        return Limits(*(factor * value for value in self))

    def batch_size(self, length: int, remaining: int) -> int:
        """Returns the rows of the next batch of rows of `length` tokens, of which so many remain; the batch is filled up."""
        size = max(min(self.tokens // length, self.rows), 1)
        while size // 4 >= max(remaining, self.least_tokens // length, 1):
            size //= 4
        return size


LIMITS = Limits()


def device_limits(platform: str) -> Limits:
    """Returns the batches that suit one device: on CPU as many tokens as stay in its caches.

    Elsewhere a batch of few rows may be small, because its vectors travel to the hosts of all processes.

    Args:
      platform: "cpu", "gpu", "cuda" or "tpu".
    """
    return LIMITS if platform == "cpu" else Limits(tokens=65_536, rows=1024, least_tokens=256)


def embed(forward: Forward, tokens: np.ndarray, mask: np.ndarray, batch_size: int) -> np.ndarray:
    """Embeds rows of one length.

    Args:
      forward: (tokens[m l], mask[m l]) → float32[m e]; it is always called with m = batch_size.
      tokens: int32[n l].
      mask: bool[n l], False on padding.
      batch_size: m; the last batch is filled up with rows that are dropped again.

    Returns:
      float32[n e], unit vectors.
    """
    blocks = []
    for start in range(0, len(tokens), batch_size):
        block, block_mask = tokens[start : start + batch_size], mask[start : start + batch_size]
        missing = batch_size - len(block)
        padding = [(0, missing), (0, 0)]
        z = forward(np.pad(block, padding), np.pad(block_mask, padding, constant_values=True))
        blocks.append(z[: len(block)])
    return np.concatenate(blocks)


def embed_ragged(
    forward: Forward,
    rows: Sequence[Sequence[int]],
    max_tokens: int,
    limits: Limits = LIMITS,
    advance: Callable[[int], None] = lambda count: None,
    min_tokens: int = 0,
) -> np.ndarray:
    """Embeds rows of any lengths, those of similar length together, the longest first.

    Args:
      forward: (tokens[m l], mask[m l]) → float32[m e].
      rows: n rows of up to `max_tokens` tokens.
      max_tokens: no row is padded to more, since a model may have no positions beyond.
      limits: the sizes of batches.
      advance: is told after each batch how many more rows are done.
      min_tokens: no row is padded to less, for an encoder that would pad it anyway.

    Returns:
      float32[n e] in the order of the rows; float32[0 1] where there are none.
    """
    sizes = np.array([len(row) for row in rows])
    lengths = [length for length in LENGTHS if min_tokens <= length < max_tokens] + [max_tokens]
    order = np.argsort(-sizes, kind="stable")
    z = np.zeros((0, 1), np.float32)
    done = 0
    while done < len(rows):
        # The longest row that is left decides the length, and by it how many rows fit.
        length = lengths[np.searchsorted(lengths, sizes[order[done]])]
        batch_size = limits.batch_size(length, len(rows) - done)
        chosen = order[done : done + batch_size]
        tokens = np.zeros((len(chosen), length), np.int32)
        for number, index in enumerate(chosen):
            tokens[number, : sizes[index]] = rows[index]
        embedded = embed(forward, tokens, np.arange(length) < sizes[chosen, None], batch_size)
        if not done:
            z = np.empty((len(rows), embedded.shape[1]), np.float32)
        z[chosen] = embedded
        done += len(chosen)
        advance(len(chosen))
    return z
