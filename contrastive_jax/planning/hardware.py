"""Chips, and targets made of them: "tpu:v5e:16x16", "gpu:h100:4x8" (nodes × GPUs of a node), "cpu:8"."""

import math
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GIB = 2**30


class Chip(NamedTuple):
    """What an estimate needs to know of one device.

    Attributes:
      flops: peak of dense bfloat16 products, FLOP/s.
      hbm: memory that a program can use, bytes.
      bandwidth: of that memory, bytes/s.
      axes: numbers in a target's shape: of a slice; nodes and GPUs; devices.
      link: TPU: one link of the torus, one direction; GPU: NVLink of one GPU, one direction; bytes/s.
      clock: TPU: cycles/s, by which the compiler's cycles become seconds.
      cores: TPU: cores that share a kernel's grid.
      torus: TPU: size at which an axis of the torus closes into a ring.
      network: GPU: to other nodes, one direction, of one GPU; bytes/s.
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


# Google's system architecture pages and NVIDIA's data sheets. The usable memory of a TPU is the compiler's own number.
CHIPS = {
    "tpu:v4": Chip(275e12, 30.75 * GIB, 1228e9, 3, 45e9, clock=1.05e9, cores=2, torus=4),
    "tpu:v5e": Chip(197e12, 15.75 * GIB, 819e9, 2, 45e9, clock=1.5e9, torus=16),
    "tpu:v5p": Chip(459e12, 95.74 * GIB, 2765e9, 3, 90e9, clock=1.75e9, cores=2, torus=4),
    "tpu:v6e": Chip(918e12, 31.25 * GIB, 1640e9, 2, 90e9, clock=1.75e9, torus=16),
    # JAX takes 92 % of a GPU's memory here (launch/gpu.sh).
    "gpu:h100": Chip(989e12, 0.92 * 79.6 * GIB, 3350e9, 2, 450e9, network=50e9),
    "gpu:a100-80": Chip(312e12, 0.92 * 79.6 * GIB, 2039e9, 2, 300e9, network=25e9),
    "cpu": Chip(2e11, 64 * GIB, 2e10, 1, 1e10, network=1e10),
}

# GpuTargetConfigProto: what XLA's compiler asks of a device that is not there.
GPU_TARGETS = {
    "gpu:h100": (9, 0, "NVIDIA H100 80GB HBM3", 132, 1.98, 3352320000000, 52428800, 232448, 233472, 85520809984, 128),
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
    "tpu:v5e:4x4, tpu:v5e:16x16, tpu:v4:4x4x8, tpu:v5p:8x8x8, tpu:v6e:16x16, gpu:h100:1x8, gpu:h100:4x8, gpu:a100-80:1x8, cpu:8"
)


class Target(NamedTuple):
    """A machine to plan for.

    Attributes:
      name: as it was asked for.
      kind: a key of CHIPS.
      shape: the slice, or (nodes, GPUs of a node), or (devices,).
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The numbers of one device."""
        return CHIPS[self.kind]

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.shape)


def parse(name: str) -> Target:
    """Reads a target's name.

    Raises:
      ValueError: there is no such target; the message lists what there is.
    """
    kind, _, shape = name.rpartition(":")
    sizes = shape.split("x")
    if kind not in CHIPS or len(sizes) != CHIPS[kind].axes or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(f"--target={name}: there are {', '.join(CHIPS)}, each with its shape, such as {EXAMPLES}")
    return Target(name, kind, tuple(int(size) for size in sizes))


def devices(target: Target) -> list[Any]:
    """The devices of a target, described to the compiler (a TPU or GPU need not be there).

    Raises:
      ValueError: the compiler is not installed, or knows no such slice.
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
            topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{target.kind.partition(':')[2]}:{shape}")
    except Exception as error:  # XLA's own types differ between versions
        raise ValueError(
            f"--target={target.name}: its compiler does not answer ({str(error).splitlines()[0][:200]}); "
            f"pip install 'contrastive_jax[plan]', and ask for a shape that exists, such as {EXAMPLES}"
        ) from error
    return list(topology.devices)
