"""What a run remembers from step to step besides parameters and moments: a target, and a queue of keys.

The target is a copy of the parameters {"encoder", "objective"} that is not trained. `memory.kind` says how it moves, and what
a step sees of it:

* "queue" (MoCo): it follows. It embeds the positive, which then is not trained, and whose embedding joins a queue of keys.
* "average" (BYOL): it follows, and embeds all views, for losses that compare the two.
* "frozen" (a teacher): it stands still where training began, or is another model (`memory.source`), of whatever size, and
  embeds all views without dropout. Token losses that learn from it are given its parameters.

Dimensions: b pairs, v views, e embedding, f views that are not trained.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives import queue as queue_lib
from contrastive_jax.objectives.losses import LOSSES
from contrastive_jax.objectives.objective import NOTHING, Given, PairIds, Params, losses_of
from contrastive_jax.objectives.queue import Queue
from contrastive_jax.objectives.tokens import Terms
from contrastive_jax.training.views import Rows


class Encoded(NamedTuple):
    """What a step's encoder makes of rows: unit vectors z float32[b v e], and with a token loss its sums [g v r]."""

    z: jax.Array
    sums: Terms | None = None


# ({"encoder", "tokens", "teacher": {"encoder", "tokens"}}, rows, a random key or None: no dropout) → Encoded
Encode = Callable[[Params, Rows, jax.Array | None], Encoded]


class Memory(NamedTuple):
    """The memory of a run: pure functions of its state, which is a part of the training state.

    Attributes:
      init: params → the state before the first step, from the initial parameters, or from those of another model.
      before_step: (state, Rows of all views, PairIds, step int32[] from 0, random key) → (new state, Given), whose z
        has the last f views where f is not 0, else all of them.
      after_step: (state, params, step) → the state after an optimiser step that gave these parameters.
      shardings: (those of the parameters, that of arrays [b ...]) → those of the state.
      fixed_views: f, how many of the last views are not trained: the memory gives their embeddings.
    """

    init: Callable[[Params], Any]
    before_step: Callable[[Any, Rows, PairIds, jax.Array, jax.Array], tuple[Any, Given]]
    after_step: Callable[[Any, Params, jax.Array], Any]
    shardings: Callable[[Any, Any], Any]
    fixed_views: int = 0


# All views are trained, and the batch's own keys are the negatives.
NO_MEMORY = Memory(lambda *_: (), lambda *_: ((), NOTHING), lambda *_: (), lambda *_: ())


def momentum(config: ConfigDict, step: jax.Array) -> jax.Array | float:
    r"""Returns the decay of the target's moving average at a step, from 0.

    `memory.momentum` m, or with `memory.rise` BYOL's, which reaches 1 after the K steps of the run:

    .. math::
      1 - (1 - m) (\cos(\pi k / K) + 1) / 2

    References:
      Grill et al., Bootstrap Your Own Latent, https://arxiv.org/abs/2006.07733, §3.2
    """
    m = config.memory.momentum
    return 1 - (1 - m) * (jnp.cos(jnp.pi * step / config.steps) + 1) / 2 if config.memory.rise else m


def check_target(config: ConfigDict, views: int) -> None:
    """Raises UserError if no loss looks at the target, or a queue does not go together with the objective, for v views."""
    memory, objective, tokens = config.memory, config.objective, config.tokens
    if memory.kind == "queue":
        if objective.name not in LOSSES or not objective.weight:
            raise UserError("config.memory.kind='queue': needs a pair loss in config.objective.name, with a weight")
        if objective.symmetric or objective.joint or objective.pairing != "first" or objective.locals or views != 2:
            raise UserError(
                "config.memory.kind='queue': needs config.objective.symmetric=False, joint=(), pairing='first', and pairs of "
                "two views"
            )
        return
    names = losses_of(objective) | ({tokens.name} if tokens.weight else set())
    guided = objective.mask_guide and objective.weight and objective.name in LOSSES
    if not guided and not names & {"byol", "similarity", "embedding", "distil"}:
        raise UserError(
            f"config.memory.kind={memory.kind!r}: no loss looks at the target; set '', or config.objective.name to 'byol', "
            "'similarity' or 'embedding', config.objective.mask_guide=True, or config.tokens.name='distil'"
        )


def make_memory(config: ConfigDict, encode: Encode, views: int, dim: int) -> Memory:
    """Builds the memory of `config.memory`: {"target": {"encoder", "objective"}}, and of the kind "queue" {"queue": Queue} too.

    Args:
      config: of the run.
      encode: the encoder of the target, without a token loss.
      views: v.
      dim: e.

    Raises:
      UserError: from `check_target`.
    """
    kind = config.memory.kind
    if not kind:
        return NO_MEMORY
    check_target(config, views)
    fixed_views = 1 if kind == "queue" else 0
    names = ("encoder", "objective", "tokens")[: 3 if config.tokens.name == "distil" else 2]

    def of_target(params: Params) -> Params:
        """The part of the parameters, or of their shardings, that the target has."""
        return {name: params[name] for name in names if name in params}

    def init(params: Params) -> dict[str, Any]:
        target = {"target": jax.tree.map(jnp.copy, of_target(params))}
        if kind != "queue":
            return target
        return target | {"queue": queue_lib.empty_queue(config.data.batch_size, config.memory.queue, dim)}

    def before_step(
        state: dict[str, Any], rows: Rows, ids: PairIds, step: jax.Array, rng: jax.Array
    ) -> tuple[dict[str, Any], Given]:
        target = jax.lax.stop_gradient(state["target"])
        seen = rows.views(-fixed_views, None)  # the last f, or all: -0 is 0
        z = jax.lax.stop_gradient(encode(target, seen, None if kind == "frozen" else rng).z)
        given = Given(z, target["objective"], teacher=target if kind == "frozen" else None)
        if kind != "queue":
            return state, given
        queue = queue_lib.push(state["queue"], z[:, 0], ids, step)
        return state | {"queue": queue}, given._replace(keys=queue_lib.queue_keys(config.objective, queue, step))

    def after_step(state: dict[str, Any], params: Params, step: jax.Array) -> dict[str, Any]:
        """Moves the target: t ← m · t + (1 - m) · parameters (He et al., equation 2; Grill et al., equation 1)."""
        if kind == "frozen":
            return state
        m = momentum(config, step)
        return state | {"target": jax.tree.map(lambda t, p: m * t + (1 - m) * p, state["target"], of_target(params))}

    def shardings(params: Any, batch: Any) -> dict[str, Any]:
        target = {"target": of_target(params)}
        return target | {"queue": Queue(batch, batch, batch)} if kind == "queue" else target

    return Memory(init, before_step, after_step, shardings, fixed_views)
