"""Finds documents that are nearly equal: MinHash signatures, and locality-sensitive hashing to bring candidates together.

The similarity of two documents is the Jaccard similarity of their sets of word pairs: the share, of the pairs of either, that
both have. Changing 5, 10 or 20 % of the words of a text leaves a similarity of about 0.82, 0.68 or 0.47. The signature of a
document has, for each of many hash functions, the lowest hash of its word pairs; two signatures agree in a slot with a
probability equal to the similarity s (Broder 1997, "On the resemblance and containment of documents"). Slots are grouped in b
bands of r: two documents are candidates if they agree in all slots of a band, which happens with probability

    1 - (1 - s^r)^b                                            (the S-curve; Lee et al. 2021, arXiv 2107.06499, appendix A)

`band_shape` chooses r as large as `MAX_BANDS` bands allow if pairs at the threshold are to be found with probability 0.9:
b × r = 36 × 4 for 0.5, 29 × 5 for 0.6, 27 × 7 for 0.7, 33 × 12 for 0.8. Candidates are then compared by a sketch: one bit of
each of 64 further slots (Li and König 2010, "b-bit minwise hashing"), of which two documents share the part (1 + s) / 2.

The stage "hash" writes a row per document and band, sorted by the hash of the band. A partition is a range of these hashes and
fits into memory. In it, documents with an equal band are one group; of a group, a document that is similar to an earlier one is
dropped. "Earlier" is what it is for equal documents: validation before train, then the order of the input. So a document is
dropped if and only if an earlier one is found to be similar, whatever the partitions and the number of workers.
"""

import math
from typing import NamedTuple

import numpy as np
import rensa

from contrastive_jax.data.clean import ngrams
from contrastive_jax.data.preparation import dedup, engine
from contrastive_jax.data.preparation.dedup import TRAIN_FLAG, Partition
from contrastive_jax.data.preparation.engine import Outcome
from contrastive_jax.data.preparation.work import WORK, Work

NGRAM = 2  # words
MAX_BANDS = 36  # each of them costs a row per document
RECALL = 0.9  # of pairs whose similarity is the threshold, before the sketches are compared
SKETCH_BITS = 64
LEADERS = 8  # documents of a group that the others are compared with
ROW = np.dtype([("band", "<u8"), ("sketch", "<u8"), ("piece", "<u4"), ("place", "<u4")])
ROW_MEMORY = 100  # bytes of memory per row while a partition is worked on
_ROWS_PER_FILE = 1 << 20  # the rows of a piece are sorted and written so many at a time
_DOCUMENTS_PER_BATCH = 256
_SEED = 1
FOLDER = f"{WORK}/near_rows"
REASON = "near_duplicate"


class Bands(NamedTuple):
    """How a signature is cut: `number` bands of `rows` slots."""

    number: int
    rows: int


def band_shape(threshold: float) -> Bands:
    """Returns the bands for a threshold between 0 and 1, see the module's text."""
    shapes = (Bands(math.ceil(math.log(1 - RECALL) / math.log1p(-(threshold**rows))), rows) for rows in range(1, 17))
    return [shape for shape in shapes if shape.number <= MAX_BANDS or shape.rows == 1][-1]


def candidate_probability(similarity: float, bands: Bands) -> float:
    """Returns the probability that two documents of this similarity have an equal band."""
    return 1 - (1 - similarity**bands.rows) ** bands.number


class Signatures:
    """The rows of a piece's documents, in the making: add the documents, then `close`."""

    def __init__(self, work: Work, piece: int, threshold: float):
        self._work, self._piece, self._bands = work, piece, band_shape(threshold)
        self._files = self._written = 0
        self._slots: list[list[int]] = []  # the signatures of a batch
        self._names: list[tuple[int, int]] = []  # (place, piece with the flag of the split) of the batch
        self._rows: list[np.ndarray] = []

    def add(self, place: int, is_train: bool, words: np.ndarray) -> None:
        """Adds a document: its place in the piece, whether it belongs to the train split, and the hashes of its words."""
        if len(words):
            self._slots.append(signature(words, self._bands))
            self._names.append((place, self._piece | (int(TRAIN_FLAG) if is_train else 0)))
            if len(self._names) == _DOCUMENTS_PER_BATCH:
                self._finish_batch()

    def close(self) -> int:
        """Writes what is left; returns the number of all rows."""
        self._finish_batch()
        self._write()
        return self._written

    def _finish_batch(self) -> None:
        if not self._names:
            return
        slots = np.array(self._slots, np.uint32)
        bands, sketches = split_signatures(slots, self._bands)
        rows = np.empty(bands.shape, ROW)
        names = np.array(self._names, np.uint32)
        rows["band"], rows["sketch"] = bands, sketches[:, None]
        rows["place"], rows["piece"] = names[:, :1], names[:, 1:]
        self._rows.append(rows.ravel())
        self._slots, self._names = [], []
        if sum(map(len, self._rows)) >= _ROWS_PER_FILE:
            self._write()

    def _write(self) -> None:
        if not self._rows:
            return
        rows = np.concatenate(self._rows)
        rows = rows[np.argsort(rows["band"])]
        name = f"{FOLDER}/{self._piece:05d}-{self._files:03d}"
        self._work.write_groups(name, rows, dedup.bucket_sizes(rows["band"]))
        self._rows, self._files, self._written = [], self._files + 1, self._written + len(rows)


