"""What the tests of the launchers share: machines on which everything is installed, and the fake gcloud."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from conftest import ROOT, XLA_FLAGS, overrides

TPU = ["bash", str(ROOT / "launch/tpu.sh")]
SLICE = ["--name=pod", "--zone=us-west4-a"]
POD = [*SLICE, "--type=v5litepod-16", "--spot", "--poll=1", "--timeout=30"]
# A python that trains as a test says, at once: $attempt counts the starts on each worker.
STUB = """#!/usr/bin/env bash
[[ "${{3:-}}" == train ]] || exec {python} "$@"
echo start >> "$FAKE_GCLOUD/starts-$OMPI_COMM_WORLD_RANK"
attempt="$(grep -c . "$FAKE_GCLOUD/starts-$OMPI_COMM_WORLD_RANK")"
touch "$CONTRASTIVE_JAX_READY_FILE"
echo "attempt $attempt of worker $OMPI_COMM_WORLD_RANK"
{training}
"""

Launch = Callable[..., subprocess.CompletedProcess[str]]
Stub = Callable[[str], None]


def write_venv(folder: pathlib.Path) -> None:
    """Writes what launch/setup.sh takes for a virtual environment in which everything is installed: it is this Python's."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    activate = f"export VIRTUAL_ENV={folder} PATH={pathlib.Path(sys.executable).parent}:$PATH\n"
    (folder / "bin" / "activate").write_text(activate)
    for extra in ("base", "tpu", "cuda"):
        lock = ROOT / f"launch/locks/{extra}-{sys.version_info.major}.{sys.version_info.minor}.txt"
        installed = (ROOT / "setup.cfg").read_text() + (lock.read_text() if lock.exists() else "")
        (folder / f"installed-{extra}").write_text(installed)


@pytest.fixture
def environment(tmp_path: pathlib.Path) -> dict[str, str]:
    """Machines on which everything is installed already: VENV is this Python's."""
    write_venv(tmp_path / "venv")
    (tmp_path / "cloud").mkdir()
    return os.environ | {
        "VENV": str(tmp_path / "venv"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": XLA_FLAGS.format(1),
        "FAKE_GCLOUD": str(tmp_path / "cloud"),
        "GCE_METADATA_HOST": "127.0.0.1:9",  # nobody answers there
        "PATH": f"{ROOT / 'tests/launch/fakes'}:{os.environ['PATH']}",
    }


@pytest.fixture
def stub(tmp_path: pathlib.Path, environment: dict[str, str]) -> Callable[[str], None]:
    """Makes the training of two workers a line of bash."""
    binary = tmp_path / "venv" / "bin"

    def write(training: str) -> None:
        (binary / "python").unlink()
        (binary / "python").write_text(STUB.format(python=sys.executable, training=training))
        (binary / "python").chmod(0o755)
        (binary / "activate").write_text(f"export VIRTUAL_ENV={tmp_path / 'venv'} PATH={binary}:$PATH\n")
        environment["FAKE_WORKERS"] = "2"

    return write


@pytest.fixture
def launch(tmp_path: pathlib.Path, environment: dict[str, str]) -> Iterator[Launch]:
    """Calls launch/tpu.sh for a slice; `run` gets a workdir. What is still there is deleted after the test."""

    def call(command: str, *options: str, arguments: tuple[str, ...] = (), seconds: int = 120) -> subprocess.CompletedProcess:
        given = [f"--workdir={tmp_path}/bucket/run", *arguments] if command == "run" else arguments
        full = [
            *TPU,
            command,
            *POD[: 2 if command not in ("run", "create") else None],
            *options,
            *["--", *given][: 9 * bool(given)],
        ]
        return subprocess.run(full, env=environment, capture_output=True, text=True, timeout=seconds)

    yield call
    for folder in (tmp_path / "cloud").glob("*/"):
        subprocess.run(["gcloud", "fake", "preempt", folder.name], env=environment, check=False, capture_output=True)


def fault(environment: dict[str, str], name: str, *lines: object) -> None:
    """Makes gcloud or a worker fail; see tests/launch/fakes/gcloud."""
    folder = pathlib.Path(environment["FAKE_GCLOUD"]) / "faults"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(map(str, lines)))


def debug(dataset: pathlib.Path) -> list[str]:
    """The flags that train the shrunk debug recipe."""
    return ["--config=configs/debug.py", *overrides("debug", dataset)]


def saved(workdir: pathlib.Path) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()}


def requests(environment: dict[str, str]) -> list[list[str]]:
    log = pathlib.Path(environment["FAKE_GCLOUD"]) / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
