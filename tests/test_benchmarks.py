"""Each benchmark runs: with toy sizes, for its output and not for its figures."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT


def run(name: str, *flags: str) -> list[str]:
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_every_benchmark_says_how_to_run_it() -> None:
    for path in (ROOT / "benchmarks").glob("*.py"):
        text = path.read_text()
        if "app.run(main)" in text:
            assert f"python -m benchmarks.{path.stem}" in text.partition('"""\n\n')[0], path


@pytest.mark.slow
def test_loss_memory() -> None:
    lines = run("loss_memory", "--dim=8", "--devices=2", "--batches=64", "--timed=64", "--repeats=1", "--block=16")
    assert lines[-1].split()[0] == "64" and lines[-1].count("ms") == 4


@pytest.mark.slow
def test_plan_memory() -> None:
    lines = run("plan_memory", "--devices=2", "--case=debug")
    assert lines[-1].startswith("debug") and len(lines[-1].split()) == 4


@pytest.mark.slow
def test_grad_cache() -> None:
    lines = run("grad_cache", "--batches=16", "--micro_batch=8", "--timed=0")
    assert lines[-1].split()[0] == "16" and len(lines[-1].split()) == 5


@pytest.mark.slow
def test_near_duplicates(tmp_path: pathlib.Path) -> None:
    texts = [" ".join(f"{a}{i * a % 97}" for i in range(80)) for a in range(1, 31)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/set.txt").write_text(" ".join(f"question{i}" for i in range(13)))
    lines = run("near_duplicates", f"--input={tmp_path}/texts.jsonl", "--planted=9", f"--decontaminate={tmp_path}/sets")
    assert lines[-1].strip() == "sets: 1 of 1 planted texts found"


@pytest.mark.slow
def test_log_line() -> None:
    lines = run("log_line", "--lines=3", "--width=8")
    assert len(lines) == 2 and all(line.endswith("ms per line") for line in lines)


@pytest.mark.slow
def test_data_order(tmp_path: pathlib.Path) -> None:
    lines = run("data_order", "--records=20000", "--pairs=256", "--sizes=100,2000", f"--output={tmp_path / 'figure.png'}")
    assert sum("each exactly once in each of 3 epochs: True" in line for line in lines) == 2
    assert (tmp_path / "figure.png").stat().st_size > 10_000
