"""Reads raw documents: lines of JSON, rows of Parquet, examples of a TFDS dataset.

    reader = sources.Reader()           # keeps its file open, for the next part of it
    for item in reader.read(part):      # a Document, or a Reject in the place of a line without one

A `Shard` is a file, or a slice of a TFDS dataset; `data.raw.inputs` finds them. A `Part` is a run of its lines, which one task
reads; `data.raw.parts` cuts shards into them. No function holds more than one line in memory, however well it was compressed.
"""

import codecs
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import orjson
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.data.raw import pairs, schemas, tables, text_stream
from contrastive_jax.data.raw.schemas import Content
from contrastive_jax.data.raw.text_stream import DECOMPRESSORS, DamagedError, Frame, TextStream

DAMAGED = "damaged file"  # reasons of rejects; this one up to its colon
NOT_JSON, NO_OBJECT = "not JSON", "not a JSON object"


class Shard(NamedTuple):
    """A file, or a slice of a TFDS dataset.

    Attributes:
      name: the path of the file, or TFDS_NAME/SPLIT[FROM:TO].
      order: its number among the inputs. Of equal documents, the one with the lowest (order, line) is kept.
      split: "train" or "validation"; "" where a hash of each document decides.
      tfds: None for a file; otherwise the directory, cut, feature and domain of the slice.
      size: the bytes of the file, or the examples of the slice.
      version: what changes when the content of the file does.
      domain: of all its documents; "": each document names its own, or else has that of the file's name.
      text_field: the dotted path of the text; "": that of a known schema.
      domain_field: the dotted path of the domain, which is "unknown" where it is missing; "": that of a known schema.
      max_lines: the lines, rows or examples that are read from its head, bad ones included; 0: all.
      max_bytes: the bytes of text that are read from its head, up to the next end of a line; 0: all.
      pair: where the texts of its pairs are; None: its lines are documents.
    """

    name: str
    order: int
    split: str
    tfds: dict[str, str] | None = None
    size: int = 0
    version: str = ""
    domain: str = ""
    text_field: str = ""
    domain_field: str = ""
    max_lines: int = 0
    max_bytes: int = 0
    pair: pairs.PairFields | None = None

    @property
    def is_limited(self) -> bool:
        """Whether only the head of the shard is read."""
        return bool(self.max_lines or self.max_bytes)


class Part(NamedTuple):
    """A run of lines of a shard; all fields but `shard` are integers, so that a part can be kept as JSON.

    Attributes:
      shard: whose lines they are.
      start: where the part begins. Plain and compressed files: the bytes of (decompressed) text before its first line. Parquet:
        the rows before it. TFDS: 0, as a slice is one part.
      end: where it ends, in the same units. In the last part of a file an estimate: the part reaches to the end of the file.
      line: the number of its first line, row or example in the shard, from 1.
      text_bytes: about the bytes of text in it.
      is_last: whether it reaches to the end of the shard: the part in which damage that no `cut` can pass is found.
      frame_file, frame_text: the offsets, in the file and in the text, of the last place before `start` at which decompression
        can begin. A reader goes there and skips the text up to `start`.
      window_bytes: the memory that the decompressor needs beyond a few MB, for a .zst of a long window.
    """

    shard: Shard
    start: int
    end: int
    line: int
    text_bytes: int
    is_last: bool
    frame_file: int = 0
    frame_text: int = 0
    window_bytes: int = 0


class Document(NamedTuple):
    """One text, with its domain, shard and line; lines are numbered from 1. That of a pair is all its texts."""

    text: str
    domain: str
    shard: Shard
    line: int
    pair: schemas.Pair | None = None


class Reject(NamedTuple):
    """A line without a document, and the reason; line 0 stands for the whole shard.

    `lost_bytes` are the bytes of the file after a damage, none of which can be read.
    """

    shard: Shard
    line: int
    reason: str
    domain: str
    lost_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.shard.name}:{self.line}: {self.reason}"


