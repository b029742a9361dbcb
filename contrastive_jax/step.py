"""The state of training and the one train step.

Dimensions: b pairs, n rows (b where spans are not packed), v views, l tokens, e embedding.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from contrastive_jax import digest

Params = Any  # nested dict of arrays
Batch = dict[str, jax.Array]  # tokens and segment int32[n v l] in n rows of packed spans, doc int32[b], text int32[b v]
Metrics = dict[str, jax.Array]


class Functions(NamedTuple):
    """What a step is made of.

    Attributes:
      encode: (encoder params, {"tokens": [n v l], "segment": [n v l], "row": int32[n v]}, dropout key) → unit vectors [b v e];
        `row` numbers the rows of the global batch, whatever part of it is encoded.
      loss: (z[b v e], ids, objective params, keys or None) → (loss, metrics).
      project: keeps the objective's parameters in range after an update.
      queue: None, or the functions of a momentum encoder and its queue of keys.
    """

    encode: Callable[[Params, Batch, jax.Array], jax.Array]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    project: Callable[[Params], Params]
    queue: "QueueFunctions | None" = None


class QueueFunctions(NamedTuple):
    """Of a momentum encoder with its queue.

    Attributes:
      init: encoder params → queue.
      push: (queue, z[b e], ids, step) → queue with the keys of this step.
      keys: (queue, step) → what the loss takes as keys.
      follow: (queue, encoder params) → queue with its momentum encoder moved.
    """

    init: Callable[[Params], Any]
    push: Callable[..., Any]
    keys: Callable[..., Any]
    follow: Callable[[Any, Params], Any]


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      step: int32[], optimiser steps done.
      params: {"encoder": ..., "objective": ...}.
      opt_state: optax state, sharded as the parameters it belongs to.
      queue: of the momentum encoder, or () without one.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    queue: Any = ()


def step_key(root: jax.Array, name: str, step: jax.Array) -> jax.Array:
    """The key of one use of randomness at one step: no chain that a restart would lose."""
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)


def batch_digest(batch: Batch) -> jax.Array:
    """A hash of the global batch, uint32[4], the same however the batch is sharded."""
    words = [digest.of_array(batch[name]) for name in ("tokens", "segment", "doc")]
    return functools.reduce(lambda total, word: digest.mix(total) + word, words)


def make_train_step(
    functions: Functions, optimizer: optax.GradientTransformation, root: jax.Array
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics, jax.Array]]:
    """Builds the step.

    Args:
      functions: encoder, loss and queue.
      optimizer: an optax transformation over the whole tree of parameters.
      root: the run's random key.

    Returns:
      step: (state, batch) → (state, metrics, z[b v e]); z lets the loop look at the embeddings now and then.
    """
    encode, loss, project, memory = functions

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, jax.Array]:
        n, v, _ = batch["tokens"].shape
        row = jnp.arange(n * v, dtype=jnp.int32).reshape(n, v)
        texts = {"tokens": batch["tokens"], "segment": batch["segment"], "row": row}
        ids = {"doc": batch["doc"], "text": batch["text"]}
        key = step_key(root, "dropout", state.step)
        queue, keys, given = state.queue, None, None
        if memory is not None:
            # Only the anchor is trained; its positive and the queue come from the momentum encoder.
            given = jax.lax.stop_gradient(encode(queue.encoder, jax.tree.map(lambda x: x[:, 1:], texts), key))
            queue = memory.push(queue, given[:, 0], ids, state.step)
            keys, texts = memory.keys(queue, state.step), jax.tree.map(lambda x: x[:, :1], texts)

        def objective(params: Params) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
            z = encode(params["encoder"], texts, key)
            z = z if given is None else jnp.concatenate([z, given], axis=1)
            value, metrics = loss(z, ids, params["objective"], keys)
            return value, (metrics, z)

        (value, (metrics, z)), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = params | {"objective": project(params["objective"])}
        if memory is not None:
            queue = memory.follow(queue, params["encoder"])
        # A step that is not finite changes nothing: neither moments nor queue may remember it.
        norms = jnp.stack([value, optax.tree.norm(gradient), optax.tree.norm(params)])
        finite = jnp.isfinite(norms).all()
        old = (state.params, state.opt_state, state.queue)
        params, opt_state, queue = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt_state, queue), old)
        metrics |= {
            "loss": value,
            "gradient_norm": norms[1],
            "parameter_norm": norms[2],
            "skipped": ~finite,
            "tokens": (batch["segment"] > 0).sum(),
            "fill": (batch["segment"] > 0).mean(),
            "batch_digest": batch_digest(batch),
        }
        return TrainState(state.step + 1, params, opt_state, queue), metrics, z

    return train_step