def signature(words: np.ndarray, bands: Bands) -> list[int]:
    """Returns the slots of a document: those of the bands, then those of the sketch.

    Args:
      words: uint64 [w], the hashes of its words, at least one.
      bands: how the signature will be cut.
    """
    pairs = ngrams.ngram_hashes(words, min(NGRAM, len(words)))
    slots = bands.number * bands.rows + SKETCH_BITS
    return rensa.RMinHash.digest_matrix_from_flat_token_hashes(pairs, [0, len(pairs)], slots, _SEED).to_rows()[0]


def split_signatures(slots: np.ndarray, bands: Bands) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hash of each band, uint64 [d, b], and the sketch, uint64 [d], of d signatures uint32 [d, b r + 64]."""
    count, size = bands
    sketches = np.packbits((slots[:, count * size :] & 1).astype(np.uint8), axis=1).view("<u8").ravel()
    cut = slots[:, : count * size].reshape(-1, count, size).astype(np.uint64)
    numbered = np.concatenate(
        [cut, np.broadcast_to(np.arange(count, dtype=np.uint64)[:, None], (len(slots), count, 1))], axis=2
    )
    return ngrams.hash_numbers(numbered), sketches


def similarities(sketches: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the estimated similarity of each document to another, from their sketches."""
    return 1 - 2 * np.bitwise_count(sketches ^ others) / SKETCH_BITS


def partitions(rows: int, pieces: int, memory: int) -> list[Partition]:
    """Returns the partitions of so many rows, each of which needs at most `memory` bytes, if that is possible."""
    return dedup.partitions(rows * ROW_MEMORY // dedup.ROW_MEMORY, pieces, memory)


def repeats_of(rows: np.ndarray, threshold: float) -> np.ndarray:
    """Returns the rows of the documents that are similar to an earlier document of their group; a group has one band."""
    rows = rows[np.lexsort((rows["place"], rows["piece"], rows["band"]))]
    repeats = [rows[:0]]
    for _ in range(LEADERS):
        if not len(rows):
            break
        begins = np.append(True, rows["band"][1:] != rows["band"][:-1])
        leaders = np.flatnonzero(begins)[np.cumsum(begins) - 1]
        is_repeat = similarities(rows["sketch"], rows["sketch"][leaders]) >= threshold
        is_repeat &= ~begins
        repeats.append(rows[is_repeat])
        rows = rows[~(is_repeat | begins)]  # the rest is compared with the first of it
    return np.concatenate(repeats)


def drop_near_duplicates(root: str, threshold: float, partition: Partition, plan_id: str = "") -> Outcome:
    """Finds the near-duplicates of a partition: a task. Like `dedup.drop_duplicates`, it writes their places, by piece."""
    work = Work(root, plan_id=plan_id)
    names = [f"{FOLDER}/{name}" for name in work.names(FOLDER)]
    of_files = [work.read_groups(name, partition.first, partition.end, ROW) for name in names]
    rows = np.concatenate([np.zeros(0, ROW), *of_files])
    del of_files
    repeats = repeats_of(rows, threshold)
    dropped = np.unique((repeats["piece"] & ~TRAIN_FLAG).astype(np.uint64) << np.uint64(32) | repeats["place"])
    sizes = np.bincount((dropped >> np.uint64(32)).astype(np.int64), minlength=partition.pieces)
    name = f"{WORK}/dropped/{REASON}-{partition.number:05d}-of-{partition.partitions:05d}"
    work.write_groups(name, dropped.astype("<u4"), sizes)
    engine.advance(len(rows))
    return work.write_outcome(f"near{partition.partitions}", partition.number, {"rows": len(rows), "dropped": name})
