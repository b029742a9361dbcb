"""Raw documents: shards in the Pile's format, any TFDS dataset with a text feature, the machine's own Python.

A `Shard` is what one worker reads alone; `read(shard)` streams its documents and, in their place, what was wrong with
the lines that gave none. Nothing here holds more than one line in memory, however well it was compressed.
"""

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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import zstandard
from etils import epath

MAX_LINE_BYTES = 256 << 20
UNKNOWN_DOMAIN = "unknown"
EMPTY_TEXT = "empty text"  # counted, but no damage: never a reason to fail
# Compressed bytes decoded at once. Zeros expand 50,000-fold, so this bounds what a hostile file can allocate (about
# 100 MB), and a damaged file loses no more good lines than end in the same kilobyte.
_FEED_BYTES = 1024
_TFDS_SHARD = 20_000


class DataError(ValueError):
    """Data or arguments the user can mend; the message is one line."""


class Shard(NamedTuple):
    """What one worker reads alone.

    Attributes:
      name: a file, or TFDS_NAME/SPLIT[FROM:TO].
      order: place among the inputs; of equal documents the one with the lowest (order, line) is kept.
      split: "train", "validation", or "" where a hash of the document decides.
      tfds: None for a file; else what `tfds_documents` needs to read the slice.
    """

    name: str
    order: int
    split: str
    tfds: dict[str, str] | None = None


class Document(NamedTuple):
    """One text and where it stood; lines count from 1."""

    text: str
    domain: str
    shard: Shard
    line: int


class Reject(NamedTuple):
    """A line that gave no document; line 0 stands for the whole shard."""

    shard: Shard
    line: int
    reason: str
    domain: str

    def __str__(self) -> str:
        return f"{self.shard.name}:{self.line}: {self.reason}"


class _Good(NamedTuple):
    text: str
    domain: str


class _Bad(NamedTuple):
    reason: str
    domain: str = UNKNOWN_DOMAIN


def read(shard: Shard) -> Iterator[Document | Reject]:
    """Streams the documents of a shard in order, with a `Reject` for each line that has none."""
    read_records = _tfds_records if shard.tfds else _file_records
    is_empty = True
    for line, record in read_records(shard):
        is_empty = False
        if isinstance(record, _Bad):
            yield Reject(shard, line, record.reason, record.domain)
        else:
            yield Document(*record, shard, line)
    if is_empty:
        yield Reject(shard, 0, "empty shard", UNKNOWN_DOMAIN)


def file_shards(patterns: Iterable[str], split: str, flag: str) -> list[Shard]:
    """The files that match the globs, local or on gs://, sorted by name within each glob.

    Raises:
      DataError: a glob matches nothing.
    """
    names: dict[str, None] = {}  # an ordered set: a file matched twice is read once
    for pattern in patterns:
        parts = epath.Path(pattern).parts
        fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
        base = epath.Path(*parts[:fixed]) if fixed else epath.Path(".")
        matches = sorted(str(path) for path in base.glob("/".join(parts[fixed:])) if not path.is_dir())
        if not matches:
            raise DataError(f"--{flag}={pattern}: no file matches")
        names.update(dict.fromkeys(matches))
    return [Shard(name, order, split) for order, name in enumerate(names)]


def tfds_shards(name: str, data_dir: str | None, feature: str | None) -> list[Shard]:
    """Cuts a prepared or downloadable TFDS dataset into shards of 20,000 examples.

    Its own validation split, where there is one, is kept; the test split is left alone.

    Raises:
      DataError: no such dataset, no train split, or not exactly one text feature to choose.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        builder.download_and_prepare()
    except (tfds.core.registered.DatasetNotFoundError, AssertionError, OSError) as error:
        raise DataError(f"--tfds={name}: {' '.join(str(error).split())[:300]}") from error
    texts = [key for key, value in builder.info.features.items() if isinstance(value, tfds.features.Text)]
    feature = feature or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    if feature not in texts:
        raise DataError(f"--tfds={name}: choose --tfds_feature among its text features: {', '.join(texts) or 'none'}")
    if "train" not in builder.info.splits:
        raise DataError(f"--tfds={name}: no split 'train' among {', '.join(builder.info.splits)}")
    own = ["train", "validation"] if "validation" in builder.info.splits else ["train"]
    shards: list[Shard] = []
    for split in own:
        size = builder.info.splits[split].num_examples
        for start in range(0, size, _TFDS_SHARD):
            cut = f"{split}[{start}:{min(start + _TFDS_SHARD, size)}]"
            recipe = {"directory": str(builder.data_path), "cut": cut, "feature": feature, "domain": builder.name}
            shards.append(Shard(f"{name}/{cut}", len(shards), split if len(own) > 1 else "", recipe))
    return shards


def _tfds_records(shard: Shard) -> Iterator[tuple[int, _Good | _Bad]]:
    """(number, record) of each example of a slice."""
    import tensorflow_datasets as tfds

    recipe = shard.tfds or {}
    builder = tfds.builder_from_directory(recipe["directory"])
    examples = builder.as_dataset(split=recipe["cut"], decoders={recipe["feature"]: tfds.decode.SkipDecoding()})
    for number, example in enumerate(tfds.as_numpy(examples), start=1):
        try:
            yield number, _checked(example[recipe["feature"]].decode("utf-8"), recipe["domain"])
        except UnicodeDecodeError:
            yield number, _Bad("invalid UTF-8", recipe["domain"])


def _file_records(shard: Shard) -> Iterator[tuple[int, _Good | _Bad]]:
    """(line number, record) of each line that is not blank."""
    number = 0
    try:
        for number, line in enumerate(_lines(_content(shard.name)), start=1):
            if line is None:
                yield number, _Bad(f"line longer than {MAX_LINE_BYTES >> 20} MB")
            elif line.strip():
                yield number, _parse(line)
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        yield number + 1, _Bad(f"damaged file: {error}")


def _parse(line: bytes) -> _Good | _Bad:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _Bad("invalid UTF-8")
    except (ValueError, RecursionError):
        return _Bad("not JSON")
    if not isinstance(record, dict):
        return _Bad("not a JSON object")
    meta = record.get("meta")
    domain = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return _checked(record.get("text"), domain if isinstance(domain, str) and domain else UNKNOWN_DOMAIN)


def _checked(text: object, domain: str) -> _Good | _Bad:
    if text is None:
        return _Bad("no text", domain)
    if not isinstance(text, str):
        return _Bad("text is not a string", domain)
    if not text.strip():
        return _Bad(EMPTY_TEXT, domain)
    try:
        (text + domain).encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell "\ud800", UTF-8 cannot
        return _Bad("lone surrogate", domain)
    return _Good(text, domain)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Splits a stream at line feeds; a line over the limit is passed over and given as None."""
    line = bytearray()
    too_long = False
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        for part, starts in [(first, False), *((part, True) for part in others)]:
            if starts:
                yield None if too_long else bytes(line)
                line, too_long = bytearray(), False
            if len(line) + len(part) > MAX_LINE_BYTES:
                line, too_long = bytearray(), True
            elif not too_long:
                line += part
    if line or too_long:
        yield None if too_long else bytes(line)


