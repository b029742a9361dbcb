"""Training that starts from the weights of another model (`config.init_from`): a run, an exported folder, or hf:FOLDER."""

import functools
from typing import Any

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, load_run_config
from contrastive_jax.data import tokenizer
from contrastive_jax.huggingface import folder as folder_lib
from contrastive_jax.runtime import sharding
from contrastive_jax.runtime.model_name import parse_model_name, read_encoder_params

# The keys of config.model that do not decide what the weights are; the new run's values win.
FREE = {"dropout", "attention_dropout", "attention", "remat", "scan", "dtype", "pooling", "embedding_dim", "init_std"}


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns the config with the sizes and choices of the model that `config.init_from` names.

    Raises:
      UserError: no model can be read there, or the rows are longer than its table of positions.
    """
    if not config.init_from:
        return config
    resolved = ConfigDict(config)
    values = source_values(config.init_from)
    changed = {key: value for key, value in values.items() if key not in FREE and resolved.model[key] != value}
    resolved.model.update(changed)
    logging.info("config.model of %s: %s", config.init_from, changed)
    return resolved


def source_values(name: str) -> dict[str, Any]:
    """Returns the values of `config.model` of a model; max_length is among them where its positions are learned.

    Raises:
      UserError: it cannot be read.
    """
    parsed = parse_model_name(name)
    try:
        if not parsed.is_run:
            return folder_lib.read_values(folder_lib.read_modules(parsed.folder))
        values = load_run_config(parsed.folder).model.to_dict()
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error
    if values["position"] != "learned":
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
    name = config.init_from
    if not name:
        return ()
    parsed = parse_model_name(name)
    spread = functools.partial(sharding.even_shardings, mesh=mesh)
    try:
        if parsed.is_run:
            _, params = read_encoder_params(parsed, spread)
        else:
            params = folder_lib.read_model(folder_lib.read_modules(parsed.folder)).params
            params = sharding.place(params, spread(params))
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error
    tokenizer_file = tokenizer.find(parsed.folder)
    if not tokenizer_file or tokenizer.load(tokenizer_file).sha256 != manifest["tokenizer_sha256"]:
        raise UserError(
            f"config.data.dir={config.data.dir}: its tokenizer is not that of {name}; prepare the data with "
            f"--tokenizer={parsed.folder}"
        )
    return params
