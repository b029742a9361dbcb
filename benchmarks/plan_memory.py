"""The plan's memory against reality: what a step is compiled to hold, and how far the process grows when the step runs.

  GLIBC_TUNABLES=... python benchmarks/plan_memory.py [--devices=8]     with the value that launch/local.sh sets

Eight CPU devices share one process, so their temporaries and new outputs add up; the process's peak (VmHWM, which Linux lets a
process reset) is read after a step. Donated arguments are in memory before and after, and count on neither side.
"""

import importlib
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from contrastive_jax import build, sharding

DEVICES = flags.DEFINE_integer("devices", 8, "CPU devices.")
ONE = flags.DEFINE_string("one", None, "Measure this case alone, in this process.")
VOCAB = 16384
MB = 1e6

# Recipe, then the values that differ from it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "debug": ("debug", {}),
    "debug, batch 1,024": ("debug", {"data.batch_size": 1024}),
    "debug, batch 1,024 in micro-batches of 256": ("debug", {"data.batch_size": 1024, "micro_batch": 256}),
    "debug, 6 layers, fsdp 4": ("debug", {"data.batch_size": 512, "model.num_layers": 6, "mesh.fsdp": 4}),
    "debug, 6 layers, remat full": ("debug", {"data.batch_size": 1024, "model.num_layers": 6, "model.remat": "full"}),
    "pile_small": ("pile_small", {}),
}


def status(name: str) -> int:
    """A size of this process from /proc, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}: this benchmark needs Linux")


def measure(name: str) -> None:
    """Compiles and runs one case, and prints its line."""
    recipe, changes = CASES[name]
    config = importlib.import_module(f"configs.{recipe}").get_config()
    config.update_from_flattened_dict(changes)
    mesh = sharding.make_mesh(config.mesh)
    run = build.build(config, mesh, VOCAB)
    shapes = build.batch_shapes(config, mesh)
    step = run.train_step.lower(run.shapes, shapes).compile()
    found: Any = step.memory_analysis()
    compiled = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    host = {name: np.ones(leaf.shape, np.int32) for name, leaf in shapes.items()}
    batch = sharding.to_global(host, np.arange(config.data.batch_size), config.data.batch_size, mesh)
    state = jax.block_until_ready(run.init())
    grown = []
    for _ in range(3):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        state, metrics, z = jax.block_until_ready(step(state, batch))
        grown.append(status("VmHWM") - before)
        del metrics, z
    devices = jax.device_count()
    got, expected = max(grown) / MB, compiled * devices / MB
    print(f"{name:<44}{expected:>14,.0f}{got:>14,.0f}{expected / got:>9.2f}", flush=True)


def main(argv: list[str]) -> None:
    """Prints a line a case, each from a process of its own."""
    del argv
    if ONE.value:
        measure(ONE.value)
        return
    print(f"{DEVICES.value} CPU devices; MB\n{'':<44}{'compiled':>14}{'grown by':>14}{'ratio':>9}", flush=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES.value}"}
    for name in CASES:
        subprocess.run([sys.executable, __file__, f"--one={name}"], env=environment, check=True)


if __name__ == "__main__":
    app.run(main)
