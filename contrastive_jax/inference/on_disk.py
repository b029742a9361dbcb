"""Texts and vectors in files, so that memory does not grow with their sizes: 24 bytes per text, and one block of vectors.

Dimensions: n texts, m rows of a block, e embedding.
"""

import array
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.data.raw import by_id
from contrastive_jax.files import listing
from contrastive_jax.inference.text_model import TextModel
from contrastive_jax.runtime.progress import Progress

BLOCK = 16384  # vectors in memory at once


def hash_text(text: str) -> int:
    """Returns a hash of 64 bits: among 100 million texts, the chance that any two differ and share it is one in 4,000."""
    return by_id.hash_of(text.encode(errors="replace"))


def loosely(text: str) -> str:
    """Returns what a text has in common with those that differ from it in white space and case alone."""
    return " ".join(text.split()).casefold()


class TextFile:
    """Texts in a new file; a text that is not there once only can be told by its hashes.

    Args:
      path: the file.

    Attributes:
      exact: hashes of the texts without white space at their ends, which is how an encoder takes them.
      loose: hashes of what `loosely` leaves of them.
    """

    def __init__(self, path: pathlib.Path):
        self._file, self._ends = path.open("w+b"), array.array("q", [0])
        self.exact, self.loose = array.array("Q"), array.array("Q")

    def __len__(self) -> int:
        return len(self.exact)

    def append(self, text: str) -> None:
        """Writes a text; a lone surrogate, which JSON can spell and UTF-8 cannot, becomes a question mark."""
        written = self._file.write(text.encode(errors="replace"))
        self._ends.append(self._ends[-1] + written)
        self.exact.append(hash_text(text.strip()))
        self.loose.append(hash_text(loosely(text)))

    def read(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Returns the texts of some rows, which are counted from 0."""
        self._file.flush()
        spans = [(self._ends[row], self._ends[row + 1]) for row in rows]
        return [os.pread(self._file.fileno(), end - start, start).decode() for start, end in spans]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def number(hashes: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers values in the order in which they first come.

    Args:
      hashes: uint64[n].

    Returns:
      The row int64[u] where each of the u different values comes first, ascending, and the number int64[n] of each value.
    """
    _, first, inverse = np.unique(np.asarray(hashes, np.uint64), return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


class VectorFile(NamedTuple):
    """Vectors [rows e] of a type, one after another from the byte `offset` of a file on."""

    path: epath.Path
    rows: int
    offset: int = 0
    dtype: np.dtype = np.dtype(np.float32)


def encode_to(path: pathlib.Path, model: TextModel, texts: TextFile, rows: np.ndarray, view: str) -> VectorFile:
    """Encodes some rows of texts, as "query" or as "document", into a new file."""
    what = "queries" if view == "query" else "documents"
    with path.open("wb") as file, Progress(f"encoding {what}", len(rows), "texts") as progress:
        for start in range(0, len(rows), BLOCK):
            z = model.encode(texts.read(rows[start : start + BLOCK]), view, progress)
            file.write(np.ascontiguousarray(z, np.float32).data)
    return VectorFile(epath.Path(path), len(rows))


def open_npy(pattern: str, dim: int) -> list[VectorFile]:
    """Returns the .npy files that match a glob, sorted by name; each has vectors float[rows e].

    Args:
      pattern: the value of --vectors; local, gs:// or s3://.
      dim: e.

    Raises:
      UserError: there is no such file, or one is no .npy of vectors that `encode` has written as float32 or float16.
    """
    found = []
    for name, size, _ in listing.list_files(pattern):
        path = epath.Path(name)
        with path.open("rb") as file:
            try:
                version = np.lib.format.read_magic(file)
                read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read_header(file)
            except ValueError as error:
                raise UserError(f"--vectors={pattern}: {name}: no .npy ({error}); give what encode has written") from error
            offset = file.tell()
        if len(shape) != 2 or shape[1] != dim or fortran or dtype.kind != "f":
            raise UserError(
                f"--vectors={pattern}: {name}: {dtype} {shape}; give float32 or float16 of the model's {dim} coordinates"
            )
        if size < offset + shape[0] * dim * dtype.itemsize:
            raise UserError(f"--vectors={pattern}: {name}: it is cut off; write it again")
        found.append(VectorFile(path, shape[0], offset, dtype))
    if not found:
        raise UserError(f"--vectors={pattern}: no file matches; give the .npy files that encode has written")
    return found


def read_vectors(file: VectorFile, dim: int, start: int, end: int) -> np.ndarray:
    """Returns the vectors float32[end - start, dim] of some rows; a memory map would stay in memory as long as it is open."""
    with file.path.open("rb") as stream:
        stream.seek(file.offset + start * dim * file.dtype.itemsize)
        data = stream.read((end - start) * dim * file.dtype.itemsize)
    return np.frombuffer(data, file.dtype).reshape(end - start, dim).astype(np.float32, copy=False)


def blocks(vector_files: Sequence[VectorFile], dim: int, kept: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the kept vectors of files, float32[m dim]; all blocks but the last have one shape, so that little is compiled.

    Args:
      vector_files: the files, with n vectors together.
      dim: the coordinates of each.
      kept: bool[n].
    """
    before, rest = 0, np.zeros((0, dim), np.float32)
    for file in vector_files:
        for start in range(0, file.rows, BLOCK):
            end = min(start + BLOCK, file.rows)
            rest = np.concatenate([rest, read_vectors(file, dim, start, end)[kept[before + start : before + end]]])
            if len(rest) >= BLOCK:
                yield rest[:BLOCK]
                rest = rest[BLOCK:]
        before += file.rows
    if len(rest):
        yield rest
