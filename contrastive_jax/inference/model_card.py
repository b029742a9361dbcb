"""The README.md of an exported model."""

import json
import pathlib
from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from contrastive_jax.inference.text_model import TextModel
from contrastive_jax.runtime import digest

CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, contrastive_jax]
---

# {name}

A text encoder, trained from raw documents: neighbouring spans of a document are positive pairs, all other spans of a batch
of {batch_size} are negatives (`{objective}`). {kind}, {size:,} parameters, vectors of {dim} numbers at unit length, texts of
at most {max_tokens} tokens, pooling `{pooling}`.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
{usage}```

{notes}
| | |
|---|---|
| steps | {steps:,} |
| parameters | `{parameters}` |
| code | `{code}` |
"""
USAGE = 'vectors = model.encode(["what is a contrastive loss?", "..."])\n'
USAGE_OF_VIEWS = 'queries = model.encode_query(["what is a contrastive loss?"])\ndocuments = model.encode_document(["..."])\n'


def model_card(model: TextModel, config: ConfigDict, prompts: Mapping[str, str]) -> str:
    """Returns the card of a run's model.

    Args:
      model: the model.
      config: of the run.
      prompts: view → prompt; empty: none.
    """
    encoder = config.model
    notes = ""
    if prompts:
        notes += f"The prompts {json.dumps(prompts)} mark a text as query or document; without a name, `query` is used.\n"
    if encoder.num_layers and encoder.position == "rotary" and not (encoder.causal or encoder.embedding_norm):
        notes += "Needs transformers ≥ 5.\n"  # older ones lack is_causal=False of Starcoder2
    return CARD.format(
        name=pathlib.PurePath(model.name).name,
        batch_size=config.data.batch_size,
        objective=config.objective.name,
        kind=f"{encoder.num_layers} layers" if encoder.num_layers else "A bag of token embeddings",
        size=sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        dim=model.dim,
        max_tokens=model.max_tokens,
        pooling=model.pooling,
        usage=USAGE_OF_VIEWS if prompts else USAGE,
        notes=notes,
        steps=model.step or 0,
        parameters=model.parameters_digest[:16],
        code=digest.hash_code()[:16],
    )
