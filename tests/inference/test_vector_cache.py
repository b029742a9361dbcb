"""Vectors that were made before."""

import pathlib

import numpy as np

from contrastive_jax.inference import vector_cache


def test_vectors_are_made_once(tmp_path: pathlib.Path) -> None:
    asked: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.array([[len(text), ord(text[0])] for text in texts], np.float32)

    path = tmp_path / "new" / "vectors.sqlite"
    texts = [f"{i % 7} {'x' * (i % 5)}" for i in range(2000)]
    z = vector_cache.cached(path, "model", encode)(texts)
    assert sorted(asked) == sorted(set(texts))
    asked.clear()
    np.testing.assert_array_equal(vector_cache.cached(path, "model", encode)(texts), z)
    assert not asked
    vector_cache.cached(path, "another", encode)(["0 x", "\ud800"])
    assert asked == ["0 x", "\ud800"]
    assert vector_cache.cached(path, "model", lambda texts: np.zeros((0, 2)))([]).shape == (0, 2)
