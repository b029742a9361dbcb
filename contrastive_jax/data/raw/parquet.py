"""Reads the rows of Parquet files: only the columns that a document needs, in bounded memory."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from contrastive_jax.data.raw import schemas
from contrastive_jax.data.raw.pairs import PairFields
from contrastive_jax.files import listing

ROWS = 128  # rows that are decoded at once
BUFFER_BYTES = 1 << 20  # bytes of a column that are taken from the file at once


class DamagedError(Exception):
    """A file is no Parquet file, or a row group of it is corrupt."""


class RowGroup(NamedTuple):
    """The rows of a row group, and the bytes of the needed columns, uncompressed and in the file."""

    rows: int
    text_bytes: int
    file_bytes: int


class StorageFile:
    """A file for pyarrow, which raises an OSError for a damaged file too; `error` is what its storage raised, if anything."""

    def __init__(self, name: str):
        """Opens a file of any storage."""
        self._name, self._file = name, listing.open_binary(name)
        self.error: Exception | None = None

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._file.closed

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def tell(self) -> int:
        """Returns the offset of the next byte."""
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes to an offset; as for a file of Python."""
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes.

        Raises:
          Exception: whatever the client of the storage raises; for hf:// see `listing.hub_errors`.
        """
        try:
            with listing.hub_errors(self._name):
                return self._file.read(size)
        except Exception as error:
            self.error = error
            raise


class ParquetTable:
    """A Parquet file whose rows are read as dicts of the needed columns.

    Raises:
      DamagedError: it is no Parquet file, or its end, where its structure is described, is missing.
    """

    def __init__(self, name: str, text_field: str, domain_field: str, pair: PairFields | None = None):
        """Opens a file of any storage, and reads its end; fields as for `sources.Shard`."""
        self._storage = StorageFile(name)
        with contextlib.ExitStack() as closing, damage(self._storage):
            closing.callback(self._storage.close)
            self._file = pyarrow.parquet.ParquetFile(
                self._storage, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            )
            closing.pop_all()
        of_text = [text_field] if text_field else [*schemas.TEXT_FIELDS]
        wanted = pair.columns() if pair else of_text
        wanted += [domain_field] if domain_field else [path for field in schemas.DOMAIN_FIELDS for path in field]
        leaves = enumerate(self._file.schema.column(i).path for i in range(len(self._file.schema)))
        self._leaves = [(number, leaf) for number, leaf in leaves if any(is_within(leaf, path) for path in wanted)]
        self._columns = [leaf for _, leaf in self._leaves]
        self._group, self._row = -1, 0  # the next row of `_batches`, after those of `_batch`
        self._batches: Iterator[pyarrow.RecordBatch] = iter(())
        self._batch: pyarrow.RecordBatch | None = None

    def close(self) -> None:
        """Closes the file."""
        self._file.close(force=True)

    def groups(self) -> list[RowGroup]:
        """Returns the row groups of the file."""
        metadata, groups = self._file.metadata, []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [group.column(i) for i, _ in self._leaves]
            sizes = [(column.total_uncompressed_size, column.total_compressed_size) for column in columns]
            groups.append(RowGroup(group.num_rows, sum(size for size, _ in sizes), sum(size for _, size in sizes)))
        return groups

    def rows(self, group: int, start: int, end: int) -> Iterator[dict[str, Any] | None]:
        """Yields rows of a row group; None in the place of a text that is not valid UTF-8.

        Rows that follow those of the last call need not be skipped to. Behind a damage there are no rows.

        Args:
          group: the number of the row group.
          start: the number of the first row in it.
          end: the number of the row after the last.

        Raises:
          DamagedError: the row group is damaged between `start` and `end`.
        """
        if self._group != group or self._row > start:
            self._batches = self._file.iter_batches(ROWS, row_groups=[group], columns=self._columns, use_threads=False)
            self._group, self._row, self._batch = group, 0, None
        while self._row < end:
            try:
                with damage(self._storage):
                    batch = self._batch or next(self._batches, None)
            except DamagedError:
                self._group = -1
                if self._row < start:
                    return
                raise
            if batch is None:
                return
            is_wanted = self._row >= start
            count = min(len(batch), (end if is_wanted else start) - self._row)
            self._row, self._batch = self._row + count, batch.slice(count) if count < len(batch) else None
            if is_wanted:
                yield from records_of(batch.slice(0, count))


def records_of(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | None]:
    """Returns the rows of a batch as dicts; None in the place of one with a text that is not valid UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [record for row in range(len(batch)) for record in records_of(batch.slice(row, 1))]


@contextlib.contextmanager
def damage(file: StorageFile) -> Iterator[None]:
    """Raises a DamagedError for what pyarrow raises at a damaged place: its own errors, or an OSError.

    What the storage raised goes on: a connection that broke says nothing about the file.
    """
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if file.error is not None or getattr(error, "errno", None) is not None:
            raise
        raise DamagedError(" ".join(str(error).split())[:200]) from error


def is_within(leaf: str, path: str) -> bool:
    """Returns whether a column of the file belongs to a dotted path; lists and maps have further names below theirs."""
    return re.match(rf"{re.escape(path)}(\.|$)", leaf) is not None
