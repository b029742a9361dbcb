"""Code that the benchmarks share: shipped recipes, batches of random tokens, and timing in turns."""

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from contrastive_jax.data.batch import Batch
from contrastive_jax.objectives import pairs
from contrastive_jax.runtime import sharding

FIRST_TOKEN = 8  # smaller ids are reserved


def load_recipe(name: str) -> ConfigDict:
    """Returns the config of configs/NAME.py."""
    return importlib.import_module(f"configs.{name}").get_config()


def random_tokens(config: ConfigDict, vocab_size: int) -> np.ndarray:
    """Returns the tokens int32[b 2 1 l] of a batch of `config.data`, without padding and without packing."""
    shape = (config.data.batch_size, 2, 1, config.data.length)
    return np.random.default_rng(0).integers(FIRST_TOKEN, vocab_size, shape).astype(np.int32)


def global_batch(tokens: np.ndarray, mesh: Mesh) -> Batch:
    """Returns the batch of tokens int32[b 2 1 l] on the devices; all spans are different and of different documents."""
    b = len(tokens)
    batch = Batch(
        tokens=tokens,
        segment=np.ones_like(tokens),
        document=np.arange(b, dtype=np.int32),
        span_hash=np.arange(2 * b, dtype=np.int32).reshape(b, 2),
    )
    return sharding.to_global(batch, np.arange(b), b, mesh)


def loss_and_gradients(config: ConfigDict, dim: int, mesh: Mesh) -> Any:
    """Returns the jitted loss of `config.objective`: (z float32[b 2 dim], ids, params) → (loss, gradients of z and params)."""
    objective = pairs.make_objective(config, 2, dim, mesh, sharding.BATCH_AXES)
    return jax.jit(jax.value_and_grad(lambda *arguments: objective.loss(*arguments)[0], argnums=(0, 2)))


def loss_shapes(b: int, dim: int, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Returns the shapes of z[b 2 dim], ids and params, to compile a loss for."""
    rows = NamedSharding(mesh, sharding.BATCH)
    structs: Any = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in ((b,), (b, 2))]
    z = jax.ShapeDtypeStruct((b, 2, dim), jnp.float32, sharding=rows)
    params = {"log_temperature": jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))}
    return z, pairs.PairIds(*structs), params


class Timing(NamedTuple):
    """Seconds of the calls of one side of a comparison.

    Attributes:
      first: of the first call, which compiles.
      median: the median of the others.
    """

    first: float
    median: float


def time_in_turns(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Calls each side once, then all sides alternately, `repeats` times, so that a busy machine slows all of them down.

    Args:
      sides: name of a side → a function that does its work and waits for the result.
      repeats: the number of timed calls of each side.
    """

    def seconds(call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    first = {name: seconds(call) for name, call in sides.items()}
    turns = [{name: seconds(call) for name, call in sides.items()} for _ in range(repeats)]
    return {name: Timing(first[name], statistics.median(turn[name] for turn in turns)) for name in sides}
