"""Engines: what runs the tasks of a stage, on this machine or elsewhere.

A stage of `prepare` is a function and its tasks. A task is small and can be pickled; so can the function, which is defined at
the top of a module or is a functools.partial of such a function. It reads and writes files, writes its outcome to a file of its
own last, and returns it. A task may therefore run twice, even at the same time: both runs write the same files.

While a task runs it calls `advance(bytes)` for the text it has worked through. Each engine gathers these numbers in its way.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from types import TracebackType
from typing import Any, Protocol

from contrastive_jax.config import UserError
from contrastive_jax.files import MachineError

Task = Any
Outcome = dict[str, Any]
# Workers are as many as the cores: each of them does its work in one thread.
ENVIRONMENT = {
    **{name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")},
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "2",  # glibc would keep freed memory in many places
}
REPORT_SECONDS = 0.5  # between two reports of a worker
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


class Engine(Protocol):
    """Runs the tasks of one stage after another."""

    def map(self, function: Callable[[Task], Outcome], tasks: Sequence[Task], done: Callable[[Outcome], None]) -> None:
        """Calls `function` for each task, in any order, and `done` in this process with each outcome; returns after the last.

        Neighbouring tasks mostly read neighbouring parts of one file, so a worker should take one after the other.

        Raises:
          UserError, MachineError: a task raised it, or a worker is gone; the outcomes of other tasks stay as they are.
        """


def ignore(size: int) -> None:
    """Counts nothing: outside an engine nobody asks how far a task is."""


reporter: Callable[[int], None] = ignore


def advance(size: int) -> None:
    """Reports that the running task has worked through `size` more bytes of text."""
    reporter(size)


def report_to(function: Callable[[int], None]) -> None:
    """Sets where `advance` reports to in this process; each engine calls this before its tasks."""
    global reporter  # noqa: PLW0603 - one process runs one task at a time
    reporter = function


class Schedule:
    """Deals out the tasks 0 .. count - 1 so that a worker mostly goes on with the task after its last one."""

    def __init__(self, count: int):
        self._runs = [(0, count)] if count else []  # (start, end) of the tasks that nobody has yet

    def take(self, last: int | None) -> int | None:
        """Returns the next task of a worker whose last task is given; None if no task is left.

        A worker whose next task is taken goes to the middle of the longest run, which somebody works through from its start.
        """
        if not self._runs:
            return None
        run = next((run for run in self._runs if run[0] - 1 == last), None) or max(self._runs, key=lambda r: r[1] - r[0])
        start, end = run
        task = start if start - 1 == last or start == 0 else (start + end) // 2
        at = self._runs.index(run)
        self._runs[at : at + 1] = [part for part in ((start, task), (task + 1, end)) if part[0] < part[1]]
        return task


class Worker:
    """A process of its own that runs one task after another; see `serve`."""

    def __init__(self) -> None:
        self.pipe, theirs = connection.Pipe()
        # Not multiprocessing: that would run the user's main module once more in each worker.
        code = f"from contrastive_jax.data.preparation import engine; engine.serve({theirs.fileno()}, {os.getpid()})"
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self.task: int | None = None  # the number of the running task, or of the last one

    def receive(self) -> tuple[str, Any]:
        """Returns the next message of the worker.

        Raises:
          MachineError: the worker is gone.
        """
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            status = self._process.wait()
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            raise MachineError(
                f"a worker was ended by {name}"
                + (", most likely for want of memory: give fewer --workers or less --memory_gb" if name == "SIGKILL" else "")
                + "; the same command goes on from what is done"
            ) from error

    def kill(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self.pipe.close()


class LocalEngine:
    """Runs tasks in processes of this machine, which live until the engine's `with` block ends.

    Args:
      workers: the processes; 1: the tasks run in this process.
      advanced: called in this process with the bytes that tasks report.
    """

    def __init__(self, workers: int, advanced: Callable[[int], None] = ignore):
        self._count, self._advanced = workers, advanced
        self._workers: list[Worker] = []

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def map(self, function: Callable[[Task], Outcome], tasks: Sequence[Task], done: Callable[[Outcome], None]) -> None:
        """See `Engine.map`."""
        if self._count == 1:
            report_to(self._advanced)
            for task in tasks:
                done(function(task))
            report_to(ignore)
            return
        schedule = Schedule(len(tasks))
        self._workers += [Worker() for _ in range(min(self._count, len(tasks)) - len(self._workers))]
        for worker in self._workers:
            worker.task = None
        busy = {worker.pipe: worker for worker in self._workers if self._start(worker, schedule, function, tasks)}
        while busy:
            for pipe in connection.wait([*busy]):
                worker = busy[pipe]  # type: ignore[index] # `wait` also takes sockets and numbers
                kind, value = worker.receive()
                if kind == "bytes":
                    self._advanced(value)
                elif kind == "failed":
                    raise value
                else:
                    done(value)
                    if not self._start(worker, schedule, function, tasks):
                        del busy[worker.pipe]

    def _start(self, worker: Worker, schedule: Schedule, function: Callable[[Task], Outcome], tasks: Sequence[Task]) -> bool:
        """Gives a worker its next task; returns whether there is one."""
        number = schedule.take(worker.task)
        if number is None:
            return False
        worker.task = number
        with contextlib.suppress(BrokenPipeError):  # a worker that is gone is met in `receive`
            worker.pipe.send((function, tasks[number]))
        return True


def end_with(parent: int) -> None:
    """Ends this process when its parent ends, whatever ended that: nobody waits for outcomes any more.

    Args:
      parent: the number of the process that started this one.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(REPORT_SECONDS)
        os._exit(1)

    if sys.platform == "linux":  # at once, also while a library computes
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    else:
        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def serve(descriptor: int, parent: int) -> None:
    """Runs the tasks that come through a pipe; the main function of a `Worker`.

    Args:
      descriptor: the file descriptor of the worker's end of the pipe.
      parent: see `end_with`.
    """
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the main one ends the others
    pipe = connection.Connection(descriptor)
    pending, reported = 0, 0.0

    def report(size: int) -> None:
        nonlocal pending, reported
        pending += size
        if time.monotonic() < reported + REPORT_SECONDS:
            return
        pipe.send(("bytes", pending))
        pending, reported = 0, time.monotonic()

    report_to(report)
    while True:
        try:
            function, task = pipe.recv()
        except EOFError:
            return
        try:
            message = ("done", function(task))
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(f"in a worker:\n{traceback.format_exc()}")
            message = ("failed", error)
        pipe.send(("bytes", pending))
        pending = 0
        try:
            pipe.send(message)
        except Exception:  # an exception with arguments that cannot be pickled
            pipe.send(("failed", RuntimeError("\n".join(traceback.format_exception(message[1])))))
