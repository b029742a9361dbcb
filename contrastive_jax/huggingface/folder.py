"""Folders of sentence-transformers and plain Hugging Face folders: which files they have, and what these mean here.

modules.json lists the parts of a sentence-transformers model in their order: Transformer (or StaticEmbedding), Pooling, Dense,
Normalize. A plain Hugging Face folder has none and is one Transformer.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from absl import logging
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.files import transfer
from contrastive_jax.huggingface import weights

# How sentence-transformers names a pooling → `config.model.pooling`: as a switch, and in newer files as a word.
POOLING = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "eos",
}
POOLING_WORDS = {"mean": "mean", "max": "max", "cls": "cls", "lasttoken": "eos"}
# The files that are read: of the model, and of its modules.
FILES = ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors")
# Longest text in tokens of a StaticEmbedding whose tokenizer sets no limit, and of a Transformer whose files state none.
DEFAULT_MAX_TOKENS = 512


class Modules(NamedTuple):
    """What modules.json says.

    Attributes:
      folder: the folder of the whole model.
      main: the folder of the Transformer or StaticEmbedding.
      is_bag: whether it is a StaticEmbedding.
      pooling: a value of `config.model.pooling`.
      projection: the folder of the Dense, if there is one.
    """

    folder: pathlib.Path
    main: pathlib.Path
    is_bag: bool = False
    pooling: str = "mean"
    projection: pathlib.Path | None = None


class TextSettings(NamedTuple):
    """How a folder wants its texts.

    Attributes:
      tokenizer: the path of tokenizer.json.
      max_tokens: the longest text in tokens, special tokens included.
      lower_case: whether texts are lower-cased first.
      split_special_tokens: whether a special token's name in a text, "[PAD]", is text like any other.
      prompts: view → the text put before its texts; views without one are absent.
    """

    tokenizer: pathlib.Path
    max_tokens: int
    lower_case: bool
    split_special_tokens: bool
    prompts: dict[str, str]


def read_modules(name: epath.PathLike) -> Modules:
    """Reads how a folder makes one vector of a text. A folder without modules.json gives the mean of its tokens.

    The libraries that read safetensors and tokenizers open local files only: a folder on a bucket is copied to the cache.

    Raises:
      UserError: it has a module or a pooling that this encoder lacks, or the bucket has no such folder.
    """
    folder = transfer.local_copy(name, FILES)
    path = folder / "modules.json"
    modules = Modules(folder, folder)
    if not path.exists():
        logging.warning("%s has no modules.json: taking the mean of all tokens", name)
        return modules
    try:
        described = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); is the folder complete?") from error
    for module in described:
        kind, part = module["type"].rpartition(".")[2], folder / module["path"]
        if kind in ("Transformer", "StaticEmbedding"):
            modules = modules._replace(main=part, is_bag=kind == "StaticEmbedding")
        elif kind == "Pooling":
            modules = modules._replace(pooling=read_pooling(part / "config.json"))
        elif kind == "Dense":
            modules = modules._replace(projection=part)
        elif kind != "Normalize":
            raise UserError(f"{path}: module {kind}; this encoder has Transformer, StaticEmbedding, Pooling, Dense, Normalize")
    return modules


def read_pooling(path: pathlib.Path) -> str:
    """Returns the `config.model.pooling` that a Pooling's config.json asks for.

    Raises:
      UserError: this encoder lacks it.
    """
    config = files.read_json(path)
    modes = [key for key, value in config.items() if key.startswith("pooling_mode") and value is True]
    if isinstance(config.get("pooling_mode"), str):
        modes.append(config["pooling_mode"])
    poolings = [(POOLING | POOLING_WORDS).get(mode) for mode in modes]
    if len(poolings) != 1 or poolings[0] is None:
        raise UserError(f"{path}: pooling by {', '.join(modes)}; this encoder knows {', '.join(POOLING_WORDS)}")
    return poolings[0]


def read_values(modules: Modules) -> dict[str, Any]:
    """Reads the values of `config.model` of a folder's encoder without reading its weights.

    Returns:
      The values; max_length is among them where positions are learned.

    Raises:
      UserError: a file is missing, or the model is one that this encoder cannot be; the message names it.
    """
    projection = files.read_json(modules.projection / "config.json") if modules.projection else {"out_features": 0}
    values = {"pooling": modules.pooling, "embedding_dim": projection["out_features"]}
    if modules.is_bag:
        return weights.bag_values(modules.main) | values
    config = weights.read_config(modules.main)
    values |= weights.FAMILIES[config["model_type"]].to_values(config)
    return values | ({"max_length": weights.position_rows(config)} if values["position"] == "learned" else {})


def read_model(modules: Modules) -> weights.Imported:
    """Reads the encoder of a folder, its projection included.

    Returns:
      The model, whose values of `config.model` also have pooling, embedding_dim and, where positions are learned, max_length.

    Raises:
      UserError: a file is missing, or the model is one that this encoder cannot be; the message names it.
    """
    imported = weights.load_bag(modules.main) if modules.is_bag else weights.load_transformer(modules.main)
    params, values = imported.params, imported.model | {"pooling": modules.pooling}
    if modules.projection:
        params |= {"projection": weights.load_projection(modules.projection)}
        values["embedding_dim"] = params["projection"]["kernel"].shape[1]
    if imported.length is not None:
        values["max_length"] = imported.length
    return imported._replace(params=params, model=values)


def read_text_settings(modules: Modules, positions: int | None) -> TextSettings:
    """Reads how a folder wants its texts.

    Args:
      modules: of the folder.
      positions: how many positions its encoder has; None: any number.

    Raises:
      UserError: there is no tokenizer.json.
    """
    main = modules.main
    tokenizer = main / "tokenizer.json"
    if not tokenizer.exists():
        raise UserError(f"hf:{main}: no tokenizer.json there; save the tokenizer with transformers' save_pretrained")
    settings = files.read_json(main / "sentence_bert_config.json")
    tokenizer_settings = files.read_json(main / "tokenizer_config.json")
    if modules.is_bag:  # no limit but its tokenizer's
        limits = [(files.read_json(tokenizer).get("truncation") or {}).get("max_length")]
    else:
        limits = [
            positions,
            settings.get("max_seq_length"),
            tokenizer_settings.get("model_max_length"),
            files.read_json(main / "config.json").get("max_position_embeddings"),
        ]
    prompts: dict[str, Any] = files.read_json(modules.folder / "config_sentence_transformers.json").get("prompts") or {}
    return TextSettings(
        tokenizer=tokenizer,
        max_tokens=int(min((limit for limit in limits if limit), default=DEFAULT_MAX_TOKENS)),
        lower_case=bool(settings.get("do_lower_case")),
        split_special_tokens=bool(tokenizer_settings.get("split_special_tokens")),
        prompts={view: prompts[view] for view in ("query", "document") if prompts.get(view)},
    )


def write_folder(
    folder: pathlib.Path,
    params: Any,
    model: Mapping[str, Any],
    tokenizer: tokenizers.Tokenizer,
    max_tokens: int,
    pad: int,
    prompts: Mapping[str, str],
    split_special_tokens: bool,
) -> None:
    """Writes all files that sentence-transformers and transformers read.

    Args:
      folder: an existing, empty folder.
      params: the encoder's parameters, float32 arrays on the host.
      model: values of `config.model`.
      tokenizer: it truncates texts and puts their delimiters.
      max_tokens: the longest text in tokens, delimiters included.
      pad: id of the padding token.
      prompts: view → prompt; empty: none.
      split_special_tokens: whether a special token's name in a text, "[PAD]", is text like any other.

    Raises:
      UserError: the encoder belongs to no family; the message names the keys that differ.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    parts = [("Normalize", "3_Normalize")]
    if model["embedding_dim"]:
        parts.insert(0, ("Dense", "2_Dense"))
    if model["num_layers"]:
        weights.save_transformer(folder, params, dict(model), max_tokens, pad)
        weights.write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
        pad_token = tokenizer.id_to_token(pad) or ""
        settings = tokenizer_config(max_tokens, pad_token, split_special_tokens)
        weights.write_json(folder / "tokenizer_config.json", settings)
        parts = [("Transformer", ""), ("Pooling", "1_Pooling"), *parts]
    else:
        weights.save_bag(folder, params, dict(model))
        parts = [("StaticEmbedding", ""), *parts]
    for _, path in parts:
        (folder / path).mkdir(exist_ok=True)
    if model["num_layers"]:
        weights.write_json(folder / "1_Pooling" / "config.json", pooling_config(model["pooling"], model["d_model"]))
    if model["embedding_dim"]:
        weights.save_projection(folder / "2_Dense", params["projection"])
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(parts)
    ]
    weights.write_json(folder / "modules.json", modules)
    default = "query" if prompts else None
    views = {"prompts": dict(prompts), "default_prompt_name": default, "similarity_fn_name": "cosine"}
    weights.write_json(folder / "config_sentence_transformers.json", {"model_type": "SentenceTransformer"} | views)


def tokenizer_config(max_tokens: int, pad_token: str, split_special_tokens: bool) -> dict[str, Any]:
    """Returns the tokenizer_config.json that transformers needs beside tokenizer.json; see `write_folder`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "pad_token": pad_token,
        "split_special_tokens": split_special_tokens,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }


def pooling_config(pooling: str, width: int) -> dict[str, Any]:
    """Returns the config.json of sentence-transformers' Pooling of states of this width.

    Raises:
      UserError: it has no such pooling.
    """
    if pooling not in POOLING.values():
        names = ", ".join(POOLING.values())
        raise UserError(f"config.model.pooling={pooling!r} has no form in sentence-transformers, which has {names}")
    modes = {mode: value == pooling for mode, value in POOLING.items()}
    return {"word_embedding_dimension": width, "include_prompt": True} | modes
