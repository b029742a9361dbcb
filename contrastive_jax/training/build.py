"""From a config and a mesh to the jitted functions of a run, for the loop, the evaluations, the plan and the tests.

This is the only module that puts data, models, objectives and the mesh together, so that what is planned and tested is the very
step that is trained.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.config.dense import dense_layers, vector_size
from contrastive_jax.data import packing, pieces, spans
from contrastive_jax.data.batch import Batch
from contrastive_jax.data.pieces import RESERVED_IDS
from contrastive_jax.models import encoder as encoder_lib
from contrastive_jax.models.dropout import Noise, row_uniform
from contrastive_jax.objectives import pairing, registry, tokens
from contrastive_jax.objectives.objective import NO_OBJECTIVE, Objective, losses_of
from contrastive_jax.objectives.tokens import Teacher, TokenLoss
from contrastive_jax.runtime import layout as layout_lib
from contrastive_jax.runtime import sharding
from contrastive_jax.runtime.randomness import step_key
from contrastive_jax.training import compiler_options, grad_cache, noise, optim, views
from contrastive_jax.training import step as step_lib
from contrastive_jax.training.memory import Encode, Encoded, make_memory
from contrastive_jax.training.noise import Vocabulary
from contrastive_jax.training.views import Rows


class Run(NamedTuple):
    """What a config means on a mesh.

    Attributes:
      mesh: the mesh.
      shapes: a TrainState of jax.ShapeDtypeStruct with shardings: what a checkpoint is restored into.
      init: (pretrained encoder params or (), params of `memory.source` or ()) → TrainState, allocated in its shardings.
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
            "config.model.embedding_dim and config.model.dense as they were there"
        )
    rows = min(len(pretrained), len(init))
    return init.at[:rows].set(pretrained[:rows])


