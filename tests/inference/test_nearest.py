"""Exact search over blocks equals a sort of all scores."""

import numpy as np
import pytest

from contrastive_jax.inference import nearest


@pytest.mark.parametrize(("keys", "block"), [(100, 33), (5, 3), (64, 64)])
def test_blocks_are_searched_as_one(keys: int, block: int) -> None:
    rng = np.random.default_rng(keys)
    z, queries = rng.integers(-3, 4, (keys, 4)).astype(np.float32), rng.integers(-3, 4, (7, 4)).astype(np.float32)  # many ties
    scores, indices = nearest.search(queries, (z[i : i + block] for i in range(0, keys, block)), 10)
    products = queries @ z.T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :10]
    found = min(10, keys)
    np.testing.assert_array_equal(indices[:, :found], expected)
    np.testing.assert_array_equal(scores[:, :found], np.take_along_axis(products, expected, axis=1))
    assert (indices[:, found:] == -1).all() and np.isneginf(scores[:, found:]).all()
