"""Chooses hard negatives among the documents that are nearest to a query.

The margins are those of sentence-transformers' `mine_hard_negatives`; the relative one is TopK-PercPos of NV-Retriever
(https://arxiv.org/abs/2407.15831). The consistency filter is that of contrastors, from Nomic Embed
(https://arxiv.org/abs/2402.01613).

Dimensions: q queries, k neighbours of each.
"""

from typing import Literal, NamedTuple

import numpy as np

from contrastive_jax.config import UserError


class Options(NamedTuple):
    """Which documents become negatives.

    Attributes:
      num_negatives: the most negatives of a query.
      range_max: candidates are so many documents, those nearest to the query, its positives and what equals them not counted;
        default: `range_min` + 10 x `num_negatives`.
      range_min: pass over so many of the nearest candidates that the margins and bounds leave.
      absolute_margin: a negative's score is at most the positive's less this; of several positives the lowest score counts.
      relative_margin: a negative's score is at most (1 - this) x the positive's; 0.05 is a good value.
      max_score: the highest score of a negative.
      min_score: the lowest score of a negative.
      sampling_strategy: take the nearest candidates, or draw from all.
      consistency: keep a positive only if it is among so many documents nearest to its query, and a query only if it keeps a
        positive; Nomic's value is 2; 0: keep all.
      seed: of the draws.
    """

    num_negatives: int = 5
    range_max: int | None = None
    range_min: int = 0
    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    sampling_strategy: Literal["top", "random"] = "top"
    consistency: int = 0
    seed: int = 0

    def candidates(self) -> int:
        """Returns the number of candidates per query.

        Raises:
          UserError: they are fewer than the negatives, or a number is negative.
        """
        count = self.range_min + 10 * self.num_negatives if self.range_max is None else self.range_max
        if self.num_negatives < 1 or self.range_min < 0 or self.consistency < 0:
            raise UserError("--num_negatives is at least 1, --range_min and --consistency at least 0")
        if count - self.range_min < self.num_negatives:
            raise UserError(
                f"--range_max={count}: leaves fewer than --num_negatives={self.num_negatives} after --range_min="
                f"{self.range_min}; raise it"
            )
        return count


def choose(
    scores: np.ndarray, excluded: np.ndarray, positive: np.ndarray, options: Options, random: np.random.Generator
) -> np.ndarray:
    """Chooses the negatives among the nearest documents of some queries.

    Args:
      scores: float32[q k], descending; -inf where there is no document.
      excluded: bool[q k], whether a document may be no negative of its query, whatever its score.
      positive: float32[q], the lowest score of the query's positives.
      options: see `Options`.
      random: for sampling_strategy="random", draws q x k numbers.

    Returns:
      bool[q k], at most num_negatives in a row.
    """
    passing = np.isfinite(scores) & ~excluded
    passing &= np.cumsum(passing, axis=1) <= options.candidates()
    bounds = []
    if options.absolute_margin is not None:
        bounds.append(positive - options.absolute_margin)
    if options.relative_margin is not None:
        bounds.append(positive - options.relative_margin * np.abs(positive))  # a positive may have a score below 0
    if options.max_score is not None:
        bounds.append(np.full_like(positive, options.max_score))
    for bound in bounds:
        passing &= scores <= bound[:, None]
    if options.min_score is not None:
        passing &= scores >= options.min_score
    rank = np.cumsum(passing, axis=1)  # from 1
    passing &= rank > options.range_min
    if options.sampling_strategy == "top":
        return passing & (rank <= options.range_min + options.num_negatives)
    lots = np.argsort(np.where(passing, random.random(passing.shape), 2), axis=1)[:, : options.num_negatives]
    drawn = np.zeros_like(passing)
    np.put_along_axis(drawn, lots, True, axis=1)
    return drawn & passing
