"""Takes out of the validation split the records that share a run of tokens with a record of the train split.

Texts that are no near-duplicates still have passages in common: licences, generated code, quotations. Where such a passage lies
in both splits, a score on validation measures memory. The unit is the record, because it is what training and evaluation read.

    runs       per piece with validation records    hashes of runs of their tokens
    leaks      per piece with training records      which of these hashes its records have too
    separate   per piece with validation records    the records without any of these are written to their file shard

Of validation, only the runs that begin at every `STRIDE`-th token of a record are hashed, and these are `STRIDE` - 1 tokens
shorter than asked for: so every shared run of `leak_tokens` tokens is found, and some of the shorter ones. That takes 3 bytes
per validation token, in files that the workers map into memory.
"""

import collections
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from contrastive_jax.config import UserError
from contrastive_jax.data import store
from contrastive_jax.data.clean import hash_set, ngrams
from contrastive_jax.data.preparation import dedup, engine, token_stage
from contrastive_jax.data.preparation.engine import Outcome
from contrastive_jax.data.preparation.manifest import SPLITS, TRAIN, VALIDATION
from contrastive_jax.data.preparation.stages import Piece, Recipe
from contrastive_jax.data.preparation.work import WORK, Work
from contrastive_jax.data.store import Record

STRIDE = 4
HASH_MEMORY = 40  # bytes of memory per hash while files of hashes are united
RUNS, RUNS_BITMAP, LEAKED = f"{WORK}/runs.npy", f"{WORK}/runs_bitmap.npy", f"{WORK}/leaked.npy"


def run_hashes(tokens: np.ndarray, leak_tokens: int, stride: int = 1) -> np.ndarray:
    """Returns the hashes of the runs of a record that begin at every `stride`-th token: uint64 [k] of int [l]."""
    hashed = ngrams.hash_numbers(tokens.astype(np.uint64)[:, None])
    return ngrams.ngram_hashes(hashed, max(leak_tokens - STRIDE + 1, 1))[::stride]


def runs_file(piece: int) -> str:
    """Returns the name of the file of the hashes of a piece's validation records."""
    return f"{WORK}/runs/{piece:05d}"


def leaks_file(piece: int) -> str:
    """Returns the name of the file of those hashes that a piece's training records have too."""
    return f"{WORK}/leaks/{piece:05d}"


def records_of(work: Work, name: str, recipe: Recipe) -> Iterator[Record]:
    """Yields the records of a file shard; counts its bytes as worked through at the end."""
    with work.local_copy(name) as path:
        yield from store.read_file_shard(path, recipe.domains, recipe.vocab_size)
        engine.advance(path.stat().st_size)


def write_hashes(work: Work, name: str, hashes: Sequence[np.ndarray]) -> int:
    """Writes the sorted union of some hashes to a file of which a range can be read alone; returns their number."""
    union = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    work.write_groups(name, union, dedup.bucket_sizes(union))
    return len(union)


