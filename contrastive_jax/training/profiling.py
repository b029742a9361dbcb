"""A profile of some training steps, for TensorBoard (its plugin is the package tensorboard-plugin-profile)."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import jax
from absl import logging
from etils import epath

from contrastive_jax.config import UserError

# The environment variable that names the file by which a running process is asked for a profile (launch/worker.sh profile).
REQUEST_VARIABLE = "CONTRASTIVE_JAX_PROFILE_FILE"


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """Returns the first and the last step of --profile_steps=FROM:TO; None for None.

    Raises:
      UserError: it is not two step numbers in order, the first at least 1.
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile_steps={text}: give FROM:TO, two step numbers in order, for example 10:12")
    return int(first), int(last)


class Profiler:
    """Writes a trace of the steps asked for to WORKDIR/plugins/profile/TIME. A context manager around the loop.

        with Profiler(workdir, (10, 12), first=0, end=1000) as profiler:
            for number in range(1, 1001):
                with profiler.step(number, wait_for=lambda: jax.block_until_ready(state)):
                    state = train_step(state)

    If the run ends within the steps asked for, the trace ends with it. With several processes, process 0 alone traces: the host
    and the devices of that process.

    A process that runs already can be asked for a trace: when the file that REQUEST_VARIABLE names appears, the process removes
    it and traces as many of its next steps as the file's content says.

    Args:
      workdir: the folder of the run.
      steps: the first and the last step to trace; None: none.
      first: the step that the run begins after; a resumed run cannot trace earlier steps.
      end: the last step of the run.
    """

    def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None, first: int, end: int):
        self._workdir, self._steps, self._end = workdir, range(0), end
        self._request = os.environ.get(REQUEST_VARIABLE)
        self._folder: tempfile.TemporaryDirectory | None = None
        self._traced = (0, 0)
        if steps is None:
            return
        asked = range(steps[0], steps[1] + 1)
        self._steps = range(max(asked.start, first + 1), min(asked.stop, end + 1))
        name = f"--profile_steps={steps[0]}:{steps[1]}"
        if not self._steps:
            logging.warning("%s: this run does steps %d to %d; no profile is written", name, first + 1, end)
        elif self._steps != asked:
            logging.warning("%s: this run does steps %d to %d; the profile is of the steps in both", name, first + 1, end)
        if jax.process_index() != 0:
            self._steps = range(0)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int, wait_for: Callable[[], Any]) -> Iterator[None]:
        """Names a step in the trace, and begins or ends the trace with it.

        Args:
          number: of the step.
          wait_for: waits until the devices have finished the steps dispatched so far.
        """
        if self._request and self._folder is None and os.path.exists(self._request):
            self._take_request(number)
        if self._steps and number == self._steps[0]:
            wait_for()
            self._folder = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._folder.name)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if self._folder is not None:
            self._traced = (self._steps[0], number)
            if number == self._steps[-1]:
                wait_for()
                self._stop()

    def _take_request(self, number: int) -> None:
        """Removes the file of a request; this step and the next ones become those to trace."""
        file = pathlib.Path(str(self._request))
        count = int(file.read_text())
        file.unlink()
        self._steps = range(number, min(number + count, self._end + 1))

    def _stop(self) -> None:
        """Ends the trace, if there is one, and moves its files into the workdir, which may be in a bucket."""
        if self._folder is None:
            return
        with self._folder as folder:
            self._folder = None
            jax.profiler.stop_trace()
            for file in filter(pathlib.Path.is_file, pathlib.Path(folder).rglob("*")):
                target = self._workdir / file.relative_to(folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        logging.info("profile of steps %d to %d: %s/plugins/profile", *self._traced, self._workdir)