def padded_vocab(vocab_size: int) -> int:
    """Returns the rows of the embedding table: a multiple of 128, so that it tiles and shards evenly."""
    return -(-vocab_size // 128) * 128


def check_positions(config: ConfigDict, longest_span: int) -> None:
    """Raises UserError if the model does not take rows as long as training needs, or no packed ones.

    A packed row has the positions of each span anew, so that its longest span counts; other rows need a position per token.
    """
    packed, longest = config.data.pack_pairs > 1, encoder_lib.longest_row(config.model)
    if packed and config.model.num_layers and (config.model.mixer != "attention" or config.model.latent):
        what = f"mixer={config.model.mixer!r}" if config.model.mixer != "attention" else f"latent={config.model.latent}"
        raise UserError(
            f"config.data.pack_pairs={config.data.pack_pairs}: config.model.{what} would mix the spans of a row; set "
            "config.data.pack_pairs=1 and config.data.pack_rows=1"
        )
    needed = (
        longest_span + spans.delimiter_count(config.data) if packed else config.data.length * (2 if config.data.join else 1)
    )
    if longest is not None and needed > longest:
        key = "config.data.max_span" if packed else "config.data.length"
        places = f"a table of {needed} learned positions" if config.model.position == "learned" else f"rows of {needed} tokens"
        raise UserError(
            f"config.model.max_length={longest}: {key} needs {places}; raise config.model.max_length, or lower {key}"
        )


def check_run(config: ConfigDict, mesh: Mesh) -> None:
    """Checks rules that involve several groups of the config, or the mesh.

    Raises:
      UserError: two values do not go together; the message names the keys.
    """
    sampler = spans.make_sampler(config.data)
    packing.check_rows(config.data, sampler.min_span)
    check_positions(config, sampler.max_span)
    if config.objective.where == "ring" and sharding.batch_shards(mesh) == 1:
        raise UserError(
            "config.objective.where='ring': the batch is on one device only (mesh.data × mesh.fsdp = 1); take 'gathered'"
        )
    check_query_length(config)
    if config.data.hard_negatives and config.data.sampler != "fields":
        raise UserError(
            f"config.data.hard_negatives={config.data.hard_negatives}: no span of a document is one; set "
            "config.data.sampler='fields', or 0"
        )
    if config.objective.locals and (config.data.pack_pairs > 1 or dense_layers(config.model)):
        raise UserError(
            "config.objective.locals: needs config.data.pack_pairs=1, config.model.embedding_dim=0 and config.model.dense=()"
        )
    if not losses_of(config.objective) and not (config.tokens.name and config.tokens.weight):
        raise UserError("config.objective.weight=0: there is no token loss either; set config.tokens.name, or raise it")


def check_query_length(config: ConfigDict) -> None:
    """Raises UserError where rows of two lengths do not go with the rest; the message names the keys."""
    data, short = config.data, config.data.query_length
    if not short:
        return
    for mistaken, need in (
        (data.sampler != "fields", "config.data.sampler='fields'"),
        (not spans.delimiter_count(data) < short <= data.length, f"to lie between 3 and config.data.length={data.length}"),
        (data.pack_pairs > 1, "config.data.pack_pairs=1"),
        (data.copies > 1, "config.data.copies=1"),
        (data.join, "config.data.join=''"),
        (config.tokens.name, "config.tokens.name=''"),
        (config.objective.locals, "config.objective.locals=0"),
    ):
        if mistaken:
            raise UserError(f"config.data.query_length={short}: needs {need}")


class Model(NamedTuple):
    """The functions and parameters of one encoder with its heads.

    Attributes:
      encoder: the encoder.
      token_loss: its token loss, if it has one.
      init: () → params {"encoder", "objective"}, and "tokens" with a token loss.
      shardings: of the parameters.
    """

    encoder: encoder_lib.Encoder
    token_loss: TokenLoss | None
    init: Callable[[], Any]
    shardings: Any


def make_model(config: ConfigDict, mesh: Mesh, ids: int, objective: Objective) -> Model:
    """Builds the encoder of a config with its heads, for `ids` token ids; nothing is allocated yet."""
    encoder = encoder_lib.make_encoder(config.model, padded_vocab(ids), layout_lib.on_mesh(mesh))
    token_loss = tokens.make_token_loss(config, config.model.d_model, ids)

    def init() -> Any:
        rng = step_key(jax.random.key(config.seed), "init", jnp.int32(0))
        params = {"encoder": encoder.init(rng), "objective": objective.init(jax.random.fold_in(rng, 1))}
        return params | ({"tokens": token_loss.init(jax.random.fold_in(rng, 2))} if token_loss else {})

    shapes = jax.eval_shape(init)
    axes = jax.tree.map(lambda x: (None,) * x.ndim, shapes) | {"encoder": encoder.axes}  # heads are whole on each device
    return Model(encoder, token_loss, init, sharding.tree_shardings(axes, shapes, mesh))


def build(
    config: ConfigDict,
    mesh: Mesh,
    vocab_size: int,
    reserved: Mapping[str, int] = RESERVED_IDS,
    tables: pieces.Tables | None = None,
) -> Run:
    """Builds a run; nothing is allocated yet.

    Args:
      config: of the run, already checked by `config.check`.
      mesh: the mesh.
      vocab_size: ids of the data's tokenizer.
      reserved: {name: id} of those that no text has.
      tables: where words begin and sentences end, for noise that asks for it (`noise.reads_text`).

    Raises:
      UserError: two values of the config do not go together, or do not fit the mesh; the message names the keys.
    """
    ids = noise.vocabulary_size(config.noise, vocab_size)
    check_run(config, mesh)
    make_views = views.make_views(config, Vocabulary(vocab_size, reserved, tables))
    view_count, dim = views.encoded_views(config.data), vector_size(config.model)
    objective = registry.make_objective(config, view_count, dim, mesh, sharding.BATCH_AXES)
    model = teacher = make_model(config, mesh, ids, objective)
    if config.memory.source:
        # A step without a teacher is built where the libraries that read models are not installed, too.
        from contrastive_jax.training import warm_start

        taught = warm_start.teacher_config(config)
        check_positions(taught, spans.make_sampler(config.data).max_span)
        teacher = make_model(taught, mesh, ids, NO_OBJECTIVE)
    encode = make_encode(model.encoder, config, mesh, model.token_loss, config.objective.locals, teacher.encoder)
    memory = make_memory(config, make_encode(teacher.encoder, config, mesh, of_target=True), view_count, dim)
    optimizer = optim.make_optimizer(config.optim, config.steps, jax.eval_shape(model.init))

    def init_state(pretrained: Any = (), source: Any = ()) -> step_lib.TrainState:
        params = model.init()
        params["encoder"] = overlay(params["encoder"], pretrained or {})
        target = params if teacher is model else overlay(teacher.init(), source or {})
        return step_lib.TrainState(jnp.int32(0), params, optimizer.init(params), memory.init(target))

    state, batch_sharding = jax.eval_shape(init_state), NamedSharding(mesh, sharding.BATCH)
    placement = state_shardings(state, model.shardings, optimizer, memory.shardings(teacher.shardings, batch_sharding), mesh)
    train_step = step_lib.make_train_step(
        make_views, encode, objective, memory, optimizer, config.seed, config.tokens.weight, views.cut_tokens(config.data)
    )
    return Run(
        mesh=mesh,
        shapes=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placement),
        init=jax.jit(init_state, out_shardings=placement),
        train_step=jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(placement, sharding.replicated(mesh), batch_sharding),
            compiler_options=compiler_options.options_for(mesh, config.xla_options),
        ),
        encoder=model.encoder,
        schedule=optim.make_schedule(config.optim, config.steps),
    )


