"""Texts to vectors: `python -m contrastive_jax.encode --model=M --input=texts.txt --output=vectors.npy`.

M is a workdir, DIR@STEP or hf:FOLDER, as for evaluate. The input has a text a line, or, as .jsonl, an object with "text" a
line. Row i of the .npy is line i; the file appears when it is whole. Memory does not grow with the input.
"""

import json
import time
from collections.abc import Iterator

import numpy as np
from absl import flags, logging
from etils import epath

from contrastive_jax import cli, processes, text_model

BLOCK = 16384  # texts held at once


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_string("model", None, "A workdir, DIR@STEP, or hf:FOLDER.", required=True)
    flags.DEFINE_string("input", None, "Lines of text, or .jsonl of objects with text.", required=True)
    flags.DEFINE_string("output", None, "The .npy.", required=True)
    kinds = ["float32", "float16", "int8", "binary"]
    flags.DEFINE_enum("dtype", kinds[0], kinds, "int8: round(127 x); binary: a bit a sign, eight to a uint8.")
    flags.DEFINE_integer("dim", None, "Keep so many first coordinates, at unit length (Matryoshka).", lower_bound=1)
    flags.DEFINE_enum("view", text_model.VIEWS[0], list(text_model.VIEWS), "As what the texts are encoded.")


def texts(path: epath.Path) -> Iterator[str]:
    """The texts of the input.

    Raises:
      ValueError: a line of a .jsonl that is no object with text; the message names it.
    """
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if path.suffix != ".jsonl":
                yield line.rstrip("\n")
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: not an object with text") from error
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: text is not a string")
            yield text


def blocks(path: epath.Path) -> Iterator[list[str]]:
    """The texts in lists of BLOCK."""
    block: list[str] = []
    for text in texts(path):
        block.append(text)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block


def stored(z: np.ndarray, dtype: str, dim: int | None) -> np.ndarray:
    """Unit vectors float32[n e] as they are written: [n dim], or [n ⌈dim / 8⌉] of bits.

    Raises:
      ValueError: there are not so many coordinates.
    """
    if dim is not None:
        if dim > z.shape[1]:
            raise ValueError(f"--dim={dim}: the model's vectors have {z.shape[1]} coordinates")
        z = z[:, :dim] / np.maximum(np.linalg.norm(z[:, :dim], axis=1, keepdims=True), 1e-12)
    if dtype == "int8":
        return np.round(127 * z).astype(np.int8)
    return np.packbits(z > 0, axis=1) if dtype == "binary" else z.astype(dtype)


def encode(
    model: text_model.TextModel,
    source: epath.Path,
    target: epath.Path,
    dtype: str = "float32",
    dim: int | None = None,
    view: str = "query",
) -> None:
    """Writes the vectors of all texts.

    Raises:
      ValueError: there is no text, or something is not as it should be; the message names it.
    """
    if not source.exists() or source.is_dir():
        raise ValueError(f"--input={source}: no such file")
    if target.suffix != ".npy" or not target.parent.is_dir():
        raise ValueError(f"--output={target}: give a .npy in a folder that is there")
    count = sum(1 for _ in texts(source))
    if not count:
        raise ValueError(f"--input={source}: no line there")
    partial = target.parent / f"{target.name}.partial"
    out: np.memmap | None = None
    began, done = time.monotonic(), 0
    for block in blocks(source):
        rows = stored(model.encode(block, text_model.VIEWS.index(view)), dtype, dim)
        if out is None:
            out = np.lib.format.open_memmap(partial, "w+", rows.dtype, (count, rows.shape[1]))
        out[done : done + len(rows)] = rows
        done += len(rows)
        rate = done / (time.monotonic() - began)
        logging.info("%d of %d texts, %.0f a second, %.0f s left", done, count, rate, (count - done) / rate)
    del out  # flushes
    partial.replace(target)
    logging.info("written to %s", target)


def main(argv: list[str]) -> None:
    """The command."""
    del argv
    processes.enable_compilation_cache()
    given = flags.FLAGS
    with cli.user_errors():
        model = text_model.open_model(given.model)
        encode(model, epath.Path(given.input), epath.Path(given.output), given.dtype, given.dim, given.view)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
