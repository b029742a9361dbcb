"""Training that starts from another model (`config.init_from`), or learns from one: a run, an exported folder, or hf:FOLDER."""

import copy
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config, load_run_config
from contrastive_jax.data import tokenizer
from contrastive_jax.huggingface import folder as folder_lib
from contrastive_jax.models import encoder as encoder_lib
from contrastive_jax.runtime import sharding
from contrastive_jax.runtime.model_name import parse_model_name, read_params

# The keys of config.model that do not decide what the weights are; the new run's values win.
FREE = {"dropout", "attention_dropout", "attention", "remat", "saved", "scan", "dtype", "products", "pooling", "pool_tanh"}
FREE |= {"embedding_dim", "dense", "init", "init_std", "part_mask", "latent_kappa"}
# Parameters that begin at 0 and then change nothing: a run may add them to a model that has none.
ADDED = {"ngrams", "token_weights"}
# The keys of config.model that say how it is computed, which a teacher has of the run.
COMPUTATION = ("attention", "scan", "dtype", "products")
# The sizes that `widen` multiplies, and the logical axes of parameters that have them.
WIDENED = ("d_model", "num_heads", "num_kv_heads", "d_ff")
WIDE_AXES = ("embed", "heads", "kv_heads", "mlp")


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns the config with the sizes and choices of the model of `config.init_from`.

    It has the blocks `config.init_layers` of that model, and is `config.init_widen` times as wide.

    Raises:
      UserError: no model can be read there, there is none to widen or to take blocks of, or it lacks one of the blocks.
    """
    layers = config.init_layers
    if not config.init_from:
        if config.init_widen > 1:
            raise UserError(f"config.init_widen={config.init_widen}: there is no model to widen; set config.init_from")
        if layers:
            raise UserError(f"config.init_layers={layers}: there is no model to take blocks of; set config.init_from")
        return config
    resolved = copy.deepcopy(config)
    values = source_values(config.init_from)
    if layers:
        if not set(layers) <= set(range(values["num_layers"])):
            raise UserError(f"config.init_layers={layers}: {config.init_from} has {values['num_layers']} blocks, from 0")
        values["num_layers"] = len(layers)
    values |= {key: config.init_widen * values[key] for key in WIDENED if key in values}
    values = {key: value for key, value in values.items() if key not in FREE and (value or key not in ADDED)}
    changed = {key: value for key, value in values.items() if resolved.model[key] != value}
    resolved.model.update(changed)
    logging.info("config.model of %s: %s", config.init_from, changed)
    return resolved


def teacher_config(config: ConfigDict) -> ConfigDict:
    """Returns the config with the model of `config.memory.source` in place of its own, and with its token head.

    Raises:
      UserError: no model can be read there, or nothing is frozen.
    """
    name = config.memory.source
    if config.memory.kind != "frozen":
        raise UserError(f"config.memory.source={name}: only a frozen target is another model; set config.memory.kind='frozen'")
    taught, parsed = copy.deepcopy(config), parse_model_name(name)
    taught.model.update(default_config().model)
    taught.model.update(source_values(name, "memory.source") | {key: config.model[key] for key in COMPUTATION})
    taught.model.update(remat="none", saved=())  # it has no backward pass
    if config.tokens.name != "distil":
        taught.tokens.name = ""
        return taught
    head = load_run_config(parsed.folder).tokens if parsed.is_run else None
    if head is None or head.name not in ("mlm", "distil") or not head.weight:
        raise UserError(f"config.memory.source={name}: it does not predict tokens; give a run with config.tokens.name='mlm'")
    ours, theirs = config.model.d_model, taught.model.d_model
    if ours != theirs and dict(config.tokens.distil).get("cosine"):
        raise UserError(
            f"config.tokens.distil: a teacher of width {theirs} has no cosine with states of width {ours}; set cosine to 0"
        )
    taught.tokens.head = head.head
    return taught


def source_values(name: str, key: str = "init_from") -> dict[str, Any]:
    """Returns the values of `config.model` of a model; max_length is among them where its parameters depend on it.

    Args:
      name: of the model.
      key: of the config that names it, for messages.

    Raises:
      UserError: it cannot be read.
    """
    parsed = parse_model_name(name)
    try:
        if not parsed.is_run:
            return folder_lib.read_values(folder_lib.read_modules(parsed.folder))
        model = load_run_config(parsed.folder).model
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from error
    values = model.to_dict()
    if encoder_lib.longest_row(model) is None:
        values.pop("max_length")
    return values


def encoder_params(config: ConfigDict, manifest: dict[str, Any], mesh: Mesh) -> Any:
    """Reads the encoder's parameters that training starts from.

    Args:
      config: of the run, resolved.
      manifest: of its data; the data's token ids must mean what they meant to the model.
      mesh: of the run.

    Returns:
      The parameters, spread over the devices of the mesh; () where `config.init_from` is empty. `training.build` lays them over
      the initial ones, whose embedding table may have more or fewer rows.

    Raises:
      UserError: the model cannot be read, or the data has another tokenizer.
    """
    if not config.init_from:
        return ()
    params = model_params("init_from", config.init_from, config, manifest, mesh)["encoder"]

    def change(params: Any) -> Any:
        if config.init_layers:
            params = take_layers(params, config.init_layers)
        return widen(params, config.model, config.init_widen) if config.init_widen > 1 else params

    spread = sharding.even_shardings(jax.eval_shape(change, params), mesh)
    return jax.jit(change, out_shardings=spread)(params)


def take_layers(params: Any, layers: Sequence[int]) -> Any:
    """Returns an encoder's parameters with these blocks alone, in this order (DistilBERT, arXiv 1910.01108, §2)."""
    transformer = params["transformer"]
    blocks = jax.tree.map(lambda x: x[np.array(layers)], transformer["blocks"])
    return params | {"transformer": transformer | {"blocks": blocks}}


