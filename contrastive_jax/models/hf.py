"""Weights of Hugging Face models: one table a family, name there ↔ path here, read in both directions; no torch.

BERT, RoBERTa, DistilBERT, ModernBERT and GPT-2 (`model_type` of config.json). What a family has beyond this encoder and always
adds (the embedding of token type 0, RoBERTa's offset of positions) is folded into the tables of embeddings.
"""

import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from safetensors import numpy as safetensors

Params = Any  # nested dict of arrays
Tensors = dict[str, np.ndarray]


class Entry(NamedTuple):
    """A parameter here and there.

    Attributes:
      ours: path below the encoder's parameters, "blocks/attention/query/kernel"; below `blocks` one slice a layer.
      theirs: the tensor's name; {} is the number of the layer.
      transposed: whether theirs is [out in], as torch.nn.Linear has it; ours are [in out].
      part: (i, n): ours is part i of n of theirs, along out.
    """

    ours: str
    theirs: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)


class Family(NamedTuple):
    """How a family is read.

    Attributes:
      entries: the table.
      config: their config.json → values of `config.model`.
      prefix: what stands before the names where the file is of a model with a head.
      missing: names that a file may lack, because the model does without (regex).
    """

    entries: list[Entry]
    config: Callable[[dict[str, Any]], dict[str, Any]]
    prefix: str
    missing: str = "$^"


def pairs(ours: str, theirs: str, transposed: bool = False, part: tuple[int, int] = (0, 1), bias: bool = True) -> list[Entry]:
    """A linear map: kernel and bias."""
    kernel = Entry(f"{ours}/kernel", f"{theirs}.weight", transposed, part)
    return [kernel, Entry(f"{ours}/bias", f"{theirs}.bias", False, part)] if bias else [kernel]


def norm(ours: str, theirs: str, bias: bool = True) -> list[Entry]:
    """A layer norm: scale and bias."""
    scale = Entry(f"{ours}/scale", f"{theirs}.weight")
    return [scale, Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else [scale]


def bert_entries() -> list[Entry]:
    """BERT's and RoBERTa's."""
    layer = "encoder.layer.{}."
    table = [
        Entry("embedding", "embeddings.word_embeddings.weight"),
        Entry("position_embedding", "embeddings.position_embeddings.weight"),
        *norm("embedding_norm", "embeddings.LayerNorm"),
        *pairs("blocks/attention/out", f"{layer}attention.output.dense", True),
        *norm("blocks/attention_norm", f"{layer}attention.output.LayerNorm"),
        *pairs("blocks/mlp/up", f"{layer}intermediate.dense", True),
        *pairs("blocks/mlp/down", f"{layer}output.dense", True),
        *norm("blocks/mlp_norm", f"{layer}output.LayerNorm"),
    ]
    for name in ("query", "key", "value"):
        table += pairs(f"blocks/attention/{name}", f"{layer}attention.self.{name}", True)
    return table


def distilbert_entries() -> list[Entry]:
    """DistilBERT's."""
    layer = "transformer.layer.{}."
    table = [
        Entry("embedding", "embeddings.word_embeddings.weight"),
        Entry("position_embedding", "embeddings.position_embeddings.weight"),
        *norm("embedding_norm", "embeddings.LayerNorm"),
        *norm("blocks/attention_norm", f"{layer}sa_layer_norm"),
        *pairs("blocks/mlp/up", f"{layer}ffn.lin1", True),
        *pairs("blocks/mlp/down", f"{layer}ffn.lin2", True),
        *norm("blocks/mlp_norm", f"{layer}output_layer_norm"),
    ]
    for name, theirs in (("query", "q_lin"), ("key", "k_lin"), ("value", "v_lin"), ("out", "out_lin")):
        table += pairs(f"blocks/attention/{name}", f"{layer}attention.{theirs}", True)
    return table


def gpt2_entries() -> list[Entry]:
    """GPT-2's: its linear maps are [in out], query, key and value one of them."""
    table = [
        Entry("embedding", "wte.weight"),
        Entry("position_embedding", "wpe.weight"),
        *norm("blocks/attention_norm", "h.{}.ln_1"),
        *pairs("blocks/attention/out", "h.{}.attn.c_proj"),
        *norm("blocks/mlp_norm", "h.{}.ln_2"),
        *pairs("blocks/mlp/up", "h.{}.mlp.c_fc"),
        *pairs("blocks/mlp/down", "h.{}.mlp.c_proj"),
        *norm("final_norm", "ln_f"),
    ]
    for number, name in enumerate(("query", "key", "value")):
        table += pairs(f"blocks/attention/{name}", "h.{}.attn.c_attn", part=(number, 3))
    return table


def modernbert_entries() -> list[Entry]:
    """ModernBERT's, without biases: query, key and value are one map, gate and up another."""
    table = [
        Entry("embedding", "embeddings.tok_embeddings.weight"),
        *norm("embedding_norm", "embeddings.norm", bias=False),
        *norm("blocks/attention_norm", "layers.{}.attn_norm", bias=False),
        *pairs("blocks/attention/out", "layers.{}.attn.Wo", True, bias=False),
        *norm("blocks/mlp_norm", "layers.{}.mlp_norm", bias=False),
        *pairs("blocks/mlp/gate", "layers.{}.mlp.Wi", True, (0, 2), bias=False),
        *pairs("blocks/mlp/up", "layers.{}.mlp.Wi", True, (1, 2), bias=False),
        *pairs("blocks/mlp/down", "layers.{}.mlp.Wo", True, bias=False),
        *norm("final_norm", "final_norm", bias=False),
    ]
    for number, name in enumerate(("query", "key", "value")):
        table += pairs(f"blocks/attention/{name}", "layers.{}.attn.Wqkv", True, (number, 3), bias=False)
    return table


GELU = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}


