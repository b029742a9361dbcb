"""Weights of Hugging Face models (`families`), read and written; no torch.

What a family has beyond this encoder and always adds (the embedding of token type 0, RoBERTa's offset of positions) is folded
into the tables of embeddings.
"""

import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
from safetensors import numpy as safetensors

from contrastive_jax.models.families import FAMILIES, Entry, Family, family_of

Params = Any  # nested dict of arrays
Tensors = dict[str, np.ndarray]

# Of RoBERTa, whose positions count from its padding id + 1.
OFFSET = {"roberta": 2}
ARCHITECTURES = {"bert": "BertModel", "gpt2": "GPT2Model", "modernbert": "ModernBertModel", "starcoder2": "Starcoder2Model"}
IDENTITY = "torch.nn.modules.linear.Identity"
# Values of `config.model` of a bag of embeddings.
BAG: dict[str, Any] = dict(
    num_layers=0, position="none", embedding_norm=False, final_norm=False, embedding_dim=0, pooling="mean"
)


class Imported(NamedTuple):
    """A model of a Hugging Face folder.

    Attributes:
      family: its `model_type`.
      model: values of `config.model`.
      params: the encoder's parameters, float32.
      length: the longest row it has positions for; None: any.
    """

    family: str
    model: dict[str, Any]
    params: Params
    length: int | None


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Their config.json.

    Raises:
      ValueError: there is none, or the family is not known.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"hf:{folder}: no config.json there")
    config = json.loads(path.read_text())
    if config.get("model_type") not in FAMILIES:
        raise ValueError(f"{path}: model_type={config.get('model_type')!r}; this encoder reads {', '.join(FAMILIES)}")
    return config


