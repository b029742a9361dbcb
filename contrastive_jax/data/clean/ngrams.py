"""Hashes of the words of a text and of its word n-grams, in NumPy, at some hundred MB per second and core.

Two texts that differ only in case, punctuation and white space have the same words: a word is a run of letters, marks and
digits, case folded. A character of a script that is written without spaces (Chinese, Thai ...) is a word of its own.

The hash of a word c_0 c_1 ... is mix(sum_i c_i p^i mod 2^64), where p is odd, so that one cumulative sum over the text serves
all its words: the sum from the word's beginning to its end, times p^-begin. The hash of an n-gram is the same polynomial, in q,
of the hashes of its words (Karp and Rabin 1987, "Efficient randomized pattern-matching algorithms").
"""

import functools
import unicodedata
from typing import NamedTuple

import numpy as np

_BLOCK = 1 << 16  # characters hashed at once: the arrays of a block fit a processor's cache
_P, _Q = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F  # odd numbers without structure: the golden ratio, and a prime of xxHash
_SPACELESS = ((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x2E80, 0xA4D0), (0xF900, 0xFB00), (0x20000, 0x30000))
_ALONE = 1 << 31  # marks, in `_folding`, a character that is a word of its own
_ASSIGNED = 0x32000  # no letter lies beyond


class Words(NamedTuple):
    """The words of a text.

    Attributes:
      hashes: uint64 [w], the hash of each word.
      sizes: int64 [w], its characters.
    """

    hashes: np.ndarray
    sizes: np.ndarray


def words_of(text: str) -> Words:
    """Returns the words of a text, in their order."""
    text = _composed(text)
    blocks, start = [], 0
    while start < len(text):
        folded = np.take(_folding(), _codes(text[start : start + _BLOCK]))
        if start + _BLOCK < len(text):  # the next block begins with the word that this one would cut, unless there is no other
            others = np.flatnonzero(folded == 0)
            folded = folded[: others[-1] + 1] if len(others) else folded
        blocks.append(_words_of_block(folded, text.isascii()))
        start += len(folded)
    if len(blocks) == 1:
        return blocks[0]
    empty = Words(np.zeros(0, np.uint64), np.zeros(0, np.int64))
    return Words(*(np.concatenate(column) for column in zip(empty, *blocks, strict=True)))


def share_of_symbols(text: str) -> float:
    """Returns the share of the characters of a text that are neither in words nor white space, however accents are spelled."""
    text = _composed(text)
    blocks = (_codes(text[start : start + _BLOCK]) for start in range(0, len(text), _BLOCK))
    symbols = sum(np.count_nonzero(np.take(_symbols(), codes)) for codes in blocks)
    return symbols / max(len(text), 1)


def ngram_hashes(words: np.ndarray, size: int) -> np.ndarray:
    """Returns the hash of each run of `size` words: uint64 [max(w - size + 1, 0)] of the hashes of the words, uint64 [w]."""
    return _mix(_polynomials(words, size)) if len(words) >= size else words[:0]


def ngram_hashes_at(words: np.ndarray, begins: np.ndarray, size: int) -> np.ndarray:
    """Returns what `ngram_hashes` has at `begins`, for few of them; all of these n-grams must end within the words."""
    return hash_numbers(words[begins[:, None] + np.arange(size)])


def hash_numbers(numbers: np.ndarray) -> np.ndarray:
    """Returns the hash of each row of numbers: uint64 [...] of uint64 [..., n]."""
    powers = np.array([pow(_Q, exponent, 1 << 64) for exponent in range(numbers.shape[-1])], np.uint64)
    return _mix((numbers * powers).sum(axis=-1, dtype=np.uint64))


def _composed(text: str) -> str:
    """Returns a text in which accents and the letters of Korean are composed (NFC)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _codes(text: str) -> np.ndarray:
    """Returns the code points of a text, uint32 [n]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _words_of_block(folded: np.ndarray, ascii_only: bool) -> Words:
    """Returns the words of a block of characters, as `_folding` has them."""
    inside = np.empty(len(folded) + 2, np.bool_)
    inside[0] = inside[-1] = False
    np.not_equal(folded, 0, out=inside[1:-1])
    if ascii_only:
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        begins, ends = edges[0::2], edges[1::2]
    else:
        alone = np.zeros(len(inside), np.bool_)
        np.greater_equal(folded, _ALONE, out=alone[1:-1])
        cut = (inside[1:] != inside[:-1]) | (alone[1:] | alone[:-1])
        begins, ends = np.flatnonzero(cut & inside[1:]), np.flatnonzero(cut & inside[:-1])
    powers, inverses = _powers()
    sums = np.zeros(len(folded) + 1, np.uint64)
    np.multiply(folded, powers[: len(folded)], out=sums[1:])
    np.cumsum(sums, out=sums)
    return Words(_mix((sums[ends] - sums[begins]) * inverses[begins]), ends - begins)


def _polynomials(words: np.ndarray, size: int) -> np.ndarray:
    """Returns sum_j words[i + j] q^j for j < size, in about 2 log2(size) passes over the words."""
    if size == 1:
        return words
    half = size // 2
    part = _polynomials(words, half)
    pair = part[: len(part) - half] + part[half:] * np.uint64(pow(_Q, half, 1 << 64))
    if size == 2 * half:
        return pair
    return pair[: len(words) - size + 1] + words[size - 1 :] * np.uint64(pow(_Q, size - 1, 1 << 64))


def _mix(values: np.ndarray) -> np.ndarray:
    """Spreads the entropy of each number over all its bits (the finalizer of SplitMix64: Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Returns p^i and p^-i mod 2^64, for every place of a block."""
    steps = np.ones((2, _BLOCK + 1), np.uint64)
    steps[:, 1:] = np.array([[_P], [pow(_P, -1, 1 << 64)]], np.uint64)
    powers, inverses = np.multiply.accumulate(steps, axis=1)
    return powers, inverses


@functools.cache
def _folding() -> np.ndarray:
    """Returns, by code point, the case-folded character, plus _ALONE if it is a word of its own; 0 if it is of no word."""
    table = np.zeros(0x110000, np.uint32)
    for code in range(_ASSIGNED):
        character = chr(code)
        if unicodedata.category(character)[0] in "LMN":
            table[code] = ord(character.casefold()[0])
    for begin, end in _SPACELESS:
        table[begin:end] |= np.where(table[begin:end] > 0, _ALONE, 0).astype(np.uint32)
    return table


@functools.cache
def _symbols() -> np.ndarray:
    """Returns, by code point, whether the character is neither of a word nor white space."""
    table = _folding() == 0
    table[[code for code in range(_ASSIGNED) if chr(code).isspace()]] = False
    return table
