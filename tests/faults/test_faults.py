"""Faults of a run: processes that die, hang or never join, a full disk, other devices after each restart."""

import contextlib
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from conftest import ROOT, command, finish, free_address, peers, start, wait_for

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.runtime import peers as peers_lib
from contrastive_jax.runtime import processes
from contrastive_jax.runtime.peers import Peers, Status
from contrastive_jax.training import guard


class Team:
    """Three Peers of one run in this process; `ends` collects the reason and the status that each would have ended with.

    `statuses` collects the exit statuses of the errors that they raise while they join.
    """

    def __init__(self, address: str, secret: str = "", silent: float = 1.5, hang: float = 5.0):
        self.address, self.ends, self.statuses = address, dict[int, tuple[str, int]](), set[int]()
        self.members = [
            Peers(address, 3, i, silent, hang, secret, lambda reason, status, i=i: self.ends.setdefault(i, (reason, status)))
            for i in range(3)
        ]

    def close(self) -> None:
        for member in self.members:
            member._over.set()
            for connection in member._connections.values():
                connection.close()

    def join(self, numbers: tuple[int, ...] = (0, 1, 2), seconds: float = 20.0) -> dict[int, str]:
        """Joins some of the members; returns the messages of the UserErrors that they raise."""
        errors: dict[int, str] = {}

        def join_member(number: int) -> None:
            try:
                self.members[number].join(seconds)
            except UserError as error:
                errors[number] = str(error)
                self.statuses.add(error.status)

        threads = [threading.Thread(target=join_member, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors


@pytest.fixture
def make_team() -> Iterator[Callable[..., Team]]:
    made: list[Team] = []

    def make(address: str | None = None, secret: str = "") -> Team:
        made.append(Team(address or free_address(), secret))
        return made[-1]

    yield make
    for team in made:
        team.close()


def test_peers_that_join_and_leave_report_nothing(make_team: Callable[..., Team]) -> None:
    team = make_team()
    assert not team.join()
    time.sleep(2.5)
    for member in (team.members[1], team.members[0], team.members[2]):
        with member:
            pass
    time.sleep(1)
    assert not team.ends


def test_b1_a_process_that_never_joins_is_named_and_has_a_status_of_its_own(make_team: Callable[..., Team]) -> None:
    team = make_team()
    errors = team.join((0, 2), seconds=2.0)
    assert errors[0].startswith("process 1 of 3 did not join within 2 s; joined: 0 (") and errors[2] == errors[0]
    assert team.statuses == {processes.NOT_JOINED} == {4}  # the launchers start such a run again
    team = make_team(address := free_address())
    errors = team.join((1,), seconds=1.0)
    assert re.match(rf"process 0 at 127.0.0.1:{int(address.split(':')[1]) - 1} does not answer after 1 s", errors[1])
    assert team.statuses == {processes.NOT_JOINED}


def test_a_process_of_another_run_is_refused(make_team: Callable[..., Team]) -> None:
    team = make_team()
    team.members[1]._count = 4
    errors = team.join((0, 1, 2), seconds=5.0)
    assert re.match(r"process 1 \(.*\) is one of 4, process 0 one of 3", errors[0]) and errors[1] == errors[0]
    assert UserError.status in team.statuses  # of processes 0 and 1; process 2 may have come too late for the reason
    team = make_team()
    team.members[2] = Peers(team.address, 3, 1, 1.5, 5.0)
    assert "process 1 joined twice" in team.join(seconds=5.0)[0]


def test_a_process_whose_connection_was_lost_may_call_again(make_team: Callable[..., Team]) -> None:
    team = make_team(address := free_address())
    errors: dict[int, str] = {}
    starting = threading.Thread(target=lambda: errors.update(team.join((0,))))
    starting.start()
    hello = {"number": 1, "count": 3, "name": "lost", "secret": team.members[1]._secret}
    time.sleep(1)  # process 0 opens its port
    with socket.create_connection(("127.0.0.1", peers_lib.watch_port(int(address.split(":")[1])))) as lost:
        lost.sendall(json.dumps(hello).encode() + b"\n")
        wait_for(lambda: 1 in team.members[0]._connections)
    errors.update(team.join((1, 2)))
    starting.join()
    assert not errors and team.members[0]._names[1] != "lost"


def test_strangers_on_the_port_are_ignored(make_team: Callable[..., Team], caplog: pytest.LogCaptureFixture) -> None:
    team = make_team(address := free_address(), secret="ours")
    host_port = ("127.0.0.1", peers_lib.watch_port(int(address.split(":")[1])))
    strangers = [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"number": 1, "count": 7, "name": "theirs", "secret": "other"}\n',
        b"",
        b"x" * 10_000,
    ]
    errors: dict[int, str] = {}

    def knock_and_join() -> None:
        time.sleep(1)
        for line in strangers:
            with socket.create_connection(host_port) as stranger:
                with contextlib.suppress(OSError):  # the other side may have hung up already
                    stranger.sendall(line)
                    stranger.shutdown(socket.SHUT_WR)
                    stranger.recv(100)
        errors.update(team.join((1, 2)))

    joining = threading.Thread(target=knock_and_join)
    joining.start()
    errors.update(team.join((0,)))
    joining.join()
    assert not errors
    assert "theirs (" in caplog.text and "called with the secret of another run; it is ignored" in caplog.text


def test_a_run_waits_for_a_port_that_another_run_still_has(make_team: Callable[..., Team]) -> None:
    before, after = make_team(address := free_address(), secret="before"), make_team(address, secret="after")
    errors: dict[int, str] = {}
    starting = threading.Thread(target=lambda: errors.update(before.join((0, 1), seconds=3.0)))
    starting.start()
    time.sleep(0.5)
    assert not after.join()  # at first the port is taken, and who listens there belongs to another run
    starting.join()
    assert "process 2 of 3 did not join within 3 s" in errors[0]


def test_jobs_that_follow_one_another_on_a_node_take_other_ports() -> None:
    coordinators = range(61_440, 65_536)  # JAX's, by the number of the SLURM job
    watches = {peers_lib.watch_port(port) for port in coordinators}
    assert not watches & set(coordinators) and len(watches) == len(coordinators)
    assert min(watches) > 1024 and max(watches) < 32_768  # above begin the ports that the system gives to clients
    assert peers_lib.watch_port(8476) == 8475


def test_a_slow_process_is_named_shows_its_stack_and_may_go_on(
    make_team: Callable[..., Team], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    caplog.set_level("INFO", logger="absl")
    team = make_team()
    team.join()
    for member in team.members:
        member.at(2)
    team.members[0].at(3)
    team.members[1].at(3, busy=True)
    wait_for(lambda: re.search(r"process 2 \(.*\) has been at step 2 for [23] s, others are at 3", caplog.text))
    wait_for(lambda: "its threads are at:" in (shown := capsys.readouterr().err) and "test_a_slow_process" in shown, 5)
    team.members[2].at(3)
    wait_for(lambda: re.search(r"process 2 \(.*\) goes on", caplog.text))
    assert not team.ends and caplog.text.count("has been at step 2") == 1


def test_a_process_that_stands_still_for_very_long_ends_the_run(
    make_team: Callable[..., Team], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    team = make_team()
    team.join()
    for member in team.members:
        member.at(2)
    team.members[0].at(3)
    team.members[1].at(3)
    wait_for(lambda: len(team.ends) == 3)
    for reason, status in team.ends.values():
        assert re.match(r"process 2 \(.*\) has been at step 2 for \d+ s, others are at 3: it hangs", reason) and status == 1
    assert "has been at step 2" in caplog.text
    assert "it hangs. This is process 0" in capsys.readouterr().err


def test_a_slow_process_is_named_again_only_after_twice_the_time(caplog: pytest.LogCaptureFixture) -> None:
    peers = Peers("127.0.0.1:5000", 2, 1, silent_seconds=10, hang_seconds=100)
    peers._names[0] = "vm"
    peers._statuses = {0: Status(step=2, since=0, busy=False), 1: Status(step=3, since=0, busy=False)}
    peers._heard = {0: 100.0}
    for second in range(100):
        peers._check_slow(now=second)
    assert re.findall(r"process 0 \(vm\) has been at step 2 for (\d+) s", caplog.text) == ["11", "23", "47", "95"]


# Loopback, in a network of its own, goes down: nothing is acknowledged any more, as when a machine loses its power.
UNREACHABLE = """
import fcntl, socket, struct, sys, threading, time
from contrastive_jax.runtime import connection, peers
connection.UNREACHABLE_SECONDS = 3

def loopback(up):
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1 if up else 0))  # SIOCSIFFLAGS, IFF_UP

loopback(True)
ended = threading.Event()
def end(reason, status):
    print(f"{reason} {status}", flush=True)
    ended.set()
team = [peers.Peers("127.0.0.1:5000", 2, i, 60, 120, end=end) for i in range(2)]
joining = [threading.Thread(target=member.join, args=(20,)) for member in team]
[thread.start() for thread in joining]
[thread.join() for thread in joining]
time.sleep(2)
loopback(False)
sys.exit(0 if ended.wait(30) else 1)
"""


def test_a_machine_that_no_longer_answers_is_named() -> None:
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("a network of its own needs root")
    command = ["unshare", "--net", sys.executable, "-c", UNREACHABLE]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr[-2000:]
    assert re.search(r"process [01] \(.*\) is gone, last seen starting; see its own log 1", output.stdout)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("config.data.dir=/absent: no manifest.json there"), 2),
        (guard.StoppedError("the embeddings collapse"), 3),
        (files.MachineError("No space left on device"), 1),
        (KeyError("a bug"), 1),
    ],
)
def test_the_error_of_one_process_ends_all_with_its_status(
    error: Exception,
    status: int,
    make_team: Callable[..., Team],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(peers_lib.os, "_exit", statuses.append)
    monkeypatch.setattr(peers_lib, "BEAT_SECONDS", 0.2)
    team = make_team()
    team.join()
    with pytest.raises(type(error)), team.members[1]:
        raise error
    wait_for(lambda: len(team.ends) == 2, 20)
    assert statuses == [status]
    for number in (0, 2):
        reason, ended_with = team.ends[number]
        assert re.match(rf"process 1 \(.*\): {re.escape(str(error))}$", reason) and ended_with == status
    err = capsys.readouterr().err
    if isinstance(error, UserError):
        assert err == f"error: {error}\n"
    else:
        assert "Traceback" in err and "KeyError: 'a bug'" in err


def options(*more: str) -> list[str]:
    return ["--config.steps=100000", "--config.checkpoint_every=20", "--silent_seconds=8", "--hang_seconds=16", *more]


def trains(workdir: pathlib.Path) -> None:
    metrics = workdir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and "loss" in metrics.read_text() and list((workdir / "checkpoints").glob("[0-9]*")))


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_or_hangs_ends_the_other_with_its_name(
    victim: int, how: signal.Signals, dataset: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    team = peers(dataset, tmp_path, *options(), devices=1)
    trains(tmp_path)
    team[victim].send_signal(how)
    began = time.monotonic()
    output = finish(team[1 - victim], status=1)[0]
    assert time.monotonic() - began < 60
    why = "has said nothing for" if how == signal.SIGSTOP else "is gone, last seen at step"
    assert re.search(rf"(?m)^error: process {victim} \(.*\) {why}", output), output[-3000:]
    team[victim].kill()
    team[victim].communicate()


def test_all_processes_end_with_the_error_of_one(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    team = peers(dataset, tmp_path, *options(), devices=1, differ="--config.data.dir=" + str(dataset) + "{}")
    (pathlib.Path(f"{dataset}0")).symlink_to(dataset)
    for output in finish(*team, status=UserError.status):
        assert re.search(rf"(?m)^error: .*config.data.dir={dataset}1: no manifest.json there", output), output[-3000:]


def test_the_verdict_of_process_0_on_the_embeddings_ends_all(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    collapsed = [
        "--config.guard.embedding_std_stop=2.0",
        "--config.guard.embedding_std_warn=2.0",
        "--config.guard.warmup_steps=0",
    ]
    team = peers(dataset, tmp_path, "--config.steps=100000", *collapsed, name="bag", devices=1)
    for output in finish(*team, status=guard.StoppedError.status):
        assert re.search(r"(?m)^error: .*step 4: embedding std \S+, the embeddings collapse", output), output[-3000:]
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str) -> Iterator[pathlib.Path]:
    """A file system of its own; skips the test where none may be mounted."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with small_disk(tmp_path / "disk", "64m") as disk:
        steps = ["--config.checkpoint_every=2", "--config.steps=4"]
        finish(start(command(dataset, disk / "run", *steps)))
        with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as other:
            while other.write(b"\0" * 4096):
                pass
        output = finish(start(command(dataset, disk / "run", *steps[:1], "--config.steps=20")), status=1)[0]
        last = output.strip().splitlines()[-1]
        assert last.startswith("error: ") and "No space left on device" in last and str(disk) in last
        assert "Traceback" not in output
        (disk / "other").unlink()
        output = finish(start(command(dataset, disk / "run", "--config.steps=5")))[0]
        assert f"resuming from {disk}/run/checkpoints/4" in output


def test_a_workdir_that_cannot_be_written_is_a_user_error(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    output = finish(start(command(dataset, tmp_path / "file" / "run")), status=UserError.status)[0]
    assert re.search(r"\nerror: --workdir=.*file/run: Not a directory; check that path", output)


@pytest.mark.slow
def test_other_devices_after_each_restart_train_the_same(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    sizes = ["--config.steps=8", "--config.model.dropout=0.2", "--config.objective.symmetric=False"]
    more = [*sizes, "--config.objective.queue=2"]
    finish(start(command(dataset, tmp_path / "whole", *more), devices=8))
    parts = tmp_path / "parts"
    finish(start(command(dataset, parts, *more, "--stop_at_step=2", "--config.mesh.fsdp=2"), devices=8))
    finish(start(command(dataset, parts, *more, "--stop_at_step=4", "--config.mesh.tensor=2"), devices=4))
    finish(*peers(dataset, parts, *more, "--stop_at_step=6", devices=2))
    finish(start(command(dataset, parts, *more)))
    runs = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    }
    assert [line["step"] for line in runs["parts"]] == list(range(1, 9))
    assert [line["batch_digest"] for line in runs["parts"]] == [line["batch_digest"] for line in runs["whole"]]
    np.testing.assert_allclose(*([line["loss"] for line in runs[name]] for name in ("parts", "whole")), rtol=1e-5)


def test_a_save_that_takes_too_long_does_not_hold_a_preempted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    ends: list[tuple[str, int]] = []
    monkeypatch.setattr(peers_lib, "end_process", lambda *reason_and_status: (ends.append(reason_and_status), ended.set()))
    before = signal.getsignal(signal.SIGTERM)
    try:
        preemption = processes.Preemption(grace_seconds=1)
        assert not preemption.reached(1)
        signal.raise_signal(signal.SIGTERM)
        assert preemption.reached(2) and not ended.is_set()
        assert ended.wait(5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ends == [("not saved within --grace_seconds=1; the checkpoint before stays", processes.PREEMPTED)]
