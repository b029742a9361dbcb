"""The arguments of `prepare` that decide what it makes."""

import json
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from contrastive_jax.config import UserError
from contrastive_jax.data.clean import cleaning
from contrastive_jax.data.raw import inputs
from contrastive_jax.files import listing, on_bucket


class Arguments(NamedTuple):
    """What decides the content of the dataset; the manifest keeps it for the next call.

    The flags of the command, their defaults and their help are these fields and the parameters of `prepare`.

    Attributes:
      input: files of documents, [NAME=]GLOB[@LIMIT], local, on gs://, s3:// or hf://; may be repeated. NAME is the domain of
        all its documents; LIMIT is the most lines (@2000000) or text (@5GB).
      validation: files of the validation split, written like `input`; may be repeated.
      validation_fraction: without `validation`: the share of the documents, chosen by their hash, that form that split.
      text_field: the field of the text, such as "article.body"; default: that of a known schema ("text", "content"). Of pairs
        all fields, "question,passage"; of a .tsv or .csv without names the numbers of its columns, "2,3".
      domain_field: the field of the domain, such as "meta.source"; default: that of a known schema, or else the file's name.
      limit: for a trial: the most lines of a split (rows, examples), from the heads of its files; 0: all.
      tfds: instead of `input`: a TFDS dataset with a text feature, NAME or NAME/CONFIG.
      tfds_data_dir: the folder in which TFDS keeps it; default: TFDS's own.
      tfds_feature: its text feature; default: "text", or the only one.
      pairs: instead of `input`: files of pairs of texts, which also may be .tsv and .csv; `validation` are pairs too.
      label_field: of pairs: the field of the label; default: "label", "score" or another known name; pairs need not have one.
      labels: of pairs: the names of the classes, separated by commas, whose numbers are 0, 1, ...; default: labels are numbers.
      min_negatives: of pairs: leave out those with fewer hard negatives; a file of sources says it for each source.
      python: instead of `input`: take the text of this Python installation.
      tokenizer: a SentencePiece .model, a tokenizer.json, or hf:FOLDER; default: train one on the text.
      vocab_size: the ids of a trained tokenizer, reserved ids included.
      sample_mb: the MB of text on which it is trained.
      record_tokens: the most tokens of a record; a longer document gives several records. A longer text of a pair is cut.
      part_mb: the MB of text that one task reads, and that one file shard holds; 0: by the size of the input, 8 to 256.
      min_characters: drop shorter documents; 0 sets no limit, here and in the other filters.
      max_characters: drop longer documents.
      max_symbols: drop documents of which a larger share of the characters is neither letters, digits nor white space, as 0.3.
      max_word_characters: drop documents whose words are longer than so many characters on average, as 15.
      max_repetition: drop documents that repeat themselves; 1 is the limit of Gopher's filters, 2 is twice as much.
      near_duplicates: drop documents that are so similar to an earlier one, between 0 and 1; 0.6 is a good value; 0: keep them.
      decontaminate: folders of evaluation sets, separated by commas; documents that have a text of these in them are dropped.
      leak_tokens: drop validation records that share a run of so many tokens with a training record, as 32; 0: keep them.
      on_bad: "fail" stops at a bad line (not JSON, no text, invalid UTF-8, a damaged or empty file), "skip" counts it.
    """

    input: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    validation_fraction: float = 0.02
    text_field: str = ""
    domain_field: str = ""
    limit: int = 0
    tfds: str = ""
    tfds_data_dir: str = ""
    tfds_feature: str = ""
    pairs: tuple[str, ...] = ()
    label_field: str = ""
    labels: str = ""
    min_negatives: int = 0
    python: bool = False
    tokenizer: str = ""
    vocab_size: int = 16384
    sample_mb: int = 10
    record_tokens: int = 1024
    part_mb: int = 0
    min_characters: int = 0
    max_characters: int = 0
    max_symbols: float = 0.0
    max_word_characters: float = 0.0
    max_repetition: float = 0.0
    near_duplicates: float = 0.0
    decontaminate: tuple[str, ...] = ()
    leak_tokens: int = 0
    on_bad: Literal["fail", "skip"] = "fail"


