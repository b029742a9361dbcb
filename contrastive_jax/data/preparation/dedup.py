"""Finds equal documents by their hashes, a range of hashes at a time.

The stage "hash" writes a row per document, sorted by key: the first 16 bytes of the SHA-256 of the text. A partition is a range
of keys over all pieces of the input: it fits into memory, and equal documents are always in one partition. Of equal documents
one is kept: one of the validation split before those of train (so that scores on validation stay honest), then the first.
"""

from typing import NamedTuple

import numpy as np

from contrastive_jax.data.preparation import engine
from contrastive_jax.data.preparation.engine import Outcome
from contrastive_jax.data.preparation.work import WORK, Work

# `place` is the number of the document within its piece, from 0, rejected lines included.
ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("piece", "<u4"), ("place", "<u4")])
TRAIN_FLAG = np.uint32(1 << 31)  # in `piece`: the document is not of the validation split
BUCKETS = 1024  # of keys, in the files of rows: a partition is a run of them
ROW_MEMORY = 120  # bytes of memory per row while a partition is worked on
DUPLICATE = "duplicate"


class Partition(NamedTuple):
    """A task: the buckets `first` to `end` - 1 of keys; `partitions` and `pieces` say how many there are of each."""

    number: int
    partitions: int
    first: int
    end: int
    pieces: int


def rows_file(piece: int) -> str:
    """Returns the name of the file of rows of a piece."""
    return f"{WORK}/rows/{piece:05d}"


def bucket_sizes(keys: np.ndarray) -> np.ndarray:
    """Returns how many keys, uint64 [n], lie in each bucket: int64 [BUCKETS]."""
    return np.bincount((keys // np.uint64(2**64 // BUCKETS)).astype(np.int64), minlength=BUCKETS)


def write_rows(work: Work, piece: int, keys: bytes, places: np.ndarray, is_train: np.ndarray) -> None:
    """Writes the rows of a piece.

    Args:
      work: the folder.
      piece: the number of the piece.
      keys: 16 bytes per document.
      places: [n], the place of each document.
      is_train: bool[n], whether it belongs to the train split.
    """
    rows = np.empty(len(places), ROW)
    key = np.frombuffer(keys, ">u8").reshape(-1, 2)
    rows["high"], rows["low"], rows["place"] = key[:, 0], key[:, 1], places
    rows["piece"] = np.uint32(piece) | np.where(is_train, TRAIN_FLAG, np.uint32(0))
    rows = rows[np.lexsort((places, rows["low"], rows["high"]))]
    work.write_groups(rows_file(piece), rows, bucket_sizes(rows["high"]))


def partitions(rows: int, pieces: int, memory: int) -> list[Partition]:
    """Returns the partitions of so many rows, each of which needs at most `memory` bytes, if that is possible."""
    count = min(BUCKETS, max(1, -(-rows * ROW_MEMORY // memory)))
    bounds = [BUCKETS * number // count for number in range(count + 1)]
    return [Partition(number, count, bounds[number], bounds[number + 1], pieces) for number in range(count)]


def drop_duplicates(root: str, partition: Partition, plan_id: str = "") -> Outcome:
    """Finds the duplicates of a partition: a task. It writes their places, grouped by piece; see `stages.dropped_places`."""
    work = Work(root, plan_id=plan_id)
    of_pieces = [work.read_groups(rows_file(piece), partition.first, partition.end, ROW) for piece in range(partition.pieces)]
    rows = np.concatenate(of_pieces)
    del of_pieces
    # The flag of train in `piece` sorts validation before train; then by piece and place.
    order = np.lexsort((rows["place"], rows["piece"], rows["low"], rows["high"]))
    high, low = rows["high"][order], rows["low"][order]
    repeats = order[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]
    piece, place = rows["piece"][repeats] & ~TRAIN_FLAG, rows["place"][repeats]
    by_piece = np.lexsort((place, piece))
    sizes = np.bincount(piece, minlength=partition.pieces)
    name = f"{WORK}/dropped/{DUPLICATE}-{partition.number:05d}-of-{partition.partitions:05d}"
    work.write_groups(name, place[by_piece].astype("<u4"), sizes)
    engine.advance(len(rows))
    return work.write_outcome(f"dedup{partition.partitions}", partition.number, {"rows": len(rows), "dropped": name})
