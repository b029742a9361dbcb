"""Batches of rows for the encoder."""

import functools

import numpy as np

from contrastive_jax.inference import batching


def test_rows_of_any_length_keep_their_order() -> None:
    shapes = set()

    def forward(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shapes.add(tokens.shape)
        return np.stack([(tokens * mask).sum(1), mask.sum(1)], axis=1).astype(np.float32)

    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 9, size).tolist() for size in rng.integers(1, 200, 3000)]
    z = batching.embed_ragged(forward, rows, 199)
    np.testing.assert_array_equal(z, [[sum(row), len(row)] for row in rows])
    assert len(shapes) <= len({int(np.searchsorted(batching.LENGTHS, len(row))) for row in rows})
    assert len({length for _, length in shapes}) == len(shapes)  # one shape a length
    assert max(length for _, length in shapes) == 199
    assert batching.embed_ragged(forward, [], 199).shape[0] == 0


def test_embedding_in_blocks_changes_nothing() -> None:
    shapes = set()

    def encode(params: float, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shapes.add(tokens.shape)
        return params * (tokens * mask).sum(1, keepdims=True).astype(np.float32)

    tokens = np.arange(7 * 3).reshape(7, 3)
    z = batching.embed(functools.partial(encode, 2.0), tokens, tokens > 4, batch_size=3)
    np.testing.assert_array_equal(z, encode(2.0, tokens, tokens > 4))
    assert shapes == {(3, 3), (7, 3)}
