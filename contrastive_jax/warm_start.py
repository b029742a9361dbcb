"""Training that begins with the weights of another model (`config.init_from`): a run of ours, or a Hugging Face folder."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from contrastive_jax import checkpoint
from contrastive_jax.data import tokenizer
from contrastive_jax.models import hf

# Of `config.model`: how it is trained and run, not what its weights are.
FREE = {"dropout", "attention_dropout", "attention", "remat", "scan", "dtype", "pooling", "embedding_dim", "init_std"}


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the sizes and choices of the model that it begins with.

    Raises:
      ValueError: `config.init_from` names no model that can be read.
    """
    if not config.init_from:
        return config
    chosen = ConfigDict(config)
    values = source_config(config.init_from)
    changed = {key: value for key, value in values.items() if key not in FREE and chosen.model[key] != value}
    chosen.model.update(changed)
    logging.info("config.model of %s: %s", config.init_from, changed)
    return chosen


def source_config(name: str) -> dict[str, Any]:
    """Values of `config.model` of the model.

    Raises:
      ValueError: it cannot be read.
    """
    if name.startswith("hf:"):
        folder = pathlib.Path(name.removeprefix("hf:")).expanduser()
        found = hf.read_config(folder)
        return hf.FAMILIES[found["model_type"]].config(found)
    path = workdir_of(name)[0] / "config.json"
    if not path.exists():
        raise ValueError(f"config.init_from={name}: no config.json there; give a workdir, WORKDIR@STEP, or hf:FOLDER")
    return json.loads(path.read_text())["model"]


def workdir_of(name: str) -> tuple[epath.Path, int | None]:
    """Folder and step of "DIR" or "DIR@STEP"."""
    folder, _, step = name.rpartition("@")
    named = bool(folder) and step.isdigit()
    return epath.Path(folder if named else name).expanduser(), int(step) if named else None


def encoder_params(config: ConfigDict, manifest: dict[str, Any], mesh: Mesh) -> Any:
    """The encoder's parameters to begin with, on every device; () where there are none. A table may have fewer rows than ours.

    Args:
      config: of the run, resolved.
      manifest: of its data, whose ids must mean the same.
      mesh: of the run.

    Raises:
      ValueError: the data have another tokenizer, or rows are longer than the model has positions.
    """
    name = config.init_from
    if not name:
        return ()
    if name.startswith("hf:"):
        folder = epath.Path(name.removeprefix("hf:")).expanduser()
        params = hf.load(pathlib.Path(folder)).params
    else:
        folder, step = workdir_of(name)
        checkpoints = checkpoint.Checkpoints(folder, read_only=True)
        step = step if step is not None else max(checkpoints.steps(), default=None)
        if step not in checkpoints.steps():
            raise ValueError(f"config.init_from={name}: no such checkpoint; there are {checkpoints.steps()}")
        params = checkpoints.read(step, "params", lambda leaf: P())["encoder"]
    words = tokenizer.find(folder)
    if not words or tokenizer.load(words).sha256 != manifest["tokenizer_sha256"]:
        raise ValueError(
            f"config.data.dir={config.data.dir}: its tokenizer is not that of {name}; prepare the data with --tokenizer={name}"
        )
    params = jax.tree.map(np.asarray, params)
    places = params["transformer"].get("position_embedding")
    if places is not None:
        if len(places) < config.data.length:
            raise ValueError(f"config.data.length={config.data.length}: {name} has positions for {len(places)}; lower it")
        params["transformer"]["position_embedding"] = places[: config.data.length]
    whole = NamedSharding(mesh, P())

    def replicated(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])

    return jax.tree.map(replicated, params)
