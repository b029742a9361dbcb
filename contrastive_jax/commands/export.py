"""Writes a model for everybody.

    contrastive-jax export --model=runs/bert --output=exported

`SentenceTransformer(FOLDER)` and, except for a bag of embeddings, `transformers.AutoModel` load the folder without this
package: safetensors, config.json, tokenizer.json, pooling, projection, normalisation, prompts, a model card. Where
sentence-transformers is installed the folder is checked: the same texts must give the same vectors.

A model with delimiters embeds queries and documents differently. --view=both writes prompts for the two ("query: ",
"document: "; encode_query and encode_document set them); --view=query or document treats every text alike.
"""

from absl import flags

from contrastive_jax.inference import export, text_model
from contrastive_jax.inference.tokenize import VIEWS


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model", None, "The workdir of a run: DIR, DIR@STEP or DIR@best.", required=True)
    flags.DEFINE_string("output", None, "The folder to write, local, gs:// or s3://; it must not exist yet.", required=True)
    flags.DEFINE_enum(
        "view", "both", ["both", *VIEWS], "both: prompts tell queries from documents; else every text is taken as that."
    )


def main(arguments: list[str]) -> None:
    """Exports a run."""
    del arguments
    values = flags.FLAGS
    export.export(text_model.load(values.model), values.output, values.view)
