"""Rows of tokens to embeddings, in blocks of one shape so that nothing compiles twice."""

from collections.abc import Callable
from typing import Any

import numpy as np

Encode = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]


def embed(encode: Encode, params: Any, tokens: np.ndarray, mask: np.ndarray, batch_size: int) -> np.ndarray:
    """Embeds n rows.

    Args:
      encode: (params, tokens[m l], mask[m l]) → float32[m e], m constant.
      params: of the model.
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
        z = encode(params, np.pad(part, padding), np.pad(part_mask, padding, constant_values=True))
        blocks.append(z[: len(part)])
    return np.concatenate(blocks)
