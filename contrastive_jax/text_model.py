"""A trained encoder as a function of text, wherever it comes from: a run of ours, or a Hugging Face folder.

runs/pile_small       the newest checkpoint of a workdir; runs/pile_small@2000: that of step 2,000; @best: of config.keep_best
hf:FOLDER             a Hugging Face or sentence-transformers folder, what `export` writes among them: safetensors,
                      config.json, tokenizer.json
"""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from configs import base
from contrastive_jax import build, checkpoint, digest, sharding
from contrastive_jax.data import tokenizer
from contrastive_jax.evals import embed
from contrastive_jax.models import encoder as encoder_lib
from contrastive_jax.models import hf
from contrastive_jax.models.layout import Layout
from contrastive_jax.step import step_key

VIEWS = ("query", "document")
BEST = -1  # in the place of a step: that of the best score
# Embedded at once by a device: on CPU what stays in its caches.
BATCH_TOKENS = {"cpu": 2048}
BAG_TOKENS = 512  # of a text that a bag takes whose tokenizer says nothing


Tokenize = Callable[[Sequence[str], int], list[list[int]]]


class TextModel(NamedTuple):
    """An encoder with its tokenizer.

    Attributes:
      protocol: what decides an embedding: it stands beside every result.
      tokenize: (texts, view) → the ids of each text as the encoder takes them; view is 0 for queries, 1 for documents.
      forward: (tokens int32[n l], mask bool[n l]) → unit vectors float32[n e].
      apply: (params, tokens, mask, key=None) → the same in jax; dropout where a key is given.
      params: of `apply`, on the devices.
      untrained: forward of the same encoder before training, by the run's seed; None where there was none.
      config: of the run; None for a Hugging Face folder.
    """

    protocol: dict[str, Any]
    tokenize: Tokenize
    forward: embed.Forward
    apply: Callable[..., jax.Array]
    params: Any
    untrained: Callable[[], embed.Forward] | None = None
    config: ConfigDict | None = None

    def encode(self, texts: Sequence[str], view: int = 0) -> np.ndarray:
        """Unit vectors float32[n e] of n texts."""
        return encode(self.forward, self.tokenize, self.protocol["max_tokens"], texts, view)


def encode(forward: embed.Forward, tokenize: Tokenize, longest: int, texts: Sequence[str], view: int) -> np.ndarray:
    """Unit vectors float32[n e] of n texts, whose rows have up to `longest` tokens."""
    tokens = BATCH_TOKENS.get(jax.default_backend(), 65536) * jax.device_count()
    return embed.embed_ragged(forward, tokenize(texts, view), longest, tokens, f"{VIEWS[view]} texts")


def open_model(name: str) -> TextModel:
    """Opens the model of a `--model` flag.

    Raises:
      ValueError: there is none; the message says what to give.
    """
    if name.startswith("hf:"):
        return open_hf(pathlib.Path(name.removeprefix("hf:")).expanduser())
    if (epath.Path(name).expanduser() / "modules.json").exists():
        return open_hf(pathlib.Path(name).expanduser())
    path, _, step = name.rpartition("@")
    if path and step == "best":
        return open_workdir(epath.Path(path), BEST)
    return open_workdir(epath.Path(path), int(step)) if path and step.isdigit() else open_workdir(epath.Path(name), None)


def one_axis() -> jax.sharding.Mesh:
    """All devices for the rows: parameters are replicated."""
    return sharding.make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))


def encoder_of(config: ConfigDict, vocab_size: int, length: int) -> tuple[encoder_lib.Encoder, Callable]:
    """The encoder of `config.model` and its jitted forward pass on all devices."""
    mesh = one_axis()
    encoder = encoder_lib.make(config, vocab_size, length, Layout(mesh, sharding.BATCH[0], "tensor", sharding.RULES))
    return encoder, build.make_encode(encoder.apply, mesh)


def tokenizes(config: ConfigDict, load: Callable[[], tokenizer.Tokenizer | tokenizer.JsonTokenizer]) -> Tokenize:
    """Texts as a run's encoder takes them: stripped, cut, between the delimiters of their view; `load` waits for a text."""
    words = functools.cache(load)

    def tokenize(texts: Sequence[str], view: int) -> list[list[int]]:
        edges = [["x_open", "x_close"], ["y_open", "y_close"]][view] if config.data.delimiters else []
        ids = [[words().reserved[name]] for name in edges] or [[], []]
        room = config.data.length - len(edges)
        return [ids[0] + row[:room] + ids[1] for row in words().encode_batch([text.strip() for text in texts])]

    return tokenize


def words_of(workdir: epath.Path, config: ConfigDict) -> tokenizer.Tokenizer | tokenizer.JsonTokenizer:
    """The tokenizer of a run: its own copy, or that of its data.

    Raises:
      DataError: neither is there.
    """
    return tokenizer.load(workdir if tokenizer.find(workdir) else config.data.dir)


def place(params: Any) -> Any:
    """Parameters on all devices."""
    return jax.device_put(params, jax.NamedSharding(one_axis(), jax.P()))


def bind(encode: Callable, params: Any) -> embed.Forward:
    """The forward pass with its parameters."""
    return lambda tokens, mask: encode({"encoder": params}, tokens, mask)


