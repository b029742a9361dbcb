"""One builder: from a config and a mesh to the jitted functions of a run, for the loop, the evaluations and the tests."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from contrastive_jax import grad_cache, optim, sharding
from contrastive_jax import step as step_lib
from contrastive_jax.data import packing, spans
from contrastive_jax.models import encoder as encoder_lib
from contrastive_jax.models.layout import Layout
from contrastive_jax.objectives import pairs
from contrastive_jax.objectives import queue as queue_lib

# Of the step, by platform. TPU: without it XLA cuts a weight gradient's product into one part a device of the FSDP axis, each
# too narrow for the matrix unit (64 columns of S on v5e:4x4): by its own estimate twice the time of product, then scatter.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}


class Run(NamedTuple):
    """What a config means on a mesh.

    Attributes:
      mesh: the mesh.
      shapes: a TrainState of jax.ShapeDtypeStruct with shardings: what a checkpoint restores into.
      init: (encoder=()) → TrainState, allocated in its shardings; encoder has parameters to begin with (`warm_start`).
      train_step: (state, batch) → (state, metrics, z); donates the state.
      encode: (params, tokens int32[n l], mask bool[n l]) → float32[n e] on the host; host arrays, the same on each process.
      schedule: step → learning rate.
    """

    mesh: Mesh
    shapes: step_lib.TrainState
    init: Callable[..., step_lib.TrainState]
    train_step: jax.stages.Wrapped
    encode: Callable[[Any, np.ndarray, np.ndarray], np.ndarray]
    schedule: Callable[[Any], Any]


def merge(fresh: Any, given: Any) -> Any:
    """The parameters of `given` in the place of those of `fresh`; where it has fewer rows, or nothing, fresh ones stay.

    Raises:
      ValueError: they differ in more than their rows.
    """
    if isinstance(fresh, dict):
        return {key: merge(value, given[key]) if key in given else value for key, value in fresh.items()}
    if given.shape[1:] != fresh.shape[1:]:
        there, here = given.shape, fresh.shape
        raise ValueError(
            f"config.init_from: a parameter {there} where this model has {here}; set config.model.embedding_dim as it was there"
        )
    rows = min(len(given), len(fresh))  # ids that no text has may be fewer or more
    return fresh.at[:rows].set(given[:rows])


def padded_vocab(vocab_size: int) -> int:
    """The rows of the embedding table: a multiple of 128, so that it tiles and shards evenly."""
    return -(-vocab_size // 128) * 128


def build(config: ConfigDict, mesh: Mesh, vocab_size: int) -> Run:
    """Builds a run; nothing is allocated yet.

    Raises:
      ValueError: the config has a value that cannot be; the message names the key.
    """
    layout = Layout(mesh, sharding.BATCH[0], "tensor", sharding.RULES)
    encoder = encoder_lib.make(config.model, padded_vocab(vocab_size), config.data.length, layout)
    sampler = spans.make(config.data)
    packing.check(config.data, sampler.min_span + 2 * config.data.delimiters)
    views, dim = sampler.views, config.model.embedding_dim or config.model.d_model
    axes = sharding.BATCH[0]
    if config.objective.where == "ring" and sharding.shards(mesh) == 1:
        raise ValueError(
            "config.objective.where='ring': the batch is on one device only (mesh.data × mesh.fsdp = 1); take 'gathered'"
        )
    objective = pairs.make(config.objective, views, dim, mesh, axes)
    queue_lib.check(config.objective, views)

    def init_params() -> Any:
        root = jax.random.key(config.seed)
        key = step_lib.step_key(root, "init", jnp.int32(0))
        return {"encoder": encoder.init(key), "objective": objective.init(key)}

    params = jax.eval_shape(init_params)
    names = {"encoder": encoder.axes, "objective": jax.tree.map(lambda x: (None,) * x.ndim, params["objective"])}
    optimizer = optim.make(config.optim, config.steps, params)
    functions = step_lib.Functions(make_encode_batch(encoder.apply, config, mesh), objective.loss, objective.project)
    if config.objective.queue:
        functions = functions._replace(
            queue=step_lib.QueueFunctions(
                init=lambda encoder: queue_lib.init(config.objective, encoder, config.data.batch_size, dim),
                push=queue_lib.push,
                keys=functools.partial(queue_lib.keys, config.objective),
                follow=functools.partial(queue_lib.follow, config.objective),
            )
        )

    def init(given: Any = ()) -> step_lib.TrainState:
        fresh = init_params()
        fresh["encoder"] = merge(fresh["encoder"], given or {})
        past = functions.queue.init(fresh["encoder"]) if functions.queue else ()
        return step_lib.TrainState(jnp.int32(0), fresh, optimizer.init(fresh), past)

    rows: Any = NamedSharding(mesh, sharding.BATCH)
    placed = sharding.tree_shardings(names, params, mesh)
    placement = state_shardings(jax.eval_shape(init), placed, mesh)
    if functions.queue:
        placement = placement._replace(queue=queue_lib.Queue(placed["encoder"], rows, rows, rows))
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(init), placement)
    step = step_lib.make_train_step(functions, optimizer, jax.random.key(config.seed))
    return Run(
        mesh=mesh,
        shapes=shapes,
        init=jax.jit(init, out_shardings=placement),
        train_step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(placement, None, rows),
            compiler_options=COMPILER_OPTIONS.get(layout.platform),
        ),
        encode=make_encode(encoder.apply, mesh),
        schedule=optim.schedule(config.optim, config.steps),
    )


def micro_batch(config: ConfigDict, mesh: Mesh) -> int:
    """Pairs of a micro-batch over all devices, by count or by the tokens of its rows; 0: the whole batch at once.

    Raises:
      ValueError: both are given, or it does not spread over the devices.
    """
    pairs_, tokens, data = config.micro_batch, config.micro_batch_tokens, config.data
    if pairs_ < 0 or tokens < 0 or (pairs_ and tokens):
        raise ValueError(f"config.micro_batch={pairs_}, config.micro_batch_tokens={tokens}: not negative, and one of them 0")
    if data.batch_size < 1:
        raise ValueError(f"config.data.batch_size={data.batch_size}: must be at least 1")
    shards = sharding.shards(mesh)
    share = shards * data.pack_pairs
    for key, value in (("data.batch_size", data.batch_size), ("micro_batch", pairs_)):
        if value % share:
            raise ValueError(f"config.{key}={value} must be a multiple of mesh.data × mesh.fsdp × data.pack_pairs = {share}")
    if pairs_ > data.batch_size:
        raise ValueError(f"config.micro_batch={pairs_} is more than config.data.batch_size={data.batch_size}; 0 takes it whole")
    if not tokens:
        return pairs_
    least = shards * data.pack_rows * spans.make(data).views * data.length
    if tokens < least:
        raise ValueError(
            f"config.micro_batch_tokens={tokens}: a pair (or packed group) on each of {shards} shards has {least}; raise it"
        )
    return tokens // least * share


def make_encode_batch(apply: Callable, config: ConfigDict, mesh: Mesh) -> Callable:
    """The encoder of a step: all at once, or in micro-batches."""
    size = micro_batch(config, mesh)
    spans_, rows_ = config.data.pack_pairs, config.data.pack_rows

    def encode(params: Any, batch: step_lib.Batch, key: jax.Array) -> jax.Array:
        def groups(params: Any, arrays: step_lib.Batch) -> jax.Array:
            """Arrays [m rows v ...] of m groups of rows that share their spans → [m spans v e]."""
            m, _, v, _ = arrays["tokens"].shape
            by_view = (arrays[name].swapaxes(1, 2) for name in ("tokens", "segment", "row"))
            tokens, segment, row = (x.reshape(m * v * rows_, *x.shape[3:]) for x in by_view)
            return apply(params, tokens, segment, key, row, (spans_, rows_)).reshape(m, v, spans_, -1).swapaxes(1, 2)

        whole = grad_cache.cached(groups, size // spans_, mesh, sharding.BATCH[0]) if size else groups
        z = whole(params, jax.tree.map(lambda x: x.reshape(-1, rows_, *x.shape[1:]), batch))
        return z.reshape(-1, *z.shape[2:])

    return encode


def state_shardings(shapes: step_lib.TrainState, params: Any, mesh: Mesh) -> step_lib.TrainState:
    """Shardings of the whole state: optimiser moments lie where their parameter lies, the rest is replicated."""
    by_path = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    replicated = NamedSharding(mesh, P())

    def one(path: Any, _: Any) -> NamedSharding:
        # A moment's path ends with its parameter's: ...mu['encoder']['transformer'][...].
        tail = (jax.tree_util.keystr(path[i:]) for i in range(len(path)))
        return next((by_path[name] for name in tail if name in by_path), replicated)

    return jax.tree_util.tree_map_with_path(one, shapes)


def make_encode(apply: Callable, mesh: Mesh) -> Callable[[Any, np.ndarray, np.ndarray], np.ndarray]:
    """Encodes rows that every process holds in full; rows are padded to a multiple of the devices and cut again."""
    replicated = NamedSharding(mesh, P())
    forward = jax.jit(lambda params, batch: apply(params, batch["tokens"], batch["mask"]), out_shardings=replicated)
    shards = sharding.shards(mesh)

    def encode(params: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        n = len(tokens)
        total = -(-n // shards) * shards
        batch = {"tokens": np.resize(tokens, (total, *tokens.shape[1:])), "mask": np.resize(mask, (total, *mask.shape[1:]))}
        z = forward(params["encoder"], sharding.to_global(batch, np.arange(total), total, mesh))
        return jax.device_get(z.addressable_data(0))[:n]

    return encode


def batch_shapes(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a step as jax.ShapeDtypeStruct with shardings: what the step is compiled for ahead of time."""
    data, v = config.data, spans.make(config.data).views
    rows = (data.batch_size // data.pack_pairs * data.pack_rows, v, data.length)
    shapes = {"tokens": rows, "segment": rows, "doc": (data.batch_size,), "text": (data.batch_size, v)}
    spread = NamedSharding(mesh, sharding.BATCH)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=spread) for name, shape in shapes.items()}
