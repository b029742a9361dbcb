"""The story of a run on a pod; see tests/cloud/rehearsal.sh.

Each worker is a machine of its own (machine.sh). The bucket is fake-gcs-server behind a proxy that refuses 5 % of the requests.
launch/tpu.sh reaches the workers through tests/launch/fakes/gcloud; nothing but gcloud and the machines below it is a fake.
"""

import argparse
import contextlib
import http.server
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import ClassVar

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from cloud.emulators import gcs_environment, make_bucket, start_gcs, upload
from cloud.proxy import Proxy
from conftest import free_address, overrides, write_dataset
from launch.machines import write_venv

SLICE = ["--name=pod", "--zone=us-west4-a"]
DIGEST = re.compile(r"step (\d+)  parameters digest: (\w+)")
BEGAN = time.monotonic()


def tell(line: str) -> None:
    """Prints one line of the story."""
    print(f"{time.monotonic() - BEGAN:5.0f} s  {line}", flush=True)


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's metadata server, one for all workers: it knows them by their addresses."""

    notices: ClassVar[dict[int, str]] = {}  # worker → value of instance/preempted

    def do_GET(self) -> None:
        worker = int(self.client_address[0].rpartition(".")[2]) - 10
        values = {
            "instance/maintenance-event": "NONE",
            "instance/preempted": self.notices.get(worker, "FALSE"),
            "instance/attributes/agent-worker-number": str(worker),
            "instance/service-accounts/default/token": json.dumps(
                {"access_token": "token", "expires_in": 3600, "token_type": "Bearer"}
            ),
        }
        path = urllib.parse.urlsplit(self.path).path.removeprefix("/computeMetadata/v1/").rstrip("/")
        self.send_response(200 if path in values else 404)
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(values.get(path, "").encode())

    def log_message(self, *_: object) -> None:
        """Silence."""


def call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def bridge() -> Iterator[tuple[str, str]]:
    """Makes a network for the workers; yields the name of its bridge and its subnet, "10.A.B"; this machine is its .1."""
    name, subnet = f"cj{os.getpid() % 100_000}", f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
    call("ip", "link", "add", name, "type", "bridge")
    try:
        call("ip", "addr", "add", f"{subnet}.1/24", "dev", name)
        call("ip", "link", "set", name, "up")
        yield name, subnet
    finally:
        call("ip", "link", "del", name)


def unbroken_digest(training: list[str], dataset: pathlib.Path, workdir: pathlib.Path, workers: int) -> str:
    """Trains on a local disk without a fault, in as many processes; returns the digest of the parameters."""
    together = [f"--config.data.dir={dataset}", f"--workdir={workdir}", f"--coordinator={free_address()}"]
    command = [sys.executable, "-m", "contrastive_jax", "train", *training, *together, f"--num_processes={workers}"]
    processes = []
    for number in range(workers):
        with open(workdir.with_name(f"local-{number}.log"), "w") as log:
            processes.append(subprocess.Popen([*command, f"--process_id={number}"], cwd=ROOT, stdout=log, stderr=log))
    statuses = [process.wait() for process in processes]
    log = workdir.with_name("local-0.log").read_text()
    assert statuses == [0] * workers, log
    return DIGEST.findall(log)[-1][1]


