"""The log line of a run: metrics of its steps, judged by the guard and written every few steps, beside the steps themselves.

No step waits for a log line. The main thread of each process collects the metrics, which stay on the devices. A thread of
process 0 fetches them when they are computed, measures the embeddings, writes the line and has the guard judge it. What that
thread raises, the main thread raises at the next line, checkpoint or evaluation; `Peers` then ends the other processes.
"""

import collections
import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from contrastive_jax.runtime import digest, sharding
from contrastive_jax.runtime.progress import clock
from contrastive_jax.training import build, guard, metrics
from contrastive_jax.training import step as step_lib
from contrastive_jax.training.background import Background
from contrastive_jax.training.speed import Speed, time_of

# Steps that may be dispatched before the devices have finished the ones before: enough to keep the devices busy, few enough
# that a run which is asked to end does so soon.
IN_FLIGHT = 2
SAMPLE = 1024  # embeddings of a batch whose statistics are computed
# The metrics of a loss that the log line shows where there are any: name, label, digits after the point.
SHOWN = (
    ("token_loss", "token loss", 4),
    ("token_accuracy", "token accuracy", 3),
    ("in_batch_top1", "top-1", 3),
    ("temperature", "temperature", 4),
)


def make_sample(mesh: Mesh) -> jax.stages.Wrapped:
    """Returns the jitted function embeddings [b v e] → the first SAMPLE pairs, replicated over the mesh."""
    return jax.jit(lambda z: z[:SAMPLE], out_shardings=sharding.replicated(mesh))


def fetch(tree: Any) -> Any:
    """Returns replicated arrays of all processes as arrays of this host, when the devices have computed them."""
    return jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), tree))


class LineWriter:
    """Process 0's part of the log lines; its thread calls `write` and `write_scores`.

    Args:
      config: of the run.
      run: its functions.
      writer: of metrics.jsonl, TensorBoard and the tracker.
      speed: measures the steps.
    """

    def __init__(self, config: ConfigDict, run: build.Run, writer: metrics.Writer, speed: Speed):
        self._config, self._schedule, self._writer, self._speed = config, run.schedule, writer, speed
        self._guard = guard.Guard(config.guard, config.optim.warmup_steps)

    def write(self, step: int, values: Sequence[step_lib.Metrics], sample: jax.Array | None, lost: float) -> None:
        """Waits until the devices have done the steps, and has them judged; with a sample, also writes the line.

        Args:
          step: the last of the steps.
          values: the metrics of each step since the last call.
          sample: embeddings of the last step; None: these steps get no line (a checkpoint follows).
          lost: seconds since the last call in which there were no steps.

        Raises:
          guard.StoppedError: the run no longer trains.
        """
        steps = fetch(list(values))
        now = time.time()
        self._speed.advance(step, now, lost)
        for one_step in steps:
            one_step["batch_digest"] = digest.hexadecimal(one_step["batch_digest"])
        done = [values for values in steps if not values["skipped"]]
        statistics = {}
        if sample is not None and done:
            if not steps[-1]["skipped"]:  # the sample is that of the last step, and may not be finite
                statistics = metrics.embedding_metrics(fetch(sample))
            mean = {name: float(np.mean([values[name] for values in done])) for name in done[-1] if name != "batch_digest"}
            mean["skipped"] = len(steps) - len(done)
            self._write_line(step, mean | statistics, batch_digest=steps[-1]["batch_digest"], time=time_of(now))
        self._guard.steps(step - len(steps) + 1, steps)
        if statistics:
            self._guard.embeddings(step, statistics)

    def _write_line(self, step: int, scalars: dict[str, float], **texts: str) -> None:
        scalars |= self._speed.scalars(scalars.pop("tokens"))
        scalars["learning_rate"] = float(self._schedule(step - 1))
        own = "".join(f"  {label} {scalars[name]:.{digits}f}" for name, label, digits in SHOWN if name in scalars)
        logging.info(
            "step %d/%d  loss %.4f%s  %.0f pairs/s (%.0f overall)  %.0f tokens/s  goodput %.0f %%  ETA %s",
            step,
            self._config.steps,
            scalars["loss"],
            own,
            scalars["pairs_per_second"],
            scalars["pairs_per_second_overall"],
            scalars["tokens_per_second"],
            100 * scalars["goodput"],
            clock(self._speed.seconds_left()),
        )
        self._writer.write(step, scalars, **texts)


