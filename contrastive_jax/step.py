"""The state of training and the one train step.

Dimensions: b pairs, v views, l tokens, e embedding.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = Any  # nested dict of arrays
Batch = dict[str, jax.Array]  # tokens int32[b v l], mask bool[b v l], doc int32[b]
Metrics = dict[str, jax.Array]
Forward = Callable[[Params, jax.Array, jax.Array, jax.Array | None], jax.Array]
Loss = Callable[[jax.Array, jax.Array, Params], tuple[jax.Array, Metrics]]


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      step: int32[], optimiser steps done.
      params: {"encoder": ..., "objective": ...}.
      opt_state: optax state, sharded as the parameters it belongs to.
    """

    step: jax.Array
    params: Params
    opt_state: Any


def step_key(root: jax.Array, name: str, step: jax.Array) -> jax.Array:
    """The key of one use of randomness at one step: no chain that a restart would lose."""
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)


def batch_digest(batch: Batch) -> jax.Array:
    """A hash of the global batch, uint32[2], the same however the batch is sharded.

    Each token, with its place and mask, is mixed by murmur3's finaliser; the sum modulo 2**32 depends on no order.
    """
    tokens = batch["tokens"].astype(jnp.uint32) * 2 + batch["mask"]
    rows = jnp.concatenate([tokens.reshape(len(tokens), -1), batch["doc"].astype(jnp.uint32)[:, None]], axis=1)
    place = jnp.arange(rows.size, dtype=jnp.uint32).reshape(rows.shape)

    def mix(x: jax.Array) -> jax.Array:
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    return jnp.stack([jnp.sum(mix(rows ^ mix(place + jnp.uint32(salt)))) for salt in (0x9E3779B9, 0x7F4A7C15)])


def make_train_step(
    forward: Forward,
    loss: Loss,
    project: Callable[[Params], Params],
    optimizer: optax.GradientTransformation,
    root: jax.Array,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics, jax.Array]]:
    """Builds the step.

    Args:
      forward: (params, tokens[n l], mask[n l], dropout key) → unit vectors [n e].
      loss: (z[b v e], doc[b], params) → (loss, metrics).
      project: keeps the objective's parameters in range after an update.
      optimizer: an optax transformation over the whole tree of parameters.
      root: the run's random key.

    Returns:
      step: (state, batch) → (state, metrics, z[b v e]); z lets the loop look at the embeddings now and then.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, jax.Array]:
        b, v, length = batch["tokens"].shape

        def objective(params: Params) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
            tokens, mask = batch["tokens"].reshape(b * v, length), batch["mask"].reshape(b * v, length)
            z = forward(params["encoder"], tokens, mask, step_key(root, "dropout", state.step)).reshape(b, v, -1)
            value, metrics = loss(z, batch["doc"], params["objective"])
            return value, (metrics, z)

        (value, (metrics, z)), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = params | {"objective": project(params["objective"])}
        metrics |= {
            "loss": value,
            "gradient_norm": optax.tree.norm(gradient),
            "tokens": batch["mask"].sum(),
            "batch_digest": batch_digest(batch),
        }
        return TrainState(state.step + 1, params, opt_state), metrics, z

    return train_step