def one_of(config: dict[str, Any], key: str, choices: dict[Any, Any], default: Any) -> Any:
    """What a value of config.json means here.

    Raises:
      ValueError: this encoder has no such thing.
    """
    value = config.get(key, default)
    if value not in choices:
        raise ValueError(f"config.json: {key}={value!r}; this encoder knows {', '.join(map(repr, choices))}")
    return choices[value]


def sizes(layers: int, width: int, heads: int, d_ff: int) -> dict[str, Any]:
    """What all families share."""
    if width % heads:
        raise ValueError(f"config.json: a width of {width} does not divide over {heads} heads")
    plain = dict(position="learned", norm="layernorm", bias=True, causal=False, local_window=0, embedding_dim=0)
    counts = dict(num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=heads, head_dim=width // heads, d_ff=d_ff)
    return plain | counts


def bert_config(config: dict[str, Any]) -> dict[str, Any]:
    """BERT's, RoBERTa's."""
    one_of(config, "position_embedding_type", {"absolute": None}, "absolute")
    return sizes(
        config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    ) | dict(
        norm_position="post",
        final_norm=False,
        embedding_norm=True,
        mlp=one_of(config, "hidden_act", GELU, "gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-12),
    )


def distilbert_config(config: dict[str, Any]) -> dict[str, Any]:
    """DistilBERT's."""
    return sizes(config["n_layers"], config["dim"], config["n_heads"], config["hidden_dim"]) | dict(
        norm_position="post",
        final_norm=False,
        embedding_norm=True,
        mlp=one_of(config, "activation", GELU, "gelu"),
        norm_eps=1e-12,
    )


def gpt2_config(config: dict[str, Any]) -> dict[str, Any]:
    """GPT-2's."""
    for key, usual in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        one_of(config, key, {usual: None}, usual)
    width = config["n_embd"]
    return sizes(config["n_layer"], width, config["n_head"], config.get("n_inner") or 4 * width) | dict(
        norm_position="pre",
        final_norm=True,
        embedding_norm=False,
        causal=True,
        mlp=one_of(config, "activation_function", GELU, "gelu_new"),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
    )


def modernbert_config(config: dict[str, Any]) -> dict[str, Any]:
    """ModernBERT's."""
    for key in ("attention_bias", "mlp_bias", "norm_bias"):
        one_of(config, key, {False: None}, False)
    gelu = one_of(config, "hidden_activation", GELU, "gelu")
    # Newer files write the bases of the rotary positions by kind of layer.
    rope = config.get("rope_parameters") or {}
    return sizes(
        config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    ) | dict(
        norm_position="pre",
        final_norm=True,
        embedding_norm=True,
        bias=False,
        position="rotary",
        mlp={"gelu_exact": "geglu_exact", "gelu": "geglu"}[gelu],
        norm_eps=config.get("norm_eps", 1e-5),
        local_window=config.get("local_attention", 128) // 2,
        global_every=config.get("global_attn_every_n_layers", 3),
        rope_theta=float(rope.get("full_attention", {}).get("rope_theta") or config.get("global_rope_theta", 160_000.0)),
        local_rope_theta=float(rope.get("sliding_attention", {}).get("rope_theta") or config.get("local_rope_theta", 10_000.0)),
    )


FAMILIES = {
    "bert": Family(bert_entries(), bert_config, "bert."),
    "roberta": Family(bert_entries(), bert_config, "roberta."),
    "distilbert": Family(distilbert_entries(), distilbert_config, "distilbert."),
    "gpt2": Family(gpt2_entries(), gpt2_config, "transformer."),
    "modernbert": Family(modernbert_entries(), modernbert_config, "model.", missing=r"layers\.0\.attn_norm\.weight"),
}
# Of RoBERTa, whose positions count from its padding id + 1.
OFFSET = {"roberta": 2}


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


def shape_of(path: str, model: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape of one layer's parameter where ours has more axes than theirs; None: it is the same."""
    heads, width, d = model["num_heads"], model["head_dim"], model["d_model"]
    if re.search(r"attention/(query|key|value)/", path):
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
        value = flat[entry.ours]
        layers = range(model["num_layers"]) if "{}" in entry.theirs else [None]
        for layer in layers:
            x = value if layer is None else value[layer]
            if shape_of(entry.ours, model) is not None:
                last = model["d_model"] if "/out/" in entry.ours else model["num_heads"] * model["head_dim"]
                x = x.reshape(-1) if entry.ours.endswith("bias") else x.reshape(-1, last)
            name = entry.theirs if layer is None else entry.theirs.format(layer)
            if not re.fullmatch(family.missing, name):
                parts.setdefault(name, {})[entry.part[0]] = x.T if entry.transposed else x
    transposed = {entry.theirs for entry in family.entries if entry.transposed}
    axis = {name: 0 if re.sub(r"\.\d+\.", ".{}.", name) in transposed else -1 for name in parts}
    return {
        name: np.ascontiguousarray(np.concatenate([found[i] for i in sorted(found)], axis=axis[name]))
        for name, found in parts.items()
    }


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
