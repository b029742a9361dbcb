"""Prepared datasets, opened for reading: the manifest, the index of one split, and the records, a chunk at a time.

Nothing is held in memory per record: a host that opens a billion records holds 13 bytes of each of their chunks.

Dimensions: n records of a split, c chunks, s file shards, m records that are read together, t tokens of all of these.
"""

import concurrent.futures
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.data import FORMAT, MAX_DOMAINS, token_type
from contrastive_jax.data.index import Split, length_pieces, open_index

# The file shards that are kept open, local or on a bucket. A bucket answers the opening of one more with a request.
MAX_OPEN = {False: 256, True: 128}
# Threads that read chunks, local or on a bucket: limited by the processor, or by the time of a request.
THREADS = {False: 4, True: 32}
PROMPTS = "prompts.json"  # in a workdir, from `prompts_of`
# Reads exactly the block that is asked for, in the thread that asks for it.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:128k"
READER_BUFFER = 1 << 15
# The keys of a stored record in its serialised form, as protocol buffers write them.
TOKENS_KEY, DOCUMENT_KEY, NUMBERS_KEY = b"\n\x06tokens\x12", b"\n\x08document\x12", b"\n\x07numbers\x12"


class Chunk(NamedTuple):
    """What training reads of the records of a chunk.

    An object per record would have Python's garbage collector look at each of them again and again: hence lists.

    Attributes:
      tokens: the bytes of the token ids of each record, of the type `token_type(vocab_size)`.
      document: the first 31 bits of the hash of the document of each: equal for the records of one document. Of pairs whose
        source has no in-batch negatives, -2 minus the number of the domain.
      numbers: of each pair, the bytes of float32 numbers, see `store.Record`; of documents b"".
    """

    tokens: list[bytes]
    document: list[int]
    numbers: list[bytes]


