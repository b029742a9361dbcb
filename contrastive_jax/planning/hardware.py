"""The machines that a step can be planned for, by name.

tpu:v5e:16x16           a TPU slice, by the shape of its torus
tpu:v5p:8x8x16x4slices  four such slices, joined by the network of their hosts
tpu7x:4x4x8             an Ironwood slice; JAX sees two devices per chip
gpu:h100:4x8            nodes × GPUs per node
cpu:8                   CPU devices
"""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from contrastive_jax.config import UserError

GIB = 2**30


class Chip(NamedTuple):
    """The figures of one device that an estimate needs.

    Attributes:
      flops: peak rate of dense bfloat16 matrix products, FLOP/s.
      hbm: the memory that a program can use, bytes.
      bandwidth: the bandwidth of that memory, bytes/s.
      axes: how many numbers the shape of a target has: 2 or 3 for a TPU slice, 2 for GPUs (nodes × GPUs per node), 1 for CPUs.
      link: the bandwidth in one direction of one link of a TPU chip in its torus, or of one GPU's NVLink, bytes/s.
      clock: TPU: the clock, cycles/s; it turns the compiler's cycles into seconds.
      cores: TPU: the number of cores that share a kernel's grid.
      torus: TPU: the size at which an axis of the torus closes into a ring.
      network: the bandwidth of one device in one direction to other GPU nodes or other TPU slices, bytes/s.
      per_host: TPU: the number of devices that share a host's network.
      per_chip: TPU: the number of devices of a chip.
      inside: TPU with several devices per chip: the bandwidth between them in one direction, bytes/s.
    """

    flops: float
    hbm: float
    bandwidth: float
    axes: int
    link: float
    clock: float = 0.0
    cores: int = 1
    torus: int = 0
    network: float = 0.0
    per_host: int = 1
    per_chip: int = 1
    inside: float = 0.0


# Sources: Google's pages on each TPU version (docs.cloud.google.com/tpu/docs/v5e and so on; they give no network for v4, which
# has v5p's here) and NVIDIA's data sheets of the HGX boards, without sparsity; for the usable memory of a TPU, its compiler.
# Google lists 100 GB/s per link and direction for v5p, v6e and Ironwood; 90 is what programs reach (jax-ml.github.io/
# scaling-book). Ironwood's clock is such that its compiler's cycles for a large product give 88 % of the peak, as on v5e.
CHIPS = {
    "tpu:v4": Chip(275e12, 30.75 * GIB, 1228e9, 3, 45e9, clock=1.05e9, cores=2, torus=4, network=6.25e9, per_host=4),
    "tpu:v5e": Chip(197e12, 15.75 * GIB, 819e9, 2, 45e9, clock=1.5e9, torus=16, network=3.125e9, per_host=8),
    "tpu:v5p": Chip(459e12, 95.74 * GIB, 2765e9, 3, 90e9, clock=1.75e9, cores=2, torus=4, network=6.25e9, per_host=4),
    "tpu:v6e": Chip(918e12, 31.25 * GIB, 1640e9, 2, 90e9, clock=1.75e9, torus=16, network=12.5e9, per_host=8),
    "tpu7x": Chip(
        flops=1153.5e12,
        hbm=94.75 * GIB,
        bandwidth=3690e9,
        axes=3,
        link=90e9,
        clock=2.4e9,
        torus=4,
        network=6.25e9,
        per_host=8,
        per_chip=2,
        inside=540e9,
    ),
    # launch/gpu.sh lets JAX take 92 % of a GPU's memory.
    "gpu:h100": Chip(989e12, 0.92 * 79.6 * GIB, 3350e9, 2, 450e9, network=50e9),
    "gpu:h200": Chip(989e12, 0.92 * 141.0 * GIB, 4800e9, 2, 450e9, network=50e9),
    "gpu:b200": Chip(2250e12, 0.92 * 178.4 * GIB, 7700e9, 2, 900e9, network=50e9),
    "gpu:a100-80": Chip(312e12, 0.92 * 79.6 * GIB, 2039e9, 2, 300e9, network=25e9),
    "cpu": Chip(2e11, 64 * GIB, 2e10, 1, 1e10, network=1e10),
}

