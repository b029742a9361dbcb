"""Tables of pairs, .tsv and .csv: one row per line, and the names of the columns in the first line.

Where fields are named by numbers, --text_field=2,3, the table has no such line and its columns are "1", "2", ... A .tsv has no
quotes; in a .csv a quoted value may have commas, and two quotes for one, but no line breaks, as a part may begin at any line.
"""

import csv
import functools

from contrastive_jax.data.raw.text_stream import DECOMPRESSORS, MAX_LINE_BYTES, TextStream

SUFFIXES = tuple(suffix + end for suffix in (".tsv", ".csv") for end in ("", *DECOMPRESSORS))


class NoRowError(Exception):
    """A line is no row of a table; the message says why."""


def is_table(name: str) -> bool:
    """Returns whether the file of this name is a table."""
    return name.endswith(SUFFIXES)


def values_of(line: bytes, name: str) -> list[str]:
    """Returns the values in a line of the table of this name.

    Raises:
      UnicodeDecodeError: it is not UTF-8.
      NoRowError: it is no row of CSV.
    """
    text = line.decode("utf-8-sig").rstrip("\r\n")
    if not any(name.endswith(".csv" + end) for end in ("", *DECOMPRESSORS)):
        return text.split("\t")
    csv.field_size_limit(MAX_LINE_BYTES)  # by default 131,072 characters
    try:
        return next(csv.reader([text], strict=True), [])  # else a value without its closing quote would be taken for whole
    except csv.Error as error:
        raise NoRowError(f"not a row of CSV: {error}; a value may have no line breaks") from error


def record_of(line: bytes, name: str, version: str, has_header: bool) -> dict[str, str] | None:
    """Returns the row in a line of a table, by the names of its columns; None: it is not UTF-8.

    Raises:
      NoRowError: it is no row of CSV, or the first line of the table is none.
    """
    try:
        values = values_of(line, name)
        names = header(name, version) if has_header else map(str, range(1, 1 + len(values)))
    except UnicodeDecodeError:
        return None
    return dict(zip(names, values, strict=False))


@functools.lru_cache(1)
def header(name: str, version: str) -> tuple[str, ...]:
    """Returns the names in the first line of a table; `version` tells a file from an earlier one of the same name.

    Raises:
      NoRowError: it is no row of CSV.
    """
    try:
        return tuple(values_of(first_line(name, version), name))
    except NoRowError as error:
        raise NoRowError(f"the first line is {error}") from error


@functools.lru_cache(1)
def first_line(name: str, version: str) -> bytes:
    """Returns the first line of a table, which is read once even if `header` finds no row in it; `version` is as there."""
    del version
    stream = TextStream(name)
    try:
        return next(stream.lines(1), None) or b""
    finally:
        stream.close()
