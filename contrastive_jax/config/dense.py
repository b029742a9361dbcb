"""The layers between an encoder's pooling and its vector, as `config.model.embedding_dim` or `config.model.dense` has them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Dense(NamedTuple):
    """One of the layers; its `activation` is "identity" or "tanh"."""

    width: int
    activation: str
    bias: bool


def dense_layers(model: Mapping[str, Any]) -> dict[str, Dense]:
    """Returns the layers of a `config.model`, first to last, by the names of their parameters."""
    config = ConfigDict(model)  # a folder's values are a plain dict
    if config.embedding_dim:
        return {"projection": Dense(config.embedding_dim, "identity", config.bias)}
    return {f"dense_{number}": Dense(*layer) for number, layer in enumerate(config.dense)}


def vector_size(model: Mapping[str, Any]) -> int:
    """Returns e, the size of the vectors of an encoder with this `config.model`."""
    widths = [layer.width for layer in dense_layers(model).values()]
    return [model["latent"] * model["latent_layers"] or model["d_model"], *widths][-1]
