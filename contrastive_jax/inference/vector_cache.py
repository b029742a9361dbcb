"""Vectors that were made before: a SQLite file with one row per text, found by a hash of model and text."""

import contextlib
import hashlib
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

KEYS_PER_QUERY = 512  # SQLite takes at least 999

Encode = Callable[[Sequence[str]], np.ndarray]  # n texts → float32[n e]


def cached(path: pathlib.Path, model: str, encode: Encode) -> Encode:
    """Returns a function like `encode` that keeps its vectors in a file and encodes only texts that have none there yet.

    Args:
      path: the SQLite file; it and its folder are made where they do not exist.
      model: all that decides a vector beside its text.
      encode: encodes texts; each text is passed to it once.
    """

    def encode_cached(texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return encode(texts)
        keys = [hashlib.sha256(f"{model}\0{text}".encode("utf-8", "surrogatepass")).digest() for text in texts]
        text_of = dict(zip(keys, texts, strict=True))
        with open_cache(path) as file:
            vectors = read_vectors(file, list(text_of))
        missing = [key for key in text_of if key not in vectors]
        logging.info("%d of %d texts have vectors in %s", len(text_of) - len(missing), len(text_of), path)
        if missing:
            z = encode([text_of[key] for key in missing]).astype(np.float32)
            rows = [(key, vector.tobytes()) for key, vector in zip(missing, z, strict=True)]
            with open_cache(path) as file:
                file.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
            vectors.update(rows)
        return np.stack([np.frombuffer(vectors[key], np.float32) for key in keys])

    return encode_cached


@contextlib.contextmanager
def open_cache(path: pathlib.Path) -> Iterator[sqlite3.Connection]:
    """Opens the file, which is made if need be; at the end what was written is committed, and the file closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as file, file:
        file.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        yield file


def read_vectors(file: sqlite3.Connection, keys: list[bytes]) -> dict[bytes, bytes]:
    """Returns the vectors, as bytes, of those keys that are in the file."""
    vectors: dict[bytes, bytes] = {}
    for start in range(0, len(keys), KEYS_PER_QUERY):
        part = keys[start : start + KEYS_PER_QUERY]
        marks = ",".join("?" * len(part))
        vectors.update(file.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", part))
    return vectors