def as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Returns one glob, or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def check_arguments(arguments: Arguments) -> None:
    """Checks the arguments.

    Raises:
      UserError: a value is out of range, or two contradict each other.
    """
    chosen = [name for name in ("input", "pairs", "tfds", "python") if getattr(arguments, name)]
    if len(chosen) != 1:
        raise UserError(f"give one of --input, --pairs, --tfds and --python, not {' and '.join(chosen) or 'none'}")
    if arguments.validation and chosen[0] not in ("input", "pairs"):
        raise UserError(f"--validation goes with --input or --pairs, not with --{chosen[0]}; leave it out")
    if (arguments.label_field or arguments.labels or arguments.min_negatives) and not arguments.pairs:
        raise UserError("--label_field, --labels and --min_negatives go with --pairs; leave them out")
    if not 0 < arguments.validation_fraction < 1:
        raise UserError(f"--validation_fraction={arguments.validation_fraction}: must lie between 0 and 1")
    if arguments.limit < 0:
        raise UserError(f"--limit={arguments.limit}: give a number of lines; 0 takes all")
    if arguments.on_bad not in ("fail", "skip"):
        raise UserError(f"--on_bad={arguments.on_bad}: choose one of fail, skip")
    cleaning.check_limits(cleaning.Limits(**{name: getattr(arguments, name) for name in cleaning.Limits._fields}))
    if not 0 <= arguments.near_duplicates < 1:
        raise UserError(f"--near_duplicates={arguments.near_duplicates}: is a similarity, so it must lie between 0 and 1")
    if arguments.leak_tokens and not 8 <= arguments.leak_tokens <= arguments.record_tokens:
        raise UserError(
            f"--leak_tokens={arguments.leak_tokens}: must lie between 8 and --record_tokens={arguments.record_tokens}"
        )
    for name, minimum in (("record_tokens", 2), ("sample_mb", 1), ("vocab_size", 300), ("part_mb", 0), ("min_negatives", 0)):
        if getattr(arguments, name) < minimum:
            raise UserError(f"--{name}={getattr(arguments, name)}: must be at least {minimum}")


def with_absolute_paths(arguments: Arguments) -> Arguments:
    """Returns the arguments with absolute paths: in another folder, the same relative path means other files."""
    return arguments._replace(
        input=tuple(absolute_input(value, "input") for value in arguments.input),
        pairs=tuple(absolute_input(value, "pairs") for value in as_tuple(arguments.pairs)),
        validation=tuple(absolute_input(value, "validation") for value in arguments.validation),
        decontaminate=tuple(absolute_path(path) for path in split_at_commas(arguments.decontaminate)),
        tokenizer=absolute_tokenizer(arguments.tokenizer),
        tfds_data_dir=absolute_path(arguments.tfds_data_dir) if arguments.tfds_data_dir else "",
    )


def split_at_commas(value: str | Sequence[str]) -> list[str]:
    """Returns the names in a flag that may be repeated, and whose values may be several names."""
    return [name.strip() for names in as_tuple(value) for name in names.split(",") if name.strip()]


def absolute_path(path: str) -> str:
    """Returns a path that means the same in every folder."""
    return path if on_bucket(path) else os.path.abspath(os.path.expanduser(path))


def absolute_tokenizer(path: str) -> str:
    """Returns the path of a tokenizer, which may begin with "hf:", as an absolute one; "" stays "": none is given."""
    prefix = "hf:" if path.startswith("hf:") else ""
    return f"{prefix}{absolute_path(path.removeprefix('hf:'))}" if path else ""


def absolute_input(value: str, flag: str) -> str:
    """Returns [NAME=]GLOB[@LIMIT] with an absolute glob."""
    glob = inputs.parse_input(value, flag).glob
    if on_bucket(glob) or listing.on_hub(glob):
        return value
    before, _, after = value.rpartition(glob)
    return f"{before}{os.path.abspath(os.path.expanduser(glob))}{after}"


def as_json(arguments: Arguments) -> dict[str, Any]:
    """Returns the arguments as they are stored in the manifest, where record_tokens is called "window"."""
    stored = {"window" if name == "record_tokens" else name: value for name, value in arguments._asdict().items()}
    return json.loads(json.dumps(stored))
