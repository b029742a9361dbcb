"""The batch: one type from packing to the loss.

Dimensions: b pairs, v views of a pair, g groups of pairs that share rows, r rows of a group per view, l tokens of a row.
"""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """A batch of pairs, views first: NumPy arrays of one process from the pipeline, global jax arrays in a step.

    Attributes:
      tokens: int32[g v r l]. Without packing g = b and r = 1: one span per row.
      segment: int32[g v r l], 1 to b / g on the spans of a group, in the order of its pairs, and 0 on padding.
      document: int32[b], the number of each pair's document.
      span_hash: int32[b v], a hash of each span without its delimiters: equal spans have equal hashes.
      label: int32[b], the class of each pair, -1 for a pair that only fills the batch up; None for unlabelled pairs.
    """

    tokens: Any
    segment: Any
    document: Any
    span_hash: Any
    label: Any = None
