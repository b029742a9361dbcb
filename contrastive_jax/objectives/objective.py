"""What an objective is: a loss over the embeddings of a batch, with trainable parameters of its own.

`registry.make_objective` builds them by name.

Dimensions: b pairs, v views, k keys of a pair, e embedding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives.tiles import MaskIds

Params = Any  # nested dict of arrays
Metrics = dict[str, jax.Array]


class PairIds(NamedTuple):
    """What a loss knows of a batch besides its embeddings.

    Attributes:
      document: int32[b], the number of each pair's document.
      span_hash: int32[b v], a hash of each span; equal spans have equal hashes.
      label: float32[b], see `data.batch.Batch`; pair losses do not use it.
      scores: float32[b k], see `data.batch.Batch`.
    """

    document: jax.Array
    span_hash: jax.Array
    label: jax.Array | None = None
    scores: jax.Array | None = None


class Keys(NamedTuple):
    """What anchors are scored against: z float32[b k e], and their ids with [b k]."""

    z: jax.Array
    ids: MaskIds


class Given(NamedTuple):
    """What the memory of a run gives a loss; no gradient flows into it.

    Attributes:
      z: float32[b v e], the embeddings of the same rows by the target, or None. Where it has fewer views, they are the last
        ones, which the run does not train, and which the loss's own z has too.
      params: the target's parameters of the objective, or None.
      keys: what the anchors are scored against; None: the batch's own keys.
      teacher: all parameters of a frozen target, for token losses that learn from it, or None.
    """

    z: jax.Array | None = None
    params: Params = None
    keys: Keys | None = None
    teacher: Params = None


NOTHING = Given()


class Objective(NamedTuple):
    """A loss with trainable parameters of its own.

    Attributes:
      init: rng → params, a nested dict of float32 arrays, which may be empty (the optimiser trains them beside the encoder's).
      loss: (z float32[b v e], PairIds, params, Given) → (loss, metrics), means over the global batch.
      project: (params, metrics of the step) → params, applied after each optimiser step to keep them in their range. Clamping
        the parameter rather than its use keeps the gradient alive at the boundary (as CLIP does, arXiv 2103.00020 §2.5). A
        number that follows the batches without a gradient is taken from the metrics.
    """

    init: Callable[[jax.Array], Params]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    project: Callable[[Params, Metrics], Params] = lambda params, metrics: params


def losses_of(config: ConfigDict) -> set[str]:
    """Returns the names of all losses of the embeddings that a run has; `config` is `config.objective`."""
    return {name for name, _ in config.extra} | ({config.name} if config.weight else set())


def check_two_views(config: ConfigDict, views: int) -> None:
    """Raises UserError if pairs have one view, for objectives that compare two; `config` is `config.objective`."""
    if views < 2:
        raise UserError(
            f"config.objective.name={config.name!r} needs two views, and the data gives {views}; set config.data.copies=2, or "
            "config.objective.weight=0"
        )


NO_OBJECTIVE = Objective(init=lambda rng: {}, loss=lambda *_: (jnp.float32(0), {}))
