"""Several processes as one run: they join, agree on the config, and end together."""

import hashlib
import os
import pathlib
import re
import signal
import threading
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax._src import clusters
from jax.experimental import multihost_utils

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.runtime import peers
from contrastive_jax.runtime.peers import Peers

# Exit status of a run that saved and ended because it was told to (EX_TEMPFAIL of sysexits.h). The launchers start it again.
PREEMPTED = 75
# Exit status of a run whose processes did not all join. The launchers start it again, as after a failure of a machine.
NOT_JOINED = peers.NotJoinedError.status
# The environment variable that names the file to make when SIGTERM no longer kills the process (launch/worker.sh waits for it).
READY_VARIABLE = "CONTRASTIVE_JAX_READY_FILE"
# The environment variable with a text that all processes of a run share and nobody else knows. Without it, and outside SLURM,
# any process that can reach the port of the watch while the run starts can take part in it.
SECRET_VARIABLE = "CONTRASTIVE_JAX_SECRET"
# The `Peers` of a run with one process: it watches nobody.
ALONE = Peers("localhost:2", 1, 0, 1.0, 1.0)


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    cluster: bool = False,
    join_seconds: int = 300,
    silent_seconds: int = 40,
    hang_seconds: int = 600,
) -> Peers:
    """Joins the other processes of the run. Must run before JAX first looks for devices.

    Args:
      coordinator: "HOST:PORT" of process 0; goes with `num_processes` and `process_id`.
      num_processes: the number of processes.
      process_id: the number of this process, from 0.
      cluster: take all three from the environment (TPU pod, SLURM, Open MPI).
      join_seconds: how long to wait for the other processes.
      silent_seconds: a process that is silent, or stays at one step, for longer than this gets a warning.
      hang_seconds: a process that is silent, or stays at one step, for longer than this ends the run.

    Returns:
      The watch over the other processes; `ALONE` where neither the three values nor `cluster` are given.

    Raises:
      UserError: only some of the three values are given, or `cluster` beside them, or a process belongs to another run.
      NotJoinedError: a process did not join; the message names it.
    """
    is_given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(is_given) and (cluster or not all(is_given)):
        raise UserError("give --coordinator, --num_processes and --process_id together, or --cluster alone")
    for name, value in (("join_seconds", join_seconds), ("silent_seconds", silent_seconds), ("hang_seconds", hang_seconds)):
        if value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")
    if cluster:
        coordinator, num_processes, process_id = detect_cluster(join_seconds)
    if coordinator is None or num_processes is None or process_id is None:
        return ALONE
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: must be in [0, --num_processes={num_processes})")
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise UserError(f"--coordinator={coordinator}: give HOST:PORT of process 0")
    others = Peers(coordinator, num_processes, process_id, silent_seconds, hang_seconds, run_secret())
    others.join(join_seconds)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        # Under SLURM and Open MPI, JAX gives a process the one GPU of its number on the node.
        cluster_detection_method="deactivate" if is_alone_on_node() else None,
        initialization_timeout=join_seconds,
        # JAX's own watch ends a process that gives no sign of life. `Peers`, which names it, comes first.
        heartbeat_timeout_seconds=hang_seconds + 60,
    )
    return others


def detect_cluster(seconds: int) -> tuple[str, int, int]:
    """Returns the coordinator, the number of processes and that of this process, as TPU pod, SLURM or Open MPI says.

    jax.distributed.initialize() would detect the same values, but it does not return them, and where a process does not come it
    does not name it. `Peers` does, and needs the values for it.

    Raises:
      UserError: the environment is none of these.
    """
    detected = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, seconds)
    coordinator, count, number = detected[:3]
    if coordinator is None or count is None or number is None:
        raise UserError(
            "--cluster: the environment has no TPU pod, SLURM or Open MPI job; "
            "give --coordinator, --num_processes and --process_id"
        )
    return coordinator, count, number


def is_alone_on_node() -> bool:
    """Returns whether SLURM or Open MPI has started one process per node, which then drives all GPUs of its node."""
    of_slurm = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    return (None not in of_slurm and of_slurm[0] == of_slurm[1]) or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def run_secret() -> str:
    """Returns a hash of what the processes of a run have in common: SECRET_VARIABLE, or else the number of the SLURM job."""
    shared = os.environ.get(SECRET_VARIABLE) or os.environ.get("SLURM_JOB_ID", "")
    return hashlib.sha256(f"contrastive_jax {shared}".encode()).hexdigest()


