"""A file of sources: what `prepare --pairs=sources.toml` reads of each source of pairs.

[nq]                                    the domain of its pairs
files = "nq/*.jsonl.zst"                a glob, relative to the folder of this file, or several in a list
query_prompt = "query: "                further keys are those of `pairs.PairOptions`
document_prompt = "passage: "
query_tokens = 64

[msmarco]
files = "scores/*.parquet"              pairs that name their texts by ids,
queries = "queries/*.parquet"           and where these are: files of JSON lines or Parquet files with an id,
documents = "corpus/*.jsonl.gz"         a text and perhaps a title

[topics]
files = "topics.jsonl"
in_batch = false                        documents of other pairs are no negatives
"""

import itertools
import os
import pathlib
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.data.raw import by_id, inputs
from contrastive_jax.data.raw.pairs import PairFields, PairOptions, with_title
from contrastive_jax.data.raw.sources import Shard
from contrastive_jax.data.raw.text_stream import DamagedError, TextStream
from contrastive_jax.files import listing, on_bucket
from contrastive_jax.files.listing import ListedFile
from contrastive_jax.runtime.progress import Progress

SUFFIX = ".toml"
IDS = ("_id", "id", "docid", "query_id", "document_id", "qid", "pid")
TEXTS = ("text", "document_text", "query_text", "document", "query", "passage", "contents")
SIDES = ("queries", "documents")
TYPES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class PairSource(NamedTuple):
    """A source of pairs: its name, the globs of its files, and its options, in which `queries` and `documents` are globs."""

    name: str
    files: list[str]
    options: PairOptions


def is_file_of_sources(value: str) -> bool:
    """Returns whether a value of --pairs or --validation is a file of sources."""
    return value.endswith(SUFFIX)


def read(path: str) -> list[PairSource]:
    """Returns the sources of a file.

    Raises:
      UserError: it cannot be read, or a key is unknown or has a wrong value; the message names it.
    """
    try:
        tables = tomllib.loads(epath.Path(path).read_bytes().decode())  # TOML is UTF-8, whatever the locale
    except FileNotFoundError as error:
        raise UserError(f"--pairs={path}: no such file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--pairs={path}: {error}; it has a table [NAME] for each source") from error
    if not tables:
        raise UserError(f'--pairs={path}: has no source; write a table [NAME] with files = "GLOB"')
    return [source_of(path, name, table) for name, table in tables.items()]


def source_of(path: str, name: str, table: Any) -> PairSource:
    """Returns the source in a table of a file of sources; raises UserError, see `read`."""
    if not isinstance(table, Mapping) or not table.get("files"):
        raise UserError(f'--pairs={path}: [{name}] has no files; write files = "GLOB"')
    values = dict(table)
    patterns = values.pop("files")
    files = [patterns] if isinstance(patterns, str) else list(patterns)
    types = dict(query_prompt=str, document_prompt=str, query_tokens=int, document_tokens=int, in_batch=bool)
    types |= dict(min_negatives=int, max_negatives=int, relative_margin=float, queries=str, documents=str)
    for key, value in values.items():
        if key not in types:
            raise UserError(f"--pairs={path}: [{name}] {key}: no such key; there are files, {', '.join(types)}")
        kind = (int, float) if types[key] is float else types[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and types[key] is not bool):
            raise UserError(f"--pairs={path}: [{name}] {key} = {value!r}: must be {TYPES[types[key]]}")
        if isinstance(value, int) and value < 0:
            raise UserError(f"--pairs={path}: [{name}] {key} = {value}: must be at least 0")
    folder = os.path.dirname(path)
    values |= {side: absolute(values[side], folder) for side in SIDES if side in values}
    return PairSource(name, [absolute(glob, folder) for glob in files], PairOptions(**values))


def absolute(glob: str, folder: str) -> str:
    """Returns a glob of a file of sources in this folder that means the same everywhere."""
    return glob if on_bucket(glob) or listing.on_hub(glob) else os.path.join(folder, os.path.expanduser(glob))


