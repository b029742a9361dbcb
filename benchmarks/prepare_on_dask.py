"""Prepares a dataset on this machine, and again on a cluster of Dask of which one worker is killed; compares the two.

  pip install -e '.[dask]'
  python -m benchmarks.prepare_on_dask --folder=/tmp/compared --input='corpus/*.jsonl.zst'

The cluster is a scheduler and three worker processes of one thread, which meet over TCP on this machine, as they would on
several. Beam's DaskRunner runs each stage as a job. While a worker runs a task of the stage --kill_in, it is killed with
SIGKILL, and nobody starts it again: the two others do its tasks too. Expect equal content hashes. All further flags are those
of `contrastive-jax prepare`. The exit status is 1 if the hashes differ, or if no worker could be killed in time.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
DASK = [sys.executable, "-m", "dask"]


def environment() -> dict[str, str]:
    """Returns the environment of the processes: they find this package."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


@contextlib.contextmanager
def cluster(folder: pathlib.Path, workers: int) -> Iterator[Any]:
    """Starts a scheduler and workers; yields a client of theirs.

    Args:
      folder: for their logs, and for the file SCHEDULER that tells clients the address of the scheduler.
      workers: the number of worker processes.
    """
    import distributed

    address_file = f"--scheduler-file={scheduler_file(folder)}"
    commands = [[*DASK, "scheduler", address_file, "--host=127.0.0.1", "--port=0", "--no-dashboard"]]
    for number in range(workers):
        options = ["--host=127.0.0.1", "--nthreads=1", "--no-nanny", "--no-dashboard", f"--name={number}"]
        commands.append([*DASK, "worker", address_file, *options, f"--local-directory={folder}"])
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            log = stack.enter_context((folder / f"dask-{number}.log").open("w"))
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), cwd=folder)
            stack.callback(process.wait)
            stack.callback(process.kill)
        deadline = time.monotonic() + 60
        while not scheduler_file(folder).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        client = stack.enter_context(distributed.Client(scheduler_file=str(scheduler_file(folder)), set_as_default=False))
        client.wait_for_workers(workers, timeout=60)
        yield client


def scheduler_file(folder: pathlib.Path) -> pathlib.Path:
    """Returns the file that tells the address of the scheduler."""
    return folder / "scheduler.json"


class Killer(threading.Thread):
    """Kills one worker while it runs a task of a stage whose first tasks are done.

    Args:
      client: of the cluster.
      tasks: the folder of the outcomes of tasks.
      stage: the name of the stage.

    Attributes:
      killed: what was killed, or "".
    """

    def __init__(self, client: Any, tasks: pathlib.Path, stage: str):
        super().__init__(daemon=True)
        self._client, self._tasks, self._stage = client, tasks, stage
        self._pids = client.run(os.getpid)
        self.killed = ""

    def run(self) -> None:
        """Waits for the moment; see the class."""
        while not self.killed:
            done = len([*self._tasks.glob(f"{self._stage}-*.json")])
            if done:
                busy = [worker for worker, tasks in self._client.processing().items() if tasks]
                if busy:
                    os.kill(self._pids[busy[0]], signal.SIGKILL)
                    self.killed = f"{busy[0]}, after {done} outcomes of the stage {self._stage}"
            time.sleep(0.02)


def prepare(output: pathlib.Path, flags: Sequence[str]) -> dict[str, Any]:
    """Runs `contrastive-jax prepare`; returns the manifest and, as "seconds", the time that it took."""
    began = time.monotonic()
    command = [sys.executable, "-m", "contrastive_jax", "prepare", f"--output={output}", *flags]
    subprocess.run(command, check=True, env=environment())
    return json.loads((output / "manifest.json").read_text()) | {"seconds": time.monotonic() - began}


def prepare_on_cluster(folder: pathlib.Path, flags: Sequence[str], workers: int, kill_in: str) -> tuple[dict[str, Any], str]:
    """Prepares FOLDER/dask on a cluster; returns what `prepare` does, and which worker was killed."""
    options = json.dumps({"runner": "DaskRunner", "dask_scheduler_file": str(scheduler_file(folder))})
    with cluster(folder, workers) as client:
        killer = Killer(client, folder / "dask.incomplete" / ".work" / "tasks", kill_in)
        killer.start()
        return prepare(folder / "dask", [*flags, f"--beam_pipeline_options={options}"]), killer.killed


def main() -> None:
    """Prints a line per run, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="where FOLDER/local and FOLDER/dask are made")
    parser.add_argument("--cluster_workers", type=int, default=3, help="worker processes of the cluster")
    parser.add_argument("--kill_in", default="token", help="the stage in which a worker is killed")
    arguments, flags = parser.parse_known_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    local = prepare(folder / "local", flags)
    print(f"this machine: {local['seconds']:.0f} s, content {local['content_hash']}")
    dask, killed = prepare_on_cluster(folder, flags, arguments.cluster_workers, arguments.kill_in)
    print(f"Dask:         {dask['seconds']:.0f} s, content {dask['content_hash']}; killed: {killed or 'no worker'}")
    same = local["content_hash"] == dask["content_hash"]
    print("equal" if same else "DIFFERENT")
    sys.exit(not (same and killed))


if __name__ == "__main__":
    main()