def stop_message(reject: Reject) -> str:
    """Returns the error message for a reject where on_bad is "fail"."""
    mend = "--text_field=NAME says where the text is, " if reject.reason.startswith(schemas.NO_TEXT) else ""
    if reject.line == 1 and ".json" in reject.shard.name and reject.reason in (NOT_JSON, NO_OBJECT):
        mend = "each line must hold one object; "
    return f"{reject} ({mend}--on_bad=skip counts such lines and goes on from what is done)"


def domain_of_shard(shard: Shard) -> str:
    """Returns the domain of the documents that name none."""
    return shard.domain or (schemas.UNKNOWN_DOMAIN if shard.domain_field else schemas.name_of_corpus(shard.name))


def is_parquet(shard: Shard) -> bool:
    """Returns whether the shard is a Parquet file."""
    return shard.name.endswith(".parquet")


def is_compressed(shard: Shard) -> bool:
    """Returns whether the shard is a compressed file of lines."""
    return shard.name.endswith(tuple(DECOMPRESSORS))


def read(part: Part) -> Iterator[Document | Reject]:
    """Yields the documents of a part in order, with a `Reject` in the place of each line that has none."""
    reader = Reader()
    try:
        yield from reader.read(part)
    finally:
        reader.close()


class Reader:
    """Reads parts. It keeps its file open, so that the next part of the same file need not be skipped to.

    Attributes:
      text_bytes: the bytes of text read so far, over all parts.
      file_bytes: the bytes of files read so far, skipped ones included.
      long_line: called before a long line is read whole; see `TextStream.lines`.
    """

    def __init__(self, long_line: Callable[[], None] = lambda: None) -> None:
        self.long_line = long_line
        self.text_bytes = self.file_bytes = 0
        self._stream: Any = None  # a TextStream or a ParquetTable
        self._shard: Shard | None = None

    def close(self) -> None:
        """Closes the file."""
        if self._stream:
            self._stream.close()
        self._stream = self._shard = None

    def read(self, part: Part) -> Iterator[Document | Reject]:
        """Yields the documents of a part in order, with a `Reject` in the place of each line that has none.

        Raises:
          UserError: the file is no longer the one that was cut.
        """
        shard, is_empty = part.shard, True
        default = domain_of_shard(shard)
        contents = self._examples if shard.tfds else self._rows if is_parquet(shard) else self._lines
        for number, content, lost in contents(part, default):
            is_empty = False
            domain = shard.domain or content.domain
            if content.reason:
                yield Reject(shard, number, content.reason, domain, lost)
            else:
                yield Document(content.text, domain, shard, number, content.pair)
        if is_empty and part.line == 1 and part.is_last:
            yield Reject(shard, 0, "empty shard", default)

    def _lines(self, part: Part, default: str) -> Iterator[tuple[int, Content, int]]:
        """Yields (line, content, lost bytes) of each line of a file that is not blank, and of the place where it is damaged."""
        shard, number = part.shard, part.line - 1
        stream = self._stream_at(part)
        position, file_position = stream.position, stream.file_position
        try:
            for line in stream.lines(sys.maxsize if part.is_last else part.end, self.long_line):
                number += 1
                self.text_bytes += stream.position - position
                self.file_bytes += stream.file_position - file_position
                position, file_position = stream.position, stream.file_position
                if line is None:
                    yield number, Content("", default, f"line longer than {text_stream.MAX_LINE_BYTES >> 20} MB"), 0
                elif line and not line.isspace() and not (number == 1 and has_header(shard)):
                    content = _parse(line, shard, default)
                    del line  # a long one takes much memory
                    yield number, content, 0
            if part.is_last:
                self.close()
        except DamagedError as error:
            lost = max(0, (shard.size or epath.Path(shard.name).stat().length) - stream.file_position)
            self.close()
            yield number + 1, Content("", default, f"{DAMAGED}: {error}"), lost

    def _stream_at(self, part: Part) -> TextStream:
        """Returns the stream of a part's file at the part's first line."""
        shard, stream = part.shard, self._stream
        frame = Frame(part.frame_file, part.frame_text) if is_compressed(shard) else Frame(part.start, part.start)
        if not isinstance(stream, TextStream) or self._shard != shard or not frame.text <= stream.position <= part.start:
            self.close()
            self._stream, self._shard = stream, _ = TextStream(shard.name, frame), shard
        before = stream.file_position
        try:
            stream.skip(part.start)
        except DamagedError as error:
            self.close()
            raise UserError(f"{shard.name}: has changed since its parts were found; start again") from error
        self.file_bytes += stream.file_position - before
        return stream

    def _rows(self, part: Part, default: str) -> Iterator[tuple[int, Content, int]]:
        """Yields (row, content, lost bytes) of each row of a part, and of the place in each row group where it is damaged."""
        from contrastive_jax.data.raw import parquet

        shard, group_end = part.shard, 0
        if not isinstance(self._stream, parquet.ParquetTable) or self._shard != shard:
            self.close()
            try:
                self._stream = parquet.ParquetTable(shard.name, shard.text_field, shard.domain_field, shard.pair)
            except parquet.DamagedError as error:
                yield 0, Content("", default, f"{DAMAGED}: {error}"), shard.size
                return
        table, self._shard = self._stream, shard
        for number, group in enumerate(table.groups()):
            group_start, group_end = group_end, group_end + group.rows
            row, end = max(group_start, part.start), min(group_end, part.end)
            if row >= end:
                continue
            share = (end - row) / group.rows
            try:
                for record in table.rows(number, row - group_start, end - group_start):
                    row += 1
                    yield row, _content_of(record, shard, default), 0
            except parquet.DamagedError as error:
                lost = group.file_bytes * (group_end - row) // group.rows
                yield row + 1, Content("", default, f"{DAMAGED}: {error}"), lost
            self.text_bytes += round(share * group.text_bytes)
            self.file_bytes += round(share * group.file_bytes)
        if part.is_last:
            self.close()

    def _examples(self, part: Part, default: str) -> Iterator[tuple[int, Content, int]]:
        """Yields (number from 1, content, 0) of each example of a slice of a TFDS dataset."""
        import tensorflow_datasets as tfds

        tfds_slice = part.shard.tfds or {}
        feature, domain = tfds_slice["feature"], tfds_slice["domain"]
        builder = tfds.builder_from_directory(tfds_slice["directory"])
        examples = builder.as_dataset(split=tfds_slice["cut"], decoders={feature: tfds.decode.SkipDecoding()})
        for number, example in enumerate(tfds.as_numpy(examples.take(part.end)), start=1):
            self.text_bytes += len(example[feature])
            self.file_bytes += len(example[feature])
            try:
                yield number, schemas.content_of({"text": example[feature].decode("utf-8")}, "text", "", domain), 0
            except UnicodeDecodeError:
                yield number, Content("", domain, "invalid UTF-8"), 0


