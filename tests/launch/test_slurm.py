"""launch/gpu.sh on one node, and under a real SLURM with two nodes on this machine, which binds each process to its cores."""

import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import ROOT, wait_for
from launch.machines import debug, saved

CORES = os.cpu_count() or 1
# A python that trains as a test says, at once: $number is the number of the process.
STUB = """#!/usr/bin/env bash
[[ "${{3:-}}" == train ]] || exec {python} "$@"
number="${{SLURM_PROCID:-0}}"
{training}
"""


def stub_training(training: str, tmp_path: pathlib.Path) -> None:
    """Makes the training of a machine with everything installed a line of bash."""
    binary = tmp_path / "venv" / "bin"
    (binary / "python").unlink()
    (binary / "python").write_text(STUB.format(python=sys.executable, training=training))
    (binary / "python").chmod(0o755)
    (binary / "activate").write_text(f"export VIRTUAL_ENV={tmp_path / 'venv'} PATH={binary}:$PATH\n")


@pytest.fixture
def slurm(tmp_path: pathlib.Path) -> Iterator[dict[str, str]]:
    """A SLURM cluster of two nodes on this machine: its own daemons, nothing of the system's is touched.

    Both nodes have all cores of this machine and two GPUs that do not exist.
    """
    if not shutil.which("slurmctld"):
        pytest.skip("SLURM is not installed (Debian: slurm-wlm)")
    if os.geteuid():
        pytest.skip("SLURM's daemons need root")
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    here, first_job = socket.gethostname(), 100 * ports[0]  # numbers that no cluster of another test has
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
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/affinity
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
FirstJobId={first_job}
# JAX takes the first name as the coordinator's: one that can be resolved.
NodeName=DEFAULT Sockets=1 CoresPerSocket={CORES} Gres=gpu:2
NodeName={here},{here}-b NodeHostname={here} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}]
PartitionName=main Nodes=ALL Default=YES State=UP
""")
    (tmp_path / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    cluster = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    tmp_path.chmod(0o755)
    munge = ["munged", "--foreground", "--force", f"--socket={tmp_path}/munge.socket", f"--key-file={key}"]
    munge += [f"--pid-file={tmp_path}/munge.pid", f"--log-file={tmp_path}/munge.log", f"--seed-file={tmp_path}/munge.seed"]
    commands = [munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", here], ["slurmd", "-D", "-N", f"{here}-b"]]
    daemons = []
    for name in ("state", f"spool-{here}", f"spool-{here}-b"):
        (tmp_path / name).mkdir()
    try:
        for command in commands:
            daemons.append(subprocess.Popen(command, env=cluster, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            wait_for((tmp_path / "munge.socket").exists, 20)
        sinfo = ["sinfo", "--noheader", "--format=%t %D"]
        wait_for(lambda: subprocess.run(sinfo, env=cluster, capture_output=True, text=True).stdout == "idle 2\n", 60)
        yield cluster
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
        for folder in (ROOT / ".job").glob(f"slurm-{ports[0]}??"):
            shutil.rmtree(folder)


class Cluster:
    """The jobs of a test: they run one after another, each on both nodes.

    Args:
      variables: the environment of the jobs and of SLURM's commands.
      folder: where the logs go.
      training: the arguments of every training.
    """

    def __init__(self, variables: dict[str, str], folder: pathlib.Path, training: list[str]):
        self.variables, self.folder, self.training = variables, folder, training
        self.jobs: dict[str, str] = {}

    def call(self, *command: str) -> str:
        return subprocess.run(command, cwd=ROOT, env=self.variables, capture_output=True, text=True, check=True).stdout

    def submit(self, name: str, *flags: str, training: tuple[str, ...] = ()) -> None:
        """Submits a job with the log NAME.log and the workdir NAME."""
        more = [*self.training, f"--workdir={self.folder / name}", *training]
        sbatch = ["sbatch", "--parsable", "--nodes=2", f"--output={self.folder / name}.log", *flags]
        self.jobs[name] = self.call(*sbatch, "launch/gpu.sh", *more).strip()

    def state(self, name: str) -> str:
        """Returns the state of a job, such as PENDING, RUNNING, COMPLETED or FAILED."""
        return re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", self.jobs[name]))[1]  # type: ignore[index]

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def end(self, *names: str, seconds: int = 600) -> dict[str, str]:
        """Waits for the end of all jobs and returns their states; lets those start at once that SLURM holds after a requeue."""
        held: dict[str, int] = {}

        def ended(name: str) -> bool:
            state, log = self.state(name), self.log(name)
            if log.count("back into the queue") < log.count("== job "):
                return state in ("COMPLETED", "FAILED")
            held[name] = held.get(name, 0) + 1 if state == "PENDING" else 0
            if held[name] % 30 == 29:  # not before the end of the start before
                self.call("scontrol", "update", f"jobid={self.jobs[name]}", "starttime=now")
            return False

        wait_for(lambda: all([ended(name) for name in names]), seconds)
        return {name: self.state(name) for name in names}

    def cancel(self) -> None:
        for job in self.jobs.values():
            subprocess.run(["scancel", "--signal=KILL", "--full", job], env=self.variables, capture_output=True, check=False)


@pytest.mark.slow
def test_three_jobs_one_after_another_each_with_all_its_cores(
    slurm: dict[str, str],
    dataset: pathlib.Path,
    tmp_path: pathlib.Path,
    environment: dict[str, str],
) -> None:
    """The first is told to save and comes back; the others find the ports of the one before free."""
    training = [*debug(dataset), "--config.steps=2", "--config.checkpoint_every=0"]
    cluster = Cluster(slurm | environment, tmp_path, training)
    cluster.submit("first", "--exclusive", training=("--config.steps=60",))
    cluster.submit("second", f"--cpus-per-task={CORES}")
    cluster.submit("third", "--exclusive", "--gpus-per-node=2", training=("--processes=gpu",))
    try:
        metrics = tmp_path / "first" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and "loss" in metrics.read_text(), 300)
        cluster.call("scancel", "--batch", "--signal=TERM", cluster.jobs["first"])  # as --signal=B:TERM@300 does
        wait_for(lambda: "back into the queue" in cluster.log("first"), 240)
        stopped = saved(tmp_path / "first")
        assert len(stopped) == 1 and 0 < min(stopped) < 60
        states = cluster.end(*cluster.jobs)
    finally:
        cluster.cancel()
    assert set(states.values()) == {"COMPLETED"}, cluster.log("first") + cluster.log("second") + cluster.log("third")
    log = cluster.log("first")
    assert "start 0" in log and "start 1" in log and "2 devices in 2 processes" in log
    assert f"resuming from {tmp_path}/first/checkpoints/{min(stopped)}" in log and "ended at step 60 of 60" in log
    for name, per_node, starts in (("first", 1, 2), ("second", 1, 1), ("third", 2, 1)):
        cores = max(CORES // per_node, 1)
        printed = re.findall(r"process (\d) on .*: (\d+) CPU core", cluster.log(name))
        expected = [(str(number), str(cores)) for number in range(2 * per_node)]
        assert sorted(printed) == sorted(expected * starts), cluster.log(name)


def test_what_a_job_does_after_each_status(slurm: dict[str, str], tmp_path: pathlib.Path, environment: dict[str, str]) -> None:
    """By a stub of python: its cases are named JOB-START-PROCESS, where the other processes wait to be killed."""
    training = """