def pair_shards(
    pair: PairFields, patterns: Sequence[str], split: str, flag: str, text_field: str, domain_field: str, limit: int
) -> list[Shard]:
    """Returns the files of pairs, of globs and of files of sources; see `inputs.file_shards`. Each belongs to the first source.

    The limit is the most lines over all sources.

    Raises:
      UserError: a file of sources is wrong, or goes with --min_negatives; a glob matches nothing, or the first lines of a
        source have no pair.
    """
    shards = list[Shard]()
    for pattern in patterns:
        sources = read(pattern) if is_file_of_sources(pattern) else [None]
        if sources != [None] and pair.options.min_negatives:
            raise UserError(f"--min_negatives={pair.options.min_negatives}: write min_negatives for each source of {pattern}")
        for source in sources:
            fields = pair._replace(options=source.options) if source else pair
            globs = source.files if source else [pattern]
            found = inputs.file_shards(globs, split, flag, text_field, domain_field, pair=fields)
            found = [shard for shard in found if shard.name not in {other.name for other in shards}]
            found = [shard._replace(domain=source.name) for shard in found] if source else found
            has_ids = fields.options.queries or fields.options.documents  # which cannot be looked up yet
            shards += found if has_ids or not found else inputs.with_field_count(found, fields)
    return [shard._replace(order=order) for order, shard in enumerate(inputs.with_limit(shards, "max_lines", limit))]


def looked_up(shards: Iterable[Shard]) -> list[str]:
    """Returns the globs of all texts that pairs name by ids, each once."""
    options = (shard.pair.options for shard in shards if shard.pair)
    globs = (getattr(one, side) for one in options for side in SIDES)
    return [*dict.fromkeys(glob for glob in globs if glob)]


def text_files(glob: str) -> list[ListedFile]:
    """Returns the files of the texts of ids; raises UserError if there are none."""
    if found := listing.list_files(glob):
        return found
    raise UserError(f"{glob}: no file matches; check queries and documents in the file of sources")


def write_texts(shards: Sequence[Shard], folder: pathlib.Path, say: Any) -> list[Shard]:
    """Writes the texts of ids into a local folder, if an earlier run has not, and tells the shards where they are.

    Raises:
      UserError: a file cannot be read.
    """
    folders = {}
    for number, glob in enumerate(looked_up(shards)):
        target, new = folder / str(number), folder / f"{number}.new"
        folders[glob] = str(target)
        if target.exists():
            continue
        with Progress("texts of ids", None, "texts", say=say, quiet_if_short=True) as progress:
            by_id.write(new, counted(texts_of(text_files(glob)), progress))
        new.rename(target)

    def placed(shard: Shard) -> Shard:
        assert shard.pair
        options = shard.pair.options
        options = options._replace(queries=folders.get(options.queries, ""), documents=folders.get(options.documents, ""))
        return shard._replace(pair=shard.pair._replace(options=options))

    return [placed(shard) for shard in shards]


def counted(texts: Iterator[tuple[str, str]], progress: Progress) -> Iterator[tuple[str, str]]:
    """Yields the texts, and counts them."""
    for text in texts:
        progress.advance()
        yield text


def texts_of(files: Iterable[ListedFile]) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of files of JSON lines or Parquet files.

    Raises:
      UserError: a line has neither, or a file is damaged.
    """
    for file in files:
        name = file.name
        records = rows(name) if name.endswith(".parquet") else lines(name)
        for number, record in enumerate(records, start=1):
            identifier, text = (next((record[x] for x in names if record.get(x) is not None), None) for names in (IDS, TEXTS))
            text = with_title({"title": record.get("title"), "text": text})
            if identifier is None or not isinstance(text, str):
                raise UserError(f"{name}:{number}: no id and text; call them {IDS[0]} and {TEXTS[0]}")
            yield str(identifier), text


def lines(name: str) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file of JSON lines; raises UserError where it is none."""
    stream, number = TextStream(name), 1
    try:
        for line in stream.lines(sys.maxsize):
            if line and not line.isspace():
                yield orjson.loads(line)
            number += 1
    except (ValueError, DamagedError) as error:
        raise UserError(f"{name}:{number}: {error}; each line must hold one object") from error
    finally:
        stream.close()


def rows(name: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a Parquet file; raises UserError if it is damaged."""
    from contrastive_jax.data.raw import parquet  # takes a second, and most inputs need none

    try:
        table = parquet.ParquetTable(name, "", "", PairFields(text=(*IDS, *TEXTS, "title")))
        try:
            groups = (table.rows(number, 0, group.rows) for number, group in enumerate(table.groups()))
            for row in itertools.chain.from_iterable(groups):
                yield row or {}
        finally:
            table.close()
    except parquet.DamagedError as error:
        raise UserError(f"{name}: damaged file: {error}") from error
