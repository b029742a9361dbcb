"""From a config and a mesh to the jitted functions of a run, for the loop, the evaluations, the plan and the tests.

This is the only module that puts data, models, objectives and the mesh together, so that what is planned and tested is the very
step that is trained.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.data import packing, spans
from contrastive_jax.data.batch import Batch
from contrastive_jax.models import encoder as encoder_lib
from contrastive_jax.objectives import pairs
from contrastive_jax.runtime import layout as layout_lib
from contrastive_jax.runtime import sharding
from contrastive_jax.runtime.randomness import step_key
from contrastive_jax.training import compiler_options, grad_cache, optim
from contrastive_jax.training import step as step_lib
from contrastive_jax.training.memory import Encode, Memory, Momentum, NoMemory
from contrastive_jax.training.rows import Rows


class Run(NamedTuple):
    """What a config means on a mesh.

    Attributes:
      mesh: the mesh.
      shapes: a TrainState of jax.ShapeDtypeStruct with shardings: what a checkpoint is restored into.
      init: (pretrained encoder params or ()) → TrainState, allocated in its shardings.
      train_step: (state, batch) → (state, metrics, z [b v e]); the metrics are replicated; donates the state.
      encoder: the encoder, for evaluations.
      schedule: step → learning rate.
    """

    mesh: Mesh
    shapes: step_lib.TrainState
    init: Callable[..., step_lib.TrainState]
    train_step: jax.stages.Wrapped
    encoder: encoder_lib.Encoder
    schedule: Callable[[Any], Any]


def overlay(init: Any, pretrained: Any) -> Any:
    """Copies `pretrained` into `init`; rows and parameters that it lacks keep their initial values.

    Token ids that no text has may be fewer or more in the pretrained table: only the rows that both have are copied.

    Raises:
      UserError: shapes differ in more than the number of rows.
    """
    if isinstance(init, dict):
        return {name: overlay(value, pretrained[name]) if name in pretrained else value for name, value in init.items()}
    if pretrained.shape[1:] != init.shape[1:]:
        raise UserError(
            f"config.init_from: a parameter has shape {pretrained.shape} there, this model needs {init.shape}; set "
            "config.model.embedding_dim as it was there"
        )
    rows = min(len(pretrained), len(init))
    return init.at[:rows].set(pretrained[:rows])


def padded_vocab(vocab_size: int) -> int:
    """Returns the rows of the embedding table: a multiple of 128, so that it tiles and shards evenly."""
    return -(-vocab_size // 128) * 128


def check_positions(config: ConfigDict, longest_span: int) -> None:
    """Raises UserError if training needs more learned positions than the model's table has.

    A packed row has the positions of each span anew, so that its longest span counts; other rows need a position per token.
    """
    packed = config.data.pack_pairs > 1
    needed = longest_span + spans.delimiter_count(config.data) if packed else config.data.length
    if config.model.position == "learned" and needed > config.model.max_length:
        key = "config.data.max_span" if packed else "config.data.length"
        raise UserError(
            f"config.model.max_length={config.model.max_length}: {key} needs a table of {needed} learned positions; raise "
            f"config.model.max_length, or lower {key}"
        )


def build(config: ConfigDict, mesh: Mesh, vocab_size: int) -> Run:
    """Builds a run; nothing is allocated yet.

    Args:
      config: of the run, already checked by `config.check`.
      mesh: the mesh.
      vocab_size: ids of the data's tokenizer.

    Raises:
      UserError: two values of the config do not go together, or do not fit the mesh; the message names the keys.
    """
    layout = layout_lib.on_mesh(mesh)
    encoder = encoder_lib.make_encoder(config.model, padded_vocab(vocab_size), layout)
    sampler = spans.make_sampler(config.data)
    packing.check_rows(config.data, sampler.min_span)
    check_positions(config, sampler.max_span)
    if config.objective.where == "ring" and sharding.batch_shards(mesh) == 1:
        raise UserError(
            "config.objective.where='ring': the batch is on one device only (mesh.data × mesh.fsdp = 1); take 'gathered'"
        )
    dim = config.model.embedding_dim or config.model.d_model
    objective = pairs.make_objective(config.objective, sampler.views, dim, mesh, sharding.BATCH_AXES)
    encode = make_encode(encoder.apply, config, mesh)
    memory: Memory = NoMemory()
    if config.objective.queue:
        memory = Momentum(config.objective, encode, config.data.batch_size, dim)

    def init_params() -> Any:
        rng = step_key(jax.random.key(config.seed), "init", jnp.int32(0))
        return {"encoder": encoder.init(rng), "objective": objective.init(rng)}

    shapes = jax.eval_shape(init_params)
    axes = {"encoder": encoder.axes, "objective": jax.tree.map(lambda x: (None,) * x.ndim, shapes["objective"])}
    optimizer = optim.make_optimizer(config.optim, config.steps, shapes)

    def init_state(pretrained: Any = ()) -> step_lib.TrainState:
        params = init_params()
        params["encoder"] = overlay(params["encoder"], pretrained or {})
        return step_lib.TrainState(jnp.int32(0), params, optimizer.init(params), memory.init(params["encoder"]))

    state, batch_sharding = jax.eval_shape(init_state), NamedSharding(mesh, sharding.BATCH)
    placement = state_shardings(state, sharding.tree_shardings(axes, shapes, mesh), optimizer, memory, mesh)
    train_step = step_lib.make_train_step(encode, objective.loss, objective.project, memory, optimizer, config.seed)
    return Run(
        mesh=mesh,
        shapes=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placement),
        init=jax.jit(init_state, out_shardings=placement),
        train_step=jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(placement, sharding.replicated(mesh), batch_sharding),
            compiler_options=compiler_options.options_for(mesh),
        ),
        encoder=encoder,
        schedule=optim.make_schedule(config.optim, config.steps),
    )


def state_shardings(
    state: step_lib.TrainState, param_shardings: Any, optimizer: optax.GradientTransformation, memory: Memory, mesh: Mesh
) -> Any:
    """Returns the shardings of a training state, a TrainState of NamedShardings.

    The optimiser's moments are sharded like their parameters, and the rest of its state is replicated. The memory (nothing, or
    MoCo's momentum encoder and queue) chooses its own shardings.

    Args:
      state: a TrainState of jax.ShapeDtypeStruct.
      param_shardings: a tree like `state.params`, of NamedShardings.
      optimizer: the optimiser that made `state.opt_state`.
      memory: the memory that made `state.memory`.
      mesh: the mesh.
    """
    replicated: Any = sharding.replicated(mesh)
    moments = optax.tree.map_params(
        optimizer, lambda _, s: s, state.opt_state, param_shardings, transform_non_params=lambda _: replicated
    )
    of_memory = memory.shardings(param_shardings["encoder"], NamedSharding(mesh, sharding.BATCH))
    return step_lib.TrainState(step=replicated, params=param_shardings, opt_state=moments, memory=of_memory)


def micro_batch_pairs(config: ConfigDict, mesh: Mesh) -> int:
    """Returns the pairs of a micro-batch over all devices, by their number or by the tokens of their rows; 0: the whole batch.

    Raises:
      UserError: both config.micro_batch and config.micro_batch_tokens are set, or it does not spread over the devices.
    """
    pairs_, tokens, data = config.micro_batch, config.micro_batch_tokens, config.data
    if pairs_ and tokens:
        raise UserError(f"config.micro_batch={pairs_}, config.micro_batch_tokens={tokens}: at most one of them may be set")
    shards = sharding.batch_shards(mesh)
    multiple = shards * data.pack_pairs
    for key, value in (("data.batch_size", data.batch_size), ("micro_batch", pairs_)):
        if value % multiple:
            raise UserError(f"config.{key}={value} must be a multiple of mesh.data × mesh.fsdp × data.pack_pairs = {multiple}")
    if pairs_ > data.batch_size:
        raise UserError(f"config.micro_batch={pairs_} is more than config.data.batch_size={data.batch_size}; 0 takes it whole")
    if not tokens:
        return pairs_
    minimum = shards * data.pack_rows * spans.make_sampler(data).views * data.length
    if tokens < minimum:
        raise UserError(
            f"config.micro_batch_tokens={tokens}: one pair (or packed group) on each of {shards} shards has {minimum} tokens; "
            "raise it"
        )
    return tokens // minimum * multiple


def make_encode(apply: Callable[..., jax.Array], config: ConfigDict, mesh: Mesh) -> Encode:
    """Returns the encoder of a step, (params, Rows, rng) → unit vectors [b v e]: all rows at once, or in micro-batches.

    Args:
      apply: of `models.encoder.Encoder`.
      config: of the run.
      mesh: the mesh.

    Raises:
      UserError: from `micro_batch_pairs`.
    """
    micro_pairs = micro_batch_pairs(config, mesh)
    pack_pairs, pack_rows = config.data.pack_pairs, config.data.pack_rows

    def encode(params: Any, rows: Rows, rng: jax.Array) -> jax.Array:
        def encode_groups(params: Any, rows: Rows) -> jax.Array:
            """Rows [g v r ...] → unit vectors [g v pack_pairs e]."""
            g, v = rows.tokens.shape[:2]
            flat = jax.tree.map(lambda x: x.reshape(g * v * pack_rows, *x.shape[3:]), rows)
            z = apply(params, flat.tokens, flat.segment, rng, flat.row, (pack_pairs, pack_rows))
            return z.reshape(g, v, pack_pairs, -1)

        if micro_pairs:
            z = grad_cache.cached(encode_groups, micro_pairs // pack_pairs, mesh, sharding.BATCH_AXES)(params, rows)
        else:
            z = encode_groups(params, rows)
        return z.swapaxes(1, 2).reshape(-1, rows.tokens.shape[1], z.shape[3])  # [g v pack_pairs e] -> [b v e]

    return encode


def batch_shapes(config: ConfigDict, mesh: Mesh) -> Batch:
    """Returns the batch of a step as jax.ShapeDtypeStruct with shardings: what the step is compiled for ahead of time."""
    data, v = config.data, spans.make_sampler(config.data).views
    rows = (data.batch_size // data.pack_pairs, v, data.pack_rows, data.length)
    shapes = Batch(tokens=rows, segment=rows, document=(data.batch_size,), span_hash=(data.batch_size, v))
    spread = NamedSharding(mesh, sharding.BATCH)
    return Batch(*(shape and jax.ShapeDtypeStruct(shape, jnp.int32, sharding=spread) for shape in shapes))
