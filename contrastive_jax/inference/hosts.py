"""Work on texts that the processes of a run do together: each tokenizes its part of the texts, and all get all rows.

The rows then go through one forward pass over the devices of all processes, as if there were one process: the results are the
same. Arrays travel between hosts through their devices, a bounded piece at a time.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from contrastive_jax.inference.tokenize import Tokenize, TokenizedTexts

PIECE = 2**23  # numbers that a device holds at once, of all processes together


def tokenize_together(tokenize: Tokenize, texts: Sequence[str], view: str) -> TokenizedTexts:
    """Returns tokenize(texts, view); with several processes, all of which must call this, each tokenizes a part."""
    processes = jax.process_count()
    if processes == 1:
        return tokenize(texts, view)
    part = -(-len(texts) // processes)  # texts per process; the last processes may have fewer, or none
    start = jax.process_index() * part
    own = tokenize(texts[start : start + part], view)
    sizes = np.full((part, 2), -1, np.int32)
    sizes[: len(own.rows), 0] = [len(row) for row in own.rows]
    sizes[: len(own.rows), 1] = own.truncated
    all_sizes = gather(sizes)
    length = np.maximum(all_sizes[..., 0], 0).sum(1)  # ids of each process
    flat = np.zeros(length.max(), np.int32)
    flat[: length[jax.process_index()]] = [token for row in own.rows for token in row]
    rows: list[list[int]] = []
    truncated: list[bool] = []
    for ids, of_process in zip(gather(flat), all_sizes, strict=True):
        kept = of_process[of_process[:, 0] >= 0]
        ends = np.cumsum(kept[:, 0])
        rows += [ids[end - size : end].tolist() for end, size in zip(ends, kept[:, 0], strict=True)]
        truncated += kept[:, 1].astype(bool).tolist()
    return TokenizedTexts(rows, truncated)


def gather(array: np.ndarray) -> np.ndarray:
    """Returns the arrays [n ...] of all processes, [processes n ...]; every process must call it with the same shape."""
    step = max(PIECE // (jax.process_count() * max(array[:1].size, 1)), 1)
    pieces = [multihost_utils.process_allgather(array[i : i + step]) for i in range(0, max(len(array), 1), step)]
    return np.concatenate([np.asarray(piece) for piece in pieces], axis=1)
