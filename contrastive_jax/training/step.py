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
from contrastive_jax.objectives.pairs import Metrics, PairIds
from contrastive_jax.runtime import digest
from contrastive_jax.runtime.randomness import step_key
from contrastive_jax.training.memory import Encode, Memory
from contrastive_jax.training.rows import rows_of_batch

Params = Any  # nested dict of arrays


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      step: int32[], optimiser steps done.
      params: {"encoder": ..., "objective": ...}.
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
    arrays = [x for x in (batch.tokens, batch.segment, batch.document, batch.label) if x is not None]
    return functools.reduce(lambda total, hashed: digest.mix(total) + hashed, map(digest.hash_array, arrays))


def make_train_step(
    encode: Encode,
    loss: Callable[..., tuple[jax.Array, Metrics]],
    project: Callable[[Params], Params],
    memory: Memory,
    optimizer: optax.GradientTransformation,
    seed: int,
) -> TrainStep:
    """Builds the train step.

    Args:
      encode: (encoder params, Rows, rng) → unit vectors [b v e].
      loss: (z [b v e], PairIds, objective params, Keys or None) → (loss, metrics), means over the global batch.
      project: keeps the objective's parameters in range after an update.
      memory: what the run remembers from step to step.
      optimizer: an optax transformation over the whole tree of parameters.
      seed: of the run; dropout depends on it and on the step's number.

    Returns:
      (state, batch) → (state, metrics, z [b v e]); z lets the loop look at the embeddings now and then.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, jax.Array]:
        # The random key is made inside the traced function: a device array from outside would be fetched at lowering.
        rng = step_key(jax.random.key(seed), "dropout", state.step)
        rows, ids = rows_of_batch(batch), PairIds(batch.document, batch.span_hash, batch.label)
        recall = memory.before_step(state.memory, rows, ids, state.step, rng)
        trained = rows.views(0, batch.tokens.shape[1] - memory.fixed_views)

        def loss_of_params(params: Params) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
            with jax.named_scope("encode"):
                z = encode(params["encoder"], trained, rng)
            z = jnp.concatenate([z, *recall.fixed], axis=1) if recall.fixed else z
            with jax.named_scope("loss"):
                value, metrics = loss(z, ids, params["objective"], recall.keys)
            return value, (metrics, z)

        (value, (metrics, z)), gradient = jax.value_and_grad(loss_of_params, has_aux=True)(state.params)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            params = params | {"objective": project(params["objective"])}
            new = TrainState(state.step, params, opt_state, memory.after_step(recall.state, params["encoder"]))
        # A step that is not finite changes nothing but the step's number: neither moments nor memory may remember it.
        norms = jnp.stack([value, optax.tree.norm(gradient), optax.tree.norm(params)])
        finite = jnp.isfinite(norms).all()
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        metrics |= {
            "loss": value,
            "gradient_norm": norms[1],
            "parameter_norm": norms[2],
            "skipped": ~finite,
            "tokens": (batch.segment > 0).sum(),
            "fill": (batch.segment > 0).mean(),
            "batch_digest": batch_digest(batch),
        }
        return kept._replace(step=state.step + 1), metrics, z

    return train_step
