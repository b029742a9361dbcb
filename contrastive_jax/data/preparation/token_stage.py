"""The last stage of `prepare`: a piece of the input → tokens → its file shards and their index.

Dimensions: n records of a file shard.
"""

import array
import collections
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from contrastive_jax.data import store, token_type, tokenizer
from contrastive_jax.data.preparation.engine import Outcome
from contrastive_jax.data.preparation.manifest import VALIDATION
from contrastive_jax.data.preparation.stages import (
    Piece,
    Recipe,
    Rejects,
    dropped_places,
    index_file,
    items_of,
    key_and_size,
    split_of,
)
from contrastive_jax.data.preparation.work import WORK, Work
from contrastive_jax.data.raw.schemas import EMPTY_TEXT, Pair
from contrastive_jax.data.raw.sources import Document
from contrastive_jax.data.store import Record

BATCH_CHARACTERS = 1 << 19  # of text that is tokenized at once
# The tokenizers need some hundred bytes per character. A longer text is tokenized in pieces that end before a space.
LONGEST_PIECE = 1 << 18


@functools.lru_cache(1)
def shared_tokenizer(root: str, sha256: str) -> Any:
    """Returns the tokenizer of the dataset, loaded once per process; `sha256` tells one from another at the same path."""
    del sha256
    return tokenizer.load(root)


class Columns:
    """The records of one split, as columns: a piece may have a million of them."""

    def __init__(self, dtype: np.dtype):
        self._dtype = dtype
        self._tokens, self._keys = bytearray(), bytearray()
        self._domain, self._start, self._length, self._position = (array.array("q") for _ in range(4))
        self._numbers: list[tuple[float, ...]] = []

    def add(self, key: bytes, domain: int, ids: np.ndarray, record_tokens: int, pair: Pair | None = None) -> int:
        """Cuts a document into records; returns their number. A pair is one record, whatever its length."""
        record_tokens = len(ids) if pair else record_tokens
        starts, before = range(0, len(ids), record_tokens), len(self._tokens) // self._dtype.itemsize
        for position in starts:
            self._start.append(before + position)
            self._length.append(min(record_tokens, len(ids) - position))
            self._position.append(position)
            self._domain.append(domain)
            self._keys += key
            self._numbers += [(pair.label, pair.positives, len(pair.texts) - 1 - pair.positives, *pair.scores)] if pair else []
        self._tokens += ids.tobytes()
        return len(starts)

    def order(self) -> np.ndarray:
        """Returns int64[n], the order in which the records are stored: by domain, then by a hash of (document, position)."""
        high = np.frombuffer(self._keys, "<u8")[::2]
        mixed = high + np.frombuffer(self._position, np.int64).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the mixer of SplitMix64
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        return np.lexsort((mixed, np.frombuffer(self._domain, np.int64)))

    def records(self, order: np.ndarray) -> Iterator[Record]:
        """Yields the records in an order."""
        tokens = np.frombuffer(self._tokens, self._dtype)
        for number in order.tolist():
            start = self._start[number]
            yield Record(
                tokens[start : start + self._length[number]],
                self._keys[16 * number : 16 * number + 16].hex(),
                self._domain[number],
                self._position[number],
                self._numbers[number] if self._numbers else None,
            )


class PairCounts:
    """What the manifest says of the pairs of a file shard."""

    def __init__(self) -> None:
        self._labels = array.array("f")
        self._fewest: tuple[int, int] | None = None  # positives and hard negatives
        self._scored = False

    def add(self, record: Record) -> None:
        """Counts a record; one of a document has no part in it."""
        if record.numbers is None:
            return
        label, positives, negatives = record.numbers[:3]
        fewest = self._fewest or (int(positives), int(negatives))
        self._fewest = min(fewest[0], int(positives)), min(fewest[1], int(negatives))
        self._labels.extend([] if math.isnan(label) else [label])
        self._scored |= len(record.numbers) > 3

    def described(self) -> dict[str, Any]:
        """Returns the range of labels, the fewest positives and hard negatives, and if there are scores; {}: no pairs."""
        if self._fewest is None:
            return {}
        labels = [min(self._labels), max(self._labels)] if self._labels else []
        return {"labels": labels, "positives": self._fewest[0], "hard_negatives": self._fewest[1], "scored": self._scored}


