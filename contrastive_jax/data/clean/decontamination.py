"""Finds evaluation texts in documents by their word 13-grams (appendix C of GPT-3: Brown et al. 2020, arXiv 2005.14165).

A document is contaminated if it has 13 words in a row in common with an evaluation text, whatever their case, punctuation and
white space. Of an evaluation text of 8 to 12 words all words count as one n-gram; a shorter one is not looked for, because
documents have such phrases by chance.

All n-grams of the evaluation texts are hashed once and lie in files that the workers map into memory: about 17 bytes per word.
"""

import base64
import collections
import csv
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.data.clean import hash_set, ngrams
from contrastive_jax.data.raw import text_stream
from contrastive_jax.files import listing
from contrastive_jax.files.listing import ListedFile

NGRAM, SHORTEST = 13, 8  # words
SUFFIXES = (".jsonl", ".ndjson", ".json", ".tsv", ".csv", ".txt", ".parquet")
PACKED = (".gz", ".zst", ".bz2", ".xz")


class EvaluationText(NamedTuple):
    """A text of an evaluation set; the name of the set is that of its folder or of its file."""

    set_name: str
    text: str


class Ngrams(NamedTuple):
    """The n-grams of evaluation texts, sorted by hash.

    Dimensions: m n-grams (one that two texts have counts twice), t texts, s sets.

    Attributes:
      hashes: uint64 [m], sorted.
      texts: int32 [m], the number of the text that each belongs to.
      sizes: uint8 [k], the sizes that occur, sorted.
      starts: the filter (see `data.clean.hash_set`) of the first 8 words of each n-gram.
      sets: int32 [t], the number of the set of each text.
    """

    hashes: np.ndarray
    texts: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    sets: np.ndarray


def evaluation_files(path: str) -> list[ListedFile]:
    """Returns the files of texts in an evaluation folder, or the one file that `path` names.

    Raises:
      UserError: there is none.
    """
    found = listing.list_files(path) if plain_suffix(path) else listing.files_below(path, "**/*")
    found = [file for file in found if plain_suffix(file.name)]
    if not found:
        raise UserError(f"--decontaminate={path}: no file of {', '.join(SUFFIXES)} there; give folders of evaluation sets")
    return found


def evaluation_texts(paths: Iterable[str]) -> Iterator[EvaluationText]:
    """Yields the texts in evaluation folders: strings in .json and .jsonl, fields of .tsv, .csv and .parquet, lines of .txt.

    Files may be compressed (.gz, .zst, .bz2, .xz). Others are passed over.

    Args:
      paths: folders, which are searched whole, and files, local, on gs:// or on s3://.

    Raises:
      UserError: there is no such folder or file, or a file is not what its suffix says.
    """
    for path in paths:
        for file in evaluation_files(path):
            set_name = set_name_of(path, file.name)
            for text in strings_of_file(file.name):
                yield EvaluationText(set_name, text)


def plain_suffix(name: str) -> str:
    """Returns the suffix of a file of texts without that of its compression; "" for other names."""
    for packed in PACKED:
        name = name.removesuffix(packed)
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def set_name_of(path: str, name: str) -> str:
    """Returns the name of the set of a file: its folder below `path`, or else the name of `path`."""
    folder = os.path.relpath(os.path.dirname(name), path) if name != path else "."
    return os.path.basename(path.rstrip("/")) if folder == "." else folder


def strings_of_file(name: str) -> Iterator[str]:
    """Yields the strings in a file of evaluation texts.

    Raises:
      UserError: the file is not what its suffix says.
    """
    suffix = plain_suffix(name)
    if suffix == ".parquet":
        yield from strings_of_parquet(name)
        return
    lines = (line.decode("utf-8", "replace") for line in text_lines(name))
    try:
        if suffix in (".tsv", ".csv"):
            yield from (field for row in csv_rows(lines, suffix) for field in row)
        elif suffix == ".json":
            yield from strings_of_json(json.loads("\n".join(lines)))
        elif suffix == ".txt":
            yield from lines
        else:
            yield from (text for line in lines if line.strip() for text in strings_of_json(json.loads(line)))
    except (ValueError, csv.Error) as error:
        raise UserError(f"--decontaminate: {name}: {error}; mend the file or leave it out") from error


def text_lines(name: str) -> Iterator[bytes]:
    """Yields the lines of a plain or compressed file.

    Raises:
      UserError: the file is damaged.
    """
    stream = text_stream.TextStream(name)
    try:
        yield from (line for line in stream.lines(sys.maxsize) if line is not None)
    except text_stream.DamagedError as error:
        raise UserError(f"--decontaminate: {name}: damaged file: {error}; replace it or leave it out") from error
    finally:
        stream.close()


def csv_rows(lines: Iterable[str], suffix: str) -> Iterator[list[str]]:
    """Yields the rows of a table; a .tsv file has no quoted fields."""
    csv.field_size_limit(1 << 30)
    if suffix == ".csv":
        yield from csv.reader(line + "\n" for line in lines)
    else:
        yield from (line.split("\t") for line in lines)


