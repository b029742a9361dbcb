"""The command `python -m contrastive_jax.prepare`: raw text -> tokenizer, windows of tokens, index and manifest.

    python -m contrastive_jax.prepare --python --output=DIR                      text of this Python installation
    python -m contrastive_jax.prepare --input='train/*.jsonl.zst' --validation='val/*.jsonl.zst' --output=DIR
    python -m contrastive_jax.prepare --tfds=wikipedia/20230601.en --output=DIR

Inputs are Pile-format shards (.jsonl, .jsonl.gz, .jsonl.zst; one {"text": ..., "meta": {"pile_set_name": ...}} a line;
blank lines are passed over). The dataset is built beside its place and renamed when it is whole:

    DIR/manifest.json      what is in it: documents, windows, tokens, bytes and rejects, by domain and split
    DIR/tokenizer.model    SentencePiece (or tokenizer.json); `data.tokenizer.load(DIR)` knows the reserved ids
    DIR/pile/1.0.0/        a TFDS dataset, for `tfds.builder_from_directory`, splits train and validation
    DIR/index-SPLIT.npz    per record, as the data source orders them: length, document, domain; the names are `domains`
    DIR/rejects.jsonl      bad lines that were passed over, the first 1,000 of each shard
"""

import contextlib
import hashlib
import heapq
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from contrastive_jax import cli
from contrastive_jax.data import FORMAT, pile, sources, token_type, tokenizer
from contrastive_jax.data.sources import DataError, Document, Shard

PROGRESS_SECONDS = 3
_SAMPLE_CHARACTERS = 4096  # the longest piece of text the tokenizer is trained on
_SAMPLE_SCAN_BYTES = 1 << 30  # read at most, all shards together, to choose the sample from


class Arguments(NamedTuple):
    """What decides the content of the dataset; kept in the manifest, where a second run compares it."""

    input: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    validation_fraction: float = 0.02
    tfds: str = ""
    tfds_data_dir: str = ""
    tfds_feature: str = ""
    python: bool = False
    tokenizer: str = ""
    vocab_size: int = 16384
    sample_mb: int = 10
    window: int = 1024
    on_bad: str = "fail"


def define_flags() -> None:
    """The flags of the command; a default is that of `Arguments`."""
    default = Arguments()
    flags.DEFINE_string("output", None, "Directory of the prepared dataset.", required=True)
    flags.DEFINE_multi_string("input", [], "Glob of Pile-format shards, local or gs://; may be repeated.")
    flags.DEFINE_multi_string("validation", [], "Glob of the shards that are the validation split; may be repeated.")
    flags.DEFINE_float(
        "validation_fraction", default.validation_fraction, "Without --validation: share of the documents, by hash."
    )
    flags.DEFINE_string("tfds", default.tfds, "Instead of --input: a TFDS dataset with a text feature, NAME[/CONFIG].")
    flags.DEFINE_string("tfds_data_dir", default.tfds_data_dir, "Where TFDS keeps it; default: TFDS's own.")
    flags.DEFINE_string("tfds_feature", default.tfds_feature, "Its text feature; default: 'text', or the only one.")
    flags.DEFINE_bool("python", default.python, "Instead of --input: the text of this Python installation.")
    flags.DEFINE_string(
        "tokenizer", default.tokenizer, "A SentencePiece .model, a tokenizer.json, or hf:FOLDER; default: one is trained."
    )
    flags.DEFINE_integer("vocab_size", default.vocab_size, "Ids of the trained tokenizer, the reserved ones included.")
    flags.DEFINE_integer("sample_mb", default.sample_mb, "Text the tokenizer is trained on, in MB.")
    flags.DEFINE_integer("window", default.window, "The most tokens of a record; a longer document gives several.")
    flags.DEFINE_enum(
        "on_bad",
        default.on_bad,
        ["fail", "skip"],
        "A bad line (not JSON, no text, invalid UTF-8, damaged or empty shard): stop there, or count it and go on.",
    )
    flags.DEFINE_bool("overwrite", False, "Replace a dataset made with other arguments.")
    flags.DEFINE_string(
        "beam_pipeline_options",
        "",
        "Options of Apache Beam, as in 'runner=DataflowRunner,project=P,region=R'; default: this machine, all cores.",
    )


