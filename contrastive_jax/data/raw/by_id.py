"""Texts on disk that are found by their ids: the queries and documents of pairs that name both.

A corpus may be larger than memory, and each process needs any of its texts: the texts of all ids lie in one file, which is
mapped into memory, with the hashes of the ids and the places of their texts beside it.

    FOLDER/texts.bin    the UTF-8 of each id and its text
    FOLDER/hash.npy     uint64[n], the hashes of the ids, ascending
    FOLDER/place.npy    int64[n 3], where the id, the text and the next id begin

Dimensions: n texts.
"""

import array
import functools
import hashlib
import mmap
import pathlib
from collections.abc import Iterable

import numpy as np

from contrastive_jax.config import UserError

NAMES = ("texts.bin", "hash.npy", "place.npy")


def hash_of(identifier: bytes) -> int:
    """Returns the 64-bit hash of an id, or of another text."""
    return int.from_bytes(hashlib.blake2b(identifier, digest_size=8).digest(), "little")


def write(folder: pathlib.Path, texts: Iterable[tuple[str, str]]) -> int:
    """Writes texts, given as (id, text), into a local folder; returns how many there are.

    Raises:
      UserError: two texts have one id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hashes, places, at = array.array("Q"), array.array("q"), 0
    with (folder / NAMES[0]).open("wb") as file:
        for identifier, text in texts:
            key, value = identifier.encode(), text.encode()
            hashes.append(hash_of(key))
            places.extend((at, at + len(key), at + len(key) + len(value)))
            file.write(key + value)
            at = places[-1]
    order = np.argsort(np.frombuffer(hashes, np.uint64), kind="stable") if hashes else np.zeros(0, np.int64)
    ordered = np.frombuffer(hashes, np.uint64)[order] if hashes else np.zeros(0, np.uint64)
    place = np.frombuffer(places, np.int64).reshape(-1, 3)[order] if hashes else np.zeros((0, 3), np.int64)
    np.save(folder / NAMES[1], ordered)
    np.save(folder / NAMES[2], place)
    found = Texts(folder)
    for number in np.flatnonzero(ordered[1:] == ordered[:-1]).tolist():
        if found.identifier(number) == found.identifier(number + 1):
            raise UserError(f"{found.identifier(number).decode()}: two texts have this id; leave one out")
    return len(ordered)


class Texts:
    """The texts of a folder that `write` made; they are read where they are needed."""

    def __init__(self, folder: pathlib.Path):
        self._hash, self._place = (np.load(folder / name, mmap_mode="r") for name in NAMES[1:])
        with (folder / NAMES[0]).open("rb") as file:
            self._texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self._hash) else b""

    def identifier(self, number: int) -> bytes:
        """Returns the id of the text of this number in the order of hashes."""
        begin, end, _ = self._place[number].tolist()
        return self._texts[begin:end]

    def get(self, identifier: str) -> str | None:
        """Returns the text of an id; None: there is none."""
        key = identifier.encode()
        value = np.uint64(hash_of(key))
        first = int(np.searchsorted(self._hash, value))
        for number in range(first, len(self._hash)):
            if self._hash[number] != value:
                break
            if self.identifier(number) == key:
                _, begin, end = self._place[number].tolist()
                return self._texts[begin:end].decode()
        return None


@functools.lru_cache(16)
def open_texts(folder: str) -> Texts:
    """Returns the texts of a folder, opened once per process; other texts need a folder of another name."""
    return Texts(pathlib.Path(folder))
