"""The mesh, the rules by which parameters are sharded over it, and global arrays from the rows of each process.

All mesh axes are Auto (jax.sharding.AxisType.Auto): XLA inserts the collectives.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from contrastive_jax.config import UserError

AXES = ("data", "fsdp", "tensor")
# The batch is sharded over every axis that does not split a matrix product.
BATCH_AXES = ("data", "fsdp")
BATCH = P(BATCH_AXES)
TENSOR_AXIS = "tensor"

# Logical axis of a parameter -> mesh axis, or None: not sharded.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
}


def make_mesh(config: ConfigDict, devices: list | None = None) -> Mesh:
    """Makes the mesh (data, fsdp, tensor).

    Where the devices are several TPU slices, the data axis goes from slice to slice, over the hosts' network, and the other
    axes stay inside a slice, whose links are many times as fast.

    Args:
      config: `config.mesh`, the size of each axis; one may be -1, all devices that remain.
      devices: the devices, present or only described. None: all devices that are present.

    Raises:
      UserError: the sizes do not multiply to the number of devices, more than one is -1, or an axis other than data would have
        to cross from slice to slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    keys = ", ".join(f"config.mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"{keys}: a size is positive, or -1 for all that remain; at most one is -1")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise UserError(f"{keys}: must multiply to the {len(devices)} devices that there are (-1: what remains)")
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
    slices = slice_count(devices)
    if shape[0] % slices:
        raise UserError(
            f"{keys}: the data axis, of size {shape[0]}, must be a multiple of the {slices} slices; of the axes, it alone may "
            "cross from slice to slice, so lower config.mesh.fsdp or config.mesh.tensor"
        )
    try:
        device_array = arrange_devices(shape, devices, slices, split=False)
    except NotImplementedError:
        logging.warning(
            "%s: not products of the axes of the slice's torus; some rings do not close, and carry half as much traffic", keys
        )
        device_array = arrange_devices(shape, devices, slices, split=True)
    return Mesh(device_array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_count(devices: Sequence[Any]) -> int:
    """Returns the number of slices: sets of TPUs that have links of their own, joined to one another by the hosts' network.

    GPUs count as one slice: XLA numbers a slice for each node, but their network is no bound for the axes of the mesh.
    """
    if devices[0].platform in ("gpu", "cuda"):
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def arrange_devices(shape: tuple[int, ...], devices: Sequence[Any], slices: int, split: bool) -> np.ndarray:
    """Arranges devices in an array so that neighbours along an axis are near each other.

    Args:
      shape: of the array. The first axis spans the slices, and the devices of a slice lie together along it.
      devices: the devices.
      slices: the number of slices.
      split: whether one axis of a torus may be split into several axes of the array.

    Raises:
      NotImplementedError: without `split`, the shape cannot be laid over the torus.
    """
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:])), devices, allow_split_physical_axes=split
    )


