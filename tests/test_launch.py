"""The launchers: a fake gcloud and a real SLURM run what a pod and a cluster would, on this machine."""

import http.server
import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from conftest import ROOT, XLA_FLAGS, overrides, wait_for

from contrastive_jax.processes import PREEMPTED

TPU = ["bash", str(ROOT / "launch/tpu.sh")]
SLICE = ["--name=pod", "--zone=us-west4-a"]
POD = [*SLICE, "--type=v5litepod-16", "--spot", "--poll=1", "--timeout=30"]


@pytest.fixture
def environment(tmp_path: pathlib.Path) -> dict[str, str]:
    """Machines on which everything is installed already: VENV is this Python's."""
    binary = tmp_path / "venv" / "bin"
    binary.mkdir(parents=True)
    (binary / "python").symlink_to(sys.executable)
    (binary / "activate").write_text(
        f"export VIRTUAL_ENV={tmp_path / 'venv'} PATH={pathlib.Path(sys.executable).parent}:$PATH\n"
    )
    for extras in ("base", "tpu", "cuda"):
        shutil.copy(ROOT / "setup.cfg", tmp_path / "venv" / f"installed-{extras}")
    (tmp_path / "cloud").mkdir()
    return os.environ | {
        "VENV": str(tmp_path / "venv"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": XLA_FLAGS.format(1),
        "FAKE_GCLOUD": str(tmp_path / "cloud"),
        "PATH": f"{ROOT / 'tests/fakes'}:{os.environ['PATH']}",
    }


def saved(workdir: pathlib.Path) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()}


