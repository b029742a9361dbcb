"""Runs the stages of `prepare` one after another, and writes what belongs to the whole dataset: tokenizer, index, manifest."""

import collections
import functools
import io
import itertools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from contrastive_jax.config import UserError
from contrastive_jax.data import store
from contrastive_jax.data import tokenizer as tokenizer_lib
from contrastive_jax.data.clean import near_duplicates
from contrastive_jax.data.preparation import clean_stage, dedup, leaks, stages, text_sample, token_stage
from contrastive_jax.data.preparation import manifest as manifest_lib
from contrastive_jax.data.preparation.arguments import Arguments
from contrastive_jax.data.preparation.engine import Engine, Outcome
from contrastive_jax.data.preparation.manifest import MANIFEST, SPLITS, VALIDATION
from contrastive_jax.data.preparation.stage_progress import StageProgress
from contrastive_jax.data.preparation.stages import Piece, Recipe
from contrastive_jax.data.preparation.work import Work
from contrastive_jax.data.raw import inputs
from contrastive_jax.data.raw.losses import losses_of
from contrastive_jax.data.raw.sources import Part, Shard
from contrastive_jax.data.store import Index

CUT_BYTES, CUT_FILES = 256 << 20, 1000  # of the input that one task cuts: a large file, or several small ones
EXPANSION = 4  # about the bytes of text per byte of a compressed file
PART_BYTES = (8 << 20, 256 << 20)  # the limits of the size of a part, if no flag sets it
PARTS = 64  # the parts of an input, between these limits


class Driver(NamedTuple):
    """What the stages share.

    Attributes:
      work: the folder in which the dataset is made.
      engine: what runs the tasks.
      progress: what the user sees.
      partition_memory: the bytes of memory that the work on one partition of hashes may take.
    """

    work: Work
    engine: Engine
    progress: StageProgress
    partition_memory: int

    def run(
        self,
        stage: str,
        function: Callable[[Any], Outcome],
        tasks: Sequence[Any],
        sizes: Sequence[int],
        correct: Callable[[Outcome], int | None] = lambda outcome: None,
    ) -> list[Outcome]:
        """Runs the tasks of a stage that have no outcome yet; returns the outcomes of all.

        Args:
          stage: its name.
          function: what a task is passed to.
          tasks: the number of each is its place in this list.
          sizes: the bytes that each task works through.
          correct: returns the true size of a task from its outcome, where `sizes` is an estimate.
        """
        outcomes = self.work.outcomes(stage)
        missing = [number for number in range(len(tasks)) if number not in outcomes]
        earlier = sum(correct(outcome) or sizes[number] for number, outcome in outcomes.items())
        self.progress.begin(stage.rstrip("0123456789"), earlier + sum(sizes[number] for number in missing), earlier)

        def done(outcome: Outcome) -> None:
            self.work.check_owner()
            outcomes[outcome["task"]] = outcome
            self.progress.correct((correct(outcome) or sizes[outcome["task"]]) - sizes[outcome["task"]])

        self.engine.map(function, [tasks[number] for number in missing], done)
        return [outcomes[number] for number in range(len(tasks))]


def text_estimate(shard: Shard) -> int:
    """Returns about how many bytes of text a file has."""
    return shard.size * (1 if shard.name.endswith(inputs.LINE_SUFFIXES) else EXPANSION)


def part_estimate(part: Part) -> int:
    """Returns about how many bytes of text a part has; of a slice of a TFDS dataset only the examples are known."""
    return text_estimate(part.shard) if part.shard.tfds else part.text_bytes


