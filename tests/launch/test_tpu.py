"""launch/tpu.sh and what it runs on the workers, at a fake gcloud that fails as the real one does."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import threading

import pytest
from conftest import ROOT, wait_for
from launch.machines import POD, SLICE, TPU, Launch, Stub, debug, fault, requests, saved

from contrastive_jax.runtime import processes
from contrastive_jax.training import guard, loop


def verbs(environment: dict[str, str]) -> list[str]:
    """The requests that create or delete: ["create", "delete" ...]."""
    return [request[3] for request in requests(environment) if request[3:4] and request[3] in ("create", "delete")]


def starts(environment: dict[str, str]) -> int:
    """How often worker 0 has started a training."""
    return (pathlib.Path(environment["FAKE_GCLOUD"]) / "starts-0").read_text().count("start")


@pytest.mark.slow  # tests/cloud/test_rehearsal.py does it with more faults
def test_a_pod_trains_is_preempted_and_comes_back(
    dataset: pathlib.Path, tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    workdir = tmp_path / "bucket with space" / "run"
    training = [*debug(dataset), f"--workdir={workdir}"]
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
    assert "config.data.dir=/absent: no manifest.json there" in done.stderr  # of whichever worker says it first
    # The slice is there now: nothing is created again.
    training = [*debug(dataset), f"--workdir={tmp_path}", "--config.steps=1000000", "--config.checkpoint_every=0"]
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


def test_b1_a_training_is_started_again_by_cause(stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    """1, 4 and 137 cost a retry; 143 and 75, which are no failures of the run, cost none."""
    stub("statuses=(0 143 1 75 4 137 0); exit ${statuses[attempt]}")
    done = launch("run", "--retries=3", "--poll=0")
    assert done.returncode == 0, done.stderr
    assert starts(environment) == 6 and verbs(environment) == ["create"]
    outcomes = re.findall("== training: (.*)", done.stderr)
    assert outcomes == ["exit 143", "exit 1", "exit 75", f"exit {processes.NOT_JOINED}", "exit 137", "exit 0"]


@pytest.mark.parametrize("status", [2, guard.StoppedError.status])
def test_b1_bad_input_and_a_run_that_no_longer_trains_are_final(
    status: int, stub: Stub, launch: Launch, environment: dict[str, str]
) -> None:
    stub(f"exit {status}")
    assert launch("run").returncode == status
    assert starts(environment) == 1


@pytest.mark.parametrize(("progress", "status", "count"), [(10, 0, 4), (0, 1, 2)])
def test_b1_a_newer_checkpoint_refills_the_retries(
    progress: int, status: int, count: int, stub: Stub, launch: Launch, environment: dict[str, str]
) -> None:
    stub(f"echo resuming from /run/checkpoints/$((attempt * {progress} + 5)); exit $((attempt < 4))")
    done = launch("run", "--retries=1", "--poll=0")
    assert (done.returncode, starts(environment)) == (status, count), done.stderr
    if status:
        assert "pod failed 2 times without a newer checkpoint (--retries=1), at last: exit 1. The logs of all" in done.stderr
    else:
        assert "starting again (3) in 0 s" in done.stderr


def test_b1_the_line_that_says_progress_is_the_training_s_own() -> None:
    assert '"resuming from %s", checkpoints.directory / str(number)' in pathlib.Path(loop.__file__).read_text()
    assert "resuming from .*/[0-9]+" in (ROOT / "launch/worker.sh").read_text()


def test_b3_a_failed_request_says_why_and_stops(stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    stub("exit 0")
    fault(environment, "queue-fails", 1, "Quota limit 'TPUV5s' has been exceeded")
    done = launch("run", "--queued")
    assert done.returncode == 2
    assert "pod cannot be created: Quota limit 'TPUV5s' has been exceeded. Mend that and run the command again" in done.stderr
    assert verbs(environment) == ["create"]
    done = launch("run", "--queued")  # mended
    assert done.returncode == 0, done.stderr
    assert verbs(environment) == ["create", "delete", "create"]


@pytest.mark.parametrize(
    ("name", "message"), [("login-expired", "Please run: $ gcloud auth login"), ("list-fails", "UNAVAILABLE: The service is")]
)
def test_b3_an_error_of_list_creates_and_deletes_nothing(
    name: str, message: str, launch: Launch, environment: dict[str, str]
) -> None:
    fault(environment, name, "always")
    for command in (("run",), ("status",), ("run", "--queued")):
        done = launch(*command)
        assert done.returncode == 1
        assert message in " ".join(done.stderr.split())
    assert not verbs(environment)


def test_b3_an_error_of_list_in_mid_run_is_waited_out(stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    """After the first training, the look at the slice fails three times."""
    stub('mkdir -p "$FAKE_GCLOUD/faults"; ((attempt > 1)) || echo 3 > "$FAKE_GCLOUD/faults/list-fails"; exit $((attempt == 1))')
    done = launch("run", "--poll=0")
    assert done.returncode == 0, done.stderr
    assert "nothing is created or deleted: ERROR: (gcloud.compute.tpus.tpu-vm.list) UNAVAILABLE" in done.stderr
    assert verbs(environment) == ["create"]


@pytest.mark.parametrize("state", ["REIMAGING", "STOPPED"])
def test_b3_a_slice_in_another_state_is_left_alone(state: str, stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    stub("exit 0")
    launch("create")
    subprocess.run(["gcloud", "fake", "state", "pod", state], env=environment, check=True)
    ready = ["gcloud", "fake", "state", "pod", "READY"]
    threading.Timer(4, lambda: subprocess.run(ready, env=environment, check=True)).start()
    done = launch("run")
    assert done.returncode == 0, done.stderr
    assert f"pod: {state}" in done.stderr and "waiting: in this state nothing is created or deleted" in done.stderr
    assert verbs(environment) == ["create"]


def test_b3_a_lack_of_capacity_is_waited_out(stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    stub("exit 0")
    fault(environment, "no-capacity", 2)
    done = launch("run", "--restarts=0", "--retries=0")
    assert done.returncode == 0, done.stderr
    assert re.findall("no capacity in us-west4-a; asking again in (.) s", done.stderr) == ["1", "2"]
    assert verbs(environment) == ["create"] * 3


def test_b3_what_gcloud_refuses_is_not_asked_again(launch: Launch, environment: dict[str, str]) -> None:
    fault(environment, "refused", "always")
    done = launch("run")
    assert done.returncode == 1 and "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied" in done.stderr
    assert verbs(environment) == ["create"]


def test_b3_an_old_bash_and_a_missing_timeout_are_refused(tmp_path: pathlib.Path, environment: dict[str, str]) -> None:
    """dash reads the beginning of the script as bash 3.2 would."""
    if shutil.which("dash"):
        old = environment | {"BASH_VERSION": "3.2.57(1)-release"}
        done = subprocess.run(["dash", *TPU[1:], "run"], env=old, capture_output=True, text=True)
        assert done.returncode == 2 and "bash 4.4 or newer is needed, and this is 3.2.57(1)-release (macOS: brew" in done.stderr
    binary = tmp_path / "bin"
    binary.mkdir()
    for name in ("bash", "dirname", "mktemp", "rm", "sed", "cat"):
        (binary / name).symlink_to(str(shutil.which(name)))
    (binary / "gcloud").symlink_to(ROOT / "tests/launch/fakes/gcloud")
    done = subprocess.run([*TPU, "run", *POD], env=environment | {"PATH": str(binary)}, capture_output=True, text=True)
    assert done.returncode == 2 and "GNU's timeout is not installed (macOS: brew install coreutils" in done.stderr


def fake_git(tmp_path: pathlib.Path, environment: dict[str, str], line: str) -> None:
    """Puts a git into PATH that runs a line of bash and then the real one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(f'#!/usr/bin/env bash\n{line}\nexec {shutil.which("git")} "$@"\n')
    (tmp_path / "bin" / "git").chmod(0o755)
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"