def all_devices_mesh() -> Mesh:
    """Makes a mesh of all devices for inference: rows are sharded over all of them, parameters over those of each slice."""
    return make_mesh(ConfigDict({"data": slice_count(jax.devices()), "fsdp": -1, "tensor": 1}))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def path_of(path: Any) -> str:
    """Returns the name of a leaf from its path in a tree, its keys joined by "/": "encoder/transformer/embedding"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def mesh_axes(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Translates the logical axes of a parameter to mesh axes; None is a dimension that is not sharded.

    Raises:
      ValueError: an axis is not in RULES.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} is not in sharding.RULES ({', '.join(RULES)})")
    return tuple(RULES[axis] if axis is not None else None for axis in axes)


def parameter_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, path: str) -> P:
    """Returns the PartitionSpec of a parameter.

    Args:
      axes: its logical axes, one name or None per dimension.
      shape: its shape.
      mesh: the mesh; axes of size 1 shard nothing.
      path: its name, for messages.

    Raises:
      ValueError: two dimensions fall on the same mesh axis, or an axis is not in RULES.
      UserError: a dimension does not divide over its mesh axis.
    """
    physical = mesh_axes(axes)
    used = [axis for axis in physical if axis is not None]
    if len(set(used)) != len(used):
        raise ValueError(f"{path}: logical axes {axes} collide on the mesh axes {physical}; change sharding.RULES")
    for name, axis, size in zip(axes, physical, shape, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{path}: {name} of size {size} does not divide over config.mesh.{axis}={mesh.shape[axis]}; change either"
            )
    return P(*physical)


def tree_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Returns the NamedShardings of a tree of parameters.

    Args:
      axes: the logical axes of each parameter, a tree like `shapes`.
      shapes: a tree of jax.ShapeDtypeStruct.
      mesh: the mesh.

    Raises:
      ValueError, UserError: from `parameter_spec`.
    """

    def leaf_sharding(path: Any, leaf: jax.ShapeDtypeStruct, leaf_axes: tuple[str | None, ...]) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(leaf_axes, leaf.shape, mesh, path_of(path)))

    return jax.tree_util.tree_map_with_path(leaf_sharding, shapes, axes)


def dividing_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the PartitionSpec of a parameter whose sizes may be any: a dimension that does not divide is not sharded.

    Args:
      axes: its logical axes, one name or None per dimension.
      shape: its shape.
      mesh: the mesh.
    """
    pairs = zip(mesh_axes(axes), shape, strict=True)
    return P(*(axis if axis is not None and size % mesh.shape[axis] == 0 else None for axis, size in pairs))


def dividing_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Returns the NamedShardings of a tree of parameters, as `tree_shardings`, but of any sizes: see `dividing_spec`."""
    return jax.tree.map(lambda leaf, axes: NamedSharding(mesh, dividing_spec(axes, leaf.shape, mesh)), shapes, axes)


def even_shardings(shapes: Any, mesh: Mesh) -> Any:
    """Returns NamedShardings for arrays that are only stored: over all devices, along the first dimension that divides."""

    def leaf_sharding(leaf: Any) -> NamedSharding:
        axis = next((i for i, size in enumerate(leaf.shape) if size % mesh.size == 0), None)
        return NamedSharding(mesh, P() if axis is None else P(*[None] * axis, AXES))

    return jax.tree.map(leaf_sharding, shapes)


def place(tree: Any, shardings: Any) -> Any:
    """Makes global arrays with the given shardings of host arrays that every process holds whole."""

    def place_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place_leaf, tree, shardings)


def rows_of_process(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Returns the rows of the global batch that this process's devices hold, int64[n], ascending.

    Raises:
      UserError: the batch does not divide over the data and fsdp axes.
    """
    shards = batch_shards(mesh)
    if batch_size < 1 or batch_size % shards:
        raise UserError(f"config.data.batch_size={batch_size} must be a positive multiple of mesh.data × mesh.fsdp = {shards}")
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices if index is not None]))


def to_global(local: Any, rows: np.ndarray, batch_size: int, mesh: Mesh) -> Any:
    """Makes global arrays [b ...], sharded over the batch, from this process's rows of each.

    Args:
      local: a tree of arrays [n ...], n = len(rows); or, of packed groups, the same fraction of it for each shard of the batch.
      rows: from `rows_of_process`.
      batch_size: b, rows of the global batch.
      mesh: the mesh.
    """
    sharding = NamedSharding(mesh, BATCH)

    def to_global_leaf(array: np.ndarray) -> jax.Array:
        total = batch_size * len(array) // len(rows)

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(total)
            first = int(np.searchsorted(rows, start * batch_size // total)) * total // batch_size
            return array[first : first + stop - start]

        with jax.transfer_guard_host_to_device("allow"):  # the one copy to the devices that a step is meant to make
            return jax.make_array_from_callback((total, *array.shape[1:]), sharding, shard)

    return jax.tree.map(to_global_leaf, local)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())