def main(argv: list[str]) -> None:
    """Reads the flags and prepares; a user's error is one line and exit status 2."""
    del argv
    values = flags.FLAGS.flag_values_dict()
    given = {name: values[name] for name in Arguments._fields}
    arguments = Arguments(**given | {"input": tuple(given["input"]), "validation": tuple(given["validation"])})
    options = [f"--{option}" for option in values["beam_pipeline_options"].split(",") if option]
    try:
        prepare(arguments, values["output"], overwrite=values["overwrite"], beam_flags=options)
    except DataError as error:
        cli.fail(str(error))


def prepare(
    arguments: Arguments, output: str, overwrite: bool = False, beam_flags: Iterable[str] = (), cores: int | None = None
) -> None:
    """Prepares a dataset.

    Args:
      arguments: what to prepare.
      output: directory that gets it, all at once, at the end.
      overwrite: whether a dataset made with other arguments may be replaced.
      beam_flags: options of Beam, see `pile.build`.
      cores: worker processes on this machine; None means all cores.

    Raises:
      DataError: wrong arguments or bad input.
    """
    check(arguments)
    target = epath.Path(output)
    if is_prepared(target, arguments, overwrite):
        say(f"{target} is already prepared with these arguments")
        return
    for left in sorted(target.parent.glob(f"{target.name}.incomplete-*")):
        say(f"{left} is of another run; if that was killed, remove it")
    work = target.parent / f"{target.name}.incomplete-{uuid.uuid4().hex[:8]}"
    work.mkdir(parents=True)
    try:
        manifest = fill(work, arguments, list(beam_flags), cores or os.cpu_count() or 1)
        replace(work, target)
    finally:
        if work.exists():
            work.rmtree()
    report(manifest, target)


def check(arguments: Arguments) -> None:
    """Refuses arguments that contradict each other."""
    chosen = [name for name in ("input", "tfds", "python") if getattr(arguments, name)]
    if len(chosen) != 1:
        raise DataError(f"give one of --input, --tfds and --python, not {' and '.join(chosen) or 'none'}")
    if arguments.validation and chosen != ["input"]:
        raise DataError(f"--validation goes with --input, not with --{chosen[0]}")
    if not 0 < arguments.validation_fraction < 1:
        raise DataError(f"--validation_fraction={arguments.validation_fraction}: must lie between 0 and 1")
    for name, least in [("window", 2), ("sample_mb", 1), ("vocab_size", 300)]:
        if getattr(arguments, name) < least:
            raise DataError(f"--{name}={getattr(arguments, name)}: must be at least {least}")


def is_prepared(target: epath.Path, arguments: Arguments, overwrite: bool) -> bool:
    """Whether the very dataset is there.

    Raises:
      DataError: something else is there, and may not be replaced.
    """
    if not target.exists():
        return False
    manifest = target / "manifest.json"
    if not manifest.exists():
        raise DataError(f"--output={target}: exists and is no prepared dataset; choose another place or remove it")
    made_with = json.loads(manifest.read_text()).get("arguments")
    if made_with == as_json(arguments):
        return not overwrite
    if not overwrite:
        raise DataError(f"--output={target}: was made with other arguments (see manifest.json); --overwrite replaces it")
    return False


