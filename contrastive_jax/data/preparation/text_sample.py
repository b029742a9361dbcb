"""The sample of text on which a tokenizer is trained: excerpts drawn evenly from all documents, the same each time.

Each excerpt of a document has a number: a hash of the document's key and the excerpt's place. The sample is the excerpts with
the lowest numbers. Pieces of the input are sampled alone, and their samples are merged: what has a low number among all has
a low number in its piece.
"""

import hashlib
import heapq
import itertools
from collections.abc import Iterable

EXCERPT_CHARACTERS = 4096  # the longest excerpt of a text


class TextSample:
    """The excerpts with the lowest numbers among those that were added, up to a size."""

    def __init__(self, characters: int):
        """Makes an empty sample that will hold about so many characters."""
        self._size, self._total = characters, 0
        self._heap: list[tuple[int, str]] = []  # (- number, excerpt): the highest number is on top, the first to be dropped
        self._numbers: set[int] = set()  # equal documents count once

    def add_document(self, key: bytes, text: str) -> None:
        """Adds the excerpts of a document; `key` is its hash."""
        for start in range(0, len(text), EXCERPT_CHARACTERS):
            digest = hashlib.blake2b(key, digest_size=8, salt=start.to_bytes(8, "little")).digest()
            number = int.from_bytes(digest, "big") >> 1
            if self._total < self._size or number < -self._heap[0][0]:
                self._add(number, text[start : start + EXCERPT_CHARACTERS])

    def add(self, excerpts: Iterable[tuple[int, str]]) -> None:
        """Adds excerpts with their numbers, from another sample."""
        for number, excerpt in excerpts:
            self._add(number, excerpt)

    def _add(self, number: int, excerpt: str) -> None:
        if number in self._numbers:
            return
        self._numbers.add(number)
        heapq.heappush(self._heap, (-number, excerpt))
        self._total += len(excerpt)
        while self._total - len(self._heap[0][1]) >= self._size:
            highest, dropped = heapq.heappop(self._heap)
            self._numbers.remove(-highest)
            self._total -= len(dropped)

    def excerpts(self) -> list[tuple[int, str]]:
        """Returns the excerpts with their numbers, lowest number first."""
        return [(-number, excerpt) for number, excerpt in sorted(self._heap, key=lambda item: -item[0])]


def merge(samples: Iterable[Iterable[tuple[int, str]]], characters: int) -> list[str]:
    """Returns the sample of so many characters of what several samples hold together."""
    whole = TextSample(characters)
    whole.add(itertools.chain.from_iterable(samples))
    return [excerpt for _, excerpt in whole.excerpts()]