def _parse(line: bytes, shard: Shard, default: str) -> Content:
    """Returns the document in a line of JSON or of a table, or why there is none."""
    if tables.is_table(shard.name):
        try:
            return _content_of(tables.record_of(line, shard.name, shard.version, has_header(shard)), shard, default)
        except tables.NoRowError as error:
            return Content("", default, str(error))
    try:
        record = orjson.loads(line)
    except ValueError:
        # It is stricter than json, which also takes NaN, says what is wrong, and passes over a byte order mark.
        try:
            record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
        except UnicodeDecodeError:
            return _content_of(None, shard, default)
        except (ValueError, RecursionError):
            return Content("", default, NOT_JSON)
    if not isinstance(record, dict):
        return Content("", default, NO_OBJECT)
    return _content_of(record, shard, default)


def has_header(shard: Shard) -> bool:
    """Returns whether the first line of the shard names its columns."""
    return tables.is_table(shard.name) and not (shard.pair and all(path.isdigit() for path in shard.pair.text or ("",)))


def _content_of(record: Mapping[str, Any] | None, shard: Shard, default: str) -> Content:
    """Returns the document or the pair in a record, or why there is none; None stands for a record that is not UTF-8."""
    if record is None:
        return Content("", default, "invalid UTF-8")
    if shard.pair:
        return pairs.content_of(record, shard.pair, shard.domain_field, default)
    return schemas.content_of(record, shard.text_field, shard.domain_field, default)
