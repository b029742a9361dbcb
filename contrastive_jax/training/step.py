"""The state of training and the one train step.

Dimensions: b pairs, v views, e embedding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from contrastive_jax.data.batch import Batch
from contrastive_jax.objectives import tokens
from contrastive_jax.objectives.objective import Metrics, Objective
from contrastive_jax.objectives.tokens import Terms
from contrastive_jax.runtime import digest
from contrastive_jax.runtime.randomness import step_key
from contrastive_jax.training.memory import Encode, Memory
from contrastive_jax.training.views import MakeViews

Params = Any  # nested dict of arrays


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      step: int32[], optimiser steps done.
      params: {"encoder": ..., "objective": ...}, and "tokens" with a token loss.
      opt_state: optax state, sharded as the parameters it belongs to.
      memory: the state of the run's `Memory`; () where there is none.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    memory: Any = ()


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics, jax.Array]]


def batch_digest(batch: Batch) -> jax.Array:
    """Hashes the global batch to uint32[4], the same however the batch is sharded."""
    arrays = [x for x in (batch.tokens, batch.segment, batch.document, batch.label, batch.scores) if x is not None]
    return functools.reduce(lambda total, hashed: digest.mix(total) + hashed, map(digest.hash_array, arrays))


def add_token_loss(value: jax.Array, metrics: Metrics, sums: Terms | None, weight: float) -> tuple[jax.Array, Metrics]:
    """Adds the token loss, where there is one, to the loss of the embeddings and to its metrics, which have both plain."""
    if sums is None:
        return value, metrics
    token_loss, of_tokens = tokens.mean(sums)
    return value + weight * token_loss, {"batch_loss": value} | metrics | of_tokens


def make_train_step(
    views: MakeViews,
    encode: Encode,
    objective: Objective,
    memory: Memory,
    optimizer: optax.GradientTransformation,
    seed: int,
    token_weight: float = 1.0,
    cut_tokens: int = 0,
) -> TrainStep:
    """Builds the train step.

    Args:
      views: (global batch, random key) → (Rows, PairIds).
      encode: (params, Rows, rng) → Encoded.
      objective: the loss of the embeddings.
      memory: what the run remembers from step to step.
      optimizer: an optax transformation over the whole tree of parameters.
      seed: of the run; dropout and views depend on it and on the step's number.
      token_weight: of the token loss in the total.
      cut_tokens: the padding of a pair's rows that the encoder does not see, which does not count as padding.

    Returns:
      (state, batch) → (state, metrics, z [b v e]); z lets the loop look at the embeddings now and then.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, jax.Array]:
        # The random key is made inside the traced function: a device array from outside would be fetched at lowering.
        root = jax.random.key(seed)
        rng = step_key(root, "dropout", state.step)
        rows, ids = views(batch, step_key(root, "views", state.step))
        remembered, given = memory.before_step(state.memory, rows, ids, state.step, rng)
        trained = rows.views(0, rows.tokens.shape[1] - memory.fixed_views)

        def loss_of_params(params: Params) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
            with jax.named_scope("encode"):
                encoded = encode(params | ({"teacher": given.teacher} if given.teacher else {}), trained, rng)
            z = encoded.z if given.z is None or not memory.fixed_views else jnp.concatenate([encoded.z, given.z], axis=1)
            with jax.named_scope("loss"):
                value, metrics = objective.loss(z, ids, params["objective"], given)
                value, metrics = add_token_loss(value, metrics, encoded.sums, token_weight)
            return value, (metrics, z)

        (value, (metrics, z)), gradient = jax.value_and_grad(loss_of_params, has_aux=True)(state.params)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            params = params | {"objective": objective.project(params["objective"], metrics)}
            new = TrainState(state.step, params, opt_state, memory.after_step(remembered, params, state.step))
        # A step that is not finite changes nothing but the step's number: neither moments nor memory may remember it.
        norms = jnp.stack([value, optax.tree.norm(gradient), optax.tree.norm(params)])
        finite = jnp.isfinite(norms).all()
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        metrics |= {"loss": value, "gradient_norm": norms[1], "parameter_norm": norms[2], "skipped": ~finite}
        filled, places = (rows.segment > 0).sum(), rows.segment.size - cut_tokens * len(rows.segment)
        metrics |= {"tokens": filled, "fill": filled / places, "batch_digest": batch_digest(batch)}
        return kept._replace(step=state.step + 1), metrics, z

    return train_step