class RecordBatch(NamedTuple):
    """Records that lie one after another in one array.

    Attributes:
      tokens: uint16 or int32 [t], the tokens of all of them.
      begin: int64[m], the position in `tokens` of each record's first token.
      length: int32[m], the tokens of each record.
      document: int32[m], see `Chunk`.
      numbers: of each pair, float32 numbers, see `store.Record`; of documents none.
    """

    tokens: np.ndarray
    begin: np.ndarray
    length: np.ndarray
    document: np.ndarray
    numbers: list[np.ndarray]

    @property
    def label(self) -> np.ndarray:
        """The label of each pair, or NaN, float32[m]."""
        return np.array([numbers[0] if len(numbers) else np.nan for numbers in self.numbers], np.float32)

    def numbers_of_texts(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32[m], the positives of each pair, and float32[texts], the score of each text of all, or NaN."""
        positives = np.array([numbers[1] for numbers in self.numbers], np.int32)
        counts = [1 + int(numbers[1] + numbers[2]) for numbers in self.numbers]
        scores = np.full(sum(counts), np.nan, np.float32)
        for end, numbers in zip(np.cumsum(counts), self.numbers, strict=True):
            if len(numbers) > 3:
                scores[end - (len(numbers) - 3) : end] = numbers[3:]
        return positives, scores

    def token_lists(self) -> list[list[int]]:
        """Returns the token ids of each record."""
        return [self.tokens[i : i + n].tolist() for i, n in zip(self.begin.tolist(), self.length.tolist(), strict=True)]


class Records:
    """The records of a split, of one prepared dataset or of several, which then follow one another.

    Attributes:
      manifest: the dataset's manifest.json; of several, see `load_manifest`.
      domains: the names of the domains; of several datasets, "DATASET/DOMAIN".
      datasets: the numbers of the domains of each dataset, by its name.
      chunk_size: uint8[c], the records of each chunk.
      chunk_domain: uint16[c], the domain of each chunk, an index into `domains`.
      alone: the numbers of the domains whose pairs have no in-batch negatives.
      remote: whether file shards are read from a bucket.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        domains: list[str],
        datasets: dict[str, list[int]],
        splits: Sequence[Split],
        alone: frozenset[int] = frozenset(),
    ):
        self.manifest, self.domains, self.datasets, self.alone = manifest, domains, datasets, alone
        self.chunk_size = np.concatenate([split.chunk_size for split in splits])
        self.chunk_domain = np.concatenate([split.chunk_domain for split in splits])
        self._splits = splits
        self._paths = [path for split in splits for path in split.file_shards]
        shard_chunks = np.concatenate([split.shard_chunks for split in splits])
        self._first_chunk = np.concatenate([[0], np.cumsum(shard_chunks)])  # of each file shard, and the end
        self.remote = any(map(files.on_bucket, self._paths))
        self._readers = _Readers(self._paths, MAX_OPEN[self.remote])
        self._counted: dict[int, np.ndarray] = {}
        self._size = int(self.chunk_size.sum(dtype=np.int64))

    def __len__(self) -> int:
        """Returns the number of records, n."""
        return self._size

    def read_chunk(self, chunk: int) -> Chunk:
        """Reads the records of a chunk, with one request; may be called from several threads.

        Raises:
          UserError: the file shard is not the one that the index describes.
        """
        shard = self._shard_of(chunk)
        first, end = self._first_chunk[shard : shard + 2]
        sizes = self.chunk_size[first:end]
        begin = int(sizes[: chunk - first].sum(dtype=np.int64))
        reader = self._readers.get(shard, int(sizes.sum(dtype=np.int64)))
        serialised = reader.read(begin, begin + int(self.chunk_size[chunk]))
        numbers = [feature_bytes(record, NUMBERS_KEY) if self.manifest.get("fields") else b"" for record in serialised]
        domain = int(self.chunk_domain[chunk])
        alone = domain in self.alone
        documents = [-2 - domain if alone else parse_document(record) for record in serialised]
        return Chunk([feature_bytes(record, TOKENS_KEY) for record in serialised], documents, numbers)

    def _shard_of(self, chunk: int) -> int:
        return int(np.searchsorted(self._first_chunk, chunk, side="right")) - 1

    def path_of(self, chunk: int) -> str:
        """Returns the path of the file shard that holds a chunk."""
        return self._paths[self._shard_of(chunk)]

    def read_records(self, numbers: Sequence[int] | np.ndarray) -> "RecordBatch":
        """Reads a few records by their numbers, in their order; training reads whole chunks instead."""
        ends = np.cumsum(self.chunk_size, dtype=np.int64)
        chunk_of = np.searchsorted(ends, numbers, side="right")
        positions = np.asarray(numbers) - (ends - self.chunk_size)[chunk_of]
        needed = np.unique(chunk_of).tolist()
        with concurrent.futures.ThreadPoolExecutor(THREADS[self.remote]) as threads:
            chunks = dict(zip(needed, threads.map(self.read_chunk, needed), strict=True))
        numbered = list(zip(chunk_of.tolist(), positions.tolist(), strict=True))
        document = np.array([chunks[chunk].document[i] for chunk, i in numbered], np.int32)
        of_pairs = [chunks[chunk].numbers[i] for chunk, i in numbered]
        return self.join([chunks[chunk].tokens[i] for chunk, i in numbered], document, of_pairs)

    def join(self, tokens: Sequence[bytes], document: np.ndarray, numbers: Sequence[bytes]) -> "RecordBatch":
        """Puts the tokens of records into one array."""
        dtype = token_type(self.manifest["vocab_size"])
        length = np.array([len(record) for record in tokens], np.int64) // dtype.itemsize
        begin = np.cumsum(length) - length
        of_pairs = [np.frombuffer(each, np.float32) for each in numbers]
        return RecordBatch(np.frombuffer(b"".join(tokens), dtype), begin, length.astype(np.int32), document, of_pairs)

    def lengths(self) -> np.ndarray:
        """Returns int32[n], the tokens of each record: for splits that are small enough."""
        return np.concatenate([lengths.astype(np.int32) for _, lengths in self.length_pieces()] or [np.zeros(0, np.int32)])

    def record_domains(self) -> np.ndarray:
        """Returns uint16[n], the domain of each record: for splits that are small enough."""
        return np.repeat(self.chunk_domain, self.chunk_size)

    def count(self, *minimums: int) -> list[np.ndarray]:
        """Counts the records with at least so many tokens, uint8[c] per minimum. Reads all lengths once, and remembers."""
        new = [minimum for minimum in dict.fromkeys(minimums) if minimum not in self._counted]
        if new:
            pieces: list[list[np.ndarray]] = [[np.zeros(0, np.uint8)] for _ in new]
            for sizes, lengths in self.length_pieces():
                begin = np.cumsum(sizes, dtype=np.int64) - sizes
                for minimum, counts in zip(new, pieces, strict=True):
                    counts.append(np.add.reduceat(lengths >= minimum, begin, dtype=np.uint8))
            self._counted |= {minimum: np.concatenate(counts) for minimum, counts in zip(new, pieces, strict=True)}
        return [self._counted[minimum] for minimum in minimums]

    def length_pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields all lengths in pieces of whole chunks: (the records of each chunk, the tokens of each record)."""
        for split in self._splits:
            yield from length_pieces(split)


class _Readers:
    """The file shards that are open: at most `limit`, those that were used last."""

    def __init__(self, paths: Sequence[str], limit: int):
        self._paths, self._limit, self._lock = paths, limit, threading.Lock()
        self._open: OrderedDict[int, Any] = OrderedDict()

    def get(self, shard: int, size: int) -> Any:
        """Returns the reader of a file shard, which must hold `size` records."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        path = self._paths[shard]
        reader = array_record_module.ArrayRecordReader(path, options=READER_OPTIONS, file_reader_buffer_size=READER_BUFFER)
        if reader.num_records() != size:
            raise UserError(f"{path}: holds {reader.num_records()} records, but the index lists {size}; prepare the data again")
        with self._lock:
            self._open[shard] = reader
            while len(self._open) > self._limit:
                self._open.popitem(last=False)  # it closes when the last thread that reads from it has let go of it
        return reader


