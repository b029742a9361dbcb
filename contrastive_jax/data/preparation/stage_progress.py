"""The progress of `prepare`: one line for all its stages, with what is done, how fast, and the time left until the end."""

import time
from collections.abc import Mapping, Sequence

from contrastive_jax.data.preparation.arguments import Arguments
from contrastive_jax.runtime.progress import clock

# The work per byte of each stage whose work is bytes, relative to the last one; roughly, for the time left alone. The stage
# "cut" counts bytes of files, those that look for leaks bytes of file shards, the others bytes of text.
COSTS = {"cut": 0.2, "hash": 0.12, "token": 1.0, "runs": 0.1, "leaks": 0.1, "separate": 0.1}


def stage_names(arguments: Arguments) -> list[str]:
    """Returns the names of the stages, in their order."""
    similar = ["near"] if arguments.near_duplicates else []
    leaks = ["runs", "leaks", "separate"] if arguments.leak_tokens else []
    return ["cut", "hash", "tokenizer", "dedup", *similar, "token", *leaks, "finish"]


class StageProgress:
    """Counts the bytes of text that each stage has worked through, and those that are left.

    Args:
      stages: see `stage_names`.
      text_bytes: the text of the input, an estimate until the first stage has found it.
    """

    def __init__(self, stages: Sequence[str], text_bytes: int):
        self._stages = stages
        self._totals = {stage: text_bytes for stage in stages if stage in COSTS}
        self._done = dict.fromkeys(self._totals, 0)
        self._earlier = dict.fromkeys(self._totals, 0)  # the part of it that earlier runs have done
        self._stage, self._note = "", ""
        self._stage_began, self._seconds = time.monotonic(), 0.0  # the seconds of earlier stages in COSTS

    def set_text_bytes(self, text_bytes: int) -> None:
        """Sets the bytes of the text, now that they are known better."""
        self._totals = {stage: size if stage == "cut" else text_bytes for stage, size in self._totals.items()}

    def begin(self, stage: str, total: int = 0, done: int = 0, note: str = "") -> None:
        """Begins a stage.

        Args:
          stage: its name.
          total: the bytes that it works through.
          done: those that an earlier run has worked through.
          note: what to show of a stage that is not measured in bytes.
        """
        now = time.monotonic()
        self._seconds += now - self._stage_began if self._stage in COSTS else 0
        self._stage, self._note, self._stage_began = stage, note, now
        if stage in COSTS:
            self._totals[stage], self._done[stage], self._earlier[stage] = total, done, done

    def advance(self, size: int) -> None:
        """Counts bytes of the current stage."""
        if self._stage in COSTS:
            self._done[self._stage] += size

    def correct(self, difference: int) -> None:
        """Adds to the total of the current stage and of the later ones: a task had more text than was estimated."""
        for stage in self._left():
            self._totals[stage] += difference

    def line(self, seconds: float) -> str:
        """Returns the line: "hash (stage 2 of 6): 312 of 5,000 MB, 41.2 MB/s, ETA 0:05:12".

        Args:
          seconds: the time since the beginning of the run; the last stage shows it.
        """
        if not self._stage:
            return "starting"
        head = f"{self._stage} (stage {self._stages.index(self._stage) + 1} of {len(self._stages)})"
        if self._stage == self._stages[-1]:
            size = (self._totals["token"] - self._earlier["token"]) / 1e6
            return f"{head}: {size:,.0f} MB in {clock(seconds)}, {size / max(seconds, 1e-3):,.1f} MB/s in all"
        left = f", ETA {clock(eta)}" if (eta := self._seconds_left()) is not None else ""
        if self._stage not in COSTS:
            return f"{head}{': ' if self._note else ''}{self._note}{left}"
        done, total = self._done[self._stage], max(self._totals[self._stage], self._done[self._stage])
        rate = (done - self._earlier[self._stage]) / max(time.monotonic() - self._stage_began, 1e-3)
        return f"{head}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s{left}"

    def _left(self) -> list[str]:
        """Returns the stages that count bytes, from the current one on."""
        return [stage for stage in self._stages[self._stages.index(self._stage) :] if stage in COSTS]

    def _seconds_left(self) -> float | None:
        """Returns the time left, if all stages that count bytes go on as fast as this run's have been so far."""
        seconds = self._seconds + (time.monotonic() - self._stage_began if self._stage in COSTS else 0)
        work = weighted(self._done) - weighted(self._earlier)
        undone = sum(COSTS[stage] * max(0, self._totals[stage] - self._done[stage]) for stage in self._left())
        return undone / work * seconds if work else None


def weighted(sizes: Mapping[str, int]) -> float:
    """Returns the work of so many bytes of each stage."""
    return sum(COSTS[stage] * size for stage, size in sizes.items())