def describe_cores() -> str:
    """Returns the CPU cores that this process may use, for the log: "8 CPU cores (0-3, 64-67)". With too few it is slow."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    listed = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{len(cores)} CPU core{'s' * (len(cores) != 1)} ({listed})"


def enable_compilation_cache(workdir: str = "") -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR if it is set.

    Else several processes keep them in WORKDIR/compiled, since JAX writes them on process 0 alone and all must find them, and
    one process keeps them in ~/.cache/contrastive_jax.

    Not on CPU: programs that JAX 0.10 reads from the cache there have computed other losses than the compiled ones, or crashed.
    """
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        shared = jax.process_count() > 1 and workdir
        folder = files.absolute(workdir) / "compiled" if shared else files.cache_folder()
        jax.config.update("jax_compilation_cache_dir", str(folder))


def check_agreement(**values: str) -> None:
    """Checks that every process passes the same values; every process must call it.

        check_agreement(config=to_json(config), data=manifest["content_hash"])

    Raises:
      UserError: a value differs; the message names it and the processes where it differs from that of process 0.
    """
    for name, value in values.items():
        digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
        digests = np.atleast_2d(multihost_utils.process_allgather(digest))
        differing = [str(i) for i, other in enumerate(digests) if not np.array_equal(other, digests[0])]
        if differing:
            raise UserError(
                f"the {name} of process {', '.join(differing)} differs from that of process 0; "
                "start all processes with the same one"
            )


def check_shared_folder(folder: epath.Path) -> None:
    """Checks that all processes see the folder of process 0, by a file that it makes there; every process must call it.

    Raises:
      UserError: a process sees another folder; the message names it.
    """
    if jax.process_count() == 1:
        return
    token = np.frombuffer(os.urandom(8), np.uint8)
    if is_first := jax.process_index() == 0:
        files.write_text(folder / f".seen-{token.tobytes().hex()}", "")
    token = multihost_utils.broadcast_one_to_all(token)  # after the file is there
    path = folder / f".seen-{token.tobytes().hex()}"
    seen = multihost_utils.process_allgather(np.array([path.exists()]))[:, 0]
    if is_first:
        path.unlink()
    multihost_utils.sync_global_devices("the file is gone")  # before an error of another process ends process 0
    if not seen.all():
        others = ", ".join(str(i) for i in np.flatnonzero(~seen))
        raise UserError(
            f"--workdir={folder}: process {others} does not see what process 0 writes there; "
            "give a folder that all machines share, or one on gs:// or s3://"
        )


class Preemption:
    """Knows whether the run was asked to end (by SIGTERM); all processes learn it at the same step.

    Args:
      grace_seconds: end the process if saving takes longer than this; 0: wait until everything is saved.
    """

    def __init__(self, grace_seconds: int = 0) -> None:
        self._grace_seconds, self._requested = grace_seconds, False
        # With several processes, JAX's coordination service handles SIGTERM, and finds a step that no process has passed yet.
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._on_sigterm)
        if ready := os.environ.get(READY_VARIABLE):
            pathlib.Path(ready).touch()

    def _on_sigterm(self, number: int, frame: Any) -> None:
        del number, frame
        self._request("SIGTERM: saving at the end of this step")

    def _request(self, line: str) -> None:
        if self._requested:
            return
        self._requested = True
        logging.info("%s", line)
        if self._grace_seconds:
            reason = f"not saved within --grace_seconds={self._grace_seconds}; the checkpoint before stays"
            timer = threading.Timer(self._grace_seconds, peers.end_process, (reason, PREEMPTED))
            timer.daemon = True
            timer.start()

    def reached(self, step: int) -> bool:
        """Returns whether to save and end at this step; every process must call it once per step."""
        if jax.process_count() == 1:
            return self._requested
        if multihost_utils.reached_preemption_sync_point(step):
            self._request(f"SIGTERM: saving at step {step}, as all processes do")
        return self._requested
