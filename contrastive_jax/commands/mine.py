"""Finds hard negatives for a file of pairs: documents that are near to a query, but none of its positives.

    contrastive-jax mine --model=hf:models/minilm --pairs='pairs/*.jsonl.gz' --relative_margin=0.05 --output=mined.jsonl.zst
    contrastive-jax prepare --pairs=mined.jsonl.zst --min_negatives=5 --output=data/mined --tokenizer=hf:models/minilm

All documents of the pairs, and of --corpus, are searched exactly, on all devices. The output has a line per query, as
FlagEmbedding writes it: {"query", "pos", "neg", "pos_scores", "neg_scores"}, with cosines as scores. Memory does not grow with
the vectors, which lie in TMPDIR: 4 bytes per coordinate of a text, beside the texts.

A corpus that is too large for one machine is encoded in parts, on many:

    contrastive-jax encode --model=MODEL --view=document --input=corpus.jsonl --shard=0/2 --output=part-0.npy
    contrastive-jax encode --model=MODEL --view=document --input=corpus.jsonl --shard=1/2 --output=part-1.npy
    contrastive-jax mine --model=MODEL --pairs=pairs.jsonl --corpus=corpus.jsonl --vectors='part-*.npy' --output=mined.jsonl

Several processes share the work as those of `encode` do.
"""

from typing import Any

from absl import flags

from contrastive_jax import files
from contrastive_jax.commands import cli
from contrastive_jax.inference import mine, text_model
from contrastive_jax.runtime import processes


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model", None, "A workdir, DIR@STEP, DIR@best, an exported folder, or hf:FOLDER.", required=True)
    flags.DEFINE_multi_string("pairs", None, "Files of pairs, as `prepare --pairs` takes them; may be repeated.", required=True)
    flags.DEFINE_string("output", None, "The .jsonl or .jsonl.zst to write; local, gs:// or s3://.", required=True)
    flags.DEFINE_string("text_field", "", "The fields of a pair, QUERY,POSITIVE or more; default: those of a known layout.")
    flags.DEFINE_string("corpus", None, "More documents: lines of text, or .jsonl of objects with text.")
    flags.DEFINE_string("vectors", "", "A glob of .npy files that `encode` has written: the vectors of --corpus, in its order.")
    flags.DEFINE_integer("max_tokens", None, "Truncate texts to this many tokens; default: as the model says.", lower_bound=1)
    cli.define_flags_of(mine.Options)
    cli.define_processes()


def main(arguments: list[str]) -> None:
    """Mines hard negatives."""
    del arguments
    values = flags.FLAGS
    options: dict[str, Any] = {name: values[name].value for name in mine.Options._fields}
    corpus, target = files.absolute(values.corpus) if values.corpus else None, files.absolute(values.output)
    with cli.joined_processes():
        processes.enable_compilation_cache()
        model = text_model.load(values.model, values.max_tokens)
        mine.mine(model, values.pairs, target, mine.Options(**options), values.text_field, corpus, values.vectors)
