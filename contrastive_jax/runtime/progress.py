"""The progress of long work: every few seconds a line says how much is done, out of how much, how fast, and the time left."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

from absl import logging

SECONDS = 5.0  # between two lines


def clock(seconds: float) -> str:
    """Returns a duration as H:MM:SS."""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"


class Progress:
    """A context manager that writes a line every few seconds (from a thread), and a last one at the end.

        with Progress("encoding", total=len(texts), unit="texts") as progress:
            for batch in batches:
                ...
                progress.advance(len(batch))

    ", done" is added to the last line, when the block ends. If the work raises an exception, there is no last line.

    Args:
      what: the work; each line begins with it.
      total: the number of units; None if it is not known, then no time left is shown.
      unit: the name of what is counted, in the plural.
      describe: seconds since the start → the whole line; for work that counts in its own way. Default: `line`.
      say: writes one line.
      quiet_if_short: write nothing, not even the last line, if the work ends before the first line is due.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "items",
        describe: Callable[[float], str] | None = None,
        say: Callable[[str], None] = logging.info,
        quiet_if_short: bool = False,
    ):
        self._what, self._total, self._unit, self._say = what, total, unit, say
        self._describe = describe or self.line
        self._done = 0
        self._note = ""  # from the last `advance`, shown at the end of each line
        self._quiet = quiet_if_short  # until a first line is written
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more units; `note` is shown at the end of each line until the next call."""
        self._done += count
        self._note = note

    def line(self, seconds: float) -> str:
        """Returns the line: "encoding: 2,048 of 10,000 texts, 512.0/s, ETA 0:00:15". `seconds` is the time since the start."""
        rate = self._done / max(seconds, 1e-9)
        total = f" of {self._total:,}" if self._total is not None else ""
        left = f", ETA {clock((self._total - self._done) / rate)}" if self._total is not None and self._done else ""
        note = f"  {self._note}" if self._note else ""
        return f"{self._what}: {self._done:,}{total} {self._unit}, {rate:,.1f}/s{left}{note}"

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        self._thread.start()
        return self

    def _repeat(self) -> None:
        while not self._ended.wait(SECONDS):
            self._quiet = False
            self._say(self._describe(time.monotonic() - self._began))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        if error is None and not self._quiet:
            self._say(f"{self._describe(time.monotonic() - self._began)}, done")
