"""Weights and config.json of Hugging Face models, read and written without torch.

`families` says which tensor of a file is which parameter. What a family always adds beyond this encoder (the embedding of token
type 0, RoBERTa's offset of positions) is folded into the position embeddings.

Dimensions: d width of the encoder (`d_model`), e embedding.
"""

import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
from safetensors import numpy as safetensors
from safetensors import safe_open

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.config.dense import Dense, dense_layers
from contrastive_jax.huggingface.families import FAMILIES, Entry, Family, family_of

Params = Any  # nested dict of arrays
Tensors = dict[str, np.ndarray]

# Rows of a table of positions that no token uses: RoBERTa counts positions from its padding id + 1.
OFFSET = {"roberta": 2}
ARCHITECTURES = {"bert": "BertModel", "gpt2": "GPT2Model", "modernbert": "ModernBertModel", "starcoder2": "Starcoder2Model"}
POSITIONS = "embeddings.position_embeddings.weight"
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
BAG_TABLE = "embedding.weight"
VECTOR = "sentence_embedding"  # the name that sentence-transformers' modules have for a text's vector
# The activation of a layer of `config.model.dense` → the class of sentence-transformers' Dense.
DENSE = {"identity": "torch.nn.modules.linear.Identity", "tanh": "torch.nn.modules.activation.Tanh"}
# Values of `config.model` of a StaticEmbedding, which is the mean of the embeddings of tokens.
BAG: dict[str, Any] = dict(num_layers=0, position="none", embedding_norm=False, final_norm=False)
BAG |= dict(pooling="mean", pool_tanh="", token_weights=False, ngrams=())


class Imported(NamedTuple):
    """An encoder that was read from a folder.

    Attributes:
      family: its model_type, or "bag".
      model: values of `config.model`.
      params: the encoder's parameters, float32.
      length: the rows of its table of positions; None: it has none, and takes rows of any length.
    """

    family: str
    model: dict[str, Any]
    params: Params
    length: int | None


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the config.json of a folder.

    Raises:
      UserError: there is none, or this encoder does not know the family.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"hf:{folder}: no config.json there; give the folder of a Hugging Face model")
    config = files.read_json(path)
    if config.get("model_type") not in FAMILIES:
        raise UserError(f"{path}: model_type={config.get('model_type')!r}; this encoder reads {', '.join(FAMILIES)}")
    return config


def position_rows(config: dict[str, Any]) -> int:
    """Returns how many rows a learned position table has, from the config.json of a Hugging Face model."""
    name = config["model_type"]
    return config["n_positions" if name == "gpt2" else "max_position_embeddings"] - OFFSET.get(name, 0)