def state_shardings(
    state: step_lib.TrainState, param_shardings: Any, optimizer: optax.GradientTransformation, of_memory: Any, mesh: Mesh
) -> Any:
    """Returns the shardings of a training state, a TrainState of NamedShardings.

    The optimiser's moments are sharded like their parameters, and the rest of its state is replicated.

    Args:
      state: a TrainState of jax.ShapeDtypeStruct.
      param_shardings: a tree like `state.params`, of NamedShardings.
      optimizer: the optimiser that made `state.opt_state`.
      of_memory: a tree like `state.memory`, of NamedShardings.
      mesh: the mesh.
    """
    replicated: Any = sharding.replicated(mesh)
    moments = optax.tree.map_params(
        optimizer, lambda _, s: s, state.opt_state, param_shardings, transform_non_params=lambda _: replicated
    )
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
    minimum = shards * data.pack_rows * row_tokens(data) * (2 if data.join == "both" else 1)
    if tokens < minimum:
        raise UserError(
            f"config.micro_batch_tokens={tokens}: one pair (or packed group) on each of {shards} shards has {minimum} tokens; "
            "raise it"
        )
    return tokens // minimum * multiple


def row_tokens(data: ConfigDict) -> int:
    """Returns the tokens of one row of each view, as the encoder sees them; `data` is `config.data`."""
    return views.view_count(data) * data.length - views.cut_tokens(data)


def computes_one_token(config: ConfigDict) -> bool:
    """Returns whether the last block of a run's encoder computes one token per row, the pooled one."""
    reads_states = config.objective.locals or (config.tokens.name and config.tokens.weight)
    packed = config.data.pack_pairs * config.data.pack_rows > 1
    return encoder_lib.pools_one_token(config.model) and not reads_states and not packed


def of_views(tree: Any, chosen: list[int], shape: tuple[int, int, int]) -> Any:
    """Returns the rows of the chosen views, from arrays [g·v·r ...]; `shape` is (g, v, r)."""
    if len(chosen) == shape[1]:
        return tree
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:])[:, chosen].reshape(-1, *x.shape[1:]), tree)


def with_teacher(targets: Any, teacher: encoder_lib.Encoder, params: Any, rows: Rows, layout: Any) -> Any:
    """Returns targets with what a teacher of these parameters says of the same rows [g·v·r l]."""
    seen = teacher.encode(params["encoder"], rows.tokens, rows.segment, None, rows.row, *layout)
    return targets._replace(teacher=Teacher(params["tokens"], seen.table, seen.states))


def encode_two_lengths(encoder: encoder_lib.Encoder, params: Any, rows: Rows, rng: jax.Array | None, short: int) -> jax.Array:
    """Rows [g v 1 l] → unit vectors [g v 1 e]; view 0 has at most `short` tokens per row, and costs no more."""
    queries, documents = jax.tree.map(lambda x: x[..., :short] if x.ndim == 4 else x, rows.views(0, 1)), rows.views(1, None)

    def embed(rows: Rows) -> jax.Array:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), rows)
        z = encoder.apply(params, flat.tokens, flat.segment, rng, flat.row)
        return z.reshape(*rows.row.shape, -1)

    if rows.row.shape[1] == 1:
        return embed(queries)
    return jnp.concatenate([embed(queries), embed(documents)], axis=1)