def fill(work: epath.Path, arguments: Arguments, beam_flags: list[str], cores: int) -> dict[str, Any]:
    """Makes all files of the dataset in `work`; returns the manifest."""
    shards = find_shards(work, arguments)
    trained = tokenizer.load(arguments.tokenizer) if arguments.tokenizer else train_tokenizer(shards, arguments)
    (work / trained.file).write_bytes(trained.model)
    recipe = pile.Recipe(
        shards, arguments.window, trained.vocab_size, arguments.validation_fraction, arguments.on_bad, os.fspath(work)
    )
    with progress(lambda seconds: writing_line(work, seconds)):
        counts = pile.build(recipe, beam_flags, cores)
    with progress(lambda seconds: f"index: {seconds:.0f} s"):
        content = {split: write_index(work, split, trained.vocab_size) for split in (pile.TRAIN, pile.VALIDATION)}
    manifest = {
        "format": FORMAT,
        "arguments": as_json(arguments),
        "inputs": [f"Python {platform.python_version()}"] if arguments.python else [shard.name for shard in shards],
        "window": arguments.window,
        "vocab_size": trained.vocab_size,
        "tokenizer_sha256": trained.sha256,
        "reserved": trained.reserved,
        "content_hash": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        "splits": {split: with_totals(counts["splits"][split]) for split in content},
        "rejects": counts.get("rejects", {}),
        "rejects_by_domain": counts.get("rejects_by_domain", {}),
        "duplicates": sum(counts.get("rejects", {}).get("duplicate", {}).values()),
    }
    (work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for name in ("counts.json", "workers.log", "progress", "downloads", "raw"):
        path = work / name
        if path.exists():
            path.rmtree() if path.is_dir() else path.unlink()
    return manifest


def find_shards(work: epath.Path, arguments: Arguments) -> list[Shard]:
    """The inputs, validation first where the input names its splits."""
    if arguments.tfds:
        return sources.tfds_shards(arguments.tfds, arguments.tfds_data_dir or None, arguments.tfds_feature or None)
    if arguments.python:
        raw = work / "raw"
        raw.mkdir()
        with progress(lambda seconds: f"python documents: {seconds:.0f} s"):
            sources.write_python_documents(raw)
        return sources.file_shards([f"{raw}/*.jsonl"], "", "python")
    train = sources.file_shards(arguments.input, pile.TRAIN if arguments.validation else "", "input")
    validation = sources.file_shards(arguments.validation, pile.VALIDATION, "validation")
    both = {shard.name for shard in train} & {shard.name for shard in validation}
    if both:
        raise DataError(f"--input and --validation: both match {sorted(both)[0]}")
    return [shard._replace(order=order) for order, shard in enumerate(validation + train)]


def train_tokenizer(shards: list[Shard], arguments: Arguments) -> tokenizer.Tokenizer:
    """Trains SentencePiece on a sample of the training shards."""
    seen = {"documents": 0, "bytes": 0}
    shards = [shard for shard in shards if shard.split != pile.VALIDATION]
    with progress(lambda s: f"tokenizer sample: {amount(seen['documents'], seen['bytes'], s)}"):
        sample = sample_text(shards, arguments.sample_mb * 10**6, arguments.on_bad, seen)
    size = sum(map(len, sample)) / 1e6
    with progress(lambda s: f"tokenizer training: {s:.0f} s on {size:.1f} MB, {size / s:.2f} MB/s"):
        return tokenizer.train(sample, arguments.vocab_size)


def sample_text(shards: list[Shard], size: int, on_bad: str, seen: dict[str, int]) -> list[str]:
    """Chooses pieces of text by their hash, so that the sample is the same each time and covers every shard.

    Args:
      shards: where the text is; of each, the first gigabyte / number of shards is read.
      size: characters to choose.
      on_bad: "fail" stops at a bad line.
      seen: "documents" and "bytes" read so far, kept up to date for the progress line.

    Returns:
      Pieces of at most 4,096 characters, in the order of their hashes.
    """
    chosen: list[tuple[int, str]] = []  # a heap, the highest hash on top to be dropped first
    total = 0
    for shard in shards:
        end = seen["bytes"] + _SAMPLE_SCAN_BYTES // len(shards)
        for item in sources.read(shard):
            if isinstance(item, Document):
                seen["documents"] += 1
                seen["bytes"] += len(item.text)
                for start in range(0, len(item.text), _SAMPLE_CHARACTERS):
                    piece = item.text[start : start + _SAMPLE_CHARACTERS]
                    digest = hashlib.blake2b(piece.encode(), digest_size=8).digest()
                    heapq.heappush(chosen, (-int.from_bytes(digest, "big"), piece))
                    total += len(piece)
                while total - len(chosen[0][1]) >= size:
                    total -= len(heapq.heappop(chosen)[1])
            elif on_bad == "fail" and item.reason != sources.EMPTY_TEXT:
                raise DataError(pile.stop_message(item))
            if seen["bytes"] >= end:
                break
    return [piece for _, piece in sorted(chosen, reverse=True)]


def write_index(work: epath.Path, split: str, vocab_size: int) -> dict[str, str]:
    """Scans the records of a split once and writes index-SPLIT.npz.

    Returns:
      Column -> SHA-256 of its values in record order. (The bytes of the records are no measure of their content:
      protocol buffers promise no order of the map entries.)
    """
    from tensorflow_datasets.proto import tf_example_pb2  # without TensorFlow, whose import takes longer than this scan

    records = ArrayRecordDataSource(sorted(map(os.fspath, (work / "pile" / "1.0.0").glob(f"*-{split}.array_record*"))))
    hashes = {name: hashlib.sha256() for name in ("tokens", "length", "document", "domain", "position")}
    lengths, documents, domains = [], [], []
    for start in range(0, len(records), 256):
        for record in records.__getitems__(range(start, min(start + 256, len(records)))):
            feature = tf_example_pb2.Example.FromString(record).features.feature
            tokens = np.frombuffer(feature["tokens"].bytes_list.value[0], token_type(vocab_size)).astype("<i4")
            document, domain = (feature[name].bytes_list.value[0] for name in ("document", "domain"))
            position = feature["position"].int64_list.value[0]
            hashes["tokens"].update(tokens.data)
            hashes["length"].update(b"%d\n" % len(tokens))
            hashes["document"].update(document + b"\n")
            hashes["domain"].update(domain + b"\0")
            hashes["position"].update(b"%d\n" % position)
            lengths.append(len(tokens))
            documents.append(document)
            domains.append(domain.decode())
    names, domain_numbers = np.unique(domains, return_inverse=True)
    _, document_numbers = np.unique(documents, return_inverse=True)
    with (work / f"index-{split}.npz").open("wb") as file:
        np.savez(
            file,
            length=np.array(lengths, np.int32),
            document=document_numbers.astype(np.int32),
            domain=domain_numbers.astype(np.int32),
            domains=names,
        )
    return {name: value.hexdigest() for name, value in hashes.items()}


def with_totals(split: dict[str, Any]) -> dict[str, Any]:
    """Adds the sums over the domains of a split."""
    domains = dict(sorted(split["domains"].items()))
    names = ("documents", "windows", "tokens", "bytes")
    return {name: sum(domain[name] for domain in domains.values()) for name in names} | {"domains": domains}


def replace(work: epath.Path, target: epath.Path) -> None:
    """Moves the finished dataset to its place; an old one is moved aside first and removed last."""
    if target.exists():
        old = work.parent / f"{work.name}.old"
        target.rename(old)
        work.rename(target)
        old.rmtree()
    else:
        work.rename(target)


def as_json(arguments: Arguments) -> dict[str, Any]:
    """The arguments as JSON gives them back."""
    return json.loads(json.dumps(arguments._asdict()))


def report(manifest: dict[str, Any], target: epath.Path) -> None:
    """Says what is in the dataset and what was passed over."""
    for split, of in manifest["splits"].items():
        say(
            f"{split}: {of['documents']:,} documents, {of['bytes'] / 1e6:.1f} MB, {of['tokens']:,} tokens, "
            f"{of['windows']:,} windows of at most {manifest['window']}, {len(of['domains'])} domains"
        )
    for reason, files in manifest["rejects"].items():
        say(f"passed over: {sum(files.values()):,} x {reason}, in {', '.join(sorted(files)[:3])}" + " ..." * (len(files) > 3))
    say(f"{target} is ready, content {manifest['content_hash'][:16]}")


@contextlib.contextmanager
def progress(line: Callable[[float], str]) -> Iterator[None]:
    """Says `line(seconds)` every few seconds and once at the end."""
    start = time.monotonic()
    done = threading.Event()

    def tell() -> None:
        while not done.wait(PROGRESS_SECONDS):
            say(line(time.monotonic() - start))

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
        say(line(time.monotonic() - start) + ", done")
    finally:
        done.set()
        thread.join()


def writing_line(work: epath.Path, seconds: float) -> str:
    """How far the workers are."""
    stages = pile.read_meters(os.fspath(work))
    return "writing: " + "; ".join(f"{stage} {amount(*done, seconds)}" for stage, done in stages.items())


def amount(documents: int, size: int, seconds: float) -> str:
    """How much, and how fast."""
    return f"{documents:,} documents, {size / 1e6:.1f} MB, {size / 1e6 / max(seconds, 1e-3):.1f} MB/s"


def say(line: str) -> None:
    """One line for the user, at once."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
