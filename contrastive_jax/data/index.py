"""The index of a split: which file shards it has, which chunks these have, and how many tokens each record has.

All but the tokens of each record is in memory; these are read in pieces, from the disk or the bucket.

Dimensions: c chunks, s file shards.
"""

import concurrent.futures
import io
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.data import store
from contrastive_jax.files import bounded, listing, transfer

# The length column is read in pieces of so many chunks, a few at once: 2 · 16 MB each.
PIECE_CHUNKS = 1 << 16
PIECES_AT_ONCE = 4


class Split(NamedTuple):
    """One split of one prepared dataset: its index without the lengths.

    Attributes:
      root: the folder of the dataset.
      name: "train" or "validation".
      file_shards: their paths, as array_record can read them.
      chunk_size: uint8[c], the records of each chunk.
      chunk_domain: uint16[c], the domain of each chunk.
      shard_chunks: int64[s], the chunks of each file shard.
    """

    root: epath.Path
    name: str
    file_shards: list[str]
    chunk_size: np.ndarray
    chunk_domain: np.ndarray
    shard_chunks: np.ndarray


def open_index(root: epath.Path, manifest: dict[str, Any], name: str, cache_dir: str, cache_gb: float) -> Split:
    """Opens the index of a split of one prepared dataset.

    Args:
      root: the folder of the dataset.
      manifest: its manifest.
      name: "train" or "validation".
      cache_dir: `config.data.cache_dir`.
      cache_gb: `config.data.cache_gb`.

    Raises:
      UserError: there is no such split, a file of its index is missing, or its file shards are not those of the index.
    """
    if name not in manifest["splits"]:
        raise UserError(f"{root}: no split {name!r} among {', '.join(manifest['splits'])}")
    paths = {column: store.index_path(root, name, column) for column in store.COLUMNS}
    missing = [os.fspath(path) for path in paths.values() if not path.exists()]
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: missing, but manifest.json is there; copy the whole dataset, or prepare the data again"
        )
    chunk_size, chunk_domain, shard_chunks = (
        np.load(io.BytesIO(paths[column].read_bytes())) for column in ("chunk_size", "chunk_domain", "shard_chunks")
    )
    file_shards = find_file_shards(root, name, cache_dir, cache_gb)
    if len(file_shards) != len(shard_chunks):
        raise UserError(
            f"{root}: the index of {name} lists {len(shard_chunks)} file shards, but there are {len(file_shards)}; "
            "prepare the data again"
        )
    return Split(root, name, file_shards, chunk_size, chunk_domain, shard_chunks)


def find_file_shards(root: epath.Path, split: str, cache_dir: str, cache_gb: float) -> list[str]:
    """Returns the paths of the file shards of a split, as array_record can read them.

    array_record reads local files and gs://, where it tries a missing file again for minutes: only files that a listing has
    named are passed to it. It cannot read s3://, whose files are copied to this machine first, as those of any bucket are if
    there is a `cache_dir`.

    Args:
      root: the prepared dataset.
      split: "train" or "validation".
      cache_dir: `config.data.cache_dir`.
      cache_gb: `config.data.cache_gb`.

    Raises:
      UserError: there are none, the disk has no room for them, or `cache_gb` has no folder to limit.
    """
    pattern = f"pile/*/*-{split}.array_record-*"
    if cache_gb and not cache_dir and os.fspath(root).startswith("gs://"):
        raise UserError(
            f"config.data.cache_gb={cache_gb}: {root} is not copied to this machine without config.data.cache_dir; set it to a "
            "local folder, or leave config.data.cache_gb out"
        )
    if files.on_bucket(root) and (cache_dir or os.fspath(root).startswith("s3://")):
        if cache_gb:
            file_shards = bounded.bounded_copy(root, pattern, cache_dir, int(cache_gb * 1e9))
            if any(path.startswith("s3://") for path in file_shards):
                raise UserError(
                    f"config.data.cache_gb={cache_gb}: {root} does not fit, and records on s3:// are read from copies alone; "
                    "raise it"
                )
            return file_shards
        root = epath.Path(transfer.local_copy(root, [pattern], cache_dir))
    file_shards = [file.name for file in listing.files_below(root, pattern)]
    if not file_shards:
        raise UserError(f"{root}: no {pattern} there; prepare the data again")
    return file_shards


def length_reader(split: Split) -> Callable[[int, int], np.ndarray]:
    """Returns a function that reads a range of the length column: (first record, end) → the tokens of each record."""
    path = store.index_path(split.root, split.name, "length")
    remote = files.on_bucket(path)

    def read_bytes(begin: int, end: int) -> bytes:
        if remote:
            return transfer.bucket_client(path).cat_file(transfer.bucket_name(path), start=begin, end=end)
        with open(path, "rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    header = io.BytesIO(read_bytes(0, 1024))
    np.lib.format.read_magic(header)
    _, _, dtype = np.lib.format.read_array_header_1_0(header)
    first, size = header.tell(), dtype.itemsize
    return lambda begin, end: np.frombuffer(read_bytes(first + begin * size, first + end * size), dtype)


def length_pieces(split: Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the lengths of one split; see `Records.length_pieces`."""
    read, ends = length_reader(split), np.cumsum(split.chunk_size, dtype=np.int64)

    def read_piece(start: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = split.chunk_size[start : start + PIECE_CHUNKS]
        return sizes, read(int(ends[start] - sizes[0]), int(ends[start + len(sizes) - 1]))

    starts = range(0, len(ends), PIECE_CHUNKS)
    with concurrent.futures.ThreadPoolExecutor(PIECES_AT_ONCE) as pool:
        for i in range(0, len(starts), PIECES_AT_ONCE):  # no more at once: each piece takes memory until it is used
            yield from pool.map(read_piece, starts[i : i + PIECES_AT_ONCE])