def read_tensors(folder: pathlib.Path) -> Tensors:
    """Reads all tensors of a folder's .safetensors, one file or several.

    Raises:
      UserError: there is no such file. Pickled weights are not read: they can run code.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"hf:{folder}: no .safetensors there (pickled weights are not read); save the model as safetensors")
    tensors: Tensors = {}
    for path in paths:
        tensors |= safetensors.load_file(path)
    return tensors


def load_transformer(folder: pathlib.Path) -> Imported:
    """Reads a Transformer of one of the families.

    Raises:
      UserError: a file or tensor is missing, or the model is one that this encoder cannot be; the message names it.
    """
    config = read_config(folder)
    name = config["model_type"]
    family, tensors = FAMILIES[name], read_tensors(folder)
    if any(key.startswith(family.prefix) for key in tensors):
        tensors = {key.removeprefix(family.prefix): value for key, value in tensors.items()}
    model = family.to_values(config)
    flat = {entry.path: to_jax(entry, family, tensors, model) for entry in family.entries}
    length = None
    if "position_embedding" in flat:
        positions = flat["position_embedding"][OFFSET.get(name, 0) :]
        if TOKEN_TYPES in tensors:
            positions = positions + tensors[TOKEN_TYPES][0].astype(np.float32)
        flat["position_embedding"], length = positions, len(positions)
    return Imported(name, model, {"transformer": nested(flat)}, length)


def bag_values(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the values of `config.model` of a StaticEmbedding; only the header of its file is read.

    Raises:
      UserError: its table is missing.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as tensors:
            if BAG_TABLE in tensors.keys():
                return BAG | {"d_model": tensors.get_slice(BAG_TABLE).get_shape()[1]}
    raise UserError(f"hf:{folder}: no tensor {BAG_TABLE!r} in its .safetensors; give the folder of a StaticEmbedding")


def load_bag(folder: pathlib.Path) -> Imported:
    """Reads sentence-transformers' StaticEmbedding: the mean of the embeddings of tokens.

    Raises:
      UserError: its table is missing.
    """
    values = bag_values(folder)
    embedding = read_tensors(folder)[BAG_TABLE].astype(np.float32)
    return Imported("bag", values, {"transformer": {"embedding": embedding}}, None)


def read_dense(folder: pathlib.Path) -> Dense:
    """Reads the config.json of sentence-transformers' class Dense.

    Raises:
      UserError: the layer has an activation that this encoder lacks, a residual connection, or other inputs than vectors.
    """
    path = folder / "config.json"
    config = files.read_json(path)
    name = config.get("activation_function", DENSE["tanh"])
    # The module of a class differs between versions of torch. Of classes from elsewhere the library makes a tanh.
    activations = [key for key, known in DENSE.items() if name.split(".")[-1] == known.split(".")[-1]]
    if not activations or not name.startswith("torch."):
        raise UserError(f"{path}: activation_function={name}; this encoder has Identity and Tanh, so choose another model")
    wrong = [f"use_residual={config['use_residual']}"] if config.get("use_residual") else []
    for key in ("module_input_name", "module_output_name"):
        if config.get(key, VECTOR) != VECTOR:
            wrong.append(f"{key}={config[key]}")
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)}; this encoder has no such layer, so choose another model")
    return Dense(config["out_features"], activations[0], config.get("bias", True))


def load_dense(folder: pathlib.Path) -> Params:
    """Reads the weights of sentence-transformers' class Dense.

    Returns:
      {"kernel": float32[d e]}, and "bias": float32[e] if the layer has one.
    """
    tensors = read_tensors(folder)
    layer = {"kernel": tensors["linear.weight"].T.astype(np.float32)}
    return layer | ({"bias": tensors["linear.bias"].astype(np.float32)} if "linear.bias" in tensors else {})


def save_transformer(folder: pathlib.Path, params: Params, model: dict[str, Any], max_tokens: int, pad: int) -> str:
    """Writes config.json and model.safetensors of the family that an encoder belongs to.

    Args:
      folder: an existing folder.
      params: the encoder's parameters, float32; a projection is not written here.
      model: `config.model`.
      max_tokens: the longest text in tokens; the rows of a learned table of positions win.
      pad: id of the padding token.

    Returns:
      The family's name.

    Raises:
      UserError: the encoder belongs to no family.
    """
    name, config = family_of(model)
    tensors = to_hf(name, params, model)
    if name == "bert":
        tensors[TOKEN_TYPES] = np.zeros((1, model["d_model"]), np.float32)
    positions = params["transformer"].get("position_embedding")
    config |= {
        "architectures": [ARCHITECTURES[name]],
        "vocab_size": len(params["transformer"]["embedding"]),
        "n_positions" if name == "gpt2" else "max_position_embeddings": max_tokens if positions is None else len(positions),
        "pad_token_id": pad,
        "dtype": "float32",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), None),
    }
    write_json(folder / "config.json", config)
    save_tensors(folder, tensors)
    return name


def save_bag(folder: pathlib.Path, params: Params, model: dict[str, Any]) -> None:
    """Writes a bag of embeddings as sentence-transformers' StaticEmbedding.

    A token's weight is multiplied into its embedding. The mean then has another length, but the same direction, which alone
    is left where no dense layer follows.

    Raises:
      UserError: the encoder is more than that; the message names the keys that differ.
    """
    folds = model["token_weights"] and not dense_layers(model)
    wrong = [key for key, value in BAG.items() if model[key] != value and not (key == "token_weights" and folds)]
    if wrong:
        changes = ", ".join(f"{key}={BAG[key]!r} (is {model[key]!r})" for key in wrong)
        raise UserError(f"config.model: no layers, but no plain bag of embeddings either; that has {changes}")
    table = np.asarray(params["transformer"]["embedding"])
    table = table * np.exp(np.asarray(params["token_weight"]))[:, None] if folds else table
    save_tensors(folder, {BAG_TABLE: np.ascontiguousarray(table)})


def save_dense(folder: pathlib.Path, params: Params, activation: str) -> None:
    """Writes a layer {kernel [d e], bias [e]} with its activation, "identity" or "tanh", as sentence-transformers' Dense."""
    kernel, bias = np.asarray(params["kernel"]), params.get("bias")
    width, dim = kernel.shape
    config = {"in_features": width, "out_features": dim, "bias": bias is not None, "activation_function": DENSE[activation]}
    write_json(folder / "config.json", config)
    tensors = {"linear.weight": np.ascontiguousarray(kernel.T)}
    save_tensors(folder, tensors if bias is None else tensors | {"linear.bias": np.asarray(bias)})


def load_token_weights(folder: pathlib.Path) -> np.ndarray:
    """Reads sentence-transformers' class WordWeights: the logarithm of each token's weight, float32[vocab].

    Raises:
      UserError: a weight is not above 0, or there is no config.json.
    """
    path = folder / "config.json"
    config = files.read_json(path)
    if "vocab" not in config:
        raise UserError(f"{path}: no 'vocab' there; is the folder complete?")
    known, other = config["word_weights"], config.get("unknown_word_weight", 1)
    weights = np.array([known.get(token, known.get(token.lower(), other)) for token in config["vocab"]], np.float32)
    if not (weights > 0).all():
        token = config["vocab"][int(np.argmin(weights > 0))]
        raise UserError(f"{path}: the weight of {token!r} is not above 0; this encoder has weights above 0 only")
    return np.log(weights)


