"""The engine that runs tasks on other machines, through Apache Beam: Dataflow, Flink, Spark, or a cluster of Dask.

Each call of `map` is one Beam pipeline:

    Create(numbers of runs)  ->  Reshuffle  ->  Map(run_tasks)

A run is one task or some neighbours, which mostly read neighbouring parts of one file. Everything else goes through files
in a folder that the driver and all workers can use, so that the pipeline stays small however many tasks there are (Dataflow
refuses a job description of more than 10 MB), and so that all runners work alike:

    FOLDER/job-XXXX/tasks/000000.pickle       the function and a block of BLOCK tasks, which the driver writes
    FOLDER/job-XXXX/outcomes/0000012.pickle   what the function returned for task 12, and the bytes it reported, from a worker
    FOLDER/job-XXXX/stop                      the message of a task that found a mistake of the user; no further task begins

A task whose outcome is there is not run again: a runner may repeat those that a lost worker had finished.
"""

import contextlib
import functools
import logging
import os
import pickle
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import apache_beam as beam
from absl import logging as absl_logging
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.data.beam import options as beam_options
from contrastive_jax.data.beam import workers as beam_workers
from contrastive_jax.data.beam.options import BeamOptions
from contrastive_jax.data.preparation import engine
from contrastive_jax.data.preparation.engine import Outcome, Task
from contrastive_jax.data.preparation.work import READS, Work
from contrastive_jax.files import MachineError

BLOCK = 200  # tasks in one file: a worker reads all of them to run one
# What a job is divided into, at most. More would spread the last minutes of a job better; but of a compressed file each run
# must be read from its start.
MAX_RUNS = 1000
# A process keeps files open from one task to the next, so it runs one task at a time, however many threads a runner uses.
ONE_TASK = threading.Lock()
POLL_SECONDS = 2.0
STOP = "stop"  # the file of the header


class BeamEngine:
    """Runs tasks as jobs of Apache Beam.

        options = beam_options.complete({"runner": "DataflowRunner", "project": "mine", "region": "us-central1"}, folder)
        BeamEngine(options, folder, print).map(function, tasks, done)

    Args:
      options: from `beam_options.complete`.
      folder: a folder that the driver and all workers can read and write, on a bucket or a shared file system.
      say: writes one line for the user.
      advanced: called with the bytes that a task has reported, when its outcome is there.
    """

    def __init__(
        self,
        options: BeamOptions,
        folder: epath.Path,
        say: Callable[[str], None],
        advanced: Callable[[int], None] = engine.ignore,
    ):
        self._flags, self._kind = options
        self._folder, self._say, self._advanced = folder, say, advanced
        # Runners in this process log their internals, and errors that are raised anyway. Of a cluster each line may matter.
        logging.getLogger("apache_beam").setLevel(logging.WARNING if options.in_process else logging.INFO)
        # This one prints all options of each job, and little else: the id and the page of a job are printed here.
        logging.getLogger("apache_beam.runners.dataflow.internal.apiclient").setLevel(logging.WARNING)

    def __enter__(self) -> "BeamEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Does nothing: each job ends by itself."""

    def map(self, function: Callable[[Task], Outcome], tasks: Sequence[Task], done: Callable[[Outcome], None]) -> None:
        """See `Engine.map`: all tasks are one job, and outcomes come while it runs."""
        if not tasks:
            return
        job = Work(self._folder / f"job-{uuid.uuid4().hex[:8]}")
        write_tasks(job, function, tasks)
        outcomes = Outcomes(job, len(tasks), done, self._advanced)
        self._say(f"Beam ({self._kind}): submitting a job of {len(tasks):,} tasks")
        try:
            with contextlib.ExitStack() as stack:
                flags = [*self._flags]
                if beam_workers.need_package(self._kind, beam_options.names(flags)):
                    flags.append(f"--extra_package={stack.enter_context(beam_workers.wheel())}")
                pipeline = make_pipeline(flags, job.root, len(tasks))
                result = pipeline.run()
            self._follow(result, pipeline.options, outcomes)
        except UserError:
            raise
        except Exception as error:  # Beam's runners raise whatever their clients raise
            outcomes.raise_if_stopped()
            reason = beam_options.reason_of(error)
            raise MachineError(
                f"Beam ({self._kind}): the job failed ({reason}); the same command goes on from there"
            ) from error
        job.remove("")

    def _follow(self, result: PipelineResult, options: PipelineOptions, outcomes: "Outcomes") -> None:
        """Waits for the job, and reports outcomes meanwhile."""
        if job := beam_options.describe(result, options):
            self._say(f"Beam ({self._kind}): {job}")
        wait = Wait(result)
        try:
            while not wait.ended(POLL_SECONDS):
                try:
                    outcomes.report()
                    outcomes.raise_if_stopped()
                except UserError:
                    raise
                except Exception as error:  # a request that fails is nothing to stop for: the next turn comes soon
                    absl_logging.warning("Beam (%s): %s", self._kind, beam_options.one_line(error))
        except KeyboardInterrupt:
            self._say(f"Beam ({self._kind}): {beam_options.how_to_cancel(result, options)}")
            raise
        except UserError:
            with contextlib.suppress(Exception):  # the tasks that have not begun do nothing in any case
                result.cancel()
            raise
        wait.raise_error()
        outcomes.raise_if_stopped()
        outcomes.report()
        if outcomes.missing:
            raise RuntimeError(f"it ended as {result.state}, and {len(outcomes.missing):,} tasks have no outcome")
        if client := getattr(result, "client", None):  # of Dask; it would stay connected
            client.close()


