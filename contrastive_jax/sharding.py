"""The mesh, one table of sharding rules, and host data to global arrays.

Axes are Auto throughout: XLA inserts the collectives (jax.sharding.AxisType.Auto).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

AXES = ("data", "fsdp", "tensor")
# The batch is spread over every axis that does not split a matrix product.
BATCH = P(("data", "fsdp"))

# Logical axis of a parameter → mesh axis. Everything not sharded is replicated.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
}


def make_mesh(config: ConfigDict, devices: list | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices.

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    shown = ", ".join(f"config.mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"{shown}: sizes are positive, and at most one is -1")
    known = -int(np.prod(sizes)) if -1 in sizes else int(np.prod(sizes))
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(f"{shown}: must multiply to the {len(devices)} devices there are (-1 takes what remains)")
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    except NotImplementedError:
        logging.warning("%s: no products of axes of the slice's torus; rings that do not close carry half as much", shown)
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, path: str) -> P:
    """The PartitionSpec of one parameter.

    Args:
      axes: logical axis names, one a dimension.
      shape: the parameter's shape.
      mesh: the mesh; axes of size 1 shard nothing.
      path: the parameter's name, for messages.

    Raises:
      ValueError: two dimensions fall on one mesh axis, an axis is not in RULES, or a size does not divide.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"{path}: logical axis {unknown[0]!r} is not in sharding.RULES ({', '.join(RULES)})")
    physical = [RULES[axis] if axis is not None else None for axis in axes]
    used = [axis for axis in physical if axis is not None]
    if len(set(used)) != len(used):
        raise ValueError(f"{path}: logical axes {axes} collide on the mesh axes {tuple(physical)}; change sharding.RULES")
    for name, axis, size in zip(axes, physical, shape, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{path}: {name} of size {size} does not divide over config.mesh.{axis}={mesh.shape[axis]}; change either"
            )
    return P(*physical)


def tree_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of parameters, from their logical axes and shapes."""

    def one(path: Any, shape: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(names, shape.shape, mesh, name))

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def shards(mesh: Mesh) -> int:
    """Into how many parts the batch is spread."""
    return math.prod(mesh.shape[axis] for axis in BATCH[0])


def rows_of_process(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of the global batch that this process's devices hold, int64[n], ascending.

    Raises:
      ValueError: the batch does not divide over the data and fsdp axes.
    """
    if batch_size < 1 or batch_size % shards(mesh):
        raise ValueError(
            f"config.data.batch_size={batch_size} must be a positive multiple of mesh.data × mesh.fsdp = {shards(mesh)}"
        )
    held = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held if index is not None]))


def to_global(local: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays [b ...], sharded over the batch, from this process's rows of each.

    Args:
      local: arrays [n ...], n = len(rows); or, of packed rows, the same share of it for each shard of the batch.
      rows: from `rows_of_process`.
      batch_size: b, rows of the global batch.
      mesh: the mesh.
    """
    sharding = NamedSharding(mesh, BATCH)

    def one(array: np.ndarray) -> jax.Array:
        total = batch_size * len(array) // len(rows)

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(total)
            first = int(np.searchsorted(rows, start * batch_size // total)) * total // batch_size
            return array[first : first + stop - start]

        with jax.transfer_guard_host_to_device("allow"):  # the one copy to the devices that a step is meant to make
            return jax.make_array_from_callback((total, *array.shape[1:]), sharding, shard)

    return {name: one(array) for name, array in local.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())