def feature_bytes(serialised: bytes, key: bytes) -> bytes:
    """Returns the bytes of a feature of a serialised record: of the token ids, or of the float32 numbers of a pair.

    Parsing the whole message costs several times as much, and a host parses tens of thousands of records per second.
    """
    size, at = varint(serialised, serialised.index(key) + len(key))
    end = at + size  # of the feature, which ends with its list's bytes, after two more tags and lengths
    for _ in range(2):
        at += 1
        while serialised[at] & 0x80:
            at += 1
        at += 1
    return serialised[at:end]


def parse_document(serialised: bytes) -> int:
    """Returns the first 31 bits of the hash of the document of a serialised record."""
    begin = serialised.index(DOCUMENT_KEY) + len(DOCUMENT_KEY) + 5  # three lengths of one byte, and two tags
    return int(serialised[begin : begin + 8], 16) & 0x7FFFFFFF


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns the number of variable length at a position of a protocol buffer, and the position after it."""
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def folders(directory: epath.PathLike) -> list[epath.Path]:
    """Returns the folders that `config.data.dir` names, separated by commas."""
    return [files.absolute(name.strip()) for name in os.fspath(directory).split(",")]


def load_manifest(directory: epath.PathLike) -> dict[str, Any]:
    """Returns the manifest of a prepared dataset.

    Of several datasets, it is the manifest of the first one, with the longest `window` of all, a `content_hash` of all, and as
    many positives and hard negatives as the pairs of all have.

    Args:
      directory: `config.data.dir`.

    Raises:
      UserError: a folder is not a finished prepared dataset, or this version cannot read its format, or the datasets have
        different tokenizers, or some have pairs and others documents.
    """
    roots = folders(directory)
    manifests = [_load_manifest(root, directory) for root in roots]
    first = manifests[0]
    for root, manifest in zip(roots[1:], manifests[1:], strict=True):
        names = ("tokenizer_sha256", "vocab_size", "reserved")
        if any(manifest.get(name) != first.get(name) for name in names):
            raise UserError(
                f"config.data.dir: {root} has another tokenizer than {roots[0]}; prepare it with `--tokenizer={roots[0]}`"
            )
        if bool(manifest.get("fields")) != bool(first.get("fields")):
            kinds = ("pairs", "documents") if manifest.get("fields") else ("documents", "pairs")
            raise UserError(f"config.data.dir: {root} holds {kinds[0]}, but {roots[0]} {kinds[1]}; leave one of them out")
    if len(roots) == 1:
        return first
    hashes = [manifest["content_hash"] for manifest in manifests]
    return first | {
        "window": max(manifest["window"] for manifest in manifests),
        "content_hash": hashlib.sha256(" ".join(hashes).encode()).hexdigest(),
        **fewest_texts(manifests),
        "numbers": [name for name in first.get("numbers", []) if all(name in m.get("numbers", []) for m in manifests)],
        "sources": {name: source for manifest in manifests for name, source in manifest.get("sources", {}).items()},
        "labels": label_range(manifest.get("labels", []) for manifest in manifests),
    }


def fewest_texts(manifests: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Returns the texts that each pair of several datasets has at least: "fields" of them, "hard_negatives" among these.

    The fewest positives may be those of one dataset, and the fewest hard negatives those of another. Documents have no fields.
    """
    hard = [manifest.get("hard_negatives", 0) for manifest in manifests]
    others = [manifest.get("fields", 0) - number for manifest, number in zip(manifests, hard, strict=True)]
    return {"fields": min(others) + min(hard), "hard_negatives": min(hard)}


