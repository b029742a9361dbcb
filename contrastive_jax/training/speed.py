"""How fast a run goes: in its steps, over all, and the share of its time that becomes steps."""

import datetime
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any


def process_began() -> float:
    """Returns when this process began, in seconds of time.time(); now, where the system does not say (it is not Linux)."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5), "starttime"
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()
    return time.time() - age


class Speed:
    """Measures the speed of one process's steps, and the goodput of the whole run.

    Goodput is the share of the time since the run first began that was spent in steps which still count. Lost are the starts,
    restores, compilation with the first step of each process, evaluations, checkpoints, the time between two processes, and
    steps that were done again after a restart.

    Args:
      batch_size: pairs per step.
      steps: the number of steps of the whole run.
      began: when this process began, in seconds of time.time().
      last_line: the last line of the run's metrics before this process, which knows what came before it; {}: a new run.
    """

    def __init__(self, batch_size: int, steps: int, began: float, last_line: Mapping[str, Any]):
        self._batch_size, self._steps = batch_size, steps
        self._step_seconds = 0.0  # of the whole run
        if last_line.get("goodput"):
            self._step_seconds = last_line["step_seconds"]
            line_time = datetime.datetime.fromisoformat(last_line["time"]).timestamp()
            began = line_time - self._step_seconds / last_line["goodput"]
        self._run_began = began
        self._rate = self._overall_rate = 0.0  # steps per second

    def start(self, step: int, seconds: float, now: float) -> None:
        """Begins to measure, after the first step of this process.

        Args:
          step: its number.
          seconds: what it took, compilation included; the speed until there are other steps.
          now: time.time().
        """
        self._started = self._since = now
        self._first = self._step = step
        self._rate = self._overall_rate = 1 / max(seconds, 1e-9)

    def advance(self, step: int, now: float, lost: float) -> None:
        """Counts the steps up to `step`, which the devices had done at `now`.

        Args:
          step: the number of the last one.
          now: time.time().
          lost: seconds since the last call in which there were no steps: evaluations, checkpoints.
        """
        if step > self._step:
            seconds = max(now - self._since - lost, 1e-9)
            self._step_seconds += seconds
            self._rate = (step - self._step) / seconds
            self._overall_rate = (step - self._first) / max(now - self._started, 1e-9)
        self._step, self._since, self._now = step, now, now

    def seconds_left(self) -> float:
        """Returns the time to the end of the run, with evaluations and checkpoints as they were so far."""
        return (self._steps - self._step) / self._overall_rate

    def scalars(self, tokens: float) -> dict[str, float]:
        """Returns what a log line says of the speed.

        Args:
          tokens: the tokens of a step.

        Returns:
          "pairs_per_second" and "tokens_per_second" of the steps since the last line; "pairs_per_second_overall" since the
          first step of this process, with evaluations, checkpoints and statistics; "step_seconds", which the run has spent in
          steps; and "goodput".
        """
        return {
            "pairs_per_second": self._rate * self._batch_size,
            "tokens_per_second": self._rate * tokens,
            "pairs_per_second_overall": self._overall_rate * self._batch_size,
            "step_seconds": self._step_seconds,
            "goodput": self._step_seconds / max(self._now - self._run_began, 1e-9),
        }


def time_of(now: float) -> str:
    """Returns a moment of time.time() as text: "2026-11-24T14:46:09.250+00:00"."""
    return datetime.datetime.fromtimestamp(now, datetime.UTC).isoformat(timespec="milliseconds")
