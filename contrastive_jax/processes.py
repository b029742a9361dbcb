"""Several processes as one run: joining, agreeing, ending together."""

import hashlib
import os
import re
import signal
import threading
from typing import Any

import jax
import numpy as np
from absl import logging
from jax._src import clusters
from jax.experimental import multihost_utils

from contrastive_jax import peers
from contrastive_jax.peers import Peers

# Exit status of a run that was told to end and has saved (sysexits' EX_TEMPFAIL): the launchers start it again.
PREEMPTED = 75
# The watch of a run of one process.
ALONE = Peers("localhost:2", 1, 0, 1.0)


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    cluster: bool = False,
    join_seconds: int = 300,
    silent_seconds: int = 40,
) -> Peers:
    """Joins the other processes; must run before JAX first looks for devices.

    Args:
      coordinator: "HOST:PORT" of process 0; with num_processes and process_id.
      num_processes: how many there are.
      process_id: this one's number, from 0.
      cluster: take all three from the environment (TPU pod, SLURM, Open MPI).
      join_seconds: how long to wait for the others.
      silent_seconds: after how long a process that does nothing is taken to hang.

    Returns:
      The watch over the others.

    Raises:
      ValueError: only some of the three are given, or both ways are asked for; or a process did not come, which is named.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and (cluster or not all(given)):
        raise ValueError("give --coordinator, --num_processes and --process_id together, or --cluster alone")
    for name, value in (("join_seconds", join_seconds), ("silent_seconds", silent_seconds)):
        if value < 1:
            raise ValueError(f"--{name}={value}: must be at least 1")
    if cluster:
        # What jax.distributed.initialize() itself asks; here, since it does not tell, and waits for all without a name.
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, join_seconds)
        coordinator, num_processes, process_id = found[:3]
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError("--cluster: no TPU pod, SLURM or Open MPI job is around; give --coordinator and the two beside it")
    if coordinator is None or num_processes is None or process_id is None:
        return ALONE
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id={process_id}: must be in [0, --num_processes={num_processes})")
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise ValueError(f"--coordinator={coordinator}: give HOST:PORT of process 0")
    others = Peers(coordinator, num_processes, process_id, silent_seconds)
    others.join(join_seconds)
    jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=join_seconds)
    return others


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
    """Whether the run was asked to end (SIGTERM); all processes learn it at the same step.

    Args:
      grace_seconds: where saving takes longer than this, the process ends without; 0: it takes what it takes.
    """

    def __init__(self, grace_seconds: int = 0) -> None:
        self._grace, self._asked = grace_seconds, False
        # With several processes, JAX's coordination service has taken SIGTERM and finds a step that all have yet to reach.
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        del number, frame
        self._note("SIGTERM: saving at the end of this step")

    def _note(self, line: str) -> None:
        if self._asked:
            return
        self._asked = True
        logging.info("%s", line)
        if self._grace:
            reason = f"not saved within --grace_seconds={self._grace}; the checkpoint before stays"
            timer = threading.Timer(self._grace, peers.end_process, (reason, PREEMPTED))
            timer.daemon = True
            timer.start()

    def reached(self, step: int) -> bool:
        """Whether to save and end at this step; every process must ask, once a step."""
        if jax.process_count() == 1:
            return self._asked
        if multihost_utils.reached_preemption_sync_point(step):
            self._note(f"SIGTERM: saving at step {step}, as all processes do")
        return self._asked
