"""Tables of pairs, .tsv and .csv: one row per line, and the names of the columns in the first line.

Where fields are named by numbers, --text_field=2,3, the table has no such line and its columns are "1", "2", ... A .tsv has no
quotes; in a .csv a quoted value may have commas, and two quotes for one, but no line breaks.
"""

import csv
import functools

from contrastive_jax.data.raw.text_stream import DECOMPRESSORS, TextStream

SUFFIXES = tuple(suffix + end for suffix in (".tsv", ".csv") for end in ("", *DECOMPRESSORS))


def is_table(name: str) -> bool:
    """Returns whether the file of this name is a table."""
    return name.endswith(SUFFIXES)


def values_of(line: bytes, name: str) -> list[str]:
    """Returns the values in a line of the table of this name; raises UnicodeDecodeError where it is not UTF-8."""
    text = line.decode("utf-8-sig").rstrip("\r\n")
    if any(name.endswith(".csv" + end) for end in ("", *DECOMPRESSORS)):
        return next(csv.reader([text]), [])
    return text.split("\t")


def record_of(line: bytes, name: str, version: str, has_header: bool) -> dict[str, str] | None:
    """Returns the row in a line of a table, by the names of its columns; None: it is not UTF-8."""
    try:
        values = values_of(line, name)
        names = header(name, version) if has_header else map(str, range(1, 1 + len(values)))
    except UnicodeDecodeError:
        return None
    return dict(zip(names, values, strict=False))


@functools.lru_cache(1)
def header(name: str, version: str) -> tuple[str, ...]:
    """Returns the names in the first line of a table; `version` tells a file from an earlier one of the same name."""
    del version
    stream = TextStream(name)
    try:
        return tuple(values_of(next(stream.lines(1), None) or b"", name))
    finally:
        stream.close()
