"""Runs the checks of this folder on the accelerator at hand, and writes one JSON file of figures.

    python -m tests.accelerator --output=accelerator.json

Needs jax with its plugin, flax, optax, ml_collections and numpy; with torch and transformers it also compares with PyTorch.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback
import types
from typing import Any

FOLDER = pathlib.Path(__file__).parent
NAMES = ("resume", "attention", "losses", "plan", "train_step")


def parse_arguments() -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="accelerator.json", help="the file of figures")
    parser.add_argument("--checks", default=",".join(NAMES), help="which checks to run, separated by commas")
    parser.add_argument("--any", action="store_true", help="run on a CPU too: with toy sizes, to test the checks themselves")
    parser.add_argument("--here", action="store_true", help="run the checks in this process, not each in its own")
    return parser.parse_args()


def prepare_imports() -> None:
    """Puts the repository and its tests on the path, and a hollow module in the place of TensorFlow if that is not installed.

    The rules for a config's spans and rows stand beside the functions that cut spans with TensorFlow; these do not run here.
    """
    sys.path[:0] = [str(FOLDER.parent.parent), str(FOLDER.parent)]
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        hollow: Any = types.ModuleType("tensorflow")
        hollow.Tensor = object
        sys.modules["tensorflow"] = hollow


def run_here(names: list[str], small_if_cpu: bool) -> dict[str, Any]:
    """Runs checks in this process and returns the figures, with the device's name and the errors."""
    prepare_imports()
    import jax
    from accelerator import checks

    device = jax.devices()[0]
    is_cpu = device.platform == "cpu"
    if is_cpu and not small_if_cpu:
        sys.exit("error: JAX finds no accelerator here; --any runs the checks on the CPU with toy sizes")
    figures: dict[str, Any] = {"device": device.device_kind, "devices": jax.device_count(), "jax": jax.__version__}
    for name in names:
        begin, result = time.monotonic(), {}
        try:
            result = checks.CHECKS[name](is_cpu)
        except Exception as error:  # the other checks still run
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        figures[name] = result | {"check_seconds": round(time.monotonic() - begin, 1)}
        print(f"{name}: {result.get('error') or result.get('skipped') or 'passed'}", flush=True)
    return figures


def run_apart(names: list[str], any_device: bool, output: pathlib.Path) -> dict[str, Any]:
    """Runs each check in a process of its own, so that the peak of the allocator is that of the check alone."""
    figures: dict[str, Any] = {}
    for name in names:
        environment = dict(os.environ)
        if (
            name == "resume"
        ):  # without it, sums by atomic additions (the gradient of the embeddings) have no fixed order on GPUs
            environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
        command = [sys.executable, "-m", "tests.accelerator", "--here", f"--checks={name}", f"--output={output}"]
        output.unlink(missing_ok=True)
        done = subprocess.run([*command, *["--any"] * any_device], cwd=FOLDER.parent.parent, env=environment)
        if output.exists():
            figures |= json.loads(output.read_text())
        else:
            figures[name] = {"error": f"the process ended with status {done.returncode}"}
    return figures


def main() -> None:
    """Writes the figures; ends with status 1 if a check failed."""
    arguments = parse_arguments()
    names, output = arguments.checks.split(","), pathlib.Path(arguments.output).absolute()
    if unknown := [name for name in names if name not in NAMES]:
        sys.exit(f"error: --checks={','.join(unknown)}: there are {', '.join(NAMES)}")
    figures = run_here(names, arguments.any) if arguments.here else run_apart(names, arguments.any, output)
    output.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(any("error" in figures[name] for name in names))


if __name__ == "__main__":
    main()