# The values that vary between GPUs in GPU_TARGET, the text of a GpuTargetConfigProto: XLA's compiler needs it for a GPU that is
# not present. They are those of XLA's own descriptions (xla/backends/gpu/target_config/specs).
GPU_TARGETS = {
    "gpu:h100": (9, 0, "NVIDIA H100 80GB HBM3", 132, 1.98, 3352320000000, 52428800, 232448, 233472, 85520809984, 128),
    "gpu:h200": (9, 0, "NVIDIA H200 141GB HBM3e", 132, 1.98, 4800000000000, 52428800, 232448, 233472, 151397597184, 128),
    "gpu:b200": (10, 0, "NVIDIA B200", 148, 1.965, 7672320000000, 132644864, 232448, 233472, 191514411008, 128),
    "gpu:a100-80": (8, 0, "NVIDIA A100-SXM4-80GB", 108, 1.41, 2039000000000, 41943040, 166912, 167936, 85520809984, 64),
}
GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {8}
  threads_per_core_limit: 2048 core_count: {3} fpus_per_core: {10} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {5} l2_cache_size: {6} clock_rate_ghz: {4} device_memory_size: {9}
  shared_memory_per_block_optin: {7} cuda_compute_capability {{ major: {0} minor: {1} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{2}"
"""

EXAMPLES = (
    "tpu:v5e:4x4, tpu:v5e:16x16, tpu:v4:4x4x8, tpu:v5p:8x8x8, tpu:v5p:8x8x16x4slices, tpu:v6e:16x16, tpu7x:4x4x8, "
    "gpu:h100:1x8, gpu:h100:4x8, gpu:h200:1x8, gpu:b200:1x8, gpu:a100-80:1x8, cpu:8"
)


class Target(NamedTuple):
    """A machine to plan for.

    Attributes:
      name: its name, as given to `parse_target`.
      kind: the kind of chip, a key of CHIPS.
      shape: the shape of a TPU slice, or (nodes, GPUs per node), or (CPU devices,).
      slices: the number of TPU slices.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """The figures of one device."""
        return CHIPS[self.kind]

    @property
    def is_tpu(self) -> bool:
        """Whether the machine is made of TPUs."""
        return self.kind.startswith("tpu")

    @property
    def size(self) -> int:
        """The number of devices, over all slices."""
        return math.prod(self.shape) * self.chip.per_chip * self.slices


def parse_target(name: str) -> Target:
    """Returns the machine of a name such as "tpu:v5e:16x16" or, of several slices, "tpu:v5e:16x16x2slices".

    Raises:
      UserError: there is no such machine; the message lists the chips and gives examples.
    """
    parts = re.fullmatch(r"(.+):(\d+(?:x\d+)*?)(?:x(\d+)slices)?", name)
    kind, sizes = (parts[1], [int(size) for size in parts[2].split("x")]) if parts else ("", [])
    slices = int(parts[3] or 1) if parts else 1
    known = kind in CHIPS and len(sizes) == CHIPS[kind].axes and (slices == 1 or kind.startswith("tpu"))
    if not known or not all(sizes) or not slices:
        raise UserError(f"--target={name}: no such machine; give a chip ({', '.join(CHIPS)}) and its shape, such as {EXAMPLES}")
    return Target(name, kind, tuple(sizes), slices)


def describe_devices(target: Target) -> list[Any]:
    """Returns device descriptions to compile for; no TPU or GPU has to be present.

    Raises:
      UserError: the compiler is not installed, or it knows no slice of this shape.
    """
    if target.kind == "cpu":
        return jax.devices("cpu")[: target.size]
    shape = "x".join(str(size) for size in target.shape)
    try:
        if target.kind.startswith("gpu"):
            description = GPU_TARGET.format(*GPU_TARGETS[target.kind])
            topology = topologies.get_topology_desc(
                platform="cuda", topology_name=f"1x{shape}", topology=f"1x{shape}", target_config=description
            )
        else:
            several = {"num_slices": target.slices} if target.slices > 1 else {}
            topology = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{target.kind.removeprefix('tpu:')}:{shape}", **several
            )
    except Exception as error:  # the type of XLA's error differs between versions
        raise UserError(
            f"--target={target.name}: its compiler failed ({str(error).splitlines()[0][:200]}); "
            f"run pip install 'contrastive_jax[plan]', and give a shape that exists, such as {EXAMPLES}"
        ) from error
    return list(topology.devices)
