"""Makes a dataset of tokens from raw documents.

    contrastive-jax prepare --python --output=DIR                      text of this Python installation
    contrastive-jax prepare --input='train/*.jsonl.zst' --validation='val/*.jsonl.zst' --output=DIR
    contrastive-jax prepare --input='web=crawl/*.parquet' --input='code=code/*.jsonl.gz@5GB' --output=DIR
    contrastive-jax prepare --tfds=wikipedia/20230601.en --output=DIR

Inputs are files of JSON lines (.jsonl, .json; also with .gz, .zst, .bz2, .xz) and Parquet files. The Pile, C4, Dolma,
SlimPajama, FineWeb and sets of code with "content" need no flags; of others --text_field and --domain_field name the fields.
Inputs and DIR may be on gs:// and s3://, inputs also on hf://. The dataset is made in DIR.incomplete, which is renamed when it
is whole; on a bucket it is made in DIR, manifest.json last. The same command goes on after an interruption:

    DIR/manifest.json      what is in it: documents, records, tokens, bytes and what was passed over, by domain, split and file
    DIR/tokenizer.model    SentencePiece (or tokenizer.json)
    DIR/pile/1.0.0/        a TFDS dataset, for `tfds.builder_from_directory`, with splits train and validation
    DIR/index/             the length of each record, and the chunks in which the records lie
    DIR/rejects.jsonl      the first bad lines that were passed over, at most 1,000 of each file
"""

import sys
from typing import Any

from absl import flags

from contrastive_jax.commands import cli
from contrastive_jax.data.preparation import prepare


def define_flags() -> None:
    """Defines a flag for each argument that decides the content, and for each parameter of `prepare.prepare`."""
    cli.define_flags_of(prepare.Arguments, prepare.prepare)


def main(arguments: list[str]) -> None:
    """Prepares the dataset."""
    del arguments
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in cli.parameters_of(prepare.Arguments, prepare.prepare)}
    try:
        prepare.prepare(**values)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell says it; `prepare` has said what becomes of the work
