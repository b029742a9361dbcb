"""Rows of tokens to embeddings, in blocks of few shapes, so that little compiles and nothing twice."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

Forward = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Lengths to which rows are padded (a twelfth of them wasted; each is compiled for once).
LENGTHS = tuple(sorted({step * quarter // 4 for step in (16 << i for i in range(10)) for quarter in (4, 5, 6, 7)}))
PROGRESS_SECONDS = 5


def embed(forward: Forward, tokens: np.ndarray, mask: np.ndarray, batch_size: int) -> np.ndarray:
    """Embeds n rows of one length.

    Args:
      forward: (tokens[m l], mask[m l]) → float32[m e], m constant.
      tokens: int32[n l].
      mask: bool[n l].
      batch_size: m.

    Returns:
      float32[n e], unit vectors.
    """
    blocks = []
    for start in range(0, len(tokens), batch_size):
        part, part_mask = tokens[start : start + batch_size], mask[start : start + batch_size]
        missing = batch_size - len(part)
        padding = [(0, missing), (0, 0)]
        z = forward(np.pad(part, padding), np.pad(part_mask, padding, constant_values=True))
        blocks.append(z[: len(part)])
    return np.concatenate(blocks)


def embed_ragged(
    forward: Forward, rows: Sequence[Sequence[int]], longest: int, batch_tokens: int = 2048, what: str = "texts"
) -> np.ndarray:
    """Embeds rows of any lengths: those of like length together, the longest first.

    Args:
      forward: (tokens[m l], mask[m l]) → float32[m e].
      rows: n rows of up to `longest` tokens.
      longest: as many as the model has positions for.
      batch_tokens: embedded at once, padding included.
      what: for the progress line.

    Returns:
      float32[n e], in the order of the rows.
    """
    sizes = np.array([len(row) for row in rows])
    lengths = [length for length in LENGTHS if length < longest] + [longest]  # a model may have positions for no more
    order = np.argsort(-sizes, kind="stable")
    began = told = time.monotonic()
    z: np.ndarray | None = None
    done = 0
    while done < len(rows):
        # As many as have room at the length of the longest that is left: only the very last batch is not full.
        length = lengths[np.searchsorted(lengths, sizes[order[done]])]
        batch = max(batch_tokens // length, 1)
        chosen = order[done : done + batch]
        tokens = np.zeros((len(chosen), length), np.int32)
        for place, index in enumerate(chosen):
            tokens[place, : sizes[index]] = rows[index]
        found = embed(forward, tokens, np.arange(length) < sizes[chosen, None], batch)
        z = np.empty((len(rows), found.shape[1]), np.float32) if z is None else z
        z[chosen] = found
        done += len(chosen)
        if time.monotonic() > told + PROGRESS_SECONDS:
            told = time.monotonic()
            logging.info("embedding %s: %d of %d, %.0f a second", what, done, len(rows), done / (told - began))
    return np.zeros((0, 1), np.float32) if z is None else z
