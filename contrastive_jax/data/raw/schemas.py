"""Finds the text and the domain of a document in a line of JSON or a row of a table.

The schemas of known corpora are recognised without flags:

    The Pile        {"text": ..., "meta": {"pile_set_name": DOMAIN}}
    SlimPajama      {"text": ..., "meta": {"redpajama_set_name": DOMAIN}}
    Dolma           {"id": ..., "text": ..., "source": DOMAIN, ...}
    FineWeb         text, id, dump (the domain), url, date, ...
    C4              {"text": ..., "timestamp": ..., "url": ...}: the domain is the file's name
    code            {"content": ..., "lang" or "language": DOMAIN, ...}
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

TEXT_FIELDS = ("text", "content", "raw_content")
# (field, a field that has to be there too): "source" alone may be anything, such as an address per document.
DOMAIN_FIELDS = (
    ("meta.pile_set_name", "text"),
    ("meta.redpajama_set_name", "text"),
    ("source", "id"),
    ("dump", "url"),
    ("lang", "content"),
    ("language", "content"),
)
MAX_DOMAIN_CHARACTERS = 100  # longer values of a known field are no name of a domain
UNKNOWN_DOMAIN = "unknown"
EMPTY_TEXT, FEW_NEGATIVES = "empty text", "too few hard negatives"
HARMLESS = (EMPTY_TEXT, FEW_NEGATIVES)  # reasons to count a line, but never to fail: nothing is damaged
NO_TEXT = "no text"
# What a file's name has beside the name of the corpus: numbers of shards, splits, and suffixes.
_NAME_PARTS = re.compile(
    r"(\.|-|_|^)(\d+([-_]?of[-_]?\d+)?|train|training|validation|valid|val|dev|test|part|shard|chunk|tfrecord|data)(?=\.|-|_|$)"
)


class Pair(NamedTuple):
    """The texts of a pair, and what is known of them.

    Attributes:
      texts: the query, its positives, then its hard negatives.
      label: of the pair, or NaN.
      positives: how many positives there are.
      scores: a teacher's score of each document, NaN for one without; (): there are none.
    """

    texts: tuple[str, ...]
    label: float = math.nan
    positives: int = 1
    scores: tuple[float, ...] = ()


class Content(NamedTuple):
    """The text and the domain of a document, and the pair that it stands for; or `reason`, why there is no document."""

    text: str
    domain: str
    reason: str = ""
    pair: Pair | None = None


def field_of(record: Mapping[str, Any], path: str) -> Any:
    """Returns the value at a dotted path, such as "meta.pile_set_name"; None: there is none."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def domain_of(record: Mapping[str, Any], domain_field: str, default: str) -> str:
    """Returns the domain of a record: the value of `domain_field`, or else of a known schema's field, or else `default`."""
    if domain_field:
        value = field_of(record, domain_field)
        return str(value) if isinstance(value, str | int) and value != "" else default
    for path, companion in DOMAIN_FIELDS:
        value = field_of(record, path) if companion in record else None
        if isinstance(value, str) and 0 < len(value) <= MAX_DOMAIN_CHARACTERS and "://" not in value:
            return value
    return default


def content_of(record: Mapping[str, Any], text_field: str, domain_field: str, default: str) -> Content:
    """Returns the document of a record.

    Args:
      record: an object of JSON, or a row of a table.
      text_field: the dotted path of the text; "": the field of a known schema.
      domain_field: the dotted path of the domain; "": the field of a known schema.
      default: the domain of a record that names none.
    """
    domain = domain_of(record, domain_field, default)
    paths = (text_field,) if text_field else TEXT_FIELDS
    text = next((value for path in paths if (value := field_of(record, path)) is not None), None)
    return Content("", domain, NO_TEXT) if text is None else check_text(text, domain, default)


def check_text(text: Any, domain: str, default: str) -> Content:
    """Returns a text as a document, or why it is none; of a text that is no Unicode, `default` is the domain."""
    if not isinstance(text, str):
        return Content("", domain, "text is not a string")
    if not text.strip():
        return Content("", domain, EMPTY_TEXT)
    try:
        (text + domain).encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell "\ud800", UTF-8 cannot
        return Content("", default, "lone surrogate")
    return Content(text, domain)


def name_of_corpus(path: str) -> str:
    """Returns the domain of a file whose documents name none: its name without suffixes, splits and numbers of shards.

    It is "c4" for "en/c4-train.00000-of-01024.json.gz". Where a name has nothing else, the folder's name counts: the domain is
    "10BT" for "sample/10BT/000_00000.parquet".
    """
    parts = [part for part in path.rpartition("://")[2].split("/") if part]
    name = re.sub(r"(\.(jsonl|json|ndjson|tsv|csv|parquet|gz|zst|bz2|xz))+$", "", parts[-1])
    for candidate in (name, *reversed(parts[:-1])):
        stripped = _NAME_PARTS.sub("", candidate).strip("._- ")
        if stripped:
            return stripped
    return UNKNOWN_DOMAIN
