"""How records lie on disk: file shards in ArrayRecord, in chunks that are read with one request, and an index of the chunks.

A chunk is a run of up to CHUNK records of one domain that lie together in a file shard and are compressed together. All records
of a chunk are read with one request, so a reader that uses whole chunks needs few. The records of a file shard are sorted by
domain; their order within a domain is random.

    DIR/pile/1.0.0/pile-SPLIT.array_record-00000-of-00003     the file shards, a TFDS dataset
    DIR/index/SPLIT-length.npy          uint16 or int32 [n], the tokens of each record, in the order of the file shards
    DIR/index/SPLIT-chunk_size.npy      uint8 [c], the records of each chunk
    DIR/index/SPLIT-chunk_domain.npy    uint16 [c], the domain of each chunk: an index into the manifest's list of domains
    DIR/index/SPLIT-shard_chunks.npy    int64 [s], the chunks of each file shard

Dimensions: n records, c chunks, s file shards of a split.
"""

import array
import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_module
from etils import epath

from contrastive_jax.data import token_type

CHUNK = 128
WRITER_OPTIONS = f"group_size:{CHUNK},zstd:1"
NAME = "pile/1.0.0/pile-{split}.array_record-{number:05d}-of-{count:05d}"
COLUMNS = ("length", "chunk_size", "chunk_domain", "shard_chunks")


class Record(NamedTuple):
    """A window of the tokens of one document.

    Attributes:
      tokens: the token ids.
      document: the first half of the SHA-256 of the document's text, in hexadecimal.
      domain: the number of the document's domain.
      position: the tokens of the document before the record.
      numbers: of a pair, its label or NaN, how many positives and how many hard negatives it has, and the scores of all these,
        if there are any; None for a document.
    """

    tokens: np.ndarray
    document: str
    domain: int
    position: int
    numbers: Sequence[float] | None = None


class Index(NamedTuple):
    """The index of some file shards: a field per file of the header, without `SPLIT-`."""

    length: np.ndarray
    chunk_size: np.ndarray
    chunk_domain: np.ndarray
    shard_chunks: np.ndarray


def write_file_shard(path: os.PathLike, records: Iterable[Record], domains: Sequence[str], vocab_size: int) -> Index:
    """Writes a file shard to a local file.

    Args:
      path: the file.
      records: its records, sorted by domain.
      domains: the names of the domains.
      vocab_size: of the tokenizer; it decides the type of the stored tokens.

    Returns:
      The index of this file shard.
    """
    from tensorflow_datasets.proto import tf_example_pb2  # without TensorFlow, whose import takes seconds

    writer, dtype = array_record_module.ArrayRecordWriter(os.fspath(path), WRITER_OPTIONS), token_type(vocab_size)
    lengths, numbers = array.array("q"), array.array("q")
    for record in records:
        lengths.append(len(record.tokens))
        numbers.append(record.domain)
        example = tf_example_pb2.Example()
        feature = example.features.feature
        feature["tokens"].bytes_list.value.append(record.tokens.astype(dtype).tobytes())
        feature["document"].bytes_list.value.append(record.document.encode())
        feature["domain"].bytes_list.value.append(domains[record.domain].encode())
        feature["position"].int64_list.value.append(record.position)
        if record.numbers is not None:
            feature["numbers"].float_list.value.extend(record.numbers)
        writer.write(example.SerializeToString())
    writer.close()
    return index_of(lengths, numbers)


def read_file_shard(path: os.PathLike, domains: Sequence[str], vocab_size: int) -> Iterator[Record]:
    """Yields the records of a local file shard in their order; see `write_file_shard` for the arguments."""
    from tensorflow_datasets.proto import tf_example_pb2  # without TensorFlow, whose import takes seconds

    numbers, dtype = {name.encode(): number for number, name in enumerate(domains)}, token_type(vocab_size)
    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    for begin in range(0, reader.num_records(), CHUNK):
        for serialised in reader.read(begin, min(begin + CHUNK, reader.num_records())):
            feature = tf_example_pb2.Example.FromString(serialised).features.feature
            yield Record(
                np.frombuffer(feature["tokens"].bytes_list.value[0], dtype),
                feature["document"].bytes_list.value[0].decode(),
                numbers[feature["domain"].bytes_list.value[0]],
                feature["position"].int64_list.value[0],
                feature["numbers"].float_list.value[:] if "numbers" in feature else None,
            )
    reader.close()


def index_of(lengths: Sequence[int], domains: Sequence[int]) -> Index:
    """Returns the index of one file shard from the lengths and the domains of its records.

    A chunk begins at every CHUNK-th record, where ArrayRecord begins a new compressed block, and at every new domain.
    """
    domain = np.asarray(domains, np.uint16)
    number = np.arange(len(domain))
    begins = (number % CHUNK == 0) | (np.diff(domain, prepend=domain[:1]) != 0)
    starts = np.flatnonzero(begins)
    return Index(
        length=np.asarray(lengths, np.uint16 if max(lengths, default=0) < 1 << 16 else np.int32),
        chunk_size=np.diff(starts, append=len(domain)).astype(np.uint8),
        chunk_domain=domain[starts],
        shard_chunks=np.array([len(starts)], np.int64),
    )


def index_path(root: epath.Path, split: str, column: str) -> epath.Path:
    """Returns the path of one column of the index."""
    return root / "index" / f"{split}-{column}.npy"


def write_index(root: pathlib.Path, split: str, indexes: Iterable[Index]) -> None:
    """Writes the index of a split into the local folder of a dataset.

    Args:
      root: the folder.
      split: train or validation.
      indexes: of its file shards, in their order. They are gone through twice and may be loaded each time: all of them together
        may be larger than memory.
    """
    (root / "index").mkdir(parents=True, exist_ok=True)
    sizes, types = [0] * len(COLUMNS), [np.dtype(np.uint8)] * len(COLUMNS)
    for index in indexes:
        sizes = [size + len(values) for size, values in zip(sizes, index, strict=True)]
        types = [np.promote_types(dtype, values.dtype) for dtype, values in zip(types, index, strict=True)]
    with contextlib.ExitStack() as stack:
        columns = [stack.enter_context(index_path(epath.Path(root), split, name).open("wb")) for name in COLUMNS]
        for file, size, dtype in zip(columns, sizes, types, strict=True):
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
            np.lib.format.write_array_header_1_0(file, header)
        for index in indexes:
            for file, values, dtype in zip(columns, index, types, strict=True):
                file.write(values.astype(dtype).tobytes())