def open_workdir(workdir: epath.Path, step: int | None) -> TextModel:
    """A run of ours at a step, or at its newest checkpoint.

    Raises:
      ValueError: the folder is no workdir, or has no such checkpoint.
    """
    workdir = workdir.expanduser()
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"--model={workdir}: no config.json there; give the workdir of a training run, or hf:FOLDER")
    config = ConfigDict(json.loads(path.read_text()))
    checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
    there = checkpoints.steps()
    if step == BEST:
        step = checkpoints.best()
        if step is None:
            raise ValueError(f"--model={workdir}@best: no checkpoint has a score; the run had no config.keep_best")
    step = step if step is not None else max(there, default=None)
    if step not in there:
        raise ValueError(f"--model={workdir}: no checkpoint {'yet' if step is None else step}; there are {there}")
    params = checkpoints.read(step, "params", lambda leaf: jax.P())["encoder"]
    vocab_size = len(params["transformer"]["embedding"])
    encoder, encode = encoder_of(config.model, vocab_size, config.data.length)
    tokenize = tokenizes(config, lambda: words_of(workdir, config))

    def untrained() -> embed.Forward:
        return bind(encode, place(encoder.init(step_key(jax.random.key(config.seed), "init", jnp.int32(0)))))

    protocol = {
        "model": str(workdir),
        "step": step,
        "pooling": config.model.pooling,
        "prompts": "[x], {y}" if config.data.delimiters else "none",
        "max_tokens": config.data.length,
    }
    placed = place(params)
    return TextModel(protocol | common(placed), tokenize, bind(encode, placed), encoder.apply, placed, untrained, config)


def common(params: Any) -> dict[str, Any]:
    """What every protocol says."""
    return {"normalised": True, "parameters": digest.summary(digest.of_tree(params)), "code": digest.of_code()}


POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "eos"}


class Modules(NamedTuple):
    """What modules.json of a sentence-transformers folder says.

    Attributes:
      where: the folder of the Transformer or StaticEmbedding.
      bag: whether it is a StaticEmbedding.
      pooling: as `config.model.pooling`.
      projection: the folder of the Dense, if there is one.
    """

    where: pathlib.Path
    bag: bool = False
    pooling: str = "mean"
    projection: pathlib.Path | None = None


def read_modules(folder: pathlib.Path) -> Modules:
    """How a sentence-transformers folder makes one vector of a text; plain folders: the mean.

    Raises:
      ValueError: a module that this encoder does not have.
    """
    path = folder / "modules.json"
    if not path.exists():
        logging.warning("%s has no modules.json: taking the mean of all tokens", folder)
        return Modules(folder)
    found = Modules(folder)
    for module in json.loads(path.read_text()):
        kind, place = module["type"].rpartition(".")[2], folder / module["path"]
        if kind in ("Transformer", "StaticEmbedding"):
            found = found._replace(where=place, bag=kind == "StaticEmbedding")
        elif kind == "Pooling":
            config = json.loads((place / "config.json").read_text())
            chosen = [key for key, value in config.items() if key.startswith("pooling_mode") and value is True]
            chosen += [f"pooling_mode_{config['pooling_mode']}_tokens"] if isinstance(config.get("pooling_mode"), str) else []
            if len(chosen) != 1 or chosen[0] not in POOLING:
                raise ValueError(f"{path}: pooling by {', '.join(chosen)}; this encoder knows {', '.join(POOLING)}")
            found = found._replace(pooling=POOLING[chosen[0]])
        elif kind == "Dense":
            found = found._replace(projection=place)
        elif kind != "Normalize":
            known = "Transformer, StaticEmbedding, Pooling, Dense, Normalize"
            raise ValueError(f"{path}: module {kind}; this encoder has {known}")
    return found


def open_hf(folder: pathlib.Path) -> TextModel:
    """A Hugging Face or sentence-transformers folder.

    Raises:
      ValueError: something is missing, or is what this encoder does not have.
    """
    import tokenizers

    modules = read_modules(folder)
    where = modules.where
    found = hf.load_bag(where) if modules.bag else hf.load(where)
    params, config = found.params, base.get_config().model
    config.update(found.model, pooling=modules.pooling, attention="plain")
    if modules.projection:
        params |= {"projection": hf.load_projection(modules.projection)}
        config.embedding_dim = params["projection"]["kernel"].shape[1]
    if not (where / "tokenizer.json").exists():
        raise ValueError(f"hf:{where}: no tokenizer.json there; save the tokenizer with transformers' save_pretrained")
    settings = read_json(where / "sentence_bert_config.json")
    said = (("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings"))
    limits = [settings.get("max_seq_length"), found.length, *(read_json(where / name).get(key) for name, key in said)]
    words = tokenizers.Tokenizer.from_file(str(where / "tokenizer.json"))
    if modules.bag:  # it has no limit but its tokenizer's
        limits = [words.truncation["max_length"] if words.truncation else BAG_TOKENS]
    length = int(min((limit for limit in limits if limit), default=512))
    words.enable_truncation(length)
    words.no_padding()
    kept = read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    prompts = {view: kept[view] for view in VIEWS if kept.get(view)}

    def tokenize(texts: Sequence[str], view: int) -> list[list[int]]:
        prompt = prompts.get(VIEWS[view], "")
        shown = [prompt + (text.strip().lower() if settings.get("do_lower_case") else text.strip()) for text in texts]
        return [row.ids for row in words.encode_batch(shown, add_special_tokens=not modules.bag)]

    embedding = params["transformer"]["embedding"]
    encoder, encode = encoder_of(config, len(embedding), found.length or length)
    protocol = {"model": f"hf:{folder}", "pooling": modules.pooling, "prompts": prompts or "none", "max_tokens": length}
    placed = place(params)
    return TextModel(protocol | common(placed), tokenize, bind(encode, placed), encoder.apply, placed)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file, or {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}