def save_token_weights(folder: pathlib.Path, log_weights: np.ndarray, tokens: list[str]) -> None:
    """Writes the weights of tokens, in the order of their ids, as sentence-transformers' WordWeights."""
    weights = np.exp(log_weights[: len(tokens)], dtype=np.float32).tolist()
    known = dict(zip(tokens, weights, strict=True))
    write_json(folder / "config.json", {"vocab": tokens, "word_weights": known, "unknown_word_weight": 1})


def save_tensors(folder: pathlib.Path, tensors: Tensors) -> None:
    """Writes model.safetensors; the metadata is what transformers asks for."""
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file that people can read too."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def layer_shape(path: str, model: dict[str, Any]) -> tuple[int, ...] | None:
    """Returns the shape of one layer's parameter where it has separate axes for heads; None: the tensor has its shape."""
    heads, width, d = model["num_heads"], model["head_dim"], model["d_model"]
    if match := re.search(r"attention/(query|key|value)/", path):
        heads = heads if match[1] == "query" else model["num_kv_heads"]
        return (d, heads, width) if path.endswith("kernel") else (heads, width)
    return (heads, width, d) if path.endswith("attention/out/kernel") else None


def to_jax(entry: Entry, family: Family, tensors: Tensors, model: dict[str, Any]) -> np.ndarray:
    """Makes one parameter from the tensors of a file; the layers of a block's parameter are stacked.

    Raises:
      UserError: a tensor is missing, or its size contradicts config.json.
    """

    def read_layer(name: str) -> np.ndarray:
        if name not in tensors:
            if re.fullmatch(family.optional, name):
                return np.ones(model["d_model"], np.float32)
            raise UserError(f"no tensor {name!r} in the safetensors; there are {', '.join(sorted(tensors)[:8])}, ...")
        x = tensors[name].astype(np.float32)
        x = x.T if entry.transposed else x
        index, count = entry.part
        x = np.split(x, count, axis=-1)[index]
        shape = layer_shape(entry.path, model)
        if shape is not None and math.prod(shape) != x.size:
            raise UserError(f"{name} is {tensors[name].shape}, which is not what config.json says; are the files of one model?")
        return x if shape is None else x.reshape(shape)

    if "{}" not in entry.tensor:
        return read_layer(entry.tensor)
    return np.stack([read_layer(entry.tensor.format(layer)) for layer in range(model["num_layers"])])


def to_hf(family_name: str, params: Params, model: dict[str, Any]) -> Tensors:
    """Makes the tensors of a family's file from an encoder's parameters: the inverse of `load_transformer`.

    What was folded into the table of positions stays there.
    """
    flat, family = flattened(params["transformer"]), FAMILIES[family_name]
    parts: dict[str, dict[int, np.ndarray]] = {}  # tensor → its parts by number
    axes: dict[str, int] = {}  # tensor → the axis along which the parts lie
    for entry in family.entries:
        value = flat[entry.path] if entry.path in flat else zero_bias(flat, entry.path)
        in_layers = "{}" in entry.tensor
        for layer in range(model["num_layers"] if in_layers else 1):
            x = value[layer] if in_layers else value
            if layer_shape(entry.path, model) is not None:
                d = model["d_model"]
                matrix = (-1, d) if "/out/" in entry.path else (d, -1)
                x = x.reshape(-1 if entry.path.endswith("bias") else matrix)
            name = entry.tensor.format(layer) if in_layers else entry.tensor
            if not re.fullmatch(family.optional, name):
                parts.setdefault(name, {})[entry.part[0]] = x.T if entry.transposed else x
                axes[name] = 0 if entry.transposed else -1
    return {
        name: np.ascontiguousarray(np.concatenate([by_number[i] for i in sorted(by_number)], axis=axes[name]))
        for name, by_number in parts.items()
    }


def zero_bias(flat: dict[str, np.ndarray], path: str) -> np.ndarray:
    """Returns zeros for the bias of an encoder without biases, in the shape of that bias.

    Raises:
      KeyError: the path is not that of a bias.
    """
    parent, _, name = path.rpartition("/")
    if name != "bias":
        raise KeyError(path)
    if f"{parent}/scale" in flat:
        return np.zeros_like(flat[f"{parent}/scale"])
    layers, *shape = flat[f"{parent}/kernel"].shape
    return np.zeros((layers, *shape[2 if parent.endswith("/out") else 1 :]), np.float32)


def nested(flat: dict[str, np.ndarray]) -> Params:
    """Turns {"a/b": x} into {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def flattened(tree: Params, prefix: str = "") -> dict[str, np.ndarray]:
    """Turns {"a": {"b": x}} into {"a/b": x}."""
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": np.asarray(value)}
    return flat
