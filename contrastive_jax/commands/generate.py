"""Writes texts like those it is given, and keeps the nearest: pairs for training.

    contrastive-jax generate --model=runs/simbert --input=texts.txt --output=pairs.jsonl
    contrastive-jax prepare --pairs=pairs.jsonl --output=data/pairs --tokenizer=runs/simbert

The model is a run that has learned to write the second text of a pair (configs/seq2seq.py:simbert). The input has one text per
line or, as .jsonl, one object with "text" per line; the output has one object with "text1" and "text2" per line.
"""

from typing import Any

from absl import flags

from contrastive_jax import files
from contrastive_jax.commands import cli
from contrastive_jax.inference import generate
from contrastive_jax.runtime import processes


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model", None, "A workdir, DIR@STEP or DIR@best.", required=True)
    flags.DEFINE_string("input", None, "Lines of text, or .jsonl of objects with text; local, gs:// or s3://.", required=True)
    flags.DEFINE_string("output", None, "The .jsonl to write; local, gs:// or s3://.", required=True)
    cli.define_flags_of(generate.Options)


def main(arguments: list[str]) -> None:
    """Writes pairs of texts."""
    del arguments
    values = flags.FLAGS
    processes.enable_compilation_cache()
    options: dict[str, Any] = {name: values[name].value for name in generate.Options._fields}
    generate.generate(values.model, files.absolute(values.input), files.absolute(values.output), generate.Options(**options))