def text_pieces(text: str) -> Iterator[str]:
    """Yields a text in pieces of at most LONGEST_PIECE characters that end before white space, where there is any."""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        limit = start + LONGEST_PIECE
        end = next((at for mark in "\n " if (at := text.rfind(mark, limit - LONGEST_PIECE // 4, limit)) > start), limit)
        yield text[start:end]
        start = end
    yield text[start:]


def encode(tokens: Any, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
    """Returns the token ids of each text, however long."""
    batch, size, encoded, counts = list[str](), 0, list[np.ndarray](), [0] * len(texts)
    for number, text in enumerate(texts):
        for piece in text_pieces(text):
            if batch and size + len(piece) > BATCH_CHARACTERS:
                encoded += [np.array(ids, dtype) for ids in tokens.encode_batch(batch)]
                batch, size = [], 0
            batch.append(piece)
            size += len(piece)
            counts[number] += 1
    encoded += [np.array(ids, dtype) for ids in tokens.encode_batch(batch)]
    following = iter(encoded)
    return [np.concatenate([next(following) for _ in range(count)]) if count > 1 else next(following) for count in counts]


def encode_pairs(tokens: Any, documents: Sequence[Document], dtype: np.dtype, most: int) -> list[np.ndarray]:
    """Returns the token ids of each pair: those of each text, `most` of them at most, and the id `eos`, which ends it.

    A source of pairs may ask for shorter queries or documents. Of a pair with a text that has no tokens, as one of characters
    that the tokenizer drops, there are no ids.
    """
    texts, limits = list[str](), list[int]()
    for document in documents:
        assert document.pair and document.shard.pair
        options, count = document.shard.pair.options, len(document.pair.texts)
        texts += [text.strip() for text in document.pair.texts]
        limits += [options.query_tokens or most] + [options.document_tokens or most] * (count - 1)
    end = np.array([tokens.reserved["eos"]], dtype)
    pairs = zip(encode(tokens, texts, dtype), limits, strict=True)
    ended = iter([np.concatenate([ids[: min(limit, most)], end]) for ids, limit in pairs])
    of_pairs = ([next(ended) for _ in document.pair.texts] for document in documents if document.pair)
    return [np.concatenate(ids) if min(map(len, ids)) > 1 else np.zeros(0, dtype) for ids in of_pairs]


def documents_of(recipe: Recipe, piece: Piece, rejects: Rejects) -> Iterator[list[Document]]:
    """Yields the documents of a piece that are kept, in batches, and counts the others that lack no text."""
    dropped, batch, size = dropped_places(recipe, piece), list[Document](), 0
    fraction = recipe.arguments.validation_fraction
    for place, item in items_of(piece):
        if not isinstance(item, Document):
            continue  # the stage "hash" has counted it
        if place in dropped:
            key = hashlib.sha256(item.text.encode()).digest()
            rejects.add(dropped[place], item.shard, item.domain, split_of(key, item.shard, fraction))
            continue
        batch.append(item)
        size += len(item.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def token_piece(recipe: Recipe, piece: Piece) -> Outcome:
    """Reads a piece for the second time; writes its file shard of each split, and the index of that."""
    work, arguments = recipe.work(), recipe.arguments
    numbers = {name: number for number, name in enumerate(recipe.domains)}
    tokens, dtype = shared_tokenizer(recipe.root, recipe.tokenizer_sha256), token_type(recipe.vocab_size)
    columns = {split: Columns(dtype) for split in piece.file_shards}
    rejects, counts = Rejects(), collections.Counter[tuple[str, str, str]]()
    longest = arguments.record_tokens
    for batch in documents_of(recipe, piece, rejects):
        encoded = (
            encode_pairs(tokens, batch, dtype, longest)
            if arguments.pairs
            else encode(tokens, [document.text for document in batch], dtype)
        )
        for document, ids in zip(batch, encoded, strict=True):
            key, size = key_and_size(document.text)
            split, domain = split_of(key, document.shard, arguments.validation_fraction), document.domain
            if document.pair and not len(ids):
                rejects.add(EMPTY_TEXT, document.shard, domain, split)
                continue
            counts[split, domain, "documents"] += 1
            counts[split, domain, "records"] += columns[split].add(key, numbers[domain], ids, longest, document.pair)
            counts[split, domain, "tokens"] += len(ids)
            counts[split, domain, "bytes"] += size
    return work.write_outcome(
        "token",
        piece.number,
        {
            "file_shards": {
                split: write_file_shard(
                    work, recipe, piece, split, of_split.records(of_split.order()), first_file(recipe, piece, split)
                )
                for split, of_split in columns.items()
            },
            "counts": [(*key, number) for key, number in sorted(counts.items())],
            "rejects": rejects.rows(),
        },
    )


def final_file(piece: Piece, split: str) -> str:
    """Returns the name of the file shard of a piece's split."""
    number, count = piece.file_shards[split]
    return store.NAME.format(split=split, number=number, count=count)


def first_file(recipe: Recipe, piece: Piece, split: str) -> str:
    """Returns the name of the file to which `token_piece` writes a split; `leaks` writes its own files of validation."""
    if recipe.arguments.leak_tokens and split == VALIDATION:
        return f"{WORK}/validation/{piece.number:05d}.array_record"
    return final_file(piece, split)


def write_file_shard(
    work: Work, recipe: Recipe, piece: Piece, split: str, records: Iterable[Record], name: str
) -> dict[str, Any]:
    """Writes records of a piece's split to the file `name`, and their index.

    Returns:
      The number of records and of chunks, the bytes of the file shard, a hash of its records, and of pairs see `PairCounts`.
      (The file is no measure of its content: protocol buffers promise no order of the entries of a map.)
    """
    digest, pairs = hashlib.sha256(), PairCounts()

    def hashed_records() -> Iterator[Record]:
        for record in records:
            numbers = "".join(f" {number:g}" for number in record.numbers or ())
            pairs.add(record)
            digest.update(record.tokens.tobytes())
            described = f"{len(record.tokens)} {record.document} {record.position} {recipe.domains[record.domain]}{numbers}"
            digest.update(f"\0{described}\0".encode())
            yield record

    with work.new_file(name) as path:
        index = store.write_file_shard(path, hashed_records(), recipe.domains, recipe.vocab_size)
        size = path.stat().st_size
    with work.new_file(index_file(piece.number, split)) as path, path.open("wb") as file:
        np.savez(file, **index._asdict())
    counts = {"records": len(index.length), "chunks": len(index.chunk_size), "bytes": size}
    return counts | {"hash": digest.hexdigest(), **pairs.described()}
