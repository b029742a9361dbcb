"""Prepares a dataset: raw text → tokenizer, records of tokens, index and manifest.

`prepare` is behind `contrastive_jax.prepare(...)` and the command of the same name, whose flags are its arguments. It makes

    DIR/manifest.json      what is in it: documents, records, tokens, bytes and rejects, by domain and split
    DIR/tokenizer.model    SentencePiece (or tokenizer.json); `data.tokenizer.load(DIR)` knows the reserved ids
    DIR/pile/1.0.0/        a TFDS dataset, for `tfds.builder_from_directory`, splits train and validation
    DIR/index/             the length of each record and the chunks of records; see `data.store`
    DIR/rejects.jsonl      the first bad lines that were passed over, at most 1,000 of each file

The work is done by small tasks (`stages`), each of which leaves a file. Whatever ends a run, the next call with the same
arguments goes on from these files, and makes the same dataset.
"""

import contextlib
import functools
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.data import FORMAT
from contrastive_jax.data import tokenizer as tokenizer_lib
from contrastive_jax.data.clean import decontamination
from contrastive_jax.data.preparation import driver, stages, workspace
from contrastive_jax.data.preparation.arguments import (
    Arguments,
    as_json,
    as_tuple,
    check_arguments,
    split_at_commas,
    with_absolute_paths,
)
from contrastive_jax.data.preparation.engine import LocalEngine
from contrastive_jax.data.preparation.manifest import (
    MANIFEST,
    TRAIN,
    VALIDATION,
    difference,
    identity_of_files,
    identity_of_python,
    is_manifest,
)
from contrastive_jax.data.preparation.stage_progress import StageProgress, stage_names
from contrastive_jax.data.preparation.work import WORK, Work
from contrastive_jax.data.raw import inputs, losses, pair_sources, python_text
from contrastive_jax.data.raw.pairs import PairFields, PairOptions
from contrastive_jax.data.raw.sources import Shard
from contrastive_jax.files import listing
from contrastive_jax.files.transfer import INCOMPLETE
from contrastive_jax.runtime.progress import Progress

if TYPE_CHECKING:
    from contrastive_jax.data.beam.options import BeamOptions

RAW, BEAM = f"{WORK}/raw/python.jsonl", f"{WORK}/beam"
# Bytes of memory: of the main process, for itself and per byte of the tokenizer's sample; of a worker, for itself and per byte
# of a part. Measured: 180 MB and 20; 70 MB and 3.
MAIN_BYTES, SAMPLE_FACTOR, WORKER_BYTES, PART_FACTOR = 250 << 20, 24, 250 << 20, 4
DEFAULT_SHARE = 0.75  # of this machine's memory
BEAM_WORKER_BYTES = 1 << 30  # of memory that a task on another machine may take for hashes


class Source(NamedTuple):
    """The input.

    Attributes:
      shards: its files; none yet for the text of Python, which is written first.
      identity: what tells it from other input, for the manifest.
      tokenizer_sha256: of the file that --tokenizer names; "" without it.
    """

    shards: list[Shard]
    identity: list[dict[str, Any]]
    tokenizer_sha256: str


