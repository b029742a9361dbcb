"""What runs on each worker of a pod: Google's notices, and the installation."""

import datetime
import http.server
import json
import pathlib
import shutil
import subprocess
import threading
from collections.abc import Iterator

import pytest
from conftest import ROOT, wait_for
from launch.machines import Stub, debug, saved

from contrastive_jax.runtime import processes


@pytest.fixture
def metadata() -> Iterator[tuple[str, dict[str, str]]]:
    """Google's metadata server: its address, and its values by key."""
    values = {"maintenance-event": "NONE", "preempted": "FALSE", "attributes/agent-worker-number": "7"}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            key = self.path.removeprefix("/computeMetadata/v1/instance/").partition("?")[0]
            self.send_response(200 if key in values and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write(values.get(key, "").encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", values
        server.shutdown()


def on_worker(tmp_path: pathlib.Path, environment: dict[str, str], address: str, *training: str) -> tuple[int, str]:
    """Trains on one worker without gcloud; returns its exit status and its log."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("contrastive_jax", "configs", "launch", "setup.cfg"):
        (tree / name).symlink_to(ROOT / name)
    alone = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}
    alone |= {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "GCE_METADATA_HOST": address, "NOTICE_SECONDS": "1"}
    start = ["bash", "launch/worker.sh", "start", f"--workdir={tmp_path / 'run'}", *training]
    subprocess.run(start, cwd=tree, env=environment | alone, check=True, timeout=60)
    wait_for((tree / ".job" / "exit").exists)
    return int((tree / ".job" / "exit").read_text()), (tree / ".job" / "log").read_text()


def near(minutes: float) -> str:
    """What the metadata server says of maintenance that begins in so many minutes."""
    start = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=minutes)
    window = {"window_start_time": start.isoformat(), "latest_window_start_time": "2001-01-01T00:00:00Z"}
    return json.dumps({"can_reschedule": "true", "maintenance_status": "PENDING", **window})


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"),
        ("preempted", "TRUE", "preempted"),
        ("upcoming-maintenance", near(5), "maintenance at"),
        ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE", ""),
        ("upcoming-maintenance", near(24 * 60), ""),
    ],
)
def test_b2_a_notice_is_heeded_when_the_training_listens(
    key: str,
    value: str,
    reason: str,
    metadata: tuple[str, dict[str, str]],
    stub: Stub,
    tmp_path: pathlib.Path,
    environment: dict[str, str],
) -> None:
    """The notice is there before the training starts; it must not end a training that cannot save yet."""
    stub('rm "$CONTRASTIVE_JAX_READY_FILE"; sleep 2; trap "exit 75" TERM; touch "$CONTRASTIVE_JAX_READY_FILE"; sleep 4 & wait')
    metadata[1][key] = value
    status, log = on_worker(tmp_path, environment, metadata[0])
    assert (status, f"notice: {reason}" in log) == ((75, True) if reason else (0, False)), log
    assert (tmp_path / "run/logs/worker-7.log").read_text() == log


def test_a_maintenance_notice_saves_and_ends(
    metadata: tuple[str, dict[str, str]], dataset: pathlib.Path, tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    """The real training on a machine that is about to be taken away when it starts."""
    metadata[1]["preempted"] = "TRUE"
    training = [*debug(dataset), "--config.steps=1000000"]
    status, log = on_worker(tmp_path, environment, metadata[0], *training)
    assert status == processes.PREEMPTED, log
    assert "notice: preempted; saving" in log and len(saved(tmp_path / "run")) == 1


# A python that writes down what it is asked to install. It fails where its arguments match $FAIL, as venv does in the middle.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  $FAIL)
    [[ "$2" != venv ]] || {{ mkdir -p "${{@: -1}}/bin" && cp {template} "${{@: -1}}/bin/python"; }}
    exit 7
    ;;
  "-c import sys; sys.exit"*) {supported} ;;
  "-c import ensurepip"*) exit 0 ;;
  "-c import sys; print"*) echo {version} ;;
  "-m venv "* | "-m uv venv "*)
    echo "{name} $*" >> {log}
    {downloads}
    mkdir -p "${{@: -1}}/bin" && cp {template} "${{@: -1}}/bin/python" && touch "${{@: -1}}/bin/activate"
    ;;
  *) echo "{name} $*" >> {log} ;;
esac
"""


class Machine:
    """A machine with the given interpreters, by name and whether their version is supported, and with nothing else."""

    def __init__(self, folder: pathlib.Path, pythons: dict[str, bool], downloads: bool = True, version: str = "3.12"):
        self.binary, self.log, self.venv = folder / "bin", folder / "log", folder / "venv"
        self.binary.mkdir()
        for name in ("bash", "cat", "cmp", "cp", "dirname", "grep", "mkdir", "sed", "touch", "uname"):
            (self.binary / name).symlink_to(str(shutil.which(name)))
        for name, supported in pythons.items():
            text = PYTHON.format(
                name=name,
                log=self.log,
                supported="exit 0" if supported else "exit 1",
                version=version,
                downloads="" if downloads else "exit 1",
                template=self.binary / name,
            )
            (self.binary / name).write_text(text)
            (self.binary / name).chmod(0o755)

    def setup(
        self, extra: str, shell: str = "set -euo pipefail", **variables: str
    ) -> tuple[subprocess.CompletedProcess, list[str]]:
        """Sources launch/setup.sh; returns how that ended, and what the interpreters were asked to do."""
        environment = {"PATH": str(self.binary), "VENV": str(self.venv), "HOME": str(self.binary), **variables}
        self.log.write_text("")
        script = f"{shell}; cd {ROOT}; source launch/setup.sh {extra}"
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
        return done, self.log.read_text().splitlines()

    def stamps(self) -> list[str]:
        return [path.name for path in self.venv.glob("installed-*")]


@pytest.mark.parametrize(
    ("pythons", "downloads", "expected"),
    [
        ({"python3": False, "python3.12": True}, True, "python3.12 -m venv"),
        ({"python3": True, "python3.12": True}, True, "python3.12 -m venv"),
        ({"python3": True}, True, "python3 -m venv"),
        ({"python3": False}, True, "python3 -m uv venv --quiet --seed --python 3.12"),
        (
            {"python3": False},
            False,
            "error: no Python 3.11 to 3.13 is installed, and uv could not download one from",
        ),
    ],
)
def test_a4_b5_workers_install_a_named_python_and_the_versions_of_the_lock_file(
    pythons: dict[str, bool], downloads: bool, expected: str, tmp_path: pathlib.Path
) -> None:
    """As TPU images have it, python3 is 3.10 (not supported), alone or beside others."""
    done, calls = Machine(tmp_path, pythons, downloads).setup("tpu")
    assert (done.returncode == 0) == downloads, done.stderr
    called = "\n".join(calls) + done.stderr
    assert expected in called
    if downloads:
        assert "-m pip install --quiet --no-compile --requirement launch/locks/tpu-3.12.txt" in called
        assert "-m pip install --quiet --no-deps --editable ." in called


@pytest.mark.parametrize("shell", ["true", "set -euo pipefail"])
@pytest.mark.parametrize(
    ("version", "extras", "fails"),
    [
        ("3.12", "", "-m venv *"),
        ("3.12", "", "-m pip *--requirement*"),
        ("3.12", "", "-m pip *--no-deps --editable*"),
        ("3.12", "wandb", "-m pip *--constraint*"),
        ("3.13", "", "-m pip *--editable*"),  # there is no lock file
        ("3.13", "wandb", "-m pip *--editable*"),
    ],
)
def test_what_failed_to_install_is_installed_by_the_same_command_again(
    version: str, extras: str, fails: str, shell: str, tmp_path: pathlib.Path
) -> None:
    machine = Machine(tmp_path, {"python3": True}, version=version)
    done, _ = machine.setup("cuda", shell, EXTRAS=extras, FAIL=fails)
    assert done.returncode == 1 and "for the reason above; mend that and start again" in done.stderr
    assert not machine.stamps()
    done, calls = machine.setup("cuda", shell, EXTRAS=extras)
    assert done.returncode == 0 and machine.stamps() == ["installed-cuda"], done.stderr
    assert any("-m venv" in call for call in calls) == ("venv" in fails) and any("--editable" in call for call in calls)


def test_extras_are_installed_beside_the_versions_of_the_lock_file(tmp_path: pathlib.Path) -> None:
    machine = Machine(tmp_path, {"python3": True})
    pip = "python3 -m pip install --quiet"
    lock = f"{pip} --no-compile --requirement launch/locks/cuda-3.12.txt"
    plain = [lock, f"{pip} --no-deps --editable ."]
    more = [lock, f"{pip} --no-compile --constraint launch/locks/cuda-3.12.txt --editable .[wandb,gcs]"]
    assert machine.setup("cuda")[1][1:] == plain
    for extras, expected in (("wandb,gcs", more), ("wandb,gcs", []), ("", plain), ("", [])):
        done, calls = machine.setup("cuda", EXTRAS=extras)
        assert done.returncode == 0 and calls == expected, done.stderr
    done, calls = machine.setup("cuda", EXTRAS="gcs,wanbd")
    assert done.returncode == 2 and not calls
    assert "error: EXTRAS=gcs,wanbd: setup.cfg has no extra wanbd; give names from gcs, s3, " in done.stderr
    assert "wandb, trackio, docs\n" in done.stderr


@pytest.mark.parametrize(("extra", "expected"), [("cuda", ".[cuda,wandb]"), ("", ".[wandb]")])
def test_extras_are_installed_where_there_is_no_lock_file(extra: str, expected: str, tmp_path: pathlib.Path) -> None:
    done, calls = Machine(tmp_path, {"python3": True}, version="3.13").setup(extra or "''", EXTRAS="wandb")
    assert done.returncode == 0 and calls[1:] == [f"python3 -m pip install --quiet --editable {expected}"]
