"""The batch: one type from packing to the loss.

Dimensions: b pairs, v views of a pair, k = v - 1 documents of a pair, g groups of pairs that share rows, r rows of a group per
view, l tokens of a row.
"""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """A batch of pairs, views first: NumPy arrays of one process from the pipeline, global jax arrays in a step.

    Attributes:
      tokens: int32[g v r l]. Without packing g = b and r = 1: one span per row.
      segment: int32[g v r l], 1 to b / g on the spans of a group, in the order of its pairs, and 0 on padding.
      document: int32[b], the number of each pair's document.
      span_hash: int32[b v], a hash of each span without its delimiters: equal spans have equal hashes.
      label: float32[b], the class or the score of each pair, NaN for a pair without one; None: no pair has one. A class is a
        whole number, which float32 holds exactly up to 2**24.
      scores: float32[b k], what a teacher says of each pair's documents (positives, then hard negatives), NaN where it says
        nothing; None: these are no pairs.
    """

    tokens: Any
    segment: Any
    document: Any
    span_hash: Any
    label: Any = None
    scores: Any = None