class Outcomes:
    """The outcomes of a job, as files that its workers write.

    Args:
      job: the folder of the job.
      count: the number of tasks.
      done: called once with each outcome.
      advanced: called with the bytes of each outcome's task.
    """

    def __init__(self, job: Work, count: int, done: Callable[[Outcome], None], advanced: Callable[[int], None] = engine.ignore):
        self._job, self._done, self._advanced = job, done, advanced
        self.missing = set(range(count))

    def report(self) -> None:
        """Calls `done` with the outcomes that have been written since the last call."""
        written = {int(name.removesuffix(".pickle")) for name in self._job.names("outcomes")}
        new = sorted(written & self.missing)
        with ThreadPoolExecutor(READS) as pool:  # on a bucket, each file is a request
            for number, (outcome, size) in zip(new, pool.map(self._read, new), strict=True):
                self._done(outcome)
                self._advanced(size)
                self.missing.discard(number)

    def _read(self, number: int) -> tuple[Outcome, int]:
        return pickle.loads(self._job.read(outcome_file(number)))

    def raise_if_stopped(self) -> None:
        """Raises the UserError of a task, if one had one."""
        if self._job.path(STOP).exists():
            raise UserError(self._job.read(STOP).decode())


class Wait:
    """Waits for a job in a thread, so that the thread of the caller is free. Ctrl-C reaches that one alone."""

    def __init__(self, result: PipelineResult):
        self._result = result
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self._result.wait_until_finish()
        except BaseException as error:  # it is raised again by `raise_error`, in the other thread
            self._error = error

    def ended(self, seconds: float) -> bool:
        """Returns whether the job has ended, after at most so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def raise_error(self) -> None:
        """Raises what ended the job, if it failed."""
        if self._error is not None:
            raise self._error


def run_tasks(run: int, count: int, folder: str) -> None:
    """Runs the tasks of one run, on a worker.

    Args:
      run: its number.
      count: the number of tasks of the job.
      folder: of the job.
    """
    length = run_length(count)
    for number in range(run * length, min((run + 1) * length, count)):
        with ONE_TASK:
            run_task(number, folder)


def run_length(count: int) -> int:
    """Returns the number of tasks of a run, for a number of tasks of the job."""
    return -(-count // MAX_RUNS)


def run_task(number: int, folder: str) -> None:
    """Runs one task, and writes its outcome into the folder of the job."""
    job = Work(folder)
    if job.path(outcome_file(number)).exists() or job.path(STOP).exists():
        return
    for name, value in engine.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    function, tasks = read_block(folder, number // BLOCK)
    sizes: list[int] = []
    engine.report_to(sizes.append)
    try:
        outcome = function(tasks[number % BLOCK])
    except MachineError:
        raise  # the runner tries again
    except UserError as error:
        # Another try would end as this one did. The driver sees the file, and stops the job.
        job.write(STOP, str(error).encode())
        return
    beam.metrics.Metrics.counter("prepare", "bytes").inc(sum(sizes))  # some runners show it on the job's page
    job.write(outcome_file(number), pickle.dumps((outcome, sum(sizes))))


def write_tasks(job: Work, function: Callable[[Task], Outcome], tasks: Sequence[Task]) -> None:
    """Writes the function and the tasks of a job into its folder, in blocks."""

    def write_block(start: int) -> None:
        job.write(block_file(start // BLOCK), pickle.dumps((function, list(tasks[start : start + BLOCK]))))

    with ThreadPoolExecutor(READS) as pool:
        list(pool.map(write_block, range(0, len(tasks), BLOCK)))


@functools.lru_cache(maxsize=4)
def read_block(folder: str, number: int) -> tuple[Callable[[Task], Outcome], list[Task]]:
    """Returns the function of a job and a block of its tasks."""
    return pickle.loads(Work(folder).read(block_file(number)))


def block_file(number: int) -> str:
    """Returns the name of the file of a block of tasks."""
    return f"tasks/{number:06d}.pickle"


def outcome_file(number: int) -> str:
    """Returns the name of the file of the outcome of a task."""
    return f"outcomes/{number:07d}.pickle"


def make_pipeline(flags: Sequence[str], folder: epath.Path, count: int) -> beam.Pipeline:
    """Returns the pipeline of a job of `count` tasks: the numbers of its runs, spread over the workers."""
    pipeline = beam.Pipeline(options=PipelineOptions(list(flags)))
    runs = range(-(-count // run_length(count)))
    _ = (
        pipeline
        | "Runs" >> beam.Create(runs, reshuffle=False)  # the next line does it
        | "Spread" >> beam.Reshuffle()
        | "Tasks" >> beam.Map(functools.partial(run_tasks, count=count, folder=str(folder)))
    )
    return pipeline
