"""Several processes as one run: joining, agreeing, ending together."""

import hashlib
import os
import signal
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

# Exit status of a run that was told to end and has saved (sysexits' EX_TEMPFAIL): the launchers start it again.
PREEMPTED = 75


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None, cluster: bool) -> None:
    """Joins the other processes; must run before JAX first looks for devices.

    Args:
      coordinator: "HOST:PORT" of process 0; with num_processes and process_id.
      num_processes: how many there are.
      process_id: this one's number, from 0.
      cluster: take all three from the environment (TPU pod, SLURM, Open MPI).

    Raises:
      ValueError: only some of the three are given, or both ways are asked for.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and (cluster or not all(given)):
        raise ValueError("give --coordinator, --num_processes and --process_id together, or --cluster alone")
    if cluster:
        jax.distributed.initialize()
    elif all(given):
        jax.distributed.initialize(coordinator, num_processes, process_id)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in ~/.cache/contrastive_jax unless JAX_COMPILATION_CACHE_DIR names another folder.

    Not on CPU: programs that JAX 0.10 reads back there have given other losses than those just compiled, or crashed.
    """
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/contrastive_jax"))


def check_agreement(**values: str) -> None:
    """Checks that every process has the same values before the first step.

    Raises:
      ValueError: which value differs, and on which processes.
    """
    for name, value in values.items():
        digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
        every = np.atleast_2d(multihost_utils.process_allgather(digest))
        odd = [str(i) for i, row in enumerate(every) if not np.array_equal(row, every[0])]
        if odd:
            raise ValueError(
                f"the {name} of process {', '.join(odd)} differs from that of process 0; start all processes with the same one"
            )


class Preemption:
    """Whether the run was asked to end (SIGTERM); all processes learn it at the same step."""

    def __init__(self) -> None:
        self._asked = False
        # With several processes, JAX's coordination service has taken SIGTERM and finds a step that all have yet to reach.
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        del number, frame
        self._asked = True
        logging.info("SIGTERM: saving at the end of this step")

    def reached(self, step: int) -> bool:
        """Whether to save and end at this step; every process must ask, once a step."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)