def prepare(
    output: epath.PathLike,
    input: str | Sequence[str] = (),
    validation: str | Sequence[str] = (),
    *,
    overwrite: bool = False,
    beam_pipeline_options: str | Sequence[str] | Mapping[str, Any] = (),
    workers: int = 0,
    memory_gb: float = 0.0,
    **others: Any,
) -> dict[str, Any]:
    """Prepares a dataset from raw text; does nothing if the same dataset is there already.

        contrastive_jax.prepare("data/pile", input="train/*.jsonl.zst", validation="val/*.jsonl.zst", vocab_size=32000)

    A call that was interrupted, whatever ended it, goes on where it was: call it again with the same arguments.

    Args:
      output: the folder of the dataset, local, on gs:// or on s3://. It appears whole, at the end.
      input: see `Arguments`; one glob, or several.
      validation: see `Arguments`; one glob, or several.
      overwrite: replace a dataset that was made with other arguments or from other input, or the tasks of one that was begun.
      beam_pipeline_options: options of Apache Beam, runner=DataflowRunner; may be repeated, or be JSON with all of them:
        {"runner": "DataflowRunner", ...}; its machines must reach input and `output`. Default: this machine does the work.
      workers: the processes on this machine; 0: one per core.
      memory_gb: the memory that all processes together may take; it limits the workers; 0: three quarters of this machine's.
      **others: further fields of `Arguments`.

    Returns:
      The manifest of the dataset: what is in it.

    Raises:
      UserError: the arguments contradict each other, or the input is bad.
    """
    arguments = Arguments(as_tuple(input), as_tuple(validation), **others)
    check_arguments(arguments)
    arguments = with_absolute_paths(arguments)
    before = prepared_before(target := files.absolute(output))
    if before and not overwrite and not is_input_there(before, arguments):
        say(f"{target} is already prepared with these arguments; its input is no longer there")
        return before
    source = find_source(arguments)
    source.identity.extend(identity_of_evaluation(arguments))
    plan = dict(format=FORMAT, arguments=as_json(arguments), inputs=source.identity, tokenizer_sha256=source.tokenizer_sha256)
    if before and not overwrite:
        check_same(target, before, plan)
        workspace.clean_up(target)
        return before
    beam = check_beam(beam_pipeline_options, target, source.shards) if beam_pipeline_options else None
    budget = choose_budget(memory_gb, workers, *needed_memory(arguments, source.shards))
    with workspace.hold(target, say) as folder:
        if not overwrite and (before := prepared_before(target)):  # another process has made it since
            check_same(target, before, plan)
            return before
        work = workspace.begin(folder, plan, overwrite, say)
        with with_texts(work, source.shards or write_python_text(work), bool(beam)) as shards:
            manifest = build(work, arguments, plan, shards, budget, beam)
        workspace.finish(work, target)
    report(manifest, target)
    return manifest


@contextlib.contextmanager
def with_texts(work: Work, shards: list[Shard], on_beam: bool) -> Iterator[list[Shard]]:
    """Yields the files of the input, which know where the texts are that pairs name by ids.

    Raises:
      UserError: Beam's machines would look texts up, which lie on this machine.
    """
    if not pair_sources.looked_up(shards):
        yield shards
        return
    if on_beam:
        raise UserError("--beam_pipeline_options: only this machine can look texts up by ids; leave it out")
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(tempfile.TemporaryDirectory()) if files.on_bucket(work.root) else ""
        # Processes keep a folder of texts open by its name, which must not be that of an earlier plan.
        folder = pathlib.Path(local or work.path(f"{WORK}/texts/{work.plan_id}"))
        yield pair_sources.write_texts(shards, folder, say)


def needed_memory(arguments: Arguments, shards: Sequence[Shard]) -> tuple[int, int]:
    """Returns the bytes of memory that a worker needs, and those that the main process needs.

    Args:
      arguments: of `prepare`.
      shards: the files of the input; of the text of Python, none: its parts are the smallest.
    """
    worker = WORKER_BYTES + PART_FACTOR * driver.choose_part_bytes(shards, arguments) + inputs.window_bytes(shards)
    return worker, MAIN_BYTES + SAMPLE_FACTOR * (0 if arguments.tokenizer else arguments.sample_mb * 10**6)


class Budget(NamedTuple):
    """How many processes work, and the bytes of memory that each may take."""

    workers: int
    worker_bytes: int


