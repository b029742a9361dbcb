"""A file of texts to a file of vectors, in blocks, so that memory does not grow with the file."""

import contextlib
import itertools
import re
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.files import transfer
from contrastive_jax.inference.text_model import TextModel
from contrastive_jax.runtime.progress import Progress

BLOCK = 16384  # texts in memory at once


def read_texts(path: epath.Path) -> Iterator[str]:
    """Yields the texts of a file: the value of "text" in each line of a .jsonl, else each line.

    Raises:
      UserError: the file cannot be read, or a line of a .jsonl has no text; the message names the line.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from (files.text_of(position, value, "text") for position, value in files.read_json_lines(path))
    else:
        yield from (line for _, line in files.read_lines(path))


def blocks(path: epath.Path) -> Iterator[list[str]]:
    """Yields the texts of a file in lists of BLOCK."""
    block: list[str] = []
    for text in read_texts(path):
        block.append(text)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block


def parse_shard(value: str) -> tuple[int, int]:
    """Returns (i, n) of "i/n".

    Raises:
      UserError: it is written in another way, or i is not below n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", value)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--shard={value}: write I/N, where I is 0 to N - 1")
    return int(found[1]), int(found[2])


def quantize(z: np.ndarray, dtype: str, dim: int | None) -> np.ndarray:
    """Converts unit vectors to what is stored.

    Args:
      z: float32[n e].
      dtype: "float32", "float16", "int8" (127 times the value, rounded) or "binary" (one bit per sign, packed).
      dim: how many first coordinates to keep, rescaled to unit length; None: all.

    Returns:
      [n dim]; of "binary" uint8[n ⌈dim / 8⌉].

    Raises:
      UserError: there are fewer coordinates than `dim`.
    """
    if dim is not None:
        if dim > z.shape[1]:
            raise UserError(f"--dim={dim}: the model's vectors have {z.shape[1]} coordinates; lower it")
        prefix = z[:, :dim]
        z = prefix / np.maximum(np.linalg.norm(prefix, axis=1, keepdims=True), 1e-12)
    if dtype == "int8":
        return np.round(127 * z).astype(np.int8)
    return np.packbits(z > 0, axis=1) if dtype == "binary" else z.astype(dtype)


def encode_file(
    model: TextModel,
    source: epath.Path,
    target: epath.Path,
    dtype: str = "float32",
    dim: int | None = None,
    view: str = "query",
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Writes the vectors of all texts of a file, or of a part; row i of the .npy is text i, and it appears when it is whole.

    A part is a run of blocks, since the last bits of a vector may depend on the texts that are encoded with it: the parts,
    joined in order, are the file that is written without `shard`, bit for bit. Every process must call it, with the same
    arguments; each must be able to read the source.

    Args:
      model: the encoder.
      source: lines of text, or a .jsonl.
      target: the .npy to write; for a bucket it is written in TMPDIR first.
      dtype: see `quantize`.
      dim: see `quantize`.
      view: "query" or "document".
      shard: (i, n): write the i-th of n parts, i from 0; where there are fewer blocks than parts, some have no rows.

    Raises:
      UserError: the source has no text or cannot be read, or the target cannot be written; the message says what to give.
    """
    if not source.exists() or source.is_dir():
        raise UserError(f"--input={source}: no such file; give lines of text, or a .jsonl")
    first = jax.process_index() == 0  # of several processes all encode, and the first one writes
    if first:
        transfer.check_output(target, ".npy")
    count = sum(1 for _ in read_texts(source))
    if not count:
        raise UserError(f"--input={source}: it has no text; give lines of text, or a .jsonl")
    total = -(-count // BLOCK)
    begin, end = (total * part // shard[1] for part in (shard[0], shard[0] + 1))
    size, none = min(end * BLOCK, count) - begin * BLOCK, quantize(np.zeros((0, model.dim), np.float32), dtype, dim)
    header = {"descr": np.lib.format.dtype_to_descr(none.dtype), "fortran_order": False, "shape": (size, none.shape[1])}
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(stack.enter_context(transfer.new_file(target)).open("wb")) if first else None
        if file:
            np.lib.format.write_array_header_1_0(file, header)
        progress = stack.enter_context(Progress("encoding", total=size, unit="texts"))
        for block in itertools.islice(blocks(source), begin, end):
            rows = quantize(model.encode(block, view, progress), dtype, dim)
            if file:
                file.write(rows.tobytes())
    logging.info("%d of %d texts were truncated to %d tokens", model.truncation.truncated, size, model.max_tokens)
    logging.info("written to %s", target)