class Pod:
    """The launcher at the fake gcloud, and the hand that breaks things.

    Args:
      folder: of everything that is written here.
      workers: their number.
      network: the bridge and the subnet.
      storage: the environment by which the workers find the bucket.
    """

    def __init__(self, folder: pathlib.Path, workers: int, network: tuple[str, str], storage: dict[str, str]) -> None:
        name, subnet = network
        self.cloud, self.log = folder / "cloud", folder / "launcher.log"
        self._run: subprocess.Popen[str] | None = None
        (self.cloud / "faults").mkdir(parents=True)
        write_venv(folder / "venv")
        hosts = ["127.0.0.1 localhost", f"{subnet}.1 metadata.google.internal"]
        (folder / "hosts").write_text("\n".join(hosts + [f"{subnet}.{10 + n} t1v-n-pod-w-{n}" for n in range(workers)]) + "\n")
        self._environment = os.environ | {
            "PATH": f"{ROOT}/tests/launch/fakes:{os.environ['PATH']}",
            "FAKE_GCLOUD": str(self.cloud),
            "FAKE_WORKERS": str(workers),
            "FAKE_ENTER": f"bash {ROOT}/tests/cloud/machine.sh",
            "FAKE_COORDINATOR": f"{subnet}.10",
            "FAKE_BUCKETS": storage["STORAGE_EMULATOR_HOST"],
            "BRIDGE": name,
            "SUBNET": subnet,
            "MACHINE_VENV": str(folder / "venv"),
            "MACHINE_HOSTS": str(folder / "hosts"),
        }
        on_workers = storage | {"VENV": "/mnt/venv", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": os.environ["XLA_FLAGS"]}
        on_workers |= {"LOG_SECONDS": "2", "NOTICE_SECONDS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        self._options = [*SLICE, "--type=v5litepod-16", "--spot", "--queued", "--poll=1", "--timeout=20"]
        self._options += [f"--env={key}={value}" for key, value in on_workers.items()]

    def launch(self, command: str, *arguments: str) -> subprocess.Popen[str]:
        """Starts launch/tpu.sh."""
        options = self._options if command == "run" else SLICE
        full = ["bash", "launch/tpu.sh", command, *options, *arguments]
        outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._run = subprocess.Popen(full, cwd=ROOT, env=self._environment, text=True, start_new_session=True, **outputs)
        return self._run

    def lines(self, run: subprocess.Popen[str]) -> Iterator[str]:
        """Yields the launcher's lines; tells those that are its own, and keeps all in a file."""
        assert run.stdout
        with self.log.open("a") as log:
            for line in run.stdout:
                log.write(line)
                log.flush()
                if line.startswith(("== ", "error: ", "notice: ")):
                    tell(line.rstrip().removeprefix("== "))
                yield line

    def break_once(self, name: str, *lines: str) -> None:
        """Makes gcloud or a worker fail once; see tests/launch/fakes/gcloud."""
        (self.cloud / "faults" / name).write_text("\n".join(["1", *lines]))

    def close(self) -> None:
        """Ends the launcher and the machines, if the story broke off."""
        if self._run and self._run.poll() is None:
            os.killpg(self._run.pid, signal.SIGKILL)
        if (self.cloud / "pod" / "slice.json").exists():
            self.gcloud("fake", "preempt", "pod")

    def gcloud(self, *arguments: str) -> None:
        subprocess.run(["gcloud", *arguments], env=self._environment, check=True)

    def kill_training(self, worker: int) -> None:
        """Kills the training of a worker; the machine stays."""
        tell(f"-- the training of worker {worker} is killed")
        mark = f"FAKE_WORKER={self.cloud}/pod/{worker}".encode()
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_bytes()
                if mark in (process / "environ").read_bytes() and b"contrastive_jax\0train\0" in command:
                    os.kill(int(process.name), signal.SIGKILL)

    def kill_machine(self, worker: int) -> None:
        """Kills a whole worker. Google notices that a little later, and takes the slice away."""
        tell(f"-- worker {worker} is killed, with everything on it")
        os.kill(int((self.cloud / "pod" / f"machine-{worker}").read_text()), signal.SIGKILL)
        time.sleep(3)
        self.gcloud("fake", "preempt", "pod")


def tell_story(pod: Pod, arguments: list[str], workers: int, short: bool) -> str:
    """Runs the pod until it is done, and breaks one thing in each start; returns the digest of the parameters."""
    if not short:
        pod.break_once("queue-fails", "Quota limit 'TPUV5sLitepodServingPerProjectPerZone' has been exceeded. Limit: 16")
        tell("-- the first request will fail in the queue")
        run = pod.launch("run", "--", *arguments)
        list(pod.lines(run))
        assert run.wait() == 2
        tell("-- the launcher has stopped with status 2; the quota is raised, and it is called again")
    pod.break_once(f"ssh-fails-{workers - 1}")
    pod.break_once("key-seconds", "3")
    Metadata.notices[1] = "TRUE"
    tell(f"-- the first ssh to worker {workers - 1} will fail, and worker 1 has a notice of preemption from the beginning")
    run = pod.launch("run", "--", *arguments)
    faults = [lambda: None, lambda: pod.kill_training(workers - 1), lambda: pod.kill_machine(workers // 2)]
    start, saves, digest = -1, 0, ""
    for line in pod.lines(run):
        if line.startswith("== starting on all workers"):
            start, saves = start + 1 + (short and start == 0), 0  # the short form leaves out the second fault
        elif line.startswith("== training: exit 75") and Metadata.notices:
            tell("-- the notice is withdrawn")
            Metadata.notices.clear()
        elif "resuming from" in line:
            tell("resuming from " + line.rpartition("resuming from ")[2].rstrip())
        elif found := DIGEST.search(line):
            saves, digest = saves + 1, found[2]
            # In the long form a checkpoint of this start is whole by then: a save waits for the one before it.
            if saves == (1 if short else 2) and 0 < start < len(faults):
                faults[start]()
    assert run.wait() == 0, f"the launcher ended with status {run.returncode}; see {pod.log}"
    return digest


def rehearse(folder: pathlib.Path, short: bool) -> None:
    workers = 2 if short else 4
    dataset = write_dataset(folder / "data", {"train": [40] * 150, "validation": [40] * 40})
    steps = 20 if short else 40
    training = ["--config=configs/debug.py", f"--config.steps={steps}", "--config.checkpoint_every=10", "--config.log_every=10"]
    own = re.compile(r"--config\.(steps|checkpoint_every|log_every|data\.dir)=")
    training += [value for value in overrides("debug", dataset) if not own.match(value)]
    tell(f"an unbroken run of {workers} processes on the local disk")
    expected = unbroken_digest(training, dataset, folder / "local", workers)
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(bridge())
        host = f"{network[1]}.1"
        emulator = stack.enter_context(start_gcs(host=host))
        proxy = stack.enter_context(Proxy(emulator, host=host, seed=15, refuse=0.05))
        server = stack.enter_context(http.server.ThreadingHTTPServer((host, 80), Metadata))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        bucket = make_bucket("gs", emulator)
        upload(dataset, f"{bucket}/pile", emulator)
        pod = Pod(folder, workers, network, gcs_environment(proxy.address))
        stack.callback(pod.close)
        arguments = [*training, f"--config.data.dir={bucket}/pile", f"--workdir={bucket}/run"]
        reached = tell_story(pod, arguments, workers, short)
        list(pod.lines(pod.launch("delete", "--queued")))
        text = pod.launch("logs", f"--worker={workers - 1}", "--", f"--workdir={bucket}/run").communicate()[0]
        starts = text.count("resuming from") + 1
        tell(f"the slice is gone; the log of worker {workers - 1} in the bucket tells of {starts} starts")
        seen = dict(proxy.seen)
        tell(f"the bucket was asked {len(proxy.requests)} times, and refused {seen.get('refused', 0)} times")
        tell(f"parameters digest of the unbroken run: {expected}")
        tell(f"parameters digest of the pod's run:    {reached}")
        assert reached == expected
        assert starts >= (2 if short else 4), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="two workers, fewer faults")
    values = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the machines and the bridge go, too
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    folder = pathlib.Path(tempfile.mkdtemp(prefix="rehearsal-", dir="/tmp"))
    rehearse(folder, values.short)
    shutil.rmtree(folder)
    tell("done: the same parameters, bit for bit")


if __name__ == "__main__":
    main()
