"""What happens to a run: processes that die, hang or never come, a full disk, other devices after each restart."""

import contextlib
import json
import pathlib
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from conftest import command, finish, free_address, peers, start, wait_for

from contrastive_jax import cli, processes
from contrastive_jax import peers as peers_lib
from contrastive_jax.peers import Peers


class Team:
    """Three Peers of one run in this process; `ends` gathers what each would have ended with."""

    def __init__(self, address: str, silence: float = 3.0):
        self.address, self.ends = address, dict[int, tuple[str, int]]()
        self.members = [
            Peers(address, 3, i, silence, end=lambda reason, status, i=i: self.ends.setdefault(i, (reason, status)))
            for i in range(3)
        ]

    def close(self) -> None:
        for member in self.members:
            member._over.set()
            for connection in member._sockets.values():
                connection.close()

    def join(self, numbers: tuple[int, ...] = (0, 1, 2), seconds: float = 20.0) -> dict[int, str]:
        """Joins some of them; returns what the others raise."""
        errors: dict[int, str] = {}

        def one(number: int) -> None:
            try:
                self.members[number].join(seconds)
            except ValueError as error:
                errors[number] = str(error)

        threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors


@pytest.fixture
def make_team() -> Iterator[Callable[..., Team]]:
    made: list[Team] = []

    def make(address: str | None = None) -> Team:
        made.append(Team(address or free_address()))
        return made[-1]

    yield make
    for team in made:
        team.close()


def test_peers_that_come_and_leave(make_team: Callable[..., Team]) -> None:
    team = make_team()
    assert not team.join()
    time.sleep(2.5)
    for member in (team.members[1], team.members[0], team.members[2]):
        with member:
            pass
    time.sleep(1)
    assert not team.ends


def test_a_process_that_never_comes_is_named(make_team: Callable[..., Team]) -> None:
    team = make_team()
    errors = team.join((0, 2), seconds=2.0)
    assert errors[0].startswith("process 1 of 3 did not join within 2 s; there: 0 (") and errors[2] == errors[0]
    address = free_address()
    errors = make_team(address).join((1,), seconds=1.0)
    assert re.match(rf"process 0 at 127.0.0.1:{int(address.split(':')[1]) - 1} does not answer after 1 s", errors[1])


def test_a_process_of_another_run_is_refused(make_team: Callable[..., Team]) -> None:
    team = make_team()
    team.members[1]._count = 4
    errors = team.join((0, 1, 2))
    assert re.match(r"process 1 \(.*\) is one of 4, process 0 one of 3", errors[0]) and errors[1] == errors[0]
    team = make_team()
    team.members[2] = Peers(team.address, 3, 1, 3.0)
    assert "process 1 joined twice" in team.join()[0]


def test_what_is_not_ours_on_the_port_is_passed_over(make_team: Callable[..., Team]) -> None:
    team, host_port = make_team(address := free_address()), ("127.0.0.1", int(address.split(":")[1]) - 1)

    def knock() -> None:
        with socket.create_connection(host_port) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")

    threading.Timer(1.0, knock).start()
    threading.Timer(2.0, team.join, ((1, 2),)).start()
    assert not team.join((0,))


def test_a_process_that_stands_still_is_named(make_team: Callable[..., Team]) -> None:
    team = make_team()
    team.join()
    for step in range(3):
        for member in team.members:
            member.at(step)
    team.members[0].at(3)
    team.members[1].at(3, busy=True)
    wait_for(lambda: len(team.ends) == 3)
    for reason, status in team.ends.values():
        assert re.match(r"process 2 \(.*\) has been at step 2 for \d s, others are at 3: it hangs", reason) and status == 1


def options(*more: str) -> list[str]:
    return ["--config.steps=100000", "--config.checkpoint_every=20", "--silent_seconds=8", *more]


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


def test_what_one_process_fails_with_all_end_with(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    team = peers(dataset, tmp_path, *options(), devices=1, differ="--config.data.dir=" + str(dataset) + "{}")
    (pathlib.Path(f"{dataset}0")).symlink_to(dataset)
    for output in finish(*team, status=cli.USER_ERROR):
        assert re.search(rf"(?m)^error: .*config.data.dir={dataset}1: no manifest.json there", output), output[-3000:]


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
def test_a_full_disk_is_told_and_the_checkpoint_before_stays(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
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
    output = finish(start(command(dataset, tmp_path / "file" / "run")), status=cli.USER_ERROR)[0]
    assert re.search(r"\nerror: .*Not a directory: .*file", output)


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
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(peers_lib, "end_process", lambda *said: (told.append(said), ended.set()))
    before = signal.getsignal(signal.SIGTERM)
    try:
        preemption = processes.Preemption(grace_seconds=1)
        assert not preemption.reached(1)
        signal.raise_signal(signal.SIGTERM)
        assert preemption.reached(2) and not ended.is_set()
        assert ended.wait(5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [("not saved within --grace_seconds=1; the checkpoint before stays", processes.PREEMPTED)]
