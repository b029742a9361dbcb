"""From raw documents to batches of token spans. Nothing in this subpackage imports jax."""

import numpy as np

# Version of the format on disk. Increment it when this code can no longer read the datasets of the version before.
FORMAT = 3
MAX_DOMAINS = 1 << 16  # their numbers are stored in 16 bits


def token_type(vocab_size: int) -> np.dtype:
    """Returns the type in which a record stores its token ids: raw bytes, which readers copy and need not parse."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