def prompts_of(manifest: dict[str, Any]) -> dict[str, str]:
    """Returns what sources of pairs put before texts: {"query": ..., "document": ...}, without empty ones.

    Where sources have different prompts for a side, each has a name of its own, as "nq_query", and the side has none.
    """
    sources, prompts = manifest.get("sources", {}), {}
    for side in ("query", "document"):
        of_sources = {name: source[f"{side}_prompt"] for name, source in sources.items()}
        if len(set(of_sources.values())) == 1:
            prompts[side] = next(iter(of_sources.values()))
        else:
            prompts |= {f"{name}_{side}": prompt for name, prompt in of_sources.items()}
    return {name: prompt for name, prompt in prompts.items() if prompt}


def label_range(ranges: Iterable[Sequence[float]]) -> list[float]:
    """Returns the lowest and the highest label of datasets or file shards, from those of each; [] where there is none."""
    labels = [label for of_one in ranges for label in of_one]
    return [min(labels), max(labels)] if labels else []


def _load_manifest(root: epath.Path, directory: epath.PathLike) -> dict[str, Any]:
    """Returns the manifest of one prepared dataset; see `load_manifest`."""
    path = root / "manifest.json"
    manifest = files.read_json(path)
    if not manifest:
        raise UserError(
            f"config.data.dir={directory}: no manifest.json there; make it with `python -m contrastive_jax prepare "
            f"--output={root}` and --python or --input=GLOB"
        )
    if manifest["format"] != FORMAT:
        raise UserError(f"{path}: format {manifest['format']}, but this version reads {FORMAT}; prepare the data again")
    if manifest.get("fields") and "numbers" not in manifest:
        raise UserError(f"{path}: pairs of an earlier version, without the numbers of each; prepare the data again")
    return manifest


def dataset_names(roots: Sequence[epath.Path]) -> list[str]:
    """Returns the names of datasets, by which `config.data.weights` knows them: the last part of their paths.

    Raises:
      UserError: two have the same name.
    """
    names = [root.name for root in roots]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"config.data.dir: two datasets are called {name!r}; rename a folder")
    return names


def open_split(directory: epath.PathLike, split: str, cache_dir: str = "", cache_gb: float = 0) -> Records:
    """Opens a split of a prepared dataset, or the same split of several.

    Args:
      directory: `config.data.dir`: the folder that `prepare` wrote; several are separated by commas.
      split: "train" or "validation".
      cache_dir: `config.data.cache_dir`.
      cache_gb: `config.data.cache_gb`.

    Raises:
      UserError: there is no dataset, it has no such split, or several have too many domains.
    """
    roots = folders(directory)
    names = dataset_names(roots)
    manifest, splits = load_manifest(directory), []
    domains: list[str] = []
    datasets: dict[str, list[int]] = {}
    alone = set[int]()
    for root, name in zip(roots, names, strict=True):
        own = _load_manifest(root, directory)
        total = len(domains) + len(own["domains"])
        if total > MAX_DOMAINS:
            raise UserError(
                f"config.data.dir: {total:,} domains in the datasets up to {root}, but at most {MAX_DOMAINS:,} are possible; "
                "leave one out, or prepare one with fewer"
            )
        datasets[name] = list(range(len(domains), total))
        without = [source for source, options in own.get("sources", {}).items() if not options["in_batch"]]
        alone |= {len(domains) + number for number, domain in enumerate(own["domains"]) if domain in without}
        opened = open_index(root, own, split, cache_dir, cache_gb)
        splits.append(opened._replace(chunk_domain=opened.chunk_domain + np.uint16(len(domains))))
        domains += own["domains"] if len(roots) == 1 else [f"{name}/{domain}" for domain in own["domains"]]
    return Records(manifest, domains, datasets, splits, frozenset(alone))
