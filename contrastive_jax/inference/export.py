"""Writes a run as a folder that sentence-transformers and transformers load without this package.

The folder has safetensors, config.json, tokenizer.json, pooling, projection, normalisation, prompts and a model card. Where
sentence-transformers is installed, the folder's vectors are compared with the run's before it appears.
"""

import functools
import importlib.util
import pathlib

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer as tokenizer_lib
from contrastive_jax.files import transfer
from contrastive_jax.huggingface import fast_tokenizer
from contrastive_jax.huggingface import folder as folder_lib
from contrastive_jax.inference import batching, text_model
from contrastive_jax.inference.model_card import model_card
from contrastive_jax.inference.tokenize import VIEWS, RunTokenize

TOLERANCE = 1e-5
# Texts that an export is checked on: several languages, code, spaces, no text, a text that is truncated.
SAMPLES = (
    "The cat sat on the mat.",
    "  Leading and trailing spaces,  two inside  ",
    "def f(x):\n\treturn [y ** 2 for y in x]\n\n\nprint(f([1, 2, 3]))",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — ∑ 雪 🙂",
    "<x> <s> </y> [PAD]",
    "0123456789 " * 3,
    "word",
    "A sentence that goes on and on. " * 400,
)


def export(model: text_model.TextModel, folder: epath.PathLike, view: str = "both") -> None:
    """Writes a run as a sentence-transformers folder, which appears when it is whole and checked.

    Args:
      model: of a training run.
      folder: the folder to make; local, gs:// or s3://.
      view: "both": prompts tell queries and documents apart; "query" or "document": every text is taken as that.

    Raises:
      UserError: the folder exists, the model is not of a run, or its encoder or tokenizer has no form in transformers.
      RuntimeError: sentence-transformers gives other vectors for the folder.
    """
    if model.config is None:
        raise UserError(f"--model={model.name}: give the workdir of a training run; this is a folder already")
    target = files.absolute(folder)
    if target.exists() and not transfer.is_incomplete(target, last="modules.json"):
        raise UserError(f"--output={target} exists already; remove it or give another folder")
    with transfer.new_folder(target, last="modules.json") as work:
        prompts = write(model, model.config, work, view)
        if importlib.util.find_spec("sentence_transformers"):
            check_vectors(model, work, view, prompts)
        else:
            logging.info("not checked: sentence-transformers is not installed")
    logging.info("written to %s", target)


def write(model: text_model.TextModel, config: ConfigDict, folder: pathlib.Path, view: str) -> dict[str, str]:
    """Writes all files of a model and its run's config into an existing folder; see `export`.

    Returns:
      The prompts of the views; {} where the folder needs none.
    """
    tokenizer = model.tokenizer
    views: tuple[str, ...] = ()
    if config.data.delimiters:
        if not config.model.num_layers:
            raise UserError("config.data.delimiters: a bag of embeddings with delimiters has no form in sentence-transformers")
        views = VIEWS if view == "both" else (view,)
    by_prompt = len(views) > 1 and isinstance(tokenizer, tokenizer_lib.Tokenizer)
    own = model.tokenize_views.own_prompts if isinstance(model.tokenize_views, RunTokenize) else {}
    if view != "both":  # whatever a text is called, it is taken as that
        own = dict.fromkeys(VIEWS, own[view]) if view in own else {}
    prompts = dict(own)
    if by_prompt:  # another name than those of the views ends in that of its view
        marks = {name: fast_tokenizer.PROMPTS[name.rpartition("_")[2]] for name in (*VIEWS, *own)}
        prompts = {name: mark + own.get(name, "") for name, mark in marks.items()}
    if by_prompt and model.pooling == "eos":
        logging.warning(
            "texts of more than %d tokens will lose the closing delimiter, from which this model's vectors are taken; "
            "shorten them before, or export with --view=query or document",
            model.max_tokens,
        )
    folder_lib.write_folder(
        folder=folder,
        params=jax.tree.map(np.asarray, model.params),
        model=config.model.to_dict(),
        tokenizer=fast_tokenizer.convert(tokenizer, model.max_tokens, views, special_tokens=config.model.num_layers > 0),
        max_tokens=model.max_tokens,
        pad=tokenizer.reserved["pad"],
        prompts=prompts,
        # `JsonTokenizer` reads "[CLS]" in a text as text; a converted SentencePiece model needs its delimiters to be found.
        split_special_tokens=isinstance(tokenizer, tokenizer_lib.JsonTokenizer),
    )
    (folder / "README.md").write_text(model_card(model, config, prompts))
    return prompts


def check_vectors(model: text_model.TextModel, folder: pathlib.Path, view: str, prompts: dict[str, str]) -> None:
    """Compares the vectors of SAMPLES, in float32, with those of the folder loaded by sentence-transformers.

    Raises:
      RuntimeError: they differ by more than TOLERANCE.
    """
    from sentence_transformers import SentenceTransformer

    exact = ConfigDict(model.model_config.to_dict() | {"dtype": "float32", "products": "float32", "attention": "plain"})
    _, forward_with = text_model.make_encoder_on_all_devices(exact, model.params)
    forward = functools.partial(forward_with, model.params)
    exported = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    # With prompts a truncated text loses its closing delimiter.
    samples = [text for text in SAMPLES if not prompts or len(model.tokenize([text])[0]) < model.max_tokens]
    largest = 0.0
    for name in VIEWS:
        if view in ("both", name) or model.prompts == "none":
            with jax.default_matmul_precision("highest"):  # TPUs and GPUs round the factors of float32 products
                z = batching.embed_ragged(forward, model.tokenize(samples, name), model.max_tokens)
            # Without a prompt, "", it would take that of `default_prompt_name`.
            z_exported = exported.encode(samples, prompt=prompts.get(name, ""), show_progress_bar=False)
            largest = max(largest, float(np.abs(z - z_exported).max()))
    if largest > TOLERANCE:
        raise RuntimeError(f"the vectors of the exported model differ by {largest:.1e} from the run's; nothing was written")
    logging.info("checked: %d texts, vectors differ by %.1e at most", len(samples), largest)