def teacher_params(config: ConfigDict, manifest: dict[str, Any], mesh: Mesh) -> Any:
    """Reads the parameters of `config.memory.source`, as `encoder_params` does, and those of its token head; () without a name.

    Raises:
      UserError: as `encoder_params`.
    """
    name = config.memory.source
    return model_params("memory.source", name, config, manifest, mesh) if name else ()


def model_params(key: str, name: str, config: ConfigDict, manifest: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Reads the parameters {"encoder": ...} of the model that the config's `key` names, and {"tokens": ...} of a run with them.

    Raises:
      UserError: the model cannot be read, or the data has another tokenizer.
    """
    parsed = parse_model_name(name)
    spread = functools.partial(sharding.even_shardings, mesh=mesh)
    try:
        if parsed.is_run:
            _, params = read_params(parsed, spread)
        else:
            encoder = folder_lib.read_model(folder_lib.read_modules(parsed.folder)).params
            params = {"encoder": sharding.place(encoder, spread(encoder))}
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from error
    folder = parsed.folder
    if not parsed.is_run:  # sentence-transformers may keep the tokenizer beside the weights, in a folder of their own
        modules = folder_lib.read_modules(folder)
        folder /= modules.main.relative_to(modules.folder).as_posix()
    tokenizer_file = tokenizer.find(folder)
    if not tokenizer_file or tokenizer.load(tokenizer_file).sha256 != manifest["tokenizer_sha256"]:
        raise UserError(
            f"config.data.dir={config.data.dir}: its tokenizer is not that of {name}; prepare the data with "
            f"--tokenizer={folder}"
        )
    return {name: params[name] for name in ("encoder", "tokens") if name in params}


def widen(params: Any, config: ConfigDict, k: int) -> Any:
    """Makes an encoder k times as wide that gives the same cosines ("lossless widening", after Su, kexue.fm/archives/8444).

    The residual stream becomes k copies of the narrow one: tables, norms, biases and heads are repeated; a head stays as wide.
    A kernel is repeated along its outputs. Along its inputs copy c has the share a_c of it, Σ_c a_c = 1, so that the sum over
    the copies is the narrow one. Norms see the same statistics. The shares are unequal, and others for each copy of the
    outputs: with equal ones the copies would have equal gradients, and stay equal for ever.

    Args:
      params: the narrow encoder's parameters.
      config: `config.model` of the wide encoder.
      k: how many copies.

    Returns:
      The wide encoder's parameters; its vectors are k copies of the narrow one's, divided by √k, or equal to them where there
      is a projection.

    Raises:
      UserError: the mixer has weights that are no kernels from width to width.
    """
    if config.mixer != "attention" or config.latent:
        said = f"config.model.mixer={config.mixer!r}, config.model.latent={config.latent}"
        raise UserError(f"config.init_widen={k}: only attention can be widened, without latents, not {said}; set 1")

    def widen_leaf(path: Any, leaf: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        name = sharding.path_of(path)
        wide = [leaf.ndim - 1] if "norm/" in name else [i for i, axis in enumerate(names) if axis in WIDE_AXES]
        if not wide or not name.endswith("/kernel"):
            return jnp.concatenate([leaf] * k, axis=wide[0]) if wide else leaf
        inputs, *outputs = wide  # the last layer of a projection has no output to repeat
        shares = np.random.default_rng(zlib.crc32(name.encode())).uniform(0.5, 1.5, (k ** len(outputs), k)).astype(np.float32)
        copies = [jnp.concatenate([a * leaf for a in row / row.sum()], axis=inputs) for row in shares]
        return jnp.concatenate(copies, axis=outputs[0]) if outputs else copies[0]

    def common(tree: Any, other: Any) -> Any:
        """Returns what both have, with the values of `tree`: of projections or n-grams, one of the two may have none."""
        is_inner = isinstance(tree, dict)
        return {name: common(tree[name], other[name]) for name in tree if name in other} if is_inner else tree

    axes = encoder_lib.make_encoder(config, params["transformer"]["embedding"].shape[0]).axes
    return jax.tree_util.tree_map_with_path(widen_leaf, common(params, axes), common(axes, params))