def choose_budget(memory_gb: float, workers: int, needed: int, main: int) -> Budget:
    """Returns the workers that fit into the memory.

    Args:
      memory_gb: see `prepare`; so is `workers`.
      workers: the most workers.
      needed: the bytes that each of them needs; `main` are those of the main process.
      main: see `needed`.

    Raises:
      UserError: not even one does.
    """
    memory = int(memory_gb * 1e9) or int(DEFAULT_SHARE * machine_memory())
    fitting = (memory - main) // needed
    if fitting < 1 and memory_gb:
        raise UserError(
            f"--memory_gb={memory_gb:g}: one worker and the main process need {(needed + main) / 1e9:.1f} GB for "
            "parts of this size and this input; give that, or a smaller --part_mb"
        )
    count = max(1, min(workers or available_cores(), fitting))
    return Budget(count, max(needed, (memory - main) // count))


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> int:
    """Returns the bytes of memory that this machine, or the container, has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(name):
            limit = epath.Path(name).read_text().strip()
            memory = min(memory, int(limit)) if limit.isdigit() else memory
    return memory


def check_beam(options: str | Sequence[str] | Mapping[str, Any], target: epath.Path, shards: Sequence[Shard]) -> "BeamOptions":
    """Returns the options of Beam for `BeamEngine`, checked.

    Raises:
      UserError: Beam is not installed, an option is wrong, or workers do not reach the input or the output.
    """
    try:
        from contrastive_jax.data.beam import options as beam_options  # Beam takes seconds, and need not be installed
    except ImportError as error:
        mend = "pip install 'contrastive_jax[beam]' (or gcp, dask)"
        raise UserError(f"--beam_pipeline_options: Apache Beam cannot be imported ({error}); {mend}") from error
    beam = beam_options.complete(options, str(workspace.work_folder(target) / BEAM))
    beam_options.check_inputs(beam, [shard.name for shard in shards])
    return beam


def build(
    work: Work,
    arguments: Arguments,
    plan: dict[str, Any],
    shards: list[Shard],
    budget: Budget,
    beam: "BeamOptions | None",
) -> dict[str, Any]:
    """Runs the stages on the engine of choice; returns the manifest."""
    progress = StageProgress(stage_names(arguments), sum(map(driver.text_estimate, shards)))
    memory = budget.worker_bytes
    engine: Any
    if beam:
        from contrastive_jax.data.beam.engine import BeamEngine

        engine = BeamEngine(beam, work.path(BEAM), say, progress.advance)
        memory = min(memory, BEAM_WORKER_BYTES)
    else:
        engine = LocalEngine(budget.workers, progress.advance)
    try:
        with Progress("prepare", describe=progress.line, say=say), engine:
            return driver.build_dataset(driver.Driver(work, engine, progress, memory), arguments, plan, shards)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from what is done")
        raise
    finally:
        stages.release_input()  # of tasks that ran in this process


def prepared_before(target: epath.Path) -> dict[str, Any]:
    """Returns the manifest of the dataset that is in a folder; {} if there is none.

    Raises:
      UserError: the folder holds something else, or is a file.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"--output={target}: is a file; give the name of a folder")
    mend = "choose another folder, or remove it"
    if manifest := files.read_json(target / MANIFEST):
        if not is_manifest(manifest):
            raise UserError(f"--output={target}: its {MANIFEST} is not that of a prepared dataset; {mend}")
        return manifest
    if target.exists() and any(target.iterdir()) and not (files.on_bucket(target) and (target / INCOMPLETE).exists()):
        raise UserError(f"--output={target}: exists and is no prepared dataset; {mend}")
    return {}


def check_same(target: epath.Path, before: dict[str, Any], plan: dict[str, Any]) -> None:
    """Checks that a dataset is the one that would be made now, and says so.

    Raises:
      UserError: it is another one.
    """
    if change := difference(before, plan, "made"):
        raise UserError(f"--output={target}: {change}; --overwrite replaces it")
    say(f"{target} is already prepared with these arguments")


def is_input_there(before: dict[str, Any], arguments: Arguments) -> bool:
    """Returns False if the dataset was made with these arguments, and all files of its input have been removed since."""
    if arguments.python or arguments.tfds or before["arguments"] != as_json(arguments):
        return True
    values = arguments.input + arguments.pairs + arguments.validation
    return any(listing.list_files(inputs.parse_input(value, "input").glob) for value in values)


def find_source(arguments: Arguments) -> Source:
    """Returns the input; files of the validation split come first where the input names its splits.

    Raises:
      UserError: there is none, or the tokenizer is missing.
    """
    sha256 = tokenizer_lib.load(arguments.tokenizer).sha256 if arguments.tokenizer else ""
    if arguments.python:
        return Source([], identity_of_python(), sha256)
    if arguments.tfds:
        shards = inputs.tfds_shards(
            arguments.tfds, arguments.tfds_data_dir or None, arguments.tfds_feature or None, arguments.limit
        )
        return Source(shards, identity_of_files(shards), sha256)
    texts, labels = (tuple(split_at_commas(value)) for value in (arguments.text_field, arguments.labels))
    enough = PairOptions(min_negatives=arguments.min_negatives)
    pair = PairFields(texts, arguments.label_field, labels, options=enough) if arguments.pairs else None
    options = arguments.text_field, arguments.domain_field, arguments.limit
    name, patterns = ("pairs", arguments.pairs) if pair else ("input", arguments.input)
    find: Callable[..., list[Shard]] = functools.partial(pair_sources.pair_shards, pair) if pair else inputs.file_shards
    train = find(patterns, TRAIN if arguments.validation else "", name, *options)
    validation = find(arguments.validation, VALIDATION, "validation", *options)
    in_both = {shard.name for shard in train} & {shard.name for shard in validation}
    if in_both:
        raise UserError(f"--{name} and --validation: both match {sorted(in_both)[0]}; change either glob")
    shards = [shard._replace(order=order) for order, shard in enumerate(validation + train)]
    inputs.check_fields(shards)
    return Source(shards, identity_of_files(shards) + identity_of_sources(arguments, shards), sha256)


def identity_of_sources(arguments: Arguments, shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """Returns what tells files of sources, and the texts that their pairs name by ids, from others of the same name."""
    paths = [value for value in arguments.pairs + arguments.validation if pair_sources.is_file_of_sources(value)]
    found = [file for value in paths for file in listing.list_files(value)]
    texts = [file for glob in pair_sources.looked_up(shards) for file in pair_sources.text_files(glob)]
    return [file._asdict() for file in [*found, *texts]]


def identity_of_evaluation(arguments: Arguments) -> list[dict[str, Any]]:
    """Returns what tells the files of evaluation sets from others of the same name; they decide the content too."""
    listed = (file for path in arguments.decontaminate for file in decontamination.evaluation_files(path))
    return [file._asdict() for file in listed]


def write_python_text(work: Work) -> list[Shard]:
    """Writes the text of this Python installation into the folder, if an earlier run has not; returns it as input."""
    if not work.path(RAW).exists():
        progress = Progress("python documents", describe=lambda seconds: f"python documents: {seconds:.0f} s", say=say)
        with progress, tempfile.TemporaryDirectory(prefix="contrastive_jax-") as folder, work.new_file(RAW) as path:
            python_text.write_python_documents(epath.Path(folder))
            shutil.copyfile(epath.Path(folder, "python.jsonl"), path)
    return inputs.file_shards([str(work.path(RAW))], "", "python")


def report(manifest: dict[str, Any], target: epath.Path) -> None:
    """Says what is in the dataset and which lines were passed over."""
    for split, counts in manifest["splits"].items():
        say(
            f"{split}: {counts['documents']:,} documents, {counts['bytes'] / 1e6:.1f} MB, {counts['tokens']:,} tokens, "
            f"{counts['records']:,} records of at most {manifest['window']} tokens, {len(counts['domains'])} domains"
        )
    for name, counts in manifest.get("decontamination", {}).items():
        say(
            f"evaluation set {name}: {counts['texts_found']:,} of {counts['texts'] - counts['too_short']:,} texts "
            f"({counts['ngrams']:,} n-grams) found in the documents; {counts['documents_removed']:,} documents removed"
        )
    if leaked := manifest.get("leaks"):
        say(
            f"validation: {leaked['removed']:,} of {leaked['records']:,} records share {leaked['tokens']} tokens in a row with "
            "a training record and were taken out"
        )
    for reason, per_file in manifest["rejects"].items():
        names = sorted(per_file)
        more = " ..." if len(names) > 3 else ""
        say(f"passed over: {sum(per_file.values()):,} x {reason}, in {', '.join(names[:3])}{more}")
    for line in losses.describe(manifest["losses"]):
        say(line)
    say(f"{target} is ready, content {manifest['content_hash'][:16]}")


def say(line: str) -> None:
    """Prints one line for the user, at once."""
    print(line, file=sys.stderr, flush=True)
