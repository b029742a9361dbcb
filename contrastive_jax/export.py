"""A run for everybody: `python -m contrastive_jax.export --workdir=runs/bert --output=exported`.

Writes a folder that `SentenceTransformer(FOLDER)` and, but for a bag of embeddings, `transformers.AutoModel` load without this
package: safetensors, config.json, tokenizer.json, pooling, projection, normalisation, prompts, a model card. Where
sentence-transformers is installed the folder is checked: the same texts, the same vectors.

An encoder with delimiters has two views. --view=both gives them prompts ("query: ", "document: "; encode_query and
encode_document set them); --view=query or document wraps every text alike, also where AutoTokenizer is used.
"""

import importlib.util
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax import cli, text_model
from contrastive_jax.data import fast_tokenizer, tokenizer
from contrastive_jax.evals import embed
from contrastive_jax.models import hf

TOLERANCE = 1e-5
# What an export is checked on: languages, code, spaces, nothing, a text that is cut.
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


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_string("workdir", None, "Of the run: DIR, or DIR@STEP.", required=True)
    flags.DEFINE_string("output", None, "The folder to write; it must not be there yet.", required=True)
    flags.DEFINE_enum("format", "sentence_transformers", ["sentence_transformers"], "What to write.")
    flags.DEFINE_enum("view", "both", ["both", *text_model.VIEWS], "As what texts are encoded that nobody says a view of.")


def export(model: text_model.TextModel, folder: pathlib.Path, view: str = "both") -> None:
    """Writes a run as a sentence-transformers folder.

    Raises:
      ValueError: the folder is there, transformers has no such encoder, or the check finds other vectors.
    """
    if model.config is None:
        raise ValueError(f"--workdir={model.protocol['model']}: give the workdir of a training run")
    if folder.exists():
        raise ValueError(f"--output={folder} is there already; remove it or give another")
    partial = folder.parent / f"{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        prompts = write(model, model.config, partial, view)
        if importlib.util.find_spec("sentence_transformers"):
            check(model, model.config, partial, view, prompts)
        else:
            logging.info("not checked: sentence-transformers is not installed")
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(folder)
    logging.info("written to %s", folder)


def write(model: text_model.TextModel, config: ConfigDict, folder: pathlib.Path, view: str) -> dict[str, str]:
    """All files of the folder; returns the prompts of its views, {} where it needs none."""
    params = jax.tree.map(np.asarray, model.params)
    words = text_model.words_of(epath.Path(model.protocol["model"]), config)
    chosen = {"both": ("x", "y"), "query": ("x",), "document": ("y",)}[view] if config.data.delimiters else ()
    prompts = fast_tokenizer.PROMPTS if len(chosen) == 2 and isinstance(words, tokenizer.Tokenizer) else {}
    if prompts and config.model.pooling == "eos":
        logging.warning(
            "texts of more than %d tokens will lose the closing delimiter, from which this model's vectors are taken; "
            "cut them before, or export with --view=query or document",
            config.data.length,
        )
    made = fast_tokenizer.convert(words, config.data.length, chosen)
    made.save(str(folder / "tokenizer.json"))
    modules = []
    if config.model.num_layers:
        hf.save(folder, params, config.model.to_dict(), config.data.length, words.reserved["pad"])
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": config.data.length, "do_lower_case": False})
        write_json(
            folder / "tokenizer_config.json",
            tokenizer_config(config.data.length, made.id_to_token(words.reserved["pad"]) or ""),
        )
        modules += [("Transformer", ""), ("Pooling", "1_Pooling")]
        (folder / "1_Pooling").mkdir()
        write_json(folder / "1_Pooling" / "config.json", pooling_config(config.model))
    else:
        if config.data.delimiters:
            raise ValueError("config.data.delimiters: a bag of embeddings with delimiters has no form in sentence-transformers")
        hf.save_bag(folder, params, config.model.to_dict())
        modules.append(("StaticEmbedding", ""))
    if config.model.embedding_dim:
        (folder / "2_Dense").mkdir()
        hf.save_projection(folder / "2_Dense", params["projection"])
        modules.append(("Dense", "2_Dense"))
    modules.append(("Normalize", "3_Normalize"))
    (folder / "3_Normalize").mkdir()
    rows = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(modules)
    ]
    write_json(folder / "modules.json", rows)
    settings = {"prompts": prompts, "default_prompt_name": "query" if prompts else None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", {"model_type": "SentenceTransformer"} | settings)
    (folder / "README.md").write_text(card(model, config, prompts))
    return prompts


def write_json(path: pathlib.Path, value: Any) -> None:
    """A JSON file to be read by people too."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def tokenizer_config(length: int, pad: str) -> dict[str, Any]:
    """What transformers wants to know beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "pad_token": pad,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }


