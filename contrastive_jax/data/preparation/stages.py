"""The stages of `prepare`: functions that run one task each, on any machine that reaches the input and the work folder.

    cut     per some files      finds their parts, runs of lines of about `part_bytes` bytes of text
    hash    per piece           bad lines, hashes of the documents, a sample for the tokenizer
    dedup   per range of hashes the places of documents that equal another; see `dedup`
    near    per range of hashes the same for near-duplicates, if they are asked for; see `data.clean.near_duplicates`
    token   per piece           reads the piece again without what was dropped; writes its file shards; see `token_stage`
    runs, leaks, separate       validation records that training records leak into, if asked for; see `leaks`

(Between hash and token, `driver` trains the tokenizer.) A `Piece` is what a task of hash and token reads: a part of a large
file, or several small files. A document is named by the number of its piece and its *place* in it, from 0;
rejected lines have a place too, so that places are the same whenever the piece is read.

Who drops documents for other reasons:

* A reason that a document shows alone: `hash_piece` asks `PieceCleaning`, which writes the places to a file of the piece.
* A reason that lies in other documents: a stage between hash and token. `hash_piece` writes what that stage needs beside the
  rows (a file per piece, with `Work.write_groups`). Its tasks write files WORK/dropped/REASON-... of places (uint32, sorted),
  grouped by piece, like `dedup.drop_duplicates`; their outcomes name these files as "dropped".

Both kinds of reasons are counted, by file and by domain, when `token_stage.token_piece` passes the document over.
"""

import collections
import fcntl
import functools
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Collection, Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from contrastive_jax.config import UserError
from contrastive_jax.data import MAX_DOMAINS
from contrastive_jax.data.preparation import dedup, engine
from contrastive_jax.data.preparation.arguments import Arguments
from contrastive_jax.data.preparation.clean_stage import PieceCleaning, has_filters, own_drops_file
from contrastive_jax.data.preparation.engine import Outcome
from contrastive_jax.data.preparation.manifest import TRAIN, VALIDATION
from contrastive_jax.data.preparation.text_sample import TextSample
from contrastive_jax.data.preparation.work import WORK, Work
from contrastive_jax.data.raw import parts as parts_lib
from contrastive_jax.data.raw import schemas, sources
from contrastive_jax.data.raw.sources import Document, Part, Reject, Shard

MAX_REJECTS_NAMED = 1000  # bad lines of a piece, and of a file, in rejects.jsonl; all are counted
SLICE_CHARACTERS = 1 << 20  # of a long text that are encoded at once
ADVANCE_BYTES = 1 << 20  # of text between two reports of progress


class Piece(NamedTuple):
    """What one task of the stages hash and token reads.

    Attributes:
      number: of the piece, among all pieces.
      parts: in the order of the input; all of them belong to one split.
      sample_characters: the length of its sample for the tokenizer.
      file_shards: the number of the file shard that it writes, and the count of these, for each split.
    """

    number: int
    parts: tuple[Part, ...]
    sample_characters: int
    file_shards: dict[str, tuple[int, int]]


class Recipe(NamedTuple):
    """What all tasks need to know.

    Attributes:
      root: the folder of the dataset that is made.
      plan_id: see `Work`.
      arguments: of `prepare`.
      part_bytes: the text of a part.
      domains: the names of all domains, sorted; known after the stage hash.
      vocab_size, tokenizer_sha256: of the tokenizer, which lies in `root`; known before the stage token.
      dropped: the files of dropped places.
      evaluation_digest: a hash of the evaluation texts that are looked for; "": of none.
    """

    root: str
    plan_id: str
    arguments: Arguments
    part_bytes: int
    domains: tuple[str, ...] = ()
    vocab_size: int = 0
    tokenizer_sha256: str = ""
    dropped: tuple[str, ...] = ()
    evaluation_digest: str = ""

    def work(self) -> Work:
        """Returns the folder, as a task writes to it."""
        return Work(self.root, plan_id=self.plan_id)


def cut_shards(recipe: Recipe, task: tuple[int, list[Shard]]) -> Outcome:
    """Finds the parts of some files: {"parts": [[the fields of a `Part` without its shard, of each part], of each file]}."""
    number, shards = task
    parts = []
    for shard in shards:
        parts.append([part[1:] for part in parts_lib.cut(shard, recipe.part_bytes)])
        engine.advance(shard.size)
    return recipe.work().write_outcome("cut", number, {"parts": parts})


@functools.cache
def shared_reader() -> sources.Reader:
    """Returns the reader of this process. It keeps its file open, so the next part of the file need not be skipped to."""
    return sources.Reader(long_texts().acquire)


class LongTexts:
    """A lock that one process of this machine has while it works on a long text, which takes gigabytes at worst."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Waits for the lock, if this process does not have it."""
        if self._file is None:
            self._file = self._path.open("wb")
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def release(self) -> None:
        """Gives the lock back, if this process has it."""
        if self._file is not None:
            self._file.close()
            self._file = None


@functools.cache
def long_texts() -> LongTexts:
    """Returns the lock of this process, shared by all of this user's."""
    return LongTexts(pathlib.Path(tempfile.gettempdir(), f"contrastive_jax-long-text-{os.getuid()}"))


def release_input() -> None:
    """Closes the file that this process reads, and gives back its lock on long texts, if it has them."""
    shared_reader().close()
    long_texts().release()


def items_of(piece: Piece) -> Iterator[tuple[int, Document | Reject]]:
    """Yields (place, document or reject) of a piece, and reports progress."""
    reader, place, reported = shared_reader(), 0, shared_reader().text_bytes
    try:
        for part in piece.parts:
            for item in reader.read(part):
                yield place, item
                del item  # a long text is gone before the next line is read
                long_texts().release()
                place += 1
                if reader.text_bytes >= reported + ADVANCE_BYTES:
                    engine.advance(reader.text_bytes - reported)
                    reported = reader.text_bytes
    except BaseException:
        release_input()  # a worker of Beam goes on with another task, maybe with this one again
        raise
    engine.advance(reader.text_bytes - reported)


