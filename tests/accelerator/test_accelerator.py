"""The checks of this folder: on the accelerator where there is one, and with toy sizes on CPU, for the code of the checks."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from accelerator.__main__ import NAMES
from conftest import ROOT

# What else the package uses: absent where only jax, flax, optax, ml_collections and numpy are installed.
ABSENT = (
    "tensorflow array_record clu tensorflow_datasets apache_beam tokenizers sentencepiece safetensors sklearn bm25s matplotlib "
    "tensorboard zstandard torch transformers pytest"
).split()
RUN = """
import runpy, sys
sys.modules.update(dict.fromkeys({absent}))
runpy.run_module("tests.accelerator", run_name="__main__")
"""


def run(output: pathlib.Path, *arguments: str, absent: list[str], **variables: str) -> dict:
    """Runs the checks in a process where the modules of `absent` cannot be imported, and returns the figures."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")} | variables
    command = [sys.executable, "-c", RUN.format(absent=absent), f"--output={output}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert output.exists(), done.stderr[-3000:]
    figures = json.loads(output.read_text())
    assert done.returncode == 0, (figures, done.stderr[-3000:])
    return figures


@pytest.mark.slow
def test_the_checks_run_on_cpu_with_toy_sizes_and_few_libraries(tmp_path: pathlib.Path) -> None:
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    figures = run(tmp_path / "cpu.json", "--any", "--here", absent=ABSENT, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    assert figures["device"] == "cpu" and figures["devices"] == 2
    assert set(NAMES) < set(figures) and set(figures["resume"]) == {"debug", "check_seconds"}
    assert figures["plan"]["bag"]["seconds"] > 0


@pytest.mark.accelerator
@pytest.mark.parametrize("name", NAMES)
def test_on_the_accelerator(name: str, tmp_path: pathlib.Path) -> None:
    if not any(pathlib.Path("/dev").glob(pattern) for pattern in ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*")):
        pytest.skip("there is no GPU or TPU here")
    run(tmp_path / "figures.json", f"--checks={name}", absent=[])
