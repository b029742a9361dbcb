"""Folders of sentence-transformers and plain Hugging Face folders: which files they have, and what these mean here.

modules.json lists the parts of a sentence-transformers model in their order: Transformer (or StaticEmbedding), WordWeights,
Pooling, any number of Dense, Normalize. A plain Hugging Face folder has none and is one Transformer.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from absl import logging
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.config.dense import Dense, dense_layers
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
# The place of each module among the others.
ORDER = {"Transformer": 0, "StaticEmbedding": 0, "WordWeights": 1, "Pooling": 2, "Dense": 3, "Normalize": 4}
# The files that are read: of the model, and of its modules.
FILES = ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors")
# Longest text in tokens of a StaticEmbedding whose tokenizer sets no limit, and of a Transformer whose files state none.
DEFAULT_MAX_TOKENS = 512
WHOLE_TEXTS = 2**20  # tokens: as good as no limit


class Modules(NamedTuple):
    """What modules.json says.

    Attributes:
      folder: the folder of the whole model.
      main: the folder of the Transformer or StaticEmbedding.
      is_bag: whether it is a StaticEmbedding.
      pooling: a value of `config.model.pooling`.
      include_prompt: whether the tokens of a prompt are pooled too.
      dense: the folders of the Dense, first to last.
      token_weights: the folder of the WordWeights; None: all tokens count alike.
    """

    folder: pathlib.Path
    main: pathlib.Path
    is_bag: bool = False
    pooling: str = "mean"
    include_prompt: bool = True
    dense: tuple[pathlib.Path, ...] = ()
    token_weights: pathlib.Path | None = None


class TextSettings(NamedTuple):
    """How a folder wants its texts.

    Attributes:
      tokenizer: the path of tokenizer.json.
      max_tokens: the longest text in tokens, special tokens included.
      lower_case: whether texts are lower-cased first.
      split_special_tokens: whether a special token's name in a text, "[PAD]", is text like any other.
      prompts: view, or another name → the text put before the texts that are encoded under it; those without one are absent.
      default_prompt: the name of the prompt that texts get for which none is named; None: they get none.
    """

    tokenizer: pathlib.Path
    max_tokens: int
    lower_case: bool
    split_special_tokens: bool
    prompts: dict[str, str]
    default_prompt: str | None


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
    kinds = [module["type"].rpartition(".")[2] for module in described]
    for kind in kinds:
        if kind not in ORDER:
            raise UserError(f"{path}: module {kind}; this encoder has {', '.join(ORDER)}")
    places = [ORDER[kind] for kind in kinds]
    if places != sorted(places) or places.count(0) != 1 or max(places.count(1), places.count(2)) > 1:
        names = ", ".join(kinds)
        raise UserError(
            f"{path}: modules {names}; this encoder has one of each, and many Dense, in the order {', '.join(ORDER)}"
        )
    for kind, module in zip(kinds, described, strict=True):
        part = folder / module["path"]
        if kind in ("Transformer", "StaticEmbedding"):
            modules = modules._replace(main=part, is_bag=kind == "StaticEmbedding")
        elif kind == "WordWeights":
            modules = modules._replace(token_weights=part)
        elif kind == "Pooling":
            include_prompt = files.read_json(part / "config.json").get("include_prompt", True)
            modules = modules._replace(pooling=read_pooling(part / "config.json"), include_prompt=include_prompt)
        elif kind == "Dense":
            modules = modules._replace(dense=(*modules.dense, part))
    return modules


def read_pooling(path: pathlib.Path) -> str:
    """Returns the `config.model.pooling` that a Pooling's config.json asks for.

    Raises:
      UserError: this encoder lacks it.
    """
    config = files.read_json(path)
    switches = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    stated = config.get("pooling_mode") or switches or "mean"
    modes = [stated] if isinstance(stated, str) else stated
    poolings = [(POOLING | POOLING_WORDS).get(mode) for mode in modes]
    if len(poolings) != 1 or poolings[0] is None:
        raise UserError(f"{path}: pooling by {', '.join(modes)}; this encoder knows {', '.join(POOLING_WORDS)}")
    return poolings[0]


def read_head(modules: Modules, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of `config.model` of a folder's encoder, with those of its Pooling and Dense laid over them.

    Raises:
      UserError: a Dense is one that this encoder cannot be.
    """
    layers = [weights.read_dense(folder) for folder in modules.dense]
    values = values | {"pooling": modules.pooling, "embedding_dim": 0, "dense": ()}
    values |= {"token_weights": True} if modules.token_weights else {}
    if layers and layers == [Dense(layers[0].width, "identity", values.get("bias", True))]:
        return values | {"embedding_dim": layers[0].width}
    return values | {"dense": tuple(map(tuple, layers))}