@pytest.mark.parametrize(
    ("line", "words"),
    [("echo fatal: not a git repository >&2; exit 128", "git says: fatal: not a git repository"), ("exit 0", "git says:")],
    ids=["fails", "lists nothing"],
)
@pytest.mark.parametrize("command", ["run", "create"])
def test_a_tree_that_git_cannot_list_is_refused_before_a_slice_is_created(
    command: str, line: str, words: str, tmp_path: pathlib.Path, launch: Launch, environment: dict[str, str]
) -> None:
    fake_git(tmp_path, environment, line)
    done = launch(command)
    assert done.returncode == 2 and not requests(environment)
    assert "error: git cannot list the files to copy to the workers; clone the repository, or call git init" in done.stderr
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_old_git_is_enough(stub: Stub, tmp_path: pathlib.Path, launch: Launch, environment: dict[str, str]) -> None:
    """Before 2.31 it had no --deduplicate."""
    stub("exit 0")
    fake_git(tmp_path, environment, '[[ "$*" != *--deduplicate* ]] || exit 129')
    done = launch("run", "--retries=0")
    assert done.returncode == 0, done.stderr


def test_b4_an_agent_without_the_key_is_said(stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    stub("exit 0")
    fault(environment, "agent-without-key", "always")
    done = launch("run")
    assert done.returncode == 2
    assert "run ssh-add ~/.ssh/google_compute_engine" in done.stderr


def test_b4_the_first_ssh_waits_for_the_key(stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    """Longer than a worker may take to answer; and then a worker's first connection fails, and another answers late."""
    stub("exit 0")
    fault(environment, "key-seconds", 1, 6)
    fault(environment, "ssh-fails-0", 1)
    fault(environment, "late-1", 1, 5)
    done = launch("run", "--timeout=4", "--retries=0")
    assert done.returncode == 0, done.stderr
    assert "no answer from worker 0 1 of pod; asking again" in done.stderr or "worker 1 of pod; asking again" in done.stderr


def test_b4_a_silent_worker_stops_the_start_with_the_words_of_gcloud(launch: Launch, environment: dict[str, str]) -> None:
    fault(environment, "ssh-fails-2", "always")
    done = launch("run", "--timeout=5", "--retries=0")
    assert done.returncode == 1
    assert "no answer within 5 s from worker 2 of 4 of pod; nothing was started. gcloud says: [/usr/bin/ssh]" in done.stderr
    assert not any("worker.sh start" in " ".join(request) for request in requests(environment))


def test_b4_flags_for_ssh_and_variables_for_the_workers(stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    stub('echo "[$LIBTPU_INIT_ARGS] [$EMPTY]"; exit 0')
    environment["GCLOUD_TRACK"] = "alpha"
    more = ["--ssh=--tunnel-through-iap", "--gcloud=--internal-ips", "--env=LIBTPU_INIT_ARGS=--a=$HOME 'b c'", "--env=EMPTY="]
    done = launch("run", *more)
    assert done.returncode == 0 and "\n[--a=$HOME 'b c'] []\n" in done.stderr, done.stderr
    for request in requests(environment):
        assert request[0] == "alpha"
        assert ("--tunnel-through-iap" in request) == (request[4] in ("ssh", "scp"))
        assert ("--internal-ips" in request) == (request[4] == "create")
    done = launch("ssh", "--worker=1", arguments=("bash", "-c", 'echo "[$0]" "$HOME"', "a b; true"))
    assert done.stdout == f"[a b; true] {environment['FAKE_GCLOUD']}/pod/worker-1\n"


def test_extras_are_installed_on_the_workers(
    stub: Stub, tmp_path: pathlib.Path, launch: Launch, environment: dict[str, str]
) -> None:
    stub("exit 0")
    python, log = tmp_path / "venv/bin/python", tmp_path / "pip"
    head, rest = python.read_text().split("\n", 1)
    python.write_text(f'{head}\n[[ "$2" != pip ]] || {{ echo "$OMPI_COMM_WORLD_RANK $*" >> {log}; exit; }}\n{rest}')
    done = launch("run", "--env=EXTRAS=gcs,wandb")
    assert done.returncode == 0, done.stderr
    assert re.search(r"--editable \.\[(tpu,)?gcs,wandb\]", log.read_text())


def test_b4_the_logs_of_all_workers_outlive_the_slice(
    stub: Stub, launch: Launch, tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    """Worker 1 is killed in mid-run; what it had logged is in the workdir, before what it logs after the next start."""
    stub("((attempt > 1)) || { sleep 4; ((OMPI_COMM_WORLD_RANK)) && kill -KILL -$PPID; exit 1; }; echo last line; exit 0")
    environment["LOG_SECONDS"] = "1"
    done = launch("run")
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "bucket/run/logs/worker-1.log").read_text()
    assert written == "attempt 1 of worker 1\nattempt 2 of worker 1\nlast line\n"
    assert "attempt 2 of worker 1" in launch("logs", "--worker=1").stdout
    launch("delete")
    done = launch("logs", "--worker=1")
    assert done.returncode == 2 and "give -- --workdir=gs://BUCKET/RUN" in done.stderr
    environment["FAKE_BUCKETS"] = str(tmp_path)
    assert launch("logs", "--worker=1", arguments=("--workdir=gs://bucket/run",)).stdout == written
    assert launch("logs", "--worker=1", arguments=(f"--workdir={tmp_path}/bucket/run",)).stdout == written


def test_a_training_that_is_left_over_on_a_worker_is_ended(stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    stub("((attempt > 1)) && exit 0; ((OMPI_COMM_WORLD_RANK)) && exec sleep 100; exit 1")
    done = launch("run")
    assert done.returncode == 0 and "ending the training that is left over on t1v-n-pod-w-1" in done.stderr, done.stderr


def test_a_trace_is_taken_from_a_running_worker(stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    asked = 'until [[ -e "$CONTRASTIVE_JAX_PROFILE_FILE" ]]; do sleep 0.1; done'
    stub(
        f'{asked}; echo "profile of steps 3 to $((2 + $(< "$CONTRASTIVE_JAX_PROFILE_FILE"))): gs://b/plugins"; sleep 5; exit 0'
    )
    command = [*TPU, "run", *POD, "--", "--workdir=/run"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as run:
        wait_for((pathlib.Path(environment["FAKE_GCLOUD"]) / "starts-1").exists)
        # The training of worker 0 waits for its own request until the run ends.
        done = launch("profile", "--worker=1", "--steps=5")
        assert done.stdout == "profile of steps 3 to 7: gs://b/plugins\n", done.stderr
        assert launch("profile", "--worker=0").returncode == 0
        run.communicate(timeout=60)
    assert run.returncode == 0
    done = launch("profile")
    assert done.returncode == 2 and "no training is at its steps here" in done.stderr


def test_a_training_that_runs_already_is_shown(stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    stub("sleep 8; exit 0")
    command = [*TPU, "run", *POD, "--", "--workdir=/run"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as first:
        wait_for((pathlib.Path(environment["FAKE_GCLOUD"]) / "starts-1").exists)
        done = launch("run")
        first.wait(60)
    assert done.returncode == first.returncode == 0
    assert "a training is already running on pod; showing its log" in done.stderr and "attempt 1 of worker 0" in done.stderr
    assert starts(environment) == 1


def test_several_slices_are_one_run(stub: Stub, launch: Launch, environment: dict[str, str]) -> None:
    """A slice that is taken back takes the run with it: the whole request is made again."""
    # The slice goes when the launcher follows the training, not while it starts; and only then does the training fail.
    followed = 'until grep -q "bash launch/worker.sh poll 0" "${FAKE_SLICE%/*}/log"; do sleep 0.1; done'
    gone = 'until grep -q PREEMPTED "${FAKE_SLICE%/*}/pod-1/slice.json"; do sleep 0.1; done'
    taken = f"if ((OMPI_COMM_WORLD_RANK)); then {gone}; else {followed}; gcloud fake preempt pod-1; fi"
    stub(f"((attempt > 1)) && exit 0; {taken}; exit 1")
    done = launch("run", "--slices=2")
    assert done.returncode == 0 and "training: lost PREEMPTED" in done.stderr, done.stderr
    creation = next(request for request in requests(environment) if "create" in request)
    assert {"--node-count=2", "--node-prefix=pod"} < set(creation)
    assert verbs(environment) == ["create", "delete", "create"]
    assert len(list(pathlib.Path(environment["FAKE_GCLOUD"]).glob("starts-[0-3]"))) == 4
    assert "of worker 2" in launch("logs", "--slices=2", "--slice=1").stdout


def dry_run(environment: dict[str, str], *more: str) -> list[str]:
    """The commands that `run` would give to gcloud."""
    slices = ["--name=cpt-s", "--zone=us-west4-a", "--project=lab", "--type=v5litepod-256", "--spot"]
    done = subprocess.run(
        [
            *(*TPU, "run", "--dry-run", *slices, *more),
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
    order = ["list", "create", "list", "describe", "ssh", "ssh", "ssh", "scp", "ssh", "ssh", "ssh"]
    assert verbs == [f"tpu-vm {verb}" for verb in order]
    assert (
        "--accelerator-type=v5litepod-256 --version=v2-alpha-tpuv5-lite --spot --zone=us-west4-a --project=lab" in commands[1]
    )
    start = shlex.split(commands[9])
    assert "--worker=all" in start
    remote = shlex.split(next(word for word in start if word.startswith("--command="))[10:])
    assert remote[-1] == "--config.data.dir=gs://bucket/it's here"


def test_the_real_gcloud_knows_every_command(environment: dict[str, str], tmp_path: pathlib.Path) -> None:
    gcloud = shutil.which("gcloud")
    # A configuration of its own, because other processes may be writing the user's; no variables that lead its Python astray.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    own["CLOUDSDK_CONFIG"] = str(tmp_path / "gcloud")
    if not gcloud or subprocess.run([gcloud, "version"], env=own, capture_output=True, timeout=60).returncode:
        pytest.skip("the real gcloud, which checks the flags, is not installed or does not start here")
    more = ["--slices=2", "--env=A=b c", "--ssh=--internal-ip", "--gcloud=--internal-ips"]
    for command in [*dry_run(environment), *dry_run(environment, *more)]:
        lint = [gcloud, "meta", "lint-gcloud-commands", f"--command-string={command}"]
        done = subprocess.run(lint, env=own, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout, done.stderr
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
        (["create", *SLICE, "--type=tpu7x-8"], "Google rents TPU7x through GKE and Compute Engine"),
        (["run", *SLICE, "--env=1=2"], "--env=1=2: give KEY=VALUE"),
        (["run", *SLICE, "--env=EXTRAS=gcs,wanbd"], "EXTRAS=gcs,wanbd: setup.cfg has no extra wanbd; give names from gcs, s3"),
        (["logs", *SLICE, "--slices=2", "--slice=2"], "--slice is below --slices"),
    ],
)
def test_user_errors_of_tpu(arguments: list[str], message: str, environment: dict[str, str]) -> None:
    done = subprocess.run([*TPU, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
