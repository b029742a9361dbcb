"""The part that cleaning has in the stage "hash", and what the driver does for it before that stage.

Before it, the n-grams of evaluation texts are written to WORK/evaluation; within it, `PieceCleaning` asks the filters about
each document, and writes the rows by which near-duplicates are found.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

from contrastive_jax.data.clean import decontamination
from contrastive_jax.data.clean.cleaning import Cleaner, Limits
from contrastive_jax.data.clean.decontamination import Collected, Ngrams
from contrastive_jax.data.clean.near_duplicates import Signatures
from contrastive_jax.data.preparation.arguments import Arguments
from contrastive_jax.data.preparation.work import WORK, Work

EVALUATION = f"{WORK}/evaluation"


def limits_of(arguments: Arguments) -> Limits:
    """Returns the limits that the arguments set."""
    return Limits(**{name: getattr(arguments, name) for name in Limits._fields})


def has_filters(arguments: Arguments) -> bool:
    """Returns whether documents may be dropped for what they are."""
    return bool(arguments.decontaminate) or any(limits_of(arguments))


def own_drops_file(piece: int) -> str:
    """Returns the name of the file {reason: places} of the documents of a piece that are dropped for what they are."""
    return f"{WORK}/own_drops/{piece:05d}.json"


def find_evaluation_texts(work: Work, arguments: Arguments) -> str:
    """Writes the n-grams of the evaluation texts, if an earlier run has not; returns a hash of them, "" without such texts.

    Raises:
      UserError: a folder or a file has no texts.
    """
    if not arguments.decontaminate:
        return ""
    if before := work.read_json(f"{EVALUATION}/report.json"):
        return before["digest"]
    collected = decontamination.collect(decontamination.evaluation_texts(arguments.decontaminate))
    for name, values in collected.ngrams._asdict().items():
        work.write_array(f"{EVALUATION}/{name}.npy", values)
    digest = hashlib.sha256(collected.ngrams.hashes.data).hexdigest()
    work.write_json(f"{EVALUATION}/report.json", {"digest": digest, "sets": collected.report})
    return digest


@functools.lru_cache(1)
def shared_evaluation(root: str, digest: str) -> Ngrams:
    """Returns the n-grams of the evaluation texts, opened once per process; `digest` tells them from those of another call."""
    del digest
    return read_evaluation(Work(root))


def read_evaluation(work: Work) -> Ngrams:
    """Returns the n-grams of the evaluation texts."""
    return Ngrams(*(work.read_array(f"{EVALUATION}/{name}.npy") for name in Ngrams._fields))


def decontamination_report(work: Work, arguments: Arguments, hashed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the report per evaluation set for the manifest, from the outcomes of the stage "hash"; {} without sets."""
    if not arguments.decontaminate:
        return {}
    sets = work.read_json(f"{EVALUATION}/report.json")["sets"]
    collected = Collected(read_evaluation(work), list(sets), sets)
    return decontamination.report_of(collected, (outcome["evaluation"] for outcome in hashed))


class PieceCleaning:
    """Filters and near-duplicates, for the documents of one piece."""

    def __init__(self, work: Work, arguments: Arguments, evaluation_digest: str, piece: int):
        self._work, self._piece = work, piece
        evaluation = shared_evaluation(str(work.root), evaluation_digest) if evaluation_digest else None
        self._cleaner = Cleaner(limits_of(arguments), evaluation)
        self._drops: dict[str, list[int]] | None = {} if has_filters(arguments) else None
        self._signatures = Signatures(work, piece, arguments.near_duplicates) if arguments.near_duplicates else None

    def drops(self, place: int, text: str) -> bool:
        """Returns whether the document at a place of the piece is dropped for what it is."""
        if self._drops is None or not (reason := self._cleaner(text)):
            return False
        self._drops.setdefault(reason, []).append(place)
        return True

    def keep(self, place: int, is_train: bool, text: str) -> None:
        """Takes note of a document that is not dropped; later stages compare it with others."""
        if self._signatures:
            self._signatures.add(place, is_train, self._cleaner.words(text).hashes)

    def finish(self) -> dict[str, Any]:
        """Writes the files of the piece; returns what belongs into the outcome of the task."""
        if self._drops is not None:
            self._work.write_json(own_drops_file(self._piece), self._drops)
        outcome: dict[str, Any] = {}
        if self._signatures:
            outcome["near_rows"] = self._signatures.close()
        if self._cleaner.findings is not None:
            outcome["evaluation"] = self._cleaner.findings.as_json()
        return outcome
