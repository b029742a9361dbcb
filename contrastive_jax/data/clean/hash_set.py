"""A set of 64-bit hashes that answers for whole arrays: a sorted array, and before it a filter that turns strangers away.

The filter is a bitmap in which four bits stand for each hash (Bloom 1970, "Space/time trade-offs in hash coding with allowable
errors"). The hashes must be spread evenly, as those of `data.clean.ngrams` are. A set takes about eleven bytes per hash.
"""

import numpy as np

_BITS = 32  # of the bitmap per hash, at most: 1 in 5,000 strangers passes, with half of the bits 1 in 400
# The upper bits of hash × factor are the number of a bit.
_SLICE = 1 << 20  # hashes that are added to a filter at once
_FACTORS = (1, 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)


def bitmap_of(hashes: np.ndarray) -> np.ndarray:
    """Returns the filter of these hashes, uint8 [2^k / 8]."""
    order = max(10, (len(hashes) * _BITS - 1).bit_length() - 1)
    bitmap = np.zeros(1 << (order - 3), np.uint8)
    for start in range(0, len(hashes), _SLICE):
        for factor in _FACTORS:
            numbers = np.unique(hashes[start : start + _SLICE] * np.uint64(factor) >> np.uint64(64 - order))
            np.bitwise_or.at(bitmap, numbers >> np.uint64(3), np.uint8(1) << (numbers & np.uint64(7)).astype(np.uint8))
    return bitmap


def candidates(bitmap: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Returns the places in `hashes`, in order, of those that may be in the set with this filter; the others are not in it."""
    places, shift = np.arange(len(hashes)), np.uint64(64 - (len(bitmap).bit_length() + 2))
    for factor in _FACTORS:
        numbers = hashes * np.uint64(factor) >> shift
        passed = np.flatnonzero(np.take(bitmap, numbers >> np.uint64(3)) >> (numbers & np.uint64(7)).astype(np.uint8) & 1)
        places, hashes = places[passed], hashes[passed]
    return places


def contains(sorted_hashes: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Returns bool [n], for each hash whether it is in the sorted array."""
    if not len(sorted_hashes):
        return np.zeros(len(hashes), np.bool_)
    places = np.searchsorted(sorted_hashes, hashes)
    return np.take(sorted_hashes, np.minimum(places, len(sorted_hashes) - 1)) == hashes