def read_values(modules: Modules) -> dict[str, Any]:
    """Reads the values of `config.model` of a folder's encoder without reading its weights.

    Returns:
      The values; max_length is among them where positions are learned.

    Raises:
      UserError: a file is missing, or the model is one that this encoder cannot be; the message names it.
    """
    if modules.is_bag:
        return read_head(modules, weights.bag_values(modules.main))
    config = weights.read_config(modules.main)
    values = read_head(modules, weights.FAMILIES[config["model_type"]].to_values(config))
    return values | ({"max_length": weights.position_rows(config)} if values["position"] == "learned" else {})


def read_model(modules: Modules) -> weights.Imported:
    """Reads the encoder of a folder, its Dense included.

    Returns:
      The model, whose values of `config.model` also have pooling, embedding_dim, dense and, where positions are learned,
      max_length.

    Raises:
      UserError: a file is missing, or the model is one that this encoder cannot be; the message names it.
    """
    imported = weights.load_bag(modules.main) if modules.is_bag else weights.load_transformer(modules.main)
    values = read_head(modules, imported.model)
    parts = zip(dense_layers({"bias": True} | values), modules.dense, strict=True)
    params = imported.params | {name: weights.load_dense(folder) for name, folder in parts}
    if modules.token_weights is not None:
        stored, rows = weights.load_token_weights(modules.token_weights), len(params["transformer"]["embedding"])
        params["token_weight"] = np.pad(stored[:rows], (0, max(rows - len(stored), 0)))
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
    views = modules.folder / "config_sentence_transformers.json"
    settings = files.read_json(main / "sentence_bert_config.json")
    tokenizer_settings = files.read_json(main / "tokenizer_config.json")
    if modules.is_bag:  # no limit but its tokenizer's
        limits = [(files.read_json(tokenizer).get("truncation") or {}).get("max_length", WHOLE_TEXTS)]
    else:
        limits = [
            positions,
            settings.get("max_seq_length") or tokenizer_settings.get("model_max_length"),
            files.read_json(main / "config.json").get("max_position_embeddings"),
        ]
    return TextSettings(
        tokenizer=tokenizer,
        max_tokens=int(min((limit for limit in limits if limit), default=DEFAULT_MAX_TOKENS)),
        lower_case=bool(settings.get("do_lower_case")),
        split_special_tokens=bool(tokenizer_settings.get("split_special_tokens")),
        prompts=read_prompts(views),
        default_prompt=files.read_json(views).get("default_prompt_name"),
    )


def read_prompts(path: pathlib.Path) -> dict[str, str]:
    """Returns the prompts of a folder by their names, without empty ones.

    encode_query of sentence-transformers takes "query"; encode_document takes the first of "document", "passage" and "corpus"
    that there is. But its loader (of 6.2) adds an empty "query" and "document" where there is none, so it never comes to the
    others, nor to default_prompt_name. To give its vectors, neither do the views here; other prompts can be asked for by name.
    """
    prompts = {name: text for name, text in (files.read_json(path).get("prompts") or {}).items() if text}
    unused = [name for name in ("passage", "corpus") if name in prompts and "document" not in prompts]
    if unused:
        advice = "documents get no prompt, as in sentence-transformers; if they shall have that of %r, name it 'document'"
        logging.warning(f"%s: {advice}", path, unused[0])
    return prompts


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
    dense = {name: f"{number}_Dense" for number, name in enumerate(dense_layers(model), 2)}
    parts = [*(("Dense", path) for path in dense.values()), ("Normalize", f"{len(dense) + 2}_Normalize")]
    if model["num_layers"]:
        weights.save_transformer(folder, params, dict(model), max_tokens, pad)
        weights.write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
        pad_token = tokenizer.id_to_token(pad) or ""
        settings = tokenizer_config(max_tokens, pad_token, split_special_tokens)
        weights.write_json(folder / "tokenizer_config.json", settings)
        parts = [("Transformer", ""), ("Pooling", "1_Pooling"), *parts]
        if model["token_weights"]:
            parts.insert(1, ("WordWeights", "0_WordWeights"))
    else:
        weights.save_bag(folder, params, dict(model))
        parts = [("StaticEmbedding", ""), *parts]
    for _, path in parts:
        (folder / path).mkdir(exist_ok=True)
    if model["num_layers"]:
        weights.write_json(folder / "1_Pooling" / "config.json", pooling_config(model["pooling"], model["d_model"]))
        if model["token_weights"]:
            tokens = [tokenizer.id_to_token(number) or "" for number in range(tokenizer.get_vocab_size())]
            weights.save_token_weights(folder / "0_WordWeights", np.asarray(params["token_weight"]), tokens)
    for name, layer in dense_layers(model).items():
        weights.save_dense(folder / dense[name], params[name], layer.activation)
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(parts)
    ]
    weights.write_json(folder / "modules.json", modules)
    default = "query" if "query" in prompts else None
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
