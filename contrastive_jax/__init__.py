"""Contrastive pre-training of text encoders (CPT-text) in JAX.

    prepare(...)               makes a dataset of tokens from raw documents
    train(config, workdir)     trains an encoder, or goes on with a run
    load(name)                 loads a trained encoder: encode_query, encode_document, encode, similarity
    info_nce(x, y)             the loss as a plain function
    default_config()           the configuration with its defaults
    UserError                  a mistake that the user can mend

Everything is imported on first use.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from contrastive_jax.config import UserError, default_config
    from contrastive_jax.data.preparation.prepare import prepare
    from contrastive_jax.inference.text_model import load
    from contrastive_jax.objectives.dense import info_nce
    from contrastive_jax.training.loop import Setup

__all__ = ["UserError", "default_config", "info_nce", "load", "prepare", "set_up", "train"]

# TensorFlow reads these when it is imported. It would greet the user at every start, about oneDNN above all, unused here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# It would import Keras too, a third of its own time; the legacy Keras that it then looks for is not there.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
# etils then opens gs:// and s3:// through gcsfs and s3fs. Through TensorFlow, a file could not be kept open for writing, the
# address would always be Google's, and an error would be no OSError.
os.environ.setdefault("EPATH_USE_TF", "false")
# gcsfs and s3fs would remember what they once listed, and would not see what another process has written since.
os.environ.setdefault("FSSPEC_GCS", '{"use_listings_cache": false}')
os.environ.setdefault("FSSPEC_S3", '{"use_listings_cache": false}')
# gcsfs would ask Google's gRPC service what kind of bucket it has, and wait a minute where nothing but HTTP is reached.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

_MODULES = {
    "UserError": "config",
    "default_config": "config",
    "info_nce": "objectives.dense",
    "load": "inference.text_model",
    "prepare": "data.preparation.prepare",
}


def __getattr__(name: str) -> Any:
    """Imports the public functions on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def train(config: "ConfigDict", workdir: str | os.PathLike, stop_at: int | None = None) -> int:
    """Trains an encoder on this machine, or goes on with the run in `workdir`.

        config = contrastive_jax.default_config()
        config.data.dir, config.steps = "data/python", 500
        contrastive_jax.train(config, "runs/mine")
        model = contrastive_jax.load("runs/mine")

    Args:
      config: from `default_config`, or from the `get_config` of a recipe.
      workdir: the folder of checkpoints, metrics and results; it is made if needed.
      stop_at: the step at which to save and end, if `config.steps` is later.

    Returns:
      The step reached.

    Raises:
      UserError: the config or the data do not fit, or the run no longer trains (`training.guard.StoppedError`).
    """
    from contrastive_jax.training import loop

    setup = set_up(config, workdir)
    return loop.train(setup, config.steps if stop_at is None else stop_at)


def set_up(config: "ConfigDict", workdir: str | os.PathLike, strict: bool = False, other_data: bool = False) -> "Setup":
    """Sets up a run with its evaluations; the arguments are those of `training.loop.set_up`."""
    from etils import epath

    from contrastive_jax.evals import in_training
    from contrastive_jax.training import loop

    return loop.set_up(config, epath.Path(workdir), strict, other_data, in_training.Evaluator)