class LogLine:
    """Collects the metrics of steps, and has a line written every `config.log_every` steps. A context manager around the loop.

    Args:
      config: of the run.
      run: its functions.
      first_step: the step at which this process began.
      writer: of metrics.jsonl, TensorBoard and the tracker; None on all processes but 0. It is closed with the log line.
      began: when this process began, in seconds of time.time().
    """

    def __init__(self, config: ConfigDict, run: build.Run, first_step: int, writer: metrics.Writer | None, began: float):
        self._config, self._writer = config, writer
        self._first = self._step = first_step
        self._pending: list[step_lib.Metrics] = []  # of the steps since the last line or checkpoint
        self._last: collections.deque[step_lib.Metrics] = collections.deque(maxlen=IN_FLIGHT + 1)
        self._sample = make_sample(run.mesh)
        self._began, self._lost = time.time(), 0.0
        if writer:
            self._speed = Speed(config.data.batch_size, config.steps, began, writer.last_line)
            self._line_writer = LineWriter(config, run, writer, self._speed)
            self._background = Background(writer.flush_if_due)

    def __enter__(self) -> "LogLine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._writer:
            return
        self._background.close()
        try:
            self._writer.close()
        except Exception as close_error:  # of a bucket, for example: the error that ends the run is the one to show
            if error is None:
                raise
            logging.warning("the last metrics could not be written (%s: %s)", type(close_error).__name__, close_error)

    def add(self, step: int, values: step_lib.Metrics, z: jax.Array) -> None:
        """Takes one step's metrics and embeddings float32[b v e]; waits while the host is more than IN_FLIGHT steps ahead.

        Raises:
          guard.StoppedError: the run no longer trains.
        """
        self._pending.append(values)
        self._last.append(values)
        self._step = step
        if len(self._last) > IN_FLIGHT:
            jax.block_until_ready(self._last[0])
        if step == self._first + 1:
            self.wait()
            logging.info("first step done, compilation included")
            if self._writer:
                self._speed.start(step, time.time() - self._began - self._lost, time.time())
            self._lost = 0.0
        if step % self._config.log_every == 0 or step == self._config.steps:
            self._hand_over(self._sample(z))

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Has the scores of an evaluation written."""
        if self._writer:
            self._background.submit(functools.partial(self._writer.write, step, scores))

    def wait(self) -> None:
        """Waits until the devices have finished all steps so far."""
        jax.block_until_ready(list(self._last))

    def flush(self) -> None:
        """Returns when all steps so far are judged, and all lines are in the workdir.

        Raises:
          guard.StoppedError: the run no longer trains.
        """
        if self._pending:
            self._hand_over(None)
        if self._writer:
            self._background.submit(self._writer.flush)
            self._background.wait()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work beside the steps, an evaluation or a checkpoint: its time is not the steps'.

        Raises:
          guard.StoppedError: the run no longer trains.
        """
        self.wait()
        if self._writer:
            self._background.wait()
        began = time.time()
        yield
        self._lost += time.time() - began

    def batch_digest(self) -> str:
        """Returns the digest of the last step's batch; "" before the first step of this process."""
        return digest.hexadecimal(fetch(self._last[-1]["batch_digest"])) if self._last else ""

    def _hand_over(self, sample: jax.Array | None) -> None:
        """Gives the pending metrics to the thread of process 0."""
        values, self._pending = self._pending, []
        lost, self._lost = self._lost, 0.0
        if self._writer:
            self._background.submit(functools.partial(self._line_writer.write, self._step, values, sample, lost))
