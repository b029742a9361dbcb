"""Finds the fields and the label of a pair in a line of JSON, in a line of a table or in a row of Parquet.

A pair is a record of several texts: query and document, sentence and sentence, anchor, positive and negative. These are found
without a flag, the first that a record has; a third field is a hard negative:

    anchor, positive[, negative]    query, document | passage | positive[, negative]    question, answer
    text1, text2    sentence1, sentence2    question1, question2    premise, hypothesis    text
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from contrastive_jax.data.raw import schemas
from contrastive_jax.data.raw.schemas import Content

# A layout of another library is one line here, if each record of it is one pair with a field per text.
LAYOUTS = (
    ("anchor", "positive", "negative"),
    ("query", "positive", "negative"),
    ("query", "document", "negative"),
    ("query", "passage", "negative"),
    ("question", "answer"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("text",),
)
LABELS = ("label", "score", "similarity", "gold_label")
NO_FIELD = f"{schemas.NO_TEXT} of a pair"


class PairFields(NamedTuple):
    """Where the texts and the label of a pair are.

    Attributes:
      text: the dotted paths of its texts; (): those of the first known layout.
      label: the dotted path of its label; "": that of a known name.
      names: what labels are called, in the order of their numbers; (): they are numbers.
      size: how many texts a pair has; 0: as many as there are.
    """

    text: tuple[str, ...] = ()
    label: str = ""
    names: tuple[str, ...] = ()
    size: int = 0

    def columns(self) -> list[str]:
        """Returns the paths of all fields that may be needed."""
        return [*(self.text or (name for layout in LAYOUTS for name in layout)), *((self.label,) if self.label else LABELS)]


def content_of(record: Mapping[str, Any], fields: PairFields, domain_field: str, default: str) -> Content:
    """Returns the pair of a record as a document whose text is that of all its fields.

    Args:
      record: an object of JSON, or a row of a table.
      fields: where its texts and its label are.
      domain_field: see `schemas.content_of`; so is `default`.
      default: the domain of a record that names none.
    """
    domain = schemas.domain_of(record, domain_field, default)
    texts = texts_of(record, fields.text)
    if fields.size:
        texts = texts[: fields.size]
    if not texts or len(texts) < fields.size:
        return Content("", domain, f"{NO_FIELD}: {len(texts)} of {fields.size or 'its'} fields")
    for text in texts:
        content = schemas.check_text(text, domain, default)
        if content.reason:
            return content
    name = fields.label or next((name for name in LABELS if name in record), "")
    try:
        label = number_of(schemas.field_of(record, name), fields.names)
    except ValueError as error:
        return Content("", domain, str(error))
    return Content("\n\n".join(texts), domain, fields=tuple(texts), label=label)


def texts_of(record: Mapping[str, Any], paths: tuple[str, ...]) -> list[Any]:
    """Returns the values of the fields at these paths, or of the first known layout, up to the first that is missing."""
    if not paths:
        paths = next((layout for layout in LAYOUTS if all(record.get(name) is not None for name in layout[:2])), ())
    values = [schemas.field_of(record, path) for path in paths]
    return values[: values.index(None)] if None in values else values


def number_of(label: Any, names: tuple[str, ...]) -> float:
    """Returns a label as the nearest float32: the place of its name, or the number that it is; NaN where there is none.

    Raises:
      ValueError: it is neither; the message says so.
    """
    if label is None or label == "":
        return math.nan
    text = label if isinstance(label, str) else json.dumps(label)  # true, 1, 0.5
    if names:
        if text not in names:
            raise ValueError(f"label {text[:40]} is not among --labels")
        return float(names.index(text))
    try:
        return float(np.float32(label))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"label {text[:40]} is no number (--labels=NAME,NAME names the classes)") from None