def read_tensors(folder: pathlib.Path) -> Tensors:
    """All tensors of its safetensors files (one, or several with an index).

    Raises:
      ValueError: there is none. Pickled weights are not read: they can run code.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"hf:{folder}: no .safetensors there (pickled weights are not read); save the model as safetensors")
    found: Tensors = {}
    for file in files:
        found |= safetensors.load_file(file)
    return found


def load(folder: pathlib.Path) -> Imported:
    """Reads a model.

    Raises:
      ValueError: something is missing, or is what this encoder does not have; the message names it.
    """
    config = read_config(folder)
    name = config["model_type"]
    family, tensors = FAMILIES[name], read_tensors(folder)
    if any(key.startswith(family.prefix) for key in tensors):
        tensors = {key.removeprefix(family.prefix): value for key, value in tensors.items()}
    model = family.config(config)
    flat = {entry.ours: ours(entry, family, tensors, model) for entry in family.entries}
    if "position_embedding" in flat:
        flat["position_embedding"] = flat["position_embedding"][OFFSET.get(name, 0) :]
        types = tensors.get("embeddings.token_type_embeddings.weight")
        if types is not None:
            flat["position_embedding"] = flat["position_embedding"] + types[0].astype(np.float32)
    length = len(flat["position_embedding"]) if "position_embedding" in flat else None
    return Imported(name, model, {"transformer": nested(flat)}, length)


def load_bag(folder: pathlib.Path) -> Imported:
    """Reads sentence-transformers' StaticEmbedding: the mean of the embeddings of tokens.

    Raises:
      ValueError: a tensor is missing.
    """
    tensors = read_tensors(folder)
    if "embedding.weight" not in tensors:
        raise ValueError(f"hf:{folder}: no tensor 'embedding.weight' in the safetensors")
    embedding = tensors["embedding.weight"].astype(np.float32)
    model = BAG | {"d_model": embedding.shape[1]}
    return Imported("bag", model, {"transformer": {"embedding": embedding}}, None)


def load_projection(folder: pathlib.Path) -> Params:
    """Reads sentence-transformers' Dense: kernel [d e] and, where it has one, bias [e].

    Raises:
      ValueError: it is not linear.
    """
    config = json.loads((folder / "config.json").read_text())
    if not config.get("activation_function", "Tanh").endswith("Identity") or config.get("use_residual"):
        raise ValueError(
            f"{folder}/config.json: a projection with {config.get('activation_function')}; this encoder's is linear"
        )
    tensors = read_tensors(folder)
    found = {"kernel": tensors["linear.weight"].T.astype(np.float32)}
    return found | ({"bias": tensors["linear.bias"].astype(np.float32)} if config.get("bias", True) else {})


def save(folder: pathlib.Path, params: Params, model: dict[str, Any], length: int, pad: int) -> str:
    """Writes config.json and model.safetensors of the family that the encoder belongs to, and returns its name.

    Args:
      folder: is there.
      params: of the encoder, float32; a projection is no part of it.
      model: `config.model`.
      length: of the longest row.
      pad: id of the padding.

    Raises:
      ValueError: it belongs to none.
    """
    name, config = family_of(model)
    tensors = theirs(name, params, model)
    if name == "bert":
        tensors["embeddings.token_type_embeddings.weight"] = np.zeros((1, model["d_model"]), np.float32)
    config |= {
        "architectures": [ARCHITECTURES[name]],
        "vocab_size": len(params["transformer"]["embedding"]),
        "n_positions" if name == "gpt2" else "max_position_embeddings": length,
        "pad_token_id": pad,
        "dtype": "float32",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), None),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return name


def save_bag(folder: pathlib.Path, params: Params, model: dict[str, Any]) -> None:
    """Writes a bag of embeddings as sentence-transformers' StaticEmbedding.

    Raises:
      ValueError: the encoder is more than that.
    """
    wrong = [key for key, value in BAG.items() if model[key] != value and key != "embedding_dim"]  # a module of its own
    if wrong:
        wanted = ", ".join(f"{key}={BAG[key]!r} (is {model[key]!r})" for key in wrong)
        raise ValueError(f"config.model: no layers, but no plain bag of embeddings either; that has {wanted}")
    tensors = {"embedding.weight": np.ascontiguousarray(params["transformer"]["embedding"])}
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def save_projection(folder: pathlib.Path, projection: Params) -> None:
    """Writes a projection {kernel [d e], bias [e]} as sentence-transformers' Dense."""
    kernel, bias = np.asarray(projection["kernel"]), projection.get("bias")
    width, dim = kernel.shape
    config = {"in_features": width, "out_features": dim, "bias": bias is not None, "activation_function": IDENTITY}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {"linear.weight": np.ascontiguousarray(kernel.T)}
    if bias is not None:
        tensors["linear.bias"] = np.asarray(bias)
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shape_of(path: str, model: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape of one layer's parameter where ours has more axes than theirs; None: it is the same."""
    heads, width, d = model["num_heads"], model["head_dim"], model["d_model"]
    if found := re.search(r"attention/(query|key|value)/", path):
        heads = heads if found[1] == "query" else model["num_kv_heads"]
        return (d, heads, width) if path.endswith("kernel") else (heads, width)
    return (heads, width, d) if path.endswith("attention/out/kernel") else None


def ours(entry: Entry, family: Family, tensors: Tensors, model: dict[str, Any]) -> np.ndarray:
    """One parameter from their tensors; layers are stacked."""

    def one(name: str) -> np.ndarray:
        if name not in tensors:
            if re.fullmatch(family.missing, name):
                return np.ones(model["d_model"], np.float32)
            raise ValueError(f"no tensor {name!r} in the safetensors; there are {', '.join(sorted(tensors)[:8])}, ...")
        x = tensors[name].astype(np.float32)
        x = x.T if entry.transposed else x
        index, count = entry.part
        x = np.split(x, count, axis=-1)[index]
        shape = shape_of(entry.ours, model)
        if shape is not None and math.prod(shape) != x.size:
            raise ValueError(f"{name} is {tensors[name].shape}, which is not what config.json says")
        return x if shape is None else x.reshape(shape)

    if "{}" not in entry.theirs:
        return one(entry.theirs)
    return np.stack([one(entry.theirs.format(layer)) for layer in range(model["num_layers"])])


def theirs(family_name: str, params: Params, model: dict[str, Any]) -> Tensors:
    """The tensors of a model of this family from the encoder's parameters: what `load` reads, but for what it folded."""
    flat, parts = flattened(params["transformer"]), dict[str, dict[int, np.ndarray]]()
    family = FAMILIES[family_name]
    for entry in family.entries:
        value = flat[entry.ours] if entry.ours in flat else no_bias(flat, entry.ours)
        layers = range(model["num_layers"]) if "{}" in entry.theirs else [None]
        for layer in layers:
            x = value if layer is None else value[layer]
            if shape_of(entry.ours, model) is not None:
                d = model["d_model"]
                matrix = (-1, d) if "/out/" in entry.ours else (d, -1)
                x = x.reshape(-1 if entry.ours.endswith("bias") else matrix)
            name = entry.theirs if layer is None else entry.theirs.format(layer)
            if not re.fullmatch(family.missing, name):
                parts.setdefault(name, {})[entry.part[0]] = x.T if entry.transposed else x
    transposed = {entry.theirs for entry in family.entries if entry.transposed}
    axis = {name: 0 if re.sub(r"\.\d+\.", ".{}.", name) in transposed else -1 for name in parts}
    return {
        name: np.ascontiguousarray(np.concatenate([found[i] for i in sorted(found)], axis=axis[name]))
        for name, found in parts.items()
    }


def no_bias(flat: dict[str, np.ndarray], path: str) -> np.ndarray:
    """Zeros for a bias that is not there."""
    beside, _, name = path.rpartition("/")
    if name != "bias":
        raise KeyError(path)
    if f"{beside}/scale" in flat:
        return np.zeros_like(flat[f"{beside}/scale"])
    layers, *shape = flat[f"{beside}/kernel"].shape
    return np.zeros((layers, *shape[2 if beside.endswith("/out") else 1 :]), np.float32)


def nested(flat: dict[str, np.ndarray]) -> Params:
    """{"a/b": x} → {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def flattened(tree: Params, prefix: str = "") -> dict[str, np.ndarray]:
    """{"a": {"b": x}} → {"a/b": x}."""
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": np.asarray(value)}
    return flat
