"""Vectors that were made before: a SQLite file, a row a text, by a hash of model and text."""

import contextlib
import hashlib
import pathlib
import sqlite3
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

LOOKUP = 512  # keys of a query; SQLite takes 999 at least


def cached(
    path: pathlib.Path, model: str, encode: Callable[[Sequence[str]], np.ndarray]
) -> Callable[[Sequence[str]], np.ndarray]:
    """`encode` of texts → float32[n e], that makes only the vectors that `path` does not hold yet, and each text's once.

    Args:
      path: the file, made if it is not there.
      model: all that decides a vector beside its text.
      encode: makes the others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def lookup(texts: Sequence[str]) -> np.ndarray:
        keys = [hashlib.sha256(f"{model}\0{text}".encode("utf-8", "surrogatepass")).digest() for text in texts]
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as file, file:  # closed, and committed
            file.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
            found: dict[bytes, bytes] = {}
            distinct = dict(zip(keys, texts, strict=True))
            wanted = list(distinct)
            for start in range(0, len(wanted), LOOKUP):
                part = wanted[start : start + LOOKUP]
                marks = ",".join("?" * len(part))
                found.update(file.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", part))
            missing = [key for key in wanted if key not in found]
            logging.info("%d of %d texts have vectors in %s", len(wanted) - len(missing), len(wanted), path)
        if missing:
            made = encode([distinct[key] for key in missing]).astype(np.float32)
            rows = [(key, vector.tobytes()) for key, vector in zip(missing, made, strict=True)]
            with contextlib.closing(sqlite3.connect(path, timeout=60)) as file, file:  # closed, and committed
                file.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
            found.update(rows)
        return np.stack([np.frombuffer(found[key], np.float32) for key in keys])

    return lookup