for argument; do [[ "$argument" != --workdir=* ]] || workdir="${argument#*=}"; done
mkdir -p "$workdir/checkpoints"
case "$(basename "$workdir")-${SLURM_RESTART_COUNT:-0}-$number" in
  saved-0-0) exit 75 ;;
  saved-0-1) sleep 2; kill -KILL $$ ;; # it saved as well, and was killed while it closed
  retried-0-0) mkdir "$workdir/checkpoints/1"; kill -KILL $$ ;;
  retried-1-0) mkdir "$workdir/checkpoints/2"; exit 4 ;;
  broken-*-0) mkdir -p "$workdir/checkpoints/1"; exit 1 ;;
  wrong-0-0) exit 2 ;;
  saved-1-* | retried-2-*) ;;
  *) sleep 60 ;;
esac
"""
    stub_training(training, tmp_path)
    cluster = Cluster(slurm | environment, tmp_path, ["--config=x", "--retries=1"])
    for name in ("saved", "retried", "broken", "wrong"):
        cluster.submit(name, "--cpus-per-task=1")
    try:
        states = cluster.end(*cluster.jobs)
    finally:
        cluster.cancel()
    logs = {name: cluster.log(name) for name in cluster.jobs}
    starts = {name: log.count("== job ") for name, log in logs.items()}
    assert starts == {"saved": 2, "retried": 3, "broken": 2, "wrong": 1}, logs
    assert states == {"saved": "COMPLETED", "retried": "COMPLETED", "broken": "FAILED", "wrong": "FAILED"}, logs
    assert "== saved; back into the queue" in logs["saved"]
    assert "== exit 137; back into the queue" in logs["retried"] and "== exit 4; back into the queue" in logs["retried"]
    assert "the run failed 2 times in a row without a newer checkpoint (--retries=1), at last with status 1" in logs["broken"]


def test_a_job_without_cores_is_warned(slurm: dict[str, str], tmp_path: pathlib.Path, environment: dict[str, str]) -> None:
    if CORES == 1:
        pytest.skip("all nodes have one core here")
    cluster = Cluster(slurm | environment, tmp_path, ["--config=absent.py"])
    cluster.submit("one")
    assert cluster.end("one") == {"one": "FAILED"}
    assert f"warning: the job has 1 of the {CORES} cores" in cluster.log("one")
    assert "2 nodes × 1 processes × 1 cores" in cluster.log("one")


def test_a_shell_that_srun_gave_trains_on_its_node(
    slurm: dict[str, str], tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    """As in `srun --pty bash`; several tasks would be several trainings with one workdir."""
    stub_training('echo "local id ${SLURM_LOCALID-none}: $*"; exit 75', tmp_path)
    shell = ["srun", "--nodes=1", "bash", "-c", f"bash {ROOT}/launch/gpu.sh --config=x"]
    done = subprocess.run(shell, cwd=tmp_path, env=slurm | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert "local id none: -m contrastive_jax train --config=x\n" in done.stdout
    several = ["srun", "--nodes=2", "bash", str(ROOT / "launch/gpu.sh"), "--config=x"]
    done = subprocess.run(several, cwd=tmp_path, env=slurm | environment, capture_output=True, text=True, timeout=120)
    assert "error: srun started this script several times, and each would train by itself" in done.stderr
    assert done.stdout.count("local id") <= 1


@pytest.mark.parametrize("step", [{"SLURM_STEP_ID": "0"}, {}], ids=["step", "session"])
@pytest.mark.parametrize("status", [0, 2, 75])
def test_inside_a_job_the_status_of_the_training_is_that_of_gpu(
    step: dict[str, str], status: int, tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    """In `srun --pty bash`, or in a session that runs as a batch job: SLURM and its job are left alone."""
    stub_training(f'echo "local id ${{SLURM_LOCALID-none}}: $*"; exit {status}', tmp_path)
    fakes, called = tmp_path / "fakes", tmp_path / "called"
    fakes.mkdir()
    for name in ("srun", "scontrol", "scancel"):
        (fakes / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {called}\n')
        (fakes / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_SUBMIT_DIR": "/tmp",
    }
    variables = environment | job | step | {"PATH": f"{fakes}:{environment['PATH']}"}
    gpu = ["bash", str(ROOT / "launch/gpu.sh"), "--config=x"]
    done = subprocess.run(gpu, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "local id none: -m contrastive_jax train --config=x\n" in done.stdout
    assert "warning: only" in done.stderr and "of 2 nodes of this job; sbatch launch/gpu.sh trains on all" in done.stderr
    # One of N nodes: the number of its task says nothing.
    joined = subprocess.run([*gpu, "--coordinator=a:1"], env=variables | {"SLURM_PROCID": "1"}, capture_output=True, text=True)
    assert (
        joined.returncode == status and "local id none: -m contrastive_jax train --config=x --coordinator=a:1" in joined.stdout
    )
    assert "warning" not in joined.stderr and not called.exists()


def test_gpu_on_one_node_ends_with_the_status_of_the_training(
    dataset: pathlib.Path,
    tmp_path: pathlib.Path,
    environment: dict[str, str],
) -> None:
    training = ["bash", str(ROOT / "launch/gpu.sh"), *debug(dataset), f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run([*training, "--config.steps=2"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "ended at step 2 of 2" in done.stderr
    del environment["JAX_PLATFORMS"]
    if not shutil.which("nvidia-smi"):
        done = subprocess.run(training, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "no GPU answers on this machine" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=core"], "--processes=core: give node or gpu"),
        (["--retries=often"], "--retries=often: give a whole number"),
        (["--processes=gpu", "--coordinator=a:1"], "--processes=gpu is for one node or for SLURM"),
    ],
)
def test_user_errors_of_gpu(arguments: list[str], message: str, environment: dict[str, str]) -> None:
    gpu = ["bash", str(ROOT / "launch/gpu.sh"), "--config=x", *arguments]
    done = subprocess.run(gpu, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_a_container_is_used_as_it_is(tmp_path: pathlib.Path, environment: dict[str, str]) -> None:
    (tmp_path / "apptainer").write_text('#!/usr/bin/env bash\necho "apptainer $*"\n')
    (tmp_path / "apptainer").chmod(0o755)
    variables = environment | {"PATH": f"{tmp_path}:{environment['PATH']}", "CONTAINER": str(tmp_path / "image.sif")}
    gpu = ["bash", str(ROOT / "launch/gpu.sh"), "--config=x"]
    done = subprocess.run(gpu, env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and "image.sif: no such file; launch/container.md says how to make it" in done.stderr
    (tmp_path / "image.sif").touch()
    done = subprocess.run(gpu, env=variables, capture_output=True, text=True, check=True)
    assert f"apptainer exec --nv {tmp_path}/image.sif python -m contrastive_jax train --config=x\n" in done.stdout


def test_one_process_per_gpu_of_this_node(tmp_path: pathlib.Path, environment: dict[str, str]) -> None:
    """A python that writes down its arguments; one of two processes has saved, the other was killed."""
    stub_training('echo "GPU $JAX_LOCAL_DEVICE_IDS: $*"; [[ "$*" != *process_id=1* ]] || kill -KILL $$; exit 75', tmp_path)
    gpu = ["bash", str(ROOT / "launch/gpu.sh"), "--config=x", "--processes=gpu"]
    done = subprocess.run(gpu, env=environment | {"SLURM_GPUS_ON_NODE": "2"}, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    for number in range(2):
        line = rf"GPU {number}: .* train --coordinator=localhost:\d+ --num_processes=2 --process_id={number} --config=x"
        assert re.search(line, done.stdout), done.stdout