def strings_of_json(value: Any) -> Iterator[str]:
    """Yields all strings in a value of JSON, names of fields excepted."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_of_json(item)


def strings_of_parquet(name: str) -> Iterator[str]:
    """Yields all strings in a Parquet file."""
    from pyarrow import parquet  # takes a second

    with epath.Path(name).open("rb") as file:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                yield from strings_of_json(row)


class Collected(NamedTuple):
    """What `collect` returns: the n-grams, the names of the sets, and the report, {set: {"texts", "too_short", "ngrams"}}."""

    ngrams: Ngrams
    names: list[str]
    report: dict[str, dict[str, int]]


def collect(texts: Iterable[EvaluationText]) -> Collected:
    """Returns the n-grams of evaluation texts; the same text of a set counts once."""
    numbers: dict[str, int] = {}
    counts: dict[str, collections.Counter[str]] = {}
    seen, sets, sizes = set[tuple[int, bytes]](), list[int](), set[int]()
    hashes, owners, starts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], [np.zeros(0, np.uint64)]
    for set_name, text in texts:
        number = numbers.setdefault(set_name, len(numbers))
        count = counts.setdefault(set_name, collections.Counter(texts=0, too_short=0, ngrams=0))
        words = ngrams.words_of(text).hashes
        identity = (number, hashlib.blake2b(words.tobytes(), digest_size=16).digest())
        if not len(words) or identity in seen:
            continue
        seen.add(identity)
        count["texts"] += 1
        if len(words) < SHORTEST:
            count["too_short"] += 1
            continue
        size = min(NGRAM, len(words))
        of_text = np.unique(ngrams.ngram_hashes(words, size))
        count["ngrams"] += len(of_text)
        sizes.add(size)
        hashes.append(of_text)
        owners.append(np.full(len(of_text), len(sets), np.int32))
        starts.append(ngrams.ngram_hashes(words, SHORTEST)[: len(words) - size + 1])
        sets.append(number)
    together = np.concatenate(hashes)
    order = np.argsort(together, kind="stable")
    table = Ngrams(
        hashes=together[order],
        texts=np.concatenate(owners)[order],
        sizes=np.array(sorted(sizes), np.uint8),
        starts=hash_set.bitmap_of(np.unique(np.concatenate(starts))),
        sets=np.array(sets, np.int32),
    )
    return Collected(table, list(numbers), {name: dict(count) for name, count in counts.items()})


def texts_in(table: Ngrams, words: np.ndarray) -> np.ndarray:
    """Returns the numbers of the evaluation texts that have an n-gram in common with a document, sorted.

    Args:
      table: the n-grams of the evaluation texts.
      words: uint64 [w], the hashes of the document's words.
    """
    begins = hash_set.candidates(table.starts, ngrams.ngram_hashes(words, SHORTEST))
    if not len(begins):
        return np.zeros(0, np.int32)
    inside = ((begins[begins + size <= len(words)], size) for size in table.sizes.tolist())
    hashes = np.concatenate([ngrams.ngram_hashes_at(words, places, size) for places, size in inside])
    hashes = np.unique(hashes[hash_set.contains(table.hashes, hashes)])
    first, end = (np.searchsorted(table.hashes, hashes, side) for side in ("left", "right"))
    found = [table.texts[a:b] for a, b in zip(first.tolist(), end.tolist(), strict=True)]
    return np.unique(np.concatenate([np.zeros(0, np.int32), *found]))


class Findings:
    """What the documents of a task have of the evaluation sets."""

    def __init__(self, table: Ngrams):
        self._table = table
        self._found = np.zeros(len(table.sets), np.bool_)
        self._documents: collections.Counter[int] = collections.Counter()

    def add(self, texts: np.ndarray) -> None:
        """Adds a document that has these evaluation texts in it."""
        self._found[texts] = True
        self._documents.update(set(self._table.sets[texts].tolist()))

    def as_json(self) -> dict[str, Any]:
        """Returns the findings for the outcome of a task: the texts as a bitmap, the documents by the number of the set."""
        bitmap = base64.b64encode(np.packbits(self._found).tobytes()).decode() if self._documents else ""
        return {"texts": bitmap, "documents": [list(item) for item in sorted(self._documents.items())]}


def report_of(collected: Collected, findings: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns the report for the manifest: that of `collect`, with the texts found in documents and the documents removed.

    Args:
      collected: from `collect`.
      findings: from `Findings.as_json`, of all tasks.
    """
    table, names, report = collected
    found, documents = np.zeros(len(table.sets), np.bool_), collections.Counter[int]()
    for item in findings:
        if item["texts"]:
            bits = np.frombuffer(base64.b64decode(item["texts"]), np.uint8)
            found |= np.unpackbits(bits, count=len(found)).view(np.bool_)
        documents.update(dict(item["documents"]))
    texts = np.bincount(table.sets[found], minlength=len(names))
    return {
        name: {**report[name], "texts_found": int(texts[number]), "documents_removed": documents[number]}
        for number, name in enumerate(names)
    }
