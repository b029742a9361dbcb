"""The launchers on this machine and under a real SLURM; those of pods are in test_tpu.py."""

import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from contrastive_jax.runtime.processes import PREEMPTED

STUB = """#!/usr/bin/env bash
[[ "$1" != -c ]] || exec {python} "$@"
echo "${{*@Q}}" >> {log}
"""


def test_local_trains_evaluates_and_prints_how_to_export(tmp_path: pathlib.Path, environment: dict[str, str]) -> None:
    """A python that writes down its arguments: local.sh calls the commands, and quotes what it prints."""
    binary, log = tmp_path / "venv" / "bin", tmp_path / "log"
    (binary / "python").unlink()
    (binary / "python").write_text(STUB.format(python=sys.executable, log=log))
    (binary / "python").chmod(0o755)
    (binary / "activate").write_text(f"export VIRTUAL_ENV={tmp_path / 'venv'} PATH={binary}:$PATH\n")
    workdir = f"{tmp_path}/it's here"
    more = ["--config=configs/cpt_text.py:s", f"--workdir={workdir}", "--config.data.dir=data/pile"]
    local = ["bash", str(ROOT / "launch/local.sh"), *more]
    done = subprocess.run(local, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    module = ["-m", "contrastive_jax"]
    called = [shlex.split(line) for line in log.read_text().splitlines()]
    assert called == [
        [*module, "train", *more],
        [*module, "evaluate", f"--model={workdir}", "--tasks=query_key", "--baselines"],
    ]
    printed = dict(line.split(":", 1) for line in done.stdout.splitlines() if not line.startswith("==") and ":" in line)
    assert shlex.split(printed["export"]) == [
        str(binary / "python"),
        *[*module, "export", f"--model={workdir}", "--output=exported/cpt_text-s"],
    ]
    assert shlex.split(printed["curves"]) == [str(binary / "tensorboard"), f"--logdir={workdir}"]


def test_help_of_the_launchers() -> None:
    for name, word in (("tpu.sh", "--queued"), ("gpu.sh", "sbatch --nodes=4"), ("local.sh", "--workdir=DIR")):
        done = subprocess.run(["bash", str(ROOT / "launch" / name), "--help"], capture_output=True, text=True, check=True)
        assert word in done.stdout and "set -e" not in done.stdout


def test_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = [str(path) for folder in ("launch", "tests", "tests/cloud") for path in (ROOT / folder).glob("*.sh")]
    subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, check=True)


def test_the_launchers_know_the_status_of_a_preemption() -> None:
    for name in ("tpu.sh", "gpu.sh"):
        assert f"PREEMPTED={PREEMPTED} " in (ROOT / "launch" / name).read_text()