def key_and_size(text: str) -> tuple[bytes, int]:
    """Returns the first 16 bytes of the SHA-256 of a text, and its length in bytes, without a copy of a long text."""
    digest, size = hashlib.sha256(), 0
    for start in range(0, len(text), SLICE_CHARACTERS):
        encoded = text[start : start + SLICE_CHARACTERS].encode()
        digest.update(encoded)
        size += len(encoded)
    return digest.digest()[:16], size


def split_of(key: bytes, shard: Shard, fraction: float) -> str:
    """Returns the split that the input names, or else the one that the document's hash decides."""
    return shard.split or (VALIDATION if int.from_bytes(key[:8], "big") < fraction * 2**64 else TRAIN)


class Rejects:
    """Counts of what is passed over, for the outcome of a task: [reason, name of the file, its split, domain] → number."""

    def __init__(self) -> None:
        self.counts: collections.Counter[tuple[str, str, str, str]] = collections.Counter()

    def add(self, reason: str, shard: Shard, domain: str, split: str = "") -> None:
        """Counts one document; `split` is the one that its hash decides, if it was hashed."""
        self.counts[reason.partition(":")[0], shard.name, split or shard.split or "unsplit", domain] += 1

    def rows(self) -> list[tuple[Any, ...]]:
        """Returns the counts as rows for JSON."""
        return [(*key, number) for key, number in sorted(self.counts.items())]


def hash_piece(recipe: Recipe, piece: Piece) -> Outcome:
    """Reads a piece for the first time; writes the row of each document, the sample, and the bad lines.

    Raises:
      UserError: a line is bad, and on_bad is "fail"; or the domains are too many.
    """
    work, arguments, fraction = recipe.work(), recipe.arguments, recipe.arguments.validation_fraction
    keys, places, is_train = bytearray(), list[int](), list[bool]()
    rejects, named, domains = Rejects(), list[tuple[int, int, str]](), set[str]()
    sample = TextSample(piece.sample_characters)
    lost_bytes, read_before = list[tuple[str, int]](), shared_reader().text_bytes
    lines: collections.Counter[str] = collections.Counter()
    cleaning = PieceCleaning(work, arguments, recipe.evaluation_digest, piece.number)
    for place, item in items_of(piece):
        lines[item.shard.name] += 1
        if isinstance(item, Reject):
            if arguments.on_bad == "fail" and item.reason not in schemas.HARMLESS:
                raise UserError(sources.stop_message(item))
            rejects.add(item.reason, item.shard, item.domain)
            if item.lost_bytes:
                lost_bytes.append((item.shard.name, item.lost_bytes))
            if len(named) < MAX_REJECTS_NAMED:
                named.append((item.shard.order, item.line, str(item)))
            continue
        if cleaning.drops(place, item.text):
            continue
        key, _ = key_and_size(item.text)
        keys += key
        places.append(place)
        is_train.append(split_of(key, item.shard, fraction) == TRAIN)
        cleaning.keep(place, is_train[-1], item.text)
        if piece.sample_characters and is_train[-1]:
            sample.add_document(key, item.text)
        if item.domain not in domains:
            domains.add(item.domain)
            check_domains(domains)
    dedup.write_rows(work, piece.number, bytes(keys), np.array(places, np.uint32), np.array(is_train, bool))
    work.write_json(rejects_file(piece.number), named)
    if piece.sample_characters:
        work.write_json(sample_file(piece.number), sample.excerpts())
    return work.write_outcome(
        "hash",
        piece.number,
        {
            "documents": {TRAIN: sum(is_train), VALIDATION: len(is_train) - sum(is_train)},
            "read_bytes": shared_reader().text_bytes - read_before,
            "domains": sorted(domains),
            "rejects": rejects.rows(),
            "lines": list(lines.items()),
            "lost_bytes": lost_bytes,
            **cleaning.finish(),
        },
    )


def check_domains(domains: Collection[str]) -> None:
    """Raises a UserError if there are more domains than MAX_DOMAINS, in a piece or in all of them."""
    if len(domains) > MAX_DOMAINS:
        raise UserError(
            f"the input has more than {MAX_DOMAINS:,} domains, such as {min(domains)}; --domain_field names a field of fewer "
            "values, and --input=NAME=GLOB gives all documents one domain"
        )


def rejects_file(piece: int) -> str:
    """Returns the name of the file of the first bad lines of a piece: (number of the file, line, message)."""
    return f"{WORK}/rejects/{piece:05d}.json"


def sample_file(piece: int) -> str:
    """Returns the name of the sample of a piece."""
    return f"{WORK}/sample/{piece:05d}.json"


def index_file(piece: int, split: str) -> str:
    """Returns the name of a piece's part of the index."""
    return f"{WORK}/index/{split}-{piece:05d}.npz"


def dropped_places(recipe: Recipe, piece: Piece) -> dict[int, str]:
    """Returns {place: reason} of the documents of a piece that are passed over."""
    work = recipe.work()
    own = work.read_json(own_drops_file(piece.number)) if has_filters(recipe.arguments) else {}
    dropped = {place: reason for reason, places in own.items() for place in places}
    for name in recipe.dropped:
        reason = name.rpartition("/")[2].partition("-")[0].replace("_", " ")
        for place in work.read_groups(name, piece.number, piece.number + 1, np.dtype("<u4")).tolist():
            dropped.setdefault(place, reason)
    return dropped