def pooling_config(model: ConfigDict) -> dict[str, Any]:
    """sentence-transformers' Pooling."""
    modes = {name: ours == model.pooling for name, ours in text_model.POOLING.items()}
    return {"word_embedding_dimension": model.d_model, "include_prompt": True} | modes


def card(model: text_model.TextModel, config: ConfigDict, prompts: dict[str, str]) -> str:
    """The model card."""
    of_models = config.model
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    dim = of_models.embedding_dim or of_models.d_model
    kind = f"{of_models.num_layers} layers" if of_models.num_layers else "A bag of token embeddings"
    asked = (
        'queries = model.encode_query(["what is a contrastive loss?"])\ndocuments = model.encode_document(["..."])\n'
        if prompts
        else 'vectors = model.encode(["what is a contrastive loss?", "..."])\n'
    )
    said = (
        f"The prompts {json.dumps(prompts)} say which view a text is; without one it is taken as it stands.\n"
        if prompts
        else ""
    )
    needs = (
        "" if of_models.causal or of_models.position != "rotary" or of_models.embedding_norm else "Needs transformers ≥ 5.\n"
    )
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, contrastive_jax]
---

# {pathlib.PurePath(model.protocol["model"]).name}

A text encoder, trained from raw documents: neighbouring spans of a document are positive pairs, all other spans of a batch
of {config.data.batch_size} negatives (`{config.objective.name}`). {kind}, {size:,} parameters, vectors of {dim} numbers at
unit length, texts of at most {config.data.length} tokens, pooling `{of_models.pooling}`.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
{asked}```

{said}{needs}
| | |
|---|---|
| steps | {model.protocol["step"]:,} |
| parameters | `{model.protocol["parameters"][:16]}` |
| code | `{model.protocol["code"][:16]}` |
"""


def check(model: text_model.TextModel, config: ConfigDict, folder: pathlib.Path, view: str, prompts: dict[str, str]) -> None:
    """Compares the vectors of some texts with those of the folder, loaded by sentence-transformers.

    Raises:
      ValueError: they differ.
    """
    from sentence_transformers import SentenceTransformer

    exact = ConfigDict(config.model.to_dict() | {"dtype": "float32", "attention": "plain"})
    _, encode = text_model.encoder_of(exact, len(model.params["transformer"]["embedding"]), config.data.length)
    forward = text_model.bind(encode, model.params)
    loaded = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    # With prompts a text that is cut loses its closing delimiter.
    samples = [text for text in SAMPLES if not prompts or len(model.tokenize([text], 0)[0]) < config.data.length]
    worst = 0.0
    for number, name in enumerate(text_model.VIEWS):
        if view in ("both", name) or not config.data.delimiters:
            ours = embed.embed_ragged(forward, model.tokenize(samples, number), config.data.length)
            theirs = loaded.encode(samples, prompt_name=name if prompts else None, show_progress_bar=False)
            worst = max(worst, float(np.abs(ours - theirs).max()))
    if worst > TOLERANCE:
        raise ValueError(f"the vectors of the exported model differ by {worst:.1e} from the run's; nothing was written")
    logging.info("checked: %d texts, vectors differ by %.1e at most", len(samples), worst)


def main(argv: list[str]) -> None:
    """The command."""
    del argv
    given = flags.FLAGS
    with cli.user_errors():
        export(text_model.open_model(given.workdir), pathlib.Path(given.output).expanduser(), given.view)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