def _content(name: str) -> Iterator[bytes]:
    """Streams the decompressed bytes of a file.

    Raises:
      EOFError, zlib.error, zstandard.ZstdError: damage, after all that could be decompressed was given.
    """
    with epath.Path(name).open("rb") as file:
        pieces = iter(functools.partial(file.read, _FEED_BYTES), b"")
        if name.endswith(".zst"):
            yield from _decompressed(pieces, lambda: zstandard.ZstdDecompressor().decompressobj())
        elif name.endswith(".gz"):
            yield from _decompressed(pieces, lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))
        else:
            yield from pieces


def _decompressed(pieces: Iterator[bytes], decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Decompresses concatenated frames; the library's own readers take a truncated .zst for a whole one."""
    frame = None
    for piece in pieces:
        rest = piece
        while rest:
            frame = frame or decompressor()
            yield frame.decompress(rest)
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("truncated")


# --- the machine's own Python installation ---------------------------------------------------------------------------

PYTHON_BYTES = 48_000_000
PYTHON_BYTES_A_PACKAGE = 4_000_000
_SKIPPED_FOLDERS = re.compile(r"_?vendor(ed)?|third_party|tests?|testing|idle_test|testdata|__pycache__|(site|dist)-packages")
_SKIPPED_FILES = re.compile(
    r"(licen[cs]e|copying|notice|authors|top_level|entry_points|requirements|sources|record)\b.*|(test_|conftest).*|.*(_test|_pb2|_pb2_grpc)\.py",
    re.IGNORECASE,
)
_GENERATED = re.compile(r"do not edit|(auto|automatically |file is )generated|generated (by|from)", re.IGNORECASE)
_LEADING_COMMENT = re.compile(r"\A(?:#.*\n|\s*\n)+")


def write_python_documents(directory: epath.Path) -> None:
    """Writes the text of this Python installation as a Pile-format shard: a corpus that needs no download.

    The language reference of `pydoc_data`, the modules of the standard library, and of each installed package its
    modules, its .md, .rst and .txt files and its description. The domain is the package. Left out: licences (files and
    heads of files), vendored copies, tests, generated files, tables with few words, and a file most of whose lines
    stood in another. What is taken, where a limit asks for a choice, depends on the hash of the path only.
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
    """(name, domain, loader) of everything that may become a document, in no particular order."""
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
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not _SKIPPED_FOLDERS.fullmatch(f.lower()) and not f.endswith("-info")]
        for file in files:
            if pathlib.Path(file).suffix in suffixes and not _SKIPPED_FILES.fullmatch(file):
                yield pathlib.Path(folder, file)


def _load(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""  # an old module in another encoding, or one we may not read: no loss among thousands


def _load_description(path: pathlib.Path) -> str:
    return _load(path).partition("\n\n")[2]


def _prose(text: str) -> str:
    """The text without a licence at its head; empty where there is too little in it to read."""
    head = _LEADING_COMMENT.match(text)
    if head and re.search(r"licen[cs]e|copyright", head[0], re.IGNORECASE):
        text = text[head.end() :]
    letters = sum(map(len, re.findall(r"[A-Za-z]{3,}", text)))
    is_table = 2 * letters < len(text) - text.count(" ") or max(map(len, text.split("\n"))) > 2000
    return "" if len(text) < 200 or is_table or _GENERATED.search(text[:1000]) else text


def _is_new(text: str, seen: set[int]) -> bool:
    """Whether most of the longer lines stood in no file before; remembers them if so."""
    lines = {zlib.crc32(line.strip().encode()) for line in text.split("\n") if len(line.strip()) > 20}
    if 2 * len(lines & seen) > len(lines):
        return False
    seen |= lines
    return True