def write_union(work: Work, names: Sequence[str], rows: int, memory: int, target: str) -> str:
    """Writes the sorted union of files of `write_hashes` as an array, a range of hashes at a time.

    Args:
      work: the folder.
      names: the files.
      rows: the hashes in all files together.
      memory: the bytes of memory that a range may take.
      target: the file of the array.

    Returns:
      A hash of the array.
    """
    digest, count = hashlib.sha256(), 0
    with work.new_file(target) as path, path.open("wb") as file:
        write_header(file, 0)  # numpy leaves room in it for any number
        for part in dedup.partitions(rows * HASH_MEMORY // dedup.ROW_MEMORY, len(names), memory):
            of_files = [work.read_groups(name, part.first, part.end, np.dtype("<u8")) for name in names]
            union = np.unique(np.concatenate([np.zeros(0, np.uint64), *of_files]))
            digest.update(union.data)
            file.write(union.data)
            count += len(union)
        file.seek(0)
        write_header(file, count)
    return digest.hexdigest()


def write_header(file: IO[bytes], count: int) -> None:
    """Writes the head of a .npy file of so many hashes."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": (count,)})


def hash_runs(recipe: Recipe, piece: Piece) -> Outcome:
    """Writes the sorted hashes of the runs of a piece's validation records: a task."""
    work, leak_tokens, count = recipe.work(), recipe.arguments.leak_tokens, 0
    if VALIDATION in piece.file_shards:
        records = records_of(work, token_stage.first_file(recipe, piece, VALIDATION), recipe)
        hashes = [run_hashes(record.tokens, leak_tokens, STRIDE) for record in records]
        count = write_hashes(work, runs_file(piece.number), hashes)
    return work.write_outcome("runs", piece.number, {"hashes": count})


@functools.lru_cache(4)
def shared_array(root: str, name: str, digest: str) -> np.ndarray:
    """Returns an array of the work folder, opened once per process; `digest` tells its content from an earlier one."""
    del digest
    return Work(root).read_array(name)


def find_leaks(recipe: Recipe, digest: str, piece: Piece) -> Outcome:
    """Writes the hashes of validation runs that the training records of a piece have: a task; `digest` is that of the runs."""
    work, leak_tokens, count = recipe.work(), recipe.arguments.leak_tokens, 0
    if TRAIN in piece.file_shards:
        runs, bitmap = (shared_array(recipe.root, name, digest) for name in (RUNS, RUNS_BITMAP))
        found = list[np.ndarray]()
        for record in records_of(work, token_stage.final_file(piece, TRAIN), recipe):
            hashes = run_hashes(record.tokens, leak_tokens)
            hashes = hashes[hash_set.candidates(bitmap, hashes)]
            found.append(np.unique(hashes[hash_set.contains(runs, hashes)]))
        count = write_hashes(work, leaks_file(piece.number), found)
    return work.write_outcome("leaks", piece.number, {"hashes": count})


class Separated(NamedTuple):
    """The records of a piece that stay, and rows [domain, "records" or "tokens" or "documents", number] of what leaves."""

    records: list[Record]
    removed: list[list[Any]]


def separate(records: Iterable[Record], leaked: np.ndarray, leak_tokens: int, domains: tuple[str, ...]) -> Separated:
    """Returns the records that have none of the leaked runs; `leaked` is sorted."""
    kept, counts = list[Record](), collections.Counter[tuple[str, str]]()
    before = dict[str, int]()
    for record in records:
        before[record.document] = record.domain
        if hash_set.contains(leaked, run_hashes(record.tokens, leak_tokens, STRIDE)).any():
            counts[domains[record.domain], "records"] += 1
            counts[domains[record.domain], "tokens"] += len(record.tokens)
        else:
            kept.append(record)
    for document in before.keys() - {record.document for record in kept}:
        counts[domains[before[document]], "documents"] += 1
    return Separated(kept, [[*key, number] for key, number in sorted(counts.items())])


def write_separated(recipe: Recipe, digest: str, piece: Piece) -> Outcome:
    """Writes the validation records of a piece without leaked runs, and their index: a task; `digest` is that of the leaks."""
    work, outcome = recipe.work(), dict[str, Any]()
    if VALIDATION in piece.file_shards:
        records = records_of(work, token_stage.first_file(recipe, piece, VALIDATION), recipe)
        leaked = shared_array(recipe.root, LEAKED, digest)
        kept, outcome["removed"] = separate(records, leaked, recipe.arguments.leak_tokens, recipe.domains)
        name = token_stage.final_file(piece, VALIDATION)
        outcome["file_shard"] = token_stage.write_file_shard(work, recipe, piece, VALIDATION, kept, name)
    return work.write_outcome("separate", piece.number, outcome)


def take_out(
    driver: Any, recipe: Recipe, pieces: Sequence[Piece], written: Sequence[Outcome]
) -> tuple[list[Outcome], dict[str, Any]]:
    """Runs the stages of the header.

    Args:
      driver: see `driver`.
      recipe: of the dataset.
      pieces: all of them; `written` are their outcomes of the stage "token".
      written: see `pieces`.

    Returns:
      The outcomes as they would be without the records that were taken out, and the report for the manifest.

    Raises:
      UserError: no validation record is left.
    """
    work = driver.work
    sizes = {s: [outcome["file_shards"].get(s, {"bytes": 0})["bytes"] for outcome in written] for s in SPLITS}

    def unite(outcomes: Sequence[Outcome], split: str, name: Callable[[int], str], target: str) -> str:
        names = [name(piece.number) for piece in pieces if split in piece.file_shards]
        return write_union(work, names, sum(outcome["hashes"] for outcome in outcomes), driver.partition_memory, target)

    hashed = driver.run("runs", functools.partial(hash_runs, recipe), pieces, sizes[VALIDATION])
    digest = unite(hashed, VALIDATION, runs_file, RUNS)
    work.write_array(RUNS_BITMAP, hash_set.bitmap_of(work.read_array(RUNS)))
    found = driver.run("leaks", functools.partial(find_leaks, recipe, digest), pieces, sizes[TRAIN])
    digest = unite(found, TRAIN, leaks_file, LEAKED)
    separated = driver.run("separate", functools.partial(write_separated, recipe, digest), pieces, sizes[VALIDATION])
    return corrected(written, separated, recipe.arguments.leak_tokens)


def corrected(
    written: Sequence[Outcome], separated: Sequence[Outcome], leak_tokens: int
) -> tuple[list[Outcome], dict[str, Any]]:
    """Returns what `take_out` does, from the outcomes of the stages "token" and "separate"."""
    outcomes, before = list[Outcome](), 0
    counts, removed = collections.Counter[tuple[str, str]](), collections.Counter[tuple[str, str]]()
    for outcome, of_piece in zip(written, separated, strict=True):
        if VALIDATION in outcome["file_shards"]:
            before += outcome["file_shards"][VALIDATION]["records"]
            counts.update({(domain, name): number for split, domain, name, number in outcome["counts"] if split == VALIDATION})
            removed.update({(domain, name): number for domain, name, number in of_piece["removed"]})
            outcomes.append(outcome | {"file_shards": outcome["file_shards"] | {VALIDATION: of_piece["file_shard"]}})
        else:
            outcomes.append(outcome)
    domains = {domain: number for (domain, name), number in sorted(removed.items()) if name == "records"}
    if before == sum(domains.values()):
        raise UserError(
            f"--leak_tokens={leak_tokens}: every validation record shares so long a run with training; give a larger number"
        )
    for domain in domains:  # the text of a record is not known: its share of the bytes is that of the tokens
        share = removed[domain, "tokens"] / counts[domain, "tokens"]
        removed[domain, "bytes"] = round(counts[domain, "bytes"] * share)
    less = [[VALIDATION, *key, -number] for key, number in removed.items()]
    outcomes[0] = outcomes[0] | {"counts": [*outcomes[0]["counts"], *less]}
    report = {"tokens": leak_tokens, "records": before, "removed": sum(domains.values()), "removed_by_domain": domains}
    return outcomes, report
