"""The text of this Python installation as a corpus that needs no download."""

import collections
import functools
import hashlib
import json
import os
import pathlib
import pydoc_data.topics
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator

from etils import epath

PYTHON_BYTES = 48_000_000  # at most, over all packages
PYTHON_BYTES_A_PACKAGE = 4_000_000  # at most, of one package
_SKIPPED_FOLDERS = re.compile(r"_?vendor(ed)?|third_party|tests?|testing|idle_test|testdata|__pycache__|(site|dist)-packages")
_SKIPPED_FILES = re.compile(
    r"(licen[cs]e|copying|notice|authors|top_level|entry_points|requirements|sources|record)\b.*|(test_|conftest).*|.*(_test|_pb2|_pb2_grpc)\.py",
    re.IGNORECASE,
)
_GENERATED = re.compile(r"do not edit|(auto|automatically |file is )generated|generated (by|from)", re.IGNORECASE)
_LEADING_COMMENT = re.compile(r"\A(?:#.*\n|\s*\n)+")


def write_python_documents(directory: epath.Path) -> None:
    """Writes the text of this Python installation to python.jsonl in a folder: a corpus that needs no download.

    The documents are the language reference in `pydoc_data`, the modules of the standard library, and the modules, the .md,
    .rst and .txt files and the description of each installed package. The domain is the package. Left out are licences (files
    and heads of files), vendored copies, tests, generated files, tables with few words, and files most of whose lines occur in
    another file. Where the limits above allow only a part, the hash of the path decides.
    """
    seen: set[int] = set()
    package_bytes: collections.Counter[str] = collections.Counter()
    chosen: dict[str, tuple[str, str]] = {}
    for name, domain, load in sorted(_python_candidates(), key=lambda c: hashlib.sha256(c[0].encode()).digest()):
        if package_bytes[domain] >= PYTHON_BYTES_A_PACKAGE or package_bytes.total() >= PYTHON_BYTES:
            continue
        text = _prose(load())
        if text and _is_new(text, seen):
            package_bytes[domain] += len(text.encode())
            chosen[name] = domain, text
    with (directory / "python.jsonl").open("w") as file:
        for _, (domain, text) in sorted(chosen.items()):
            file.write(json.dumps({"text": text, "meta": {"pile_set_name": domain}}) + "\n")


def _python_candidates() -> Iterator[tuple[str, str, Callable[[], str]]]:
    """Yields (name, domain, loader of the text) of everything that may become a document, in no particular order."""
    for topic, text in pydoc_data.topics.topics.items():
        yield f"pydoc_data/{topic}", "python reference", functools.partial(str, text)
    paths = sysconfig.get_paths()
    for path in _text_files(pathlib.Path(paths["stdlib"]), {".py"}):
        yield f"python/{path.relative_to(paths['stdlib'])}", "python standard library", functools.partial(_load, path)
    for site in sorted({paths["purelib"], paths["platlib"]}):
        for path in _text_files(pathlib.Path(site), {".py", ".md", ".rst", ".txt"}):
            name = path.relative_to(site)
            yield f"site/{name}", name.parts[0].removesuffix(".py"), functools.partial(_load, path)
        for path in pathlib.Path(site).glob("*.dist-info/METADATA"):
            domain = path.parent.name.partition("-")[0].lower()
            yield f"site/{path.relative_to(site)}", domain, functools.partial(_load_description, path)


def _text_files(root: pathlib.Path, suffixes: set[str]) -> Iterator[pathlib.Path]:
    """Yields the files below `root` with one of the suffixes, except those that are to be left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not _SKIPPED_FOLDERS.fullmatch(f.lower()) and not f.endswith("-info")]
        for file in files:
            if pathlib.Path(file).suffix in suffixes and not _SKIPPED_FILES.fullmatch(file):
                yield pathlib.Path(folder, file)


def _load(path: pathlib.Path) -> str:
    """Returns the text of a file; empty where it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""  # an old module in another encoding, or one without read permission: no loss among thousands


def _load_description(path: pathlib.Path) -> str:
    """Returns the description in a package's METADATA: what follows the headers."""
    return _load(path).partition("\n\n")[2]


def _prose(text: str) -> str:
    """Returns the text without the licence at its head; empty if it is short, a table of few words, or generated."""
    head = _LEADING_COMMENT.match(text)
    if head and re.search(r"licen[cs]e|copyright", head[0], re.IGNORECASE):
        text = text[head.end() :]
    letters = sum(map(len, re.findall(r"[A-Za-z]{3,}", text)))
    is_table = 2 * letters < len(text) - text.count(" ") or max(map(len, text.split("\n"))) > 2000
    return "" if len(text) < 200 or is_table or _GENERATED.search(text[:1000]) else text


def _is_new(text: str, seen: set[int]) -> bool:
    """Returns whether at least half of the longer lines are not in `seen` (hashes of lines), and adds them to it if so."""
    lines = {zlib.crc32(line.strip().encode()) for line in text.split("\n") if len(line.strip()) > 20}
    if 2 * len(lines & seen) > len(lines):
        return False
    seen |= lines
    return True
