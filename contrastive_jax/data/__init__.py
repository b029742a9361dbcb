"""From raw text to batches of token spans; nothing here imports jax."""

import numpy as np

# Of a prepared dataset; raised when a reader of today could not read one of yesterday.
FORMAT = 2


def token_type(vocab_size: int) -> np.dtype:
    """The type of a record's tokens, which are raw bytes: copied, not parsed, by who reads them."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