def choose_part_bytes(shards: Sequence[Shard], arguments: Arguments) -> int:
    """Returns the size of a part: from the flag, or from the input alone, so that it is the same on any machine."""
    if arguments.part_mb:
        return arguments.part_mb << 20
    return min(max(sum(map(text_estimate, shards)) // PARTS, PART_BYTES[0]), PART_BYTES[1])


def build_dataset(driver: Driver, arguments: Arguments, plan: dict[str, Any], shards: Sequence[Shard]) -> dict[str, Any]:
    """Makes the dataset in the driver's folder; returns its manifest.

    Raises:
      UserError: the input is bad.
    """
    work = driver.work
    if manifest := work.read_json(MANIFEST):
        return manifest  # the run before was killed while it put the dataset in its place
    recipe = Recipe(str(work.root), work.plan_id, arguments, choose_part_bytes(shards, arguments))
    recipe = recipe._replace(evaluation_digest=clean_stage.find_evaluation_texts(work, arguments))
    parts = cut(driver, recipe, shards)
    pieces = make_pieces(parts, recipe.part_bytes, arguments)
    sizes = [sum(map(part_estimate, piece.parts)) for piece in pieces]
    driver.progress.set_text_bytes(sum(sizes))
    hashed = driver.run("hash", functools.partial(stages.hash_piece, recipe), pieces, sizes, lambda o: o["read_bytes"])
    sizes = [outcome["read_bytes"] for outcome in hashed]
    require_both_splits({split: sum(outcome["documents"][split] for outcome in hashed) for split in SPLITS})
    domains = sorted({domain for outcome in hashed for domain in outcome["domains"]})
    stages.check_domains(domains)
    tokenizer = find_tokenizer(driver, arguments, len(pieces))
    recipe = recipe._replace(
        domains=tuple(domains),
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        dropped=tuple(find_dropped(driver, recipe, hashed)),
    )
    written = driver.run("token", functools.partial(token_stage.token_piece, recipe), pieces, sizes)
    reports = {"decontamination": clean_stage.decontamination_report(work, arguments, hashed)}
    reports |= manifest_lib.describe_pairs(shards, written)
    if arguments.leak_tokens:
        written, reports["leaks"] = leaks.take_out(driver, recipe, pieces, written)
    driver.progress.begin("finish")
    return finish(work, plan, tokenizer, domains, hashed, written, reports)


def cut(driver: Driver, recipe: Recipe, shards: Sequence[Shard]) -> list[Part]:
    """Returns the parts of all files."""
    groups: list[list[Shard]] = []
    size = CUT_BYTES
    for shard in shards:
        if size >= CUT_BYTES or len(groups[-1]) >= CUT_FILES:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.size
    sizes = [sum(shard.size for shard in group) for group in groups]
    outcomes = driver.run("cut", functools.partial(stages.cut_shards, recipe), list(enumerate(groups)), sizes)
    fields = itertools.chain.from_iterable(outcome["parts"] for outcome in outcomes)
    return [Part(shard, *part) for shard, parts in zip(shards, fields, strict=True) for part in parts]


def make_pieces(parts: Sequence[Part], part_bytes: int, arguments: Arguments) -> list[Piece]:
    """Returns the parts as pieces, each of one large part or of several small ones of one split."""
    groups: list[list[Part]] = []
    size = 0
    for part in parts:
        if not groups or size + part_estimate(part) > part_bytes or groups[-1][0].shard.split != part.shard.split:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part_bytes if part.shard.tfds else part.text_bytes  # a slice of TFDS is a piece of its own
    splits = [(group[0].shard.split,) if group[0].shard.split else SPLITS for group in groups]
    counts = {split: sum(split in of_piece for of_piece in splits) for split in SPLITS}
    sampled = [split != (VALIDATION,) and not arguments.tokenizer for split in splits]
    sizes = [sum(max(part_estimate(part), 1) for part in group) for group in groups]
    total = sum(size for size, is_sampled in zip(sizes, sampled, strict=True) if is_sampled)
    before, pieces = dict.fromkeys(SPLITS, 0), []
    for number, group in enumerate(groups):
        # Twice its share: by chance it may hold more of the lowest numbers of all.
        characters = 2 * arguments.sample_mb * 10**6 * sizes[number] // total + 4096 if sampled[number] else 0
        file_shards = {split: (before[split], counts[split]) for split in splits[number]}
        before.update({split: before[split] + 1 for split in splits[number]})
        pieces.append(Piece(number, tuple(group), characters, file_shards))
    return pieces


def require_both_splits(counts: dict[str, int]) -> None:
    """Raises a UserError if a split has no documents, or none is left."""
    for split in SPLITS:
        if not counts[split]:
            raise UserError(f"no document for the {split} split; change --input, --validation or --validation_fraction")


def find_tokenizer(driver: Driver, arguments: Arguments, pieces: int) -> Any:
    """Returns the tokenizer of the dataset, which is loaded or trained, and writes it into the folder."""
    work = driver.work
    if arguments.tokenizer:
        tokenizer = tokenizer_lib.load(arguments.tokenizer)
    elif work.outcomes("tokenizer"):
        return tokenizer_lib.load(work.root)
    else:
        samples = (work.read_json(stages.sample_file(number)) or [] for number in range(pieces))
        sample = text_sample.merge(samples, arguments.sample_mb * 10**6)
        driver.progress.begin("tokenizer", note=f"training on {sum(map(len, sample)) / 1e6:.1f} MB")
        tokenizer = tokenizer_lib.train(sample, arguments.vocab_size)
    work.write(tokenizer.file, tokenizer.model)
    work.write_outcome("tokenizer", 0, {"sha256": tokenizer.sha256})
    return tokenizer


def find_dropped(driver: Driver, recipe: Recipe, hashed: Sequence[Outcome]) -> Iterator[str]:
    """Yields the files of the documents that are dropped because of others."""
    threshold = recipe.arguments.near_duplicates
    rows = sum(sum(outcome["documents"].values()) for outcome in hashed)
    # An earlier run with another --memory_gb had other partitions: outcomes and files say which.
    partitions = dedup.partitions(rows, len(hashed), driver.partition_memory)
    function = functools.partial(dedup.drop_duplicates, recipe.root, plan_id=recipe.plan_id)
    outcomes = driver.run(f"dedup{len(partitions)}", function, partitions, [0] * len(partitions))
    yield from (outcome["dropped"] for outcome in outcomes)
    if threshold:
        rows = sum(outcome["near_rows"] for outcome in hashed)
        partitions = near_duplicates.partitions(rows, len(hashed), driver.partition_memory)
        function = functools.partial(near_duplicates.drop_near_duplicates, recipe.root, threshold, plan_id=recipe.plan_id)
        outcomes = driver.run(f"near{len(partitions)}", function, partitions, [0] * len(partitions))
        yield from (outcome["dropped"] for outcome in outcomes)


class StoredIndexes:
    """The indexes of the file shards of a split; each is loaded when it is gone through."""

    def __init__(self, work: Work, split: str, pieces: Sequence[int]):
        self._work, self._split, self._pieces = work, split, pieces

    def __iter__(self) -> Iterator[Index]:
        for piece in self._pieces:
            with np.load(io.BytesIO(self._work.read(stages.index_file(piece, self._split)))) as columns:
                yield Index(**{name: columns[name] for name in store.COLUMNS})


def finish(
    work: Work,
    plan: dict[str, Any],
    tokenizer: Any,
    domains: Sequence[str],
    hashed: Sequence[Outcome],
    written: Sequence[Outcome],
    reports: dict[str, Any],
) -> dict[str, Any]:
    """Writes the index, the files of TFDS, the bad lines, and the manifest, last of all; returns the manifest.

    Args:
      work: the folder of the dataset.
      plan: see `manifest.make_manifest`; so are `tokenizer` and `domains`.
      tokenizer: of the dataset.
      domains: their names.
      hashed: the outcomes of the stage "hash"; `written` are those of "token".
      written: see `hashed`.
      reports: further entries of the manifest; those without content are left out.
    """
    file_shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for outcome in written:
        for split, of_split in outcome["file_shards"].items():
            file_shards[split].append(of_split)
    require_both_splits({split: sum(shard["records"] for shard in file_shards[split]) for split in SPLITS})
    for split in SPLITS:
        pieces = [outcome["task"] for outcome in written if split in outcome["file_shards"]]
        with tempfile.TemporaryDirectory(prefix="contrastive_jax-") as folder:
            store.write_index(pathlib.Path(folder), split, StoredIndexes(work, split, pieces))
            for path in sorted(pathlib.Path(folder, "index").iterdir()):
                with work.new_file(f"index/{path.name}") as target:
                    shutil.copyfile(path, target)
    work.write(
        "pile/1.0.0/features.json", manifest_lib.tfds_features(tokenizer.vocab_size, bool(plan["arguments"]["pairs"])).encode()
    )
    work.write("pile/1.0.0/dataset_info.json", manifest_lib.tfds_info(file_shards).encode())
    write_rejects(work, len(hashed))
    manifest = manifest_lib.make_manifest(
        plan,
        tokenizer,
        domains,
        file_shards,
        counts=itertools.chain.from_iterable(outcome["counts"] for outcome in written),
        rejects=itertools.chain.from_iterable(outcome["rejects"] for outcome in (*hashed, *written)),
        losses=losses_of(plan["inputs"], hashed),
    )
    manifest |= {name: entry for name, entry in reports.items() if entry}
    work.write(MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def write_rejects(work: Work, pieces: int) -> None:
    """Writes rejects.jsonl: number of the file, line and message of the first bad lines, so many of each piece and file."""
    counts: collections.Counter[int] = collections.Counter()
    with work.new_file("rejects.jsonl") as path, path.open("w") as file:
        for piece in range(pieces):
            for order, line, message in work.read_json(stages.rejects_file(piece)):
                counts[order] += 1
                if counts[order] <= stages.MAX_REJECTS_NAMED:
                    file.write(json.dumps((order, line, message)) + "\n")
