"""Finds the texts, the label and the scores of a pair in a line of JSON, in a line of a table or in a row of Parquet.

A pair is a query (or anchor) with its documents: one positive or several, then hard negatives. These layouts are found
without a flag, the first that a record has:

    lists       query, pos, neg, pos_scores, neg_scores, prompt: lists of texts, as FlagEmbedding has them
    passages    query, positive_passages, negative_passages: lists of {"title", "text"}, as Tevatron has them
    ids         query_text or query_id, positive_document_ids, negative_document_ids: Tevatron's later layout
                query_id, document_ids, scores: the first document is the positive
    columns     anchor, positive[, negative | negative_1, negative_2, ...]    query, document | passage | positive[, negative]
                question, answer    text1, text2    sentence1, sentence2    question1, question2    premise, hypothesis    text

The texts of ids are in files of their own, see `pair_sources`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from contrastive_jax.data.raw import by_id, schemas
from contrastive_jax.data.raw.schemas import Content, Pair

# A layout of columns is one line here: anchor, positive, and the first hard negative.
COLUMNS = (
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
# Further negatives of the layouts of columns.
NUMBERED = tuple(f"negative_{number}" for number in range(1, 65))
# The fields of the layouts of lists: the query's, its positives' and its negatives'. Of `document_ids` the first is positive.
LISTS = (
    ("query", "pos", "neg"),
    ("query", "positive_passages", "negative_passages"),
    ("query_text", "positive_document_ids", "negative_document_ids"),
    ("query_id", "positive_document_ids", "negative_document_ids"),
    ("query_id", "document_ids", ""),
)
LABELS = ("label", "score", "similarity", "gold_label")
NO_FIELD = f"{schemas.NO_TEXT} of a pair"
OTHER_FIELDS = ("pos_scores", "neg_scores", "scores", "prompt", *NUMBERED)


class PairOptions(NamedTuple):
    """What is said of a source of pairs; the fields are the keys of its table in a file of sources, see `pair_sources`.

    Attributes:
      query_prompt: what is put before each query.
      document_prompt: what is put before each document.
      query_tokens: the most tokens of a query, 0: as of all records; so is `document_tokens` of a document.
      document_tokens: see `query_tokens`.
      in_batch: whether the documents of other pairs are negatives; not so of pairs whose documents are classes.
      min_negatives: pairs with fewer hard negatives are left out.
      max_negatives: the most hard negatives that are kept, the first ones; None: all.
      relative_margin: leaves out hard negatives with a score above (1 - relative_margin) times that of the positive.
      queries: the folder of the texts of `query_id`, from `by_id.write`; so is `documents` of documents.
      documents: see `queries`.
    """

    query_prompt: str = ""
    document_prompt: str = ""
    query_tokens: int = 0
    document_tokens: int = 0
    in_batch: bool = True
    min_negatives: int = 0
    max_negatives: int | None = None
    relative_margin: float | None = None
    queries: str = ""
    documents: str = ""


class PairFields(NamedTuple):
    """Where the texts and the label of a pair are.

    Attributes:
      text: the dotted paths of its texts; (): those of the first known layout.
      label: the dotted path of its label; "": that of a known name.
      names: what labels are called, in the order of their numbers; (): they are numbers.
      size: how many texts a pair of columns has; 0: as many as there are.
      options: of its source.
    """

    text: tuple[str, ...] = ()
    label: str = ""
    names: tuple[str, ...] = ()
    size: int = 0
    options: PairOptions = PairOptions()

    def columns(self) -> list[str]:
        """Returns the paths of all fields that may be needed."""
        known = [name for layout in (*LISTS, *COLUMNS) for name in layout if name]
        return [*(self.text or (*known, *OTHER_FIELDS)), *((self.label,) if self.label else LABELS)]


class NoPairError(Exception):
    """A record is no pair; the message says why."""


def content_of(record: Mapping[str, Any], fields: PairFields, domain_field: str, default: str) -> Content:
    """Returns the pair of a record as a document whose text is that of all its texts.

    Args:
      record: an object of JSON, or a row of a table.
      fields: where its texts and its label are.
      domain_field: see `schemas.content_of`; so is `default`.
      default: the domain of a record that names none.
    """
    domain = schemas.domain_of(record, domain_field, default)
    try:
        pair = pair_of(record, fields)
    except NoPairError as error:
        return Content("", domain, str(error))
    for text in pair.texts:
        content = schemas.check_text(text, domain, default)
        if content.reason:
            return content
    prompts = fields.options.query_prompt, fields.options.document_prompt
    if any(prompts):
        pair = pair._replace(texts=tuple(prompts[min(i, 1)] + text for i, text in enumerate(pair.texts)))
    return Content("\n\n".join(pair.texts), domain, pair=pair)


def pair_of(record: Mapping[str, Any], fields: PairFields) -> Pair:
    """Returns the pair of a record, without the prompts of its source.

    Raises:
      NoPairError: it has none, or fewer negatives than its source asks for.
    """
    name = fields.label or next((name for name in LABELS if name in record), "")
    label, options = number_of(schemas.field_of(record, name), fields.names), fields.options
    layout = () if fields.text else next((lists for lists in LISTS if all(record.get(x) is not None for x in lists[:2])), ())
    if not layout:
        texts = texts_of(record, fields.text)
        texts = texts[: fields.size] if fields.size else texts
        if not texts or len(texts) < fields.size:
            raise NoPairError(f"{NO_FIELD}: {len(texts)} of {fields.size or 'its'} fields")
        return fewer_negatives(Pair(tuple(texts), label, int(len(texts) > 1)), options)
    positive, negative = (passages(record, key, options) for key in layout[1:])
    if not layout[2]:
        positive, negative = positive[:1], positive[1:]
    if not positive:
        raise NoPairError(f"{NO_FIELD}: no positive")
    scores = scores_of(record, len(positive), len(negative))
    return fewer_negatives(
        Pair((query_of(record, layout[0], options), *positive, *negative), label, len(positive), scores), options
    )


def query_of(record: Mapping[str, Any], name: str, options: PairOptions) -> str:
    """Returns the query of a record of lists, with the prompt that the record itself has."""
    query = record[name]
    if name == "query_id":
        query = look_up(options.queries, "queries", query)
    prompt = record.get("prompt") or ""
    return prompt + query if isinstance(query, str) and isinstance(prompt, str) else query


def passages(record: Mapping[str, Any], name: str, options: PairOptions) -> list[Any]:
    """Returns the texts in a list of texts, of passages or of ids; [] where there is no such list."""
    found = record.get(name)
    if found is None:
        return []
    values = [found] if isinstance(found, str) else found
    if not isinstance(values, Sequence):
        raise NoPairError(f"{name} is no list")
    if name.endswith("_ids"):
        return [look_up(options.documents, "documents", value) for value in values]
    return [with_title(value) if isinstance(value, Mapping) else value for value in values]


def with_title(passage: Mapping[str, Any]) -> Any:
    """Returns the text of {"title", "text"}: both with a space between them, or the text alone."""
    title, text = passage.get("title"), passage.get("text")
    return f"{title} {text}" if title and isinstance(title, str) and isinstance(text, str) else text


def look_up(folder: str, key: str, identifier: Any) -> str:
    """Returns the text of an id; raises NoPairError if there is none."""
    if not folder:
        raise NoPairError(f"{NO_FIELD}: it has ids; say where their texts are with `{key}` in a file of sources")
    text = by_id.open_texts(folder).get(str(identifier))
    if text is None:
        raise NoPairError(f"{NO_FIELD}: no {key} with the id {str(identifier)[:40]}")
    return text


def scores_of(record: Mapping[str, Any], positives: int, negatives: int) -> tuple[float, ...]:
    """Returns the scores of all documents of a record of lists, NaN where one is missing; () if there are none."""
    if record.get("scores") is not None:
        scores = listed_scores(record, "scores", positives + negatives)
    elif record.get("pos_scores") is None and record.get("neg_scores") is None:
        return ()
    else:
        scores = [*listed_scores(record, "pos_scores", positives), *listed_scores(record, "neg_scores", negatives)]
    return tuple(scores)


def listed_scores(record: Mapping[str, Any], name: str, count: int) -> list[float]:
    """Returns the `count` numbers in a list of scores, NaN each if there is no list.

    Raises:
      NoPairError: there are more or fewer, or they are no numbers.
    """
    scores = record.get(name)
    if scores is None:
        return [math.nan] * count
    if not isinstance(scores, Sequence) or isinstance(scores, str) or len(scores) != count:
        raise NoPairError(f"{name} has not one number for each of {count} documents")
    return [number_of(score, ()) for score in scores]


def fewer_negatives(pair: Pair, options: PairOptions) -> Pair:
    """Returns a pair with the hard negatives that its source asks for; raises NoPairError if it has too few."""
    first = 1 + pair.positives
    kept = list(range(first, len(pair.texts)))
    if options.relative_margin is not None and pair.scores:
        limit = (1 - options.relative_margin) * min(pair.scores[: pair.positives])
        kept = [number for number in kept if not pair.scores[number - 1] > limit]
    kept = kept[: options.max_negatives]
    if len(kept) < options.min_negatives:
        raise NoPairError(schemas.FEW_NEGATIVES)
    if len(kept) == len(pair.texts) - first:
        return pair
    all_ = [*range(first), *kept]
    scores = tuple(pair.scores[number - 1] for number in all_[1:]) if pair.scores else ()
    return pair._replace(texts=tuple(pair.texts[number] for number in all_), scores=scores)


def texts_of(record: Mapping[str, Any], paths: tuple[str, ...]) -> list[Any]:
    """Returns the values of the fields at these paths, or of the first known layout of columns, up to the first missing one."""
    if not paths:
        paths = next((layout for layout in COLUMNS if all(record.get(name) is not None for name in layout[:2])), ())
        if len(paths) == 3:
            paths = (*paths[:2], *([paths[2]] * (record.get(paths[2]) is not None)), *numbered(record))
    values = [schemas.field_of(record, path) for path in paths]
    return values[: values.index(None)] if None in values else values


def numbered(record: Mapping[str, Any]) -> Iterator[str]:
    """Yields "negative_1", "negative_2", ... up to the first that a record lacks."""
    for name in NUMBERED:
        if record.get(name) is None:
            return
        yield name


def number_of(label: Any, names: tuple[str, ...]) -> float:
    """Returns a label as the nearest float32: the place of its name, or the number that it is; NaN where there is none.

    Raises:
      NoPairError: it is neither; the message says so.
    """
    if label is None or label == "":
        return math.nan
    text = str(label).lower() if isinstance(label, bool) else str(label)  # true, 1, 0.5
    if names:
        if text not in names:
            raise NoPairError(f"label {text[:40]} is not among --labels")
        return float(names.index(text))
    try:
        return float(np.float32(label))
    except (TypeError, ValueError, OverflowError):
        raise NoPairError(f"label {text[:40]} is no number (--labels=NAME,NAME names the classes)") from None
