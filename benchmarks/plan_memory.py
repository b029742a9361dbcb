"""Compares the memory of a compiled step, which `plan` reports, with the growth of the process when the step runs.

  GLIBC_TUNABLES=... python -m benchmarks.plan_memory [--devices=8]     with the value that launch/local.sh sets

The CPU devices share one process, so their temporaries and outputs add up; the peak of the process (VmHWM, which Linux lets a
process reset) is read after a step. Donated arguments are in memory before and after the step, and count on neither side. Each
case runs in its own process. Expect ratios of 0.9 to 1.0. Needs Linux.
"""

import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import common
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build

DEVICES = flags.DEFINE_integer("devices", 8, "CPU devices.")
CASE = flags.DEFINE_string("case", None, "Measure only this case, in this process.")
VOCAB_SIZE = 16384
MB = 1e6

# Name of a case → its recipe, and the values that differ from it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "debug": ("debug", {}),
    "debug, batch 1,024": ("debug", {"data.batch_size": 1024}),
    "debug, batch 1,024 in micro-batches of 256": ("debug", {"data.batch_size": 1024, "micro_batch": 256}),
    "debug, 6 layers, fsdp 4": ("debug", {"data.batch_size": 512, "model.num_layers": 6, "mesh.fsdp": 4}),
    "debug, 6 layers, remat full": ("debug", {"data.batch_size": 1024, "model.num_layers": 6, "model.remat": "full"}),
    "pile_small": ("pile_small", {}),
}


def status(name: str) -> int:
    """Returns a size of this process from /proc, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}: this benchmark needs Linux")


def measure(case: str) -> None:
    """Compiles and runs one case, and prints its line."""
    recipe, changes = CASES[case]
    config = common.load_recipe(recipe)
    config.update_from_flattened_dict(changes)
    mesh = sharding.make_mesh(config.mesh)
    run = build.build(config, mesh, VOCAB_SIZE)
    shapes = build.batch_shapes(config, mesh)
    step = run.train_step.lower(run.shapes, shapes).compile()
    analysis: Any = step.memory_analysis()
    compiled = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.int32), shapes)
    batch = sharding.to_global(ones, np.arange(config.data.batch_size), config.data.batch_size, mesh)
    state = jax.block_until_ready(run.init())
    growths = []
    for _ in range(3):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        state, metrics, z = jax.block_until_ready(step(state, batch))
        growths.append(status("VmHWM") - before)
        del metrics, z
    growth, expected = max(growths) / MB, compiled * jax.device_count() / MB
    print(f"{case:<44}{expected:>14,.0f}{growth:>14,.0f}{expected / growth:>9.2f}", flush=True)


def main(argv: list[str]) -> None:
    """Prints a line per case."""
    del argv
    if CASE.value:
        measure(CASE.value)
        return
    print(f"{DEVICES.value} CPU devices; MB\n{'':<44}{'compiled':>14}{'growth':>14}{'ratio':>9}", flush=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES.value}"}
    for case in CASES:
        subprocess.run([sys.executable, "-m", "benchmarks.plan_memory", f"--case={case}"], env=environment, check=True)


if __name__ == "__main__":
    app.run(main)
