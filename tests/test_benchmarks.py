"""The benchmarks still run: at toy sizes, for their output and not for their figures."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


def run(name: str, *flags: str) -> list[str]:
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, ROOT / "benchmarks" / name, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_loss_memory() -> None:
    lines = run("loss_memory.py", "--dim=8", "--devices=2", "--batches=64", "--timed=64", "--repeats=1", "--block=16")
    assert lines[-1].split()[0] == "64" and lines[-1].count("ms") == 4


@pytest.mark.slow
def test_plan_memory() -> None:
    lines = run("plan_memory.py", "--devices=2", "--one=debug")
    assert lines[-1].startswith("debug") and len(lines[-1].split()) == 4


@pytest.mark.slow
def test_grad_cache() -> None:
    lines = run("grad_cache.py", "--batches=16", "--micro_batch=8", "--timed=0")
    assert lines[-1].split()[0] == "16" and len(lines[-1].split()) == 5
