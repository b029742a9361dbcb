"""Turns texts into vectors.

    contrastive-jax encode --model=runs/debug --input=texts.txt --output=vectors.npy

The input has one text per line or, as .jsonl, one object with "text" per line. Row i of the .npy is the vector of text i; the
file appears when it is whole. Memory does not grow with the input.

With --shard=I/N, machines that know nothing of one another each encode a part of the input, which is a run of whole blocks of
16,384 texts. The files, joined in order, are the one that is written without it. `mine --vectors` takes them.

Several processes share the work on a TPU pod or under SLURM with --cluster, elsewhere with --coordinator=HOST:PORT
--num_processes=N --process_id=I. Each reads the model and the input, and process 0 writes.
"""

from absl import flags

from contrastive_jax import files
from contrastive_jax.commands import cli
from contrastive_jax.inference import encode_file, text_model
from contrastive_jax.inference.tokenize import VIEWS
from contrastive_jax.runtime import processes


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model", None, "A workdir, DIR@STEP, DIR@best, an exported folder, or hf:FOLDER.", required=True)
    flags.DEFINE_string("input", None, "Lines of text, or .jsonl of objects with text; local, gs:// or s3://.", required=True)
    flags.DEFINE_string("output", None, "The .npy to write; local, gs:// or s3://.", required=True)
    kinds = ["float32", "float16", "int8", "binary"]
    flags.DEFINE_enum("dtype", kinds[0], kinds, "Type of the vectors; int8: round(127 x); binary: one bit per sign, packed.")
    flags.DEFINE_enum("precision", None, list(text_model.PRECISIONS), text_model.PRECISION_HELP)
    flags.DEFINE_integer("dim", None, "Keep this many first coordinates, rescaled to unit length (Matryoshka).", lower_bound=1)
    flags.DEFINE_integer("max_tokens", None, "Truncate texts to this many tokens; default: as the model says.", lower_bound=1)
    flags.DEFINE_string(
        "shard", "0/1", "I/N: encode the I-th of N parts of the input, I from 0 to N - 1, each into its own file."
    )
    cli.define_processes()
    flags.DEFINE_enum("view", VIEWS[0], list(VIEWS), "Encode the texts as queries or as documents.")


def main(arguments: list[str]) -> None:
    """Encodes a file of texts."""
    del arguments
    values = flags.FLAGS
    source, target = files.absolute(values.input), files.absolute(values.output)
    shard = encode_file.parse_shard(values.shard)
    with cli.joined_processes():
        processes.enable_compilation_cache()
        model = text_model.load(values.model, values.max_tokens, values.precision)
        encode_file.encode_file(model, source, target, values.dtype, values.dim, values.view, shard)