def requests(environment: dict[str, str]) -> list[list[str]]:
    log = pathlib.Path(environment["FAKE_GCLOUD"]) / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_a_pod_trains_is_preempted_and_comes_back(
    dataset: pathlib.Path, tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    workdir = tmp_path / "bucket with space" / "run"
    training = [*overrides("debug", dataset), "--config=configs/debug.py", f"--workdir={workdir}"]
    training += ["--config.steps=60", "--config.checkpoint_every=10", "--config.log_every=10"]
    run = subprocess.Popen(
        [*TPU, "run", *POD, "--queued", "--", *training],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: saved(workdir) or run.poll() is not None, 240)
        assert run.poll() is None, run.communicate()[0]
        subprocess.run(["gcloud", "fake", "preempt", "pod"], env=environment, check=True)
        output = run.communicate(timeout=300)[0]
    finally:
        run.kill()
        subprocess.run(["gcloud", "fake", "preempt", "pod"], env=environment, check=False)
    assert run.returncode == 0, output
    assert "4 devices in 4 processes" in output
    assert "training: lost PREEMPTED" in output and "starting again (1)" in output
    resumed = re.search(r"resuming from .*/(\d+)", output)
    assert resumed and int(resumed[1]) >= 10
    assert "training: exit 0" in output and 60 in saved(workdir)
    verbs = [request[2:4] for request in requests(environment)]
    assert verbs.count(["queued-resources", "create"]) == 2
    assert verbs.count(["queued-resources", "delete"]) == 1


@pytest.mark.slow
def test_stop_saves_and_a_failed_training_gives_its_status(
    dataset: pathlib.Path, tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    bad = [*TPU, "run", *POD, "--", "--config=configs/debug.py", f"--workdir={tmp_path}", "--config.data.dir=/absent"]
    done = subprocess.run(bad, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "error: config.data.dir=/absent" in done.stderr
    # The slice is there now: nothing is created again.
    training = [*overrides("debug", dataset), f"--workdir={tmp_path}", "--config.steps=1000000", "--config.checkpoint_every=0"]
    run = subprocess.Popen([*TPU, "run", *POD, "--", *training], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        metrics = tmp_path / "metrics.jsonl"
        wait_for(lambda: run.poll() is not None or (metrics.exists() and "loss" in metrics.read_text()), 240)
        subprocess.run([*TPU, "stop", *SLICE], env=environment, check=True, timeout=120, capture_output=True)
        output = run.communicate(timeout=60)[1]
    finally:
        run.kill()
        subprocess.run([*TPU, "delete", *SLICE], env=environment, check=True, capture_output=True)
    assert run.returncode == 0, output
    assert "training: stopped" in output
    assert len(saved(tmp_path)) == 1
    assert [request[2:4] for request in requests(environment)].count(["tpu-vm", "create"]) == 1


def test_a_silent_worker_stops_the_start(tmp_path: pathlib.Path, environment: dict[str, str]) -> None:
    subprocess.run([*TPU, "create", *POD], env=environment, check=True, capture_output=True)
    (tmp_path / "cloud" / "pod" / "deaf-2").touch()
    run = [*TPU, "run", *POD, "--timeout=2", "--", "--workdir=gs://bucket/run"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "no answer within 2 s from worker 2 of 4 of pod; nothing was started" in done.stderr
    assert not any("worker.sh start" in " ".join(request) for request in requests(environment))
    (tmp_path / "cloud" / "pod" / "deaf-2").unlink()
    ssh = [*TPU, "ssh", *SLICE, "--worker=1", "--", "bash", "-c", 'echo "[$0]" "$HOME"', "a b; true"]
    done = subprocess.run(ssh, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"[a b; true] {tmp_path}/cloud/pod/worker-1\n"


def test_a_maintenance_notice_saves_and_ends(
    dataset: pathlib.Path, tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    """The metadata server of a machine that is taken as soon as its training has begun."""
    workdir = tmp_path / "run"
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("contrastive_jax", "configs", "launch", "setup.cfg"):
        (tree / name).symlink_to(ROOT / name)

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/computeMetadata/v1/instance/maintenance-event"
            begun = (workdir / "metrics.jsonl").exists()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"TERMINATE_ON_HOST_MAINTENANCE" if begun else b"NONE")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        alone = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}
        more = {"METADATA": f"http://127.0.0.1:{server.server_port}", "NOTICE_SECONDS": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
        training = [*overrides("debug", dataset), f"--workdir={workdir}", "--config.steps=1000000"]
        worker = ["bash", "launch/worker.sh"]
        subprocess.run([*worker, "start", *training], cwd=tree, env=environment | alone | more, check=True, timeout=60)
        wait_for((tree / ".job" / "exit").exists)
        server.shutdown()
    log = (tree / ".job" / "log").read_text()
    assert (tree / ".job" / "exit").read_text() == "75\n", log
    assert "notice: TERMINATE_ON_HOST_MAINTENANCE; saving" in log and len(saved(workdir)) == 1


def dry_run(environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [
            *(*TPU, "run", "--dry-run", "--name=cpt-s", "--zone=us-west4-a", "--project=lab", "--type=v5litepod-256", "--spot"),
            *("--", "--config=configs/cpt_text.py:s", "--workdir=gs://bucket/cpt-s", "--config.data.dir=gs://bucket/it's here"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.removeprefix("+ ") for line in done.stderr.splitlines() if line.startswith("+ ")]


def test_dry_run_prints_the_sequence_and_does_nothing(environment: dict[str, str]) -> None:
    commands = dry_run(environment)
    assert not requests(environment)
    verbs = [" ".join(shlex.split(line)[3:5]) for line in commands]
    order = [
        "tpu-vm list",
        "tpu-vm create",
        "tpu-vm list",
        "tpu-vm describe",
        "tpu-vm ssh",
        "tpu-vm scp",
        "tpu-vm ssh",
        "tpu-vm ssh",
    ]
    assert verbs == [*order, "tpu-vm ssh"]
    assert (
        "--accelerator-type=v5litepod-256 --version=v2-alpha-tpuv5-lite --spot --zone=us-west4-a --project=lab" in commands[1]
    )
    start = shlex.split(commands[7])
    assert "--worker=all" in start
    remote = shlex.split(next(word for word in start if word.startswith("--command="))[10:])
    assert remote[-1] == "--config.data.dir=gs://bucket/it's here"


GCLOUD = shutil.which("gcloud")


@pytest.mark.skipif(not GCLOUD, reason="the real gcloud, which checks the flags, is not installed")
def test_the_real_gcloud_knows_every_command(environment: dict[str, str]) -> None:
    for command in dry_run(environment):
        lint = [str(GCLOUD), "meta", "lint-gcloud-commands", f"--command-string={command}"]
        done = subprocess.run(lint, capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout)[0]["success"], json.loads(done.stdout)[0]["error_message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--zone=z"], "--name=: give the slice a name"),
        (["run", "--name=Pod; rm -r x", "--zone=z"], "--name=Pod; rm -r x: give the slice a name"),
        (["run", *SLICE, "--", "--workdir=runs/x"], "run needs -- --workdir=gs://BUCKET/RUN"),
        (["create", *SLICE], "create needs --type="),
        (["create", *SLICE, "--type=v9-8"], "no software version is known"),
        (["run", *SLICE, "--config=x"], "unknown option --config=x; arguments of the training come after --"),
        (["run", *SLICE, "--poll=soon"], "whole numbers, not soon"),
    ],
)
def test_user_errors_of_tpu(arguments: list[str], message: str, environment: dict[str, str]) -> None:
    done = subprocess.run([*TPU, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


def test_help_of_the_launchers() -> None:
    for name, word in (("tpu.sh", "--queued"), ("gpu.sh", "sbatch --nodes=4"), ("local.sh", "--workdir=DIR")):
        done = subprocess.run(["bash", str(ROOT / "launch" / name), "--help"], capture_output=True, text=True, check=True)
        assert word in done.stdout and "set -e" not in done.stdout


def test_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = [str(path) for folder in ("launch", "tests") for path in (ROOT / folder).glob("*.sh")]
    subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, check=True)


@pytest.fixture
def slurm(tmp_path: pathlib.Path) -> Iterator[dict[str, str]]:
    """A SLURM cluster of two nodes on this machine: its own daemons, nothing of the system's is touched."""
    if not shutil.which("slurmctld"):
        pytest.skip("SLURM is not installed (Debian: slurm-wlm)")
    if os.geteuid():
        pytest.skip("SLURM's daemons need root")
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    here = socket.gethostname()
    (tmp_path / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={here}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={tmp_path}/munge.socket
SlurmUser=root
StateSaveLocation={tmp_path}/state
SlurmdSpoolDir={tmp_path}/spool-%n
SlurmctldPidFile={tmp_path}/slurmctld.pid
SlurmdPidFile={tmp_path}/slurmd-%n.pid
SlurmctldLogFile={tmp_path}/slurmctld.log
SlurmdLogFile={tmp_path}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
# JAX takes the first name as the coordinator's: one that can be resolved.
NodeName={here},{here}-b NodeHostname={here} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}]
PartitionName=main Nodes=ALL Default=YES State=UP
""")
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    tmp_path.chmod(0o755)
    munge = ["munged", "--foreground", "--force", f"--socket={tmp_path}/munge.socket", f"--key-file={key}"]
    munge += [f"--pid-file={tmp_path}/munge.pid", f"--log-file={tmp_path}/munge.log", f"--seed-file={tmp_path}/munge.seed"]
    commands = [munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", here], ["slurmd", "-D", "-N", f"{here}-b"]]
    daemons = []
    for name in ("state", f"spool-{here}", f"spool-{here}-b"):
        (tmp_path / name).mkdir()
    try:
        for command in commands:
            daemons.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            wait_for((tmp_path / "munge.socket").exists, 20)
        sinfo = ["sinfo", "--noheader", "--format=%t %D"]
        wait_for(lambda: subprocess.run(sinfo, env=environment, capture_output=True, text=True).stdout == "idle 2\n", 60)
        yield environment
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()


def test_slurm_runs_two_nodes_and_requeues(
    slurm: dict[str, str], dataset: pathlib.Path, tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    environment = slurm | environment
    workdir, log = tmp_path / "run", tmp_path / "job.log"
    training = [*overrides("debug", dataset), f"--workdir={workdir}", "--config.steps=60", "--config.checkpoint_every=0"]

    def call(*command: str) -> str:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    job = call("sbatch", "--parsable", "--nodes=2", f"--output={log}", "launch/gpu.sh", *training).strip()
    try:
        wait_for(lambda: (workdir / "metrics.jsonl").exists() and "loss" in (workdir / "metrics.jsonl").read_text(), 180)
        call("scancel", "--batch", "--signal=TERM", job)  # what --signal=B:TERM@300 does before the time limit
        wait_for(lambda: "back into the queue" in log.read_text(), 120)
        stopped = saved(workdir)
        assert len(stopped) == 1 and 0 < min(stopped) < 60

        # SLURM holds a requeued job for two minutes.
        wait_for(lambda: call("squeue", "--noheader", "--format=%t", f"--job={job}") == "PD\n", 60)
        call("scontrol", "update", f"jobid={job}", "starttime=now")
        wait_for(lambda: "ended at step 60 of 60" in log.read_text(), 240)
        text = log.read_text()
    finally:
        subprocess.run(["scancel", "--signal=KILL", "--full", job], env=environment, check=False)
    assert "2 devices in 2 processes" in text
    assert f"resuming from {workdir}/checkpoints/{min(stopped)}" in text
    assert "start 0" in text and "start 1" in text


def test_gpu_on_one_node_ends_with_the_status_of_the_training(
    dataset: pathlib.Path, tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    training = ["bash", str(ROOT / "launch/gpu.sh"), *overrides("debug", dataset), f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run([*training, "--config.steps=2"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "ended at step 2 of 2" in done.stderr
    del environment["JAX_PLATFORMS"]
    if not shutil.which("nvidia-smi"):
        done = subprocess.run(training, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "no GPU answers on this machine" in done.stderr


def test_the_launchers_know_the_status_of_a_preemption() -> None:
    for name in ("tpu.sh", "gpu.sh"):
        assert f"PREEMPTED={PREEMPTED} " in (ROOT / "launch" / name).read_text()
