"""Reads and writes files: a file is written whole or not at all, and an error names the file and the line."""

import gzip
import io
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from contrastive_jax.config import UserError


class MachineError(UserError):
    """A failure of the machine, the network or the storage: one line, and starting again may help: exit status 1."""

    status = 1


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a local path made absolute, with "~" expanded; gs:// and s3:// as they are.

    `epath.Path.resolve` would take gs://BUCKET for a local folder called "gs:".
    """
    path = epath.Path(path)
    return path if on_bucket(path) else path.expanduser().resolve()


def on_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path is on gs:// or s3://."""
    return str(path).startswith(("gs://", "s3://"))


def cache_folder() -> pathlib.Path:
    """Returns the folder of this package in the user's cache: ~/.cache/contrastive_jax, unless XDG_CACHE_HOME is set."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "contrastive_jax"


def make_folder(path: epath.Path) -> None:
    """Makes a local folder and those above it. A bucket has none to make, and s3fs would make the bucket of a mistyped name."""
    if not on_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: epath.Path, text: str) -> None:
    """Replaces the content of a file at once: a reader finds the old text or the new one, even if this process is killed."""
    if on_bucket(path):  # there, an object appears when it is complete
        path.write_text(text)
        return
    new = path.parent / f".{path.name}.new"
    new.write_text(text)
    new.replace(path)


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Returns the object in a JSON file, or {} if there is no such file: most files that are read with this are optional.

    Raises:
      UserError: the file is not a JSON object.
    """
    path = epath.Path(path)
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        found = "a list" if isinstance(value, list) else json.dumps(value)[:40]
        raise UserError(f"{path}: expected a JSON object at the top level, found {found}")
    return value


def read_lines(path: epath.PathLike) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its end) of a UTF-8 file; a file whose name ends in .gz is unpacked.

    Raises:
      UserError: the file is missing, damaged, or not UTF-8; the message names the line.
    """
    path = epath.Path(path)
    if not path.exists() or path.is_dir():
        raise UserError(f"{path}: no such file")
    number = 0
    try:
        with path.open("rb") as raw:
            unpacked: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            with unpacked, io.TextIOWrapper(unpacked, encoding="utf-8", newline="\n") as lines:
                for number, line in enumerate(lines, 1):
                    yield number, line.rstrip("\r\n")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: cannot be read ({error})") from error


def read_json_lines(path: epath.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("FILE:LINE", object) of a .jsonl or .jsonl.gz file; blank lines are skipped.

    Raises:
      UserError: the file cannot be read, or a line is not a JSON object; the message names file and line.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON") from error
        if not isinstance(value, dict):
            raise UserError(f"{where}: not a JSON object")
        yield where, value


def text_of(where: str, value: dict[str, Any], key: str) -> str:
    """Returns the text under a key of one JSON line.

    Args:
      where: "FILE:LINE", for the message.
      value: the object on that line.
      key: the key of the text.

    Raises:
      UserError: the object does not have the key, or its value is not a string.
    """
    if not isinstance(value.get(key), str):
        raise UserError(f"{where}: no text under {key!r}")
    return value[key]
