"""What a run remembers from step to step besides parameters and moments: nothing, or MoCo's momentum encoder and queue.

Dimensions: b pairs, v views, e embedding, f views that are not trained.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.objectives import queue as queue_lib
from contrastive_jax.objectives.pairs import Keys, PairIds
from contrastive_jax.objectives.queue import Queue
from contrastive_jax.training.rows import Rows

Params = Any  # nested dict of arrays
Encode = Callable[[Params, Rows, jax.Array], jax.Array]  # (encoder params, rows, rng) → unit vectors [b v e]


class Recall(NamedTuple):
    """What the memory gives a step.

    Attributes:
      state: the memory's new state.
      fixed: embeddings [b f e] of the last f views, which are not trained; () where all views are.
      keys: what the anchors are scored against; None: the batch's own keys.
    """

    state: Any
    fixed: tuple[jax.Array, ...]
    keys: Keys | None


class Memory(Protocol):
    """The memory of a run: pure functions of its state, which is a part of the training state.

    Attributes:
      fixed_views: f, how many of the last views the memory embeds.
    """

    fixed_views: int

    def init(self, encoder: Params) -> Any:
        """Returns the state before the first step, from the encoder's initial parameters."""

    def before_step(self, state: Any, rows: Rows, ids: PairIds, step: jax.Array, rng: jax.Array) -> Recall:
        """Returns what the memory gives step `step` int32[]; rows have all views."""

    def after_step(self, state: Any, encoder: Params) -> Any:
        """Returns the state after an optimiser step that gave these encoder parameters."""

    def shardings(self, encoder: Any, batch: Any) -> Any:
        """Returns the shardings of the state, from those of the encoder's parameters and of arrays [b ...]."""


class NoMemory:
    """Remembers nothing: all views are trained, and the batch's own keys are the negatives."""

    fixed_views = 0

    def init(self, encoder: Params) -> tuple:
        """Returns the empty state."""
        return ()

    def before_step(self, state: tuple, rows: Rows, ids: PairIds, step: jax.Array, rng: jax.Array) -> Recall:
        """Gives nothing."""
        return Recall((), (), None)

    def after_step(self, state: tuple, encoder: Params) -> tuple:
        """Returns the empty state."""
        return ()

    def shardings(self, encoder: Any, batch: Any) -> tuple:
        """Returns the empty state."""
        return ()


class MomentumState(NamedTuple):
    """The state of `Momentum`: the parameters of its encoder, and its queue."""

    encoder: Params
    queue: Queue


class Momentum:
    """MoCo: only the anchor is trained. A momentum encoder embeds its positive, whose embedding joins a queue of keys.

    Args:
      config: `config.objective`.
      encode: the encoder of the step.
      batch_size: b.
      dim: e.
    """

    fixed_views = 1

    def __init__(self, config: ConfigDict, encode: Encode, batch_size: int, dim: int):
        self._config, self._encode, self._batch_size, self._dim = config, encode, batch_size, dim

    def init(self, encoder: Params) -> MomentumState:
        """Returns a momentum encoder equal to the encoder, and an empty queue."""
        queue = queue_lib.empty_queue(self._batch_size, self._config.queue, self._dim)
        return MomentumState(jax.tree.map(jnp.copy, encoder), queue)

    def before_step(self, state: MomentumState, rows: Rows, ids: PairIds, step: jax.Array, rng: jax.Array) -> Recall:
        """Embeds the positives and puts them into the queue, whose keys are all that the anchors are scored against."""
        positives = jax.lax.stop_gradient(self._encode(state.encoder, rows.views(1, None), rng))
        queue = queue_lib.push(state.queue, positives[:, 0], ids, step)
        return Recall(state._replace(queue=queue), (positives,), queue_lib.queue_keys(self._config, queue, step))

    def after_step(self, state: MomentumState, encoder: Params) -> MomentumState:
        """Moves the momentum encoder: m ← momentum · m + (1 - momentum) · encoder (He et al., equation 2)."""
        mu = self._config.momentum
        return state._replace(encoder=jax.tree.map(lambda m, p: mu * m + (1 - mu) * p, state.encoder, encoder))

    def shardings(self, encoder: Any, batch: Any) -> MomentumState:
        """Returns the shardings of the state: the momentum encoder lies like the encoder, the queue like the batch."""
        return MomentumState(encoder, Queue(batch, batch, batch))
