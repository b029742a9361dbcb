"""The log line of a run: metrics of its steps, gathered on the devices, judged by the guard, written every so often."""

import time
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from contrastive_jax import build, guard, metrics, sharding
from contrastive_jax import step as step_lib

# Steps that are begun before the devices are done with those before: enough to keep them busy, few enough that a run which is
# asked to end does so soon.
IN_FLIGHT = 2


class Reporter:
    """Gathers the metrics of steps on the devices, has them judged, and reports them every so often."""

    def __init__(self, config: ConfigDict, run: build.Run, first_step: int, writer: metrics.Writer | None):
        self._config, self._schedule, self._writer = config, run.schedule, writer
        self._guard = guard.Guard(config.guard, config.optim.warmup_steps)
        self._pending: list[step_lib.Metrics] = []
        self._step, self._since = first_step, time.monotonic()
        self._fetch = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(run.mesh))
        self._sample = jax.jit(lambda z: z[:1024], out_shardings=sharding.replicated(run.mesh))
        self.batch_digest = ""

    def add(self, step: int, values: step_lib.Metrics) -> None:
        """Keeps one step's metrics; waits while the host is more than IN_FLIGHT steps ahead."""
        self._pending.append(values)
        self._step = step
        if len(self._pending) > IN_FLIGHT:
            jax.block_until_ready(self._pending[-1 - IN_FLIGHT])

    def flush(self, z: jax.Array | None = None) -> None:
        """Fetches what is pending, checks it, and writes one line about it if `z`, the last step's embeddings, is given.

        Raises:
          guard.StoppedError: the run is of no more use.
        """
        if not self._pending:
            return
        steps = [self._local(values) for values in self._pending]
        steps = [values | {"batch_digest": "".join(f"{word:08x}" for word in values["batch_digest"])} for values in steps]
        seconds, self._pending = time.monotonic() - self._since, []
        self.batch_digest = steps[-1]["batch_digest"]
        self._guard.steps(self._step - len(steps) + 1, steps)
        done = [values for values in steps if not values["skipped"]]
        if z is not None and done:
            mean = {name: float(np.mean([step[name] for step in done])) for name in done[-1] if name != "batch_digest"}
            mean["skipped"] = len(steps) - len(done)
            self._write(mean, len(steps), seconds, self._local(self._sample(z)))

    def _local(self, tree: Any) -> Any:
        return jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), self._fetch(tree)))

    def _write(self, mean: dict[str, float], count: int, seconds: float, z: np.ndarray) -> None:
        config, step = self._config, self._step
        tokens = mean.pop("tokens")
        statistics = metrics.embedding_metrics(z)
        scalars = mean | statistics
        with jax.transfer_guard("allow"):
            scalars["learning_rate"] = float(self._schedule(step - 1))
        scalars["pairs_per_second"] = count * config.data.batch_size / seconds
        scalars["tokens_per_second"] = count * tokens / seconds
        eta = (config.steps - step) * seconds / count
        logging.info(
            "step %d/%d  loss %.4f  top-1 %.3f  temperature %.4f  %.0f pairs/s  %.0f tokens/s  ETA %d:%02d:%02d",
            step,
            config.steps,
            scalars["loss"],
            scalars["in_batch_top1"],
            scalars["temperature"],
            scalars["pairs_per_second"],
            scalars["tokens_per_second"],
            *(eta // 3600, eta % 3600 // 60, eta % 60),
        )
        if self._writer:
            self._writer.write(step, scalars, batch_digest=self.batch_digest)
        self._guard.embeddings(step, statistics)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of pairs/s what came before: compilation, evaluations, checkpoints."""
        self._since = time.monotonic()
