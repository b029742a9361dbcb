"""Measures how much a text repeats itself, as Gopher's filter does (Rae et al. 2021, arXiv 2112.11446, table A1)."""

import collections
from collections.abc import Iterator, Sequence

import numpy as np

from contrastive_jax.data.clean import ngrams
from contrastive_jax.data.clean.ngrams import Words

# The largest share of a text that Gopher allows; shares of n-grams are of the characters in words.
DUPLICATE_PARTS = 0.30  # of lines, and of paragraphs, that repeat an earlier one
DUPLICATE_CHARACTERS = 0.20  # of the characters, in such lines or paragraphs
MOST_FREQUENT = {2: 0.20, 3: 0.18, 4: 0.16}  # by size: of the most frequent n-gram, all its occurrences together
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # by size: of n-grams that repeat an earlier one
_FEW = 8  # n-grams are hashed one by one if they are fewer than the words divided by this


def repetition(text: str, words: Words) -> float:
    """Returns the largest of the measures of the header, each divided by its limit: above 1, Gopher drops the text.

    Args:
      text: the text.
      words: its words, from `ngrams.words_of`.
    """
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    paragraphs = [paragraph for paragraph in map(str.strip, text.split("\n\n")) if paragraph]
    return max(*(_duplicate_parts(parts) for parts in (lines, paragraphs)), max(_repeated_ngrams(words), default=0.0))


def _duplicate_parts(parts: Sequence[str]) -> float:
    """Returns the larger of two measures: the share of repeated parts, and that of their characters, divided by its limit."""
    counts = collections.Counter(parts)
    if len(counts) == len(parts):
        return 0.0
    characters = sum(map(len, parts))
    return max(
        (len(parts) - len(counts)) / len(parts) / DUPLICATE_PARTS,
        (characters - sum(map(len, counts))) / characters / DUPLICATE_CHARACTERS,
    )


def _repeated_ngrams(words: Words) -> Iterator[float]:
    """Yields the measures of n-grams, divided by their limits, up to the largest size that occurs twice."""
    ends = np.concatenate([[0], np.cumsum(words.sizes)])  # characters before each word
    total, count = max(int(ends[-1]), 1), len(words.hashes)
    place_bits = np.uint64((1 << count.bit_length()) - 1)
    begins = np.arange(count)  # only where an n-gram occurs twice can one of n + 1 words do so
    for size in range(2, 11):
        begins = begins[begins + size <= count]
        few = len(begins) * _FEW < count
        hashes = ngrams.ngram_hashes_at(words.hashes, begins, size) if few else ngrams.ngram_hashes(words.hashes, size)[begins]
        # The place of an n-gram takes the lower bits of its hash, so that one sort of numbers keeps hash and place together.
        numbers = np.sort(hashes & ~place_bits | begins.astype(np.uint64))
        hashes, begins = numbers & ~place_bits, (numbers & place_bits).astype(np.int64)
        is_later = np.append(False, hashes[1:] == hashes[:-1])[: len(hashes)]
        if not is_later.any():
            return
        if size in MOST_FREQUENT:
            firsts = np.flatnonzero(~is_later)
            occurrences = np.diff(np.append(firsts, len(hashes)))
            most = int(np.argmax(occurrences))
            begin = begins[firsts[most]]
            yield occurrences[most] * (ends[begin + size] - ends[begin]) / total / MOST_FREQUENT[size]
        else:
            edges = np.zeros(count + 1, np.int64)
            np.add.at(edges, begins[is_later], 1)
            np.add.at(edges, begins[is_later] + size, -1)
            covered = np.cumsum(edges[:-1]) > 0
            yield words.sizes[covered].sum() / total / DUPLICATE_NGRAMS[size]
        begins = np.sort(begins[is_later | np.append(is_later[1:], False)])