def make_encode(
    encoder: encoder_lib.Encoder,
    config: ConfigDict,
    mesh: Mesh,
    token_loss: TokenLoss | None = None,
    local_states: int = 0,
    teacher: encoder_lib.Encoder | None = None,
    of_target: bool = False,
) -> Encode:
    """Returns the encoder of a step, (params, Rows, rng) → Encoded: all rows at once, or in micro-batches.

    Args:
      encoder: the encoder.
      config: of the run.
      mesh: the mesh.
      token_loss: the token loss to compute in the same pass; its parameters are params["tokens"].
      local_states: k, how many token states of the last view follow the views as further unit vectors, [b v+k e].
      teacher: the encoder of params["teacher"], from whose token states a token loss may learn.
      of_target: whether it is that of the run's memory, which may see the last views alone: no row of these is short.

    Raises:
      UserError: from `micro_batch_pairs`.
    """
    micro_pairs = micro_batch_pairs(config, mesh)
    pack_pairs, pack_rows, joined = config.data.pack_pairs, config.data.pack_rows, bool(config.data.join)
    short, all_states = 0 if of_target else config.data.query_length, bool(local_states or token_loss)

    def encode(params: Any, rows: Rows, rng: jax.Array | None) -> Encoded:
        def encode_groups(params: Any, rows: Rows) -> Encoded:
            """Rows [g v r ...] → unit vectors [g v pack_pairs e], and sums [g a r] of the a views with something to predict."""
            if short:
                return Encoded(encode_two_lengths(encoder, params["encoder"], rows, rng, short), None)
            g, v = rows.tokens.shape[:2]
            flat = jax.tree.map(lambda x: x.reshape(g * v * pack_rows, *x.shape[3:]), rows)
            layout = (pack_pairs, pack_rows), joined
            z, states, table = encoder.encode(params["encoder"], flat.tokens, flat.segment, rng, flat.row, *layout, all_states)
            z, sums = z.reshape(g, v, pack_pairs, -1), None
            if local_states:
                assert rng is not None  # a step has it
                last, segment = (x.reshape(g, v, *x.shape[1:])[:, -1] for x in (states, flat.segment))
                uniform = row_uniform(Noise(jax.random.fold_in(rng, 1), rows.row[:, -1, 0]), segment.shape[1:])
                z = jnp.concatenate([z, pairing.choose_states(last, segment, uniform, local_states)[:, :, None]], axis=1)
            if token_loss is not None:
                with jax.named_scope("token_loss"):
                    flat, states = of_views((flat, states), views.views_with_targets(config, v), (g, v, pack_rows))
                    targets = flat.targets
                    if token_loss.taught and teacher is not None:
                        targets = with_teacher(targets, teacher, params["teacher"], flat, layout)
                    sums = token_loss.loss(params["tokens"], table, states, targets)
            return Encoded(z, jax.tree.map(lambda x: x.reshape(g, -1, pack_rows), sums))

        if micro_pairs:
            cached = grad_cache.cached(encode_groups, micro_pairs // pack_pairs, mesh, sharding.BATCH_AXES)
            z, sums = cached(params, rows)
        else:
            z, sums = encode_groups(params, rows)
        return Encoded(z.swapaxes(1, 2).reshape(-1, z.shape[1], z.shape[3]), sums)  # [g v pack_pairs e] -> [b v e]

    return encode


def batch_shapes(config: ConfigDict, mesh: Mesh) -> Batch:
    """Returns the batch of a step as jax.ShapeDtypeStruct with shardings: what the step is compiled for ahead of time."""
    data, sampler, spread = config.data, spans.make_sampler(config.data), NamedSharding(mesh, sharding.BATCH)

    def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=spread)

    rows = shape(data.batch_size // data.pack_pairs, sampler.views, data.pack_rows, data.length)
    numbers = [(), (sampler.views - 1,)] if sampler.ends == "field" else []
    of_texts = (shape(data.batch_size, *sizes, dtype=jnp.float32) for sizes in numbers)
    return Batch(rows, rows, shape(data.batch_size), shape(data.batch_size, sampler.views), *of_texts)
