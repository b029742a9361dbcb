"""How activations and parameters lie on the mesh while a model runs.

Dimensions: n rows.
"""

import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from contrastive_jax.runtime import sharding


class Layout(NamedTuple):
    """How activations and parameters lie on the mesh while a model runs; the default is one device.

    Attributes:
      mesh: the mesh, or None for one device.
      batch: the mesh axes over which rows are sharded.
      tensor: the mesh axis over which heads and widths are sharded in computations. On all other axes parameters are sharded
        only while they are stored, and gathered for use.
    """

    mesh: Mesh | None = None
    batch: tuple[str, ...] = ()
    tensor: str | None = None

    def rows(self, x: jax.Array) -> jax.Array:
        """Keeps x[n ...] sharded by rows; without this the compiler may shard the width as it does that of the parameters."""
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(self.batch)))

    def gather(self, parameter: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """All-gathers a parameter over the fsdp axis; it stays sharded over `tensor`, and its gradient is reduce-scattered.

        Cast the parameter first, so that the smaller type is gathered.

        Args:
          parameter: the parameter.
          axes: the name of its logical axis, or None, per dimension.
        """
        if self.mesh is None:
            return parameter
        stored = sharding.dividing_spec(axes, parameter.shape, self.mesh)
        used = [axis if axis == self.tensor else None for axis in stored]
        return _gather(parameter, NamedSharding(self.mesh, P(*used)), NamedSharding(self.mesh, P(*stored)))

    @property
    def batch_shards(self) -> int:
        """The number of shards of the rows."""
        return 1 if self.mesh is None else sharding.batch_shards(self.mesh)

    @property
    def tensor_shards(self) -> int:
        """The number of shards of the heads and widths."""
        return 1 if self.mesh is None or self.tensor is None else self.mesh.shape[self.tensor]

    @property
    def platform(self) -> str:
        """The platform of the mesh's devices, which may be present or only described: "cpu", "gpu", "cuda" or "tpu"."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    @property
    def compute_capability(self) -> str:
        """The compute capability of the mesh's GPUs, such as "9.0" for an H100; empty where it is unknown or there are none."""
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        return str(getattr(device, "compute_capability", ""))


def on_mesh(mesh: Mesh) -> Layout:
    """Returns the layout of this project's meshes (`sharding.make_mesh`)."""
    return Layout(mesh, sharding.BATCH_AXES, sharding.TENSOR_AXIS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
    """The identity, whose value is sharded as `used` and whose gradient is sharded as `stored`.

    With a plain constraint every device would hold the whole gradient too.
    """
    del stored
    return jax.lax.with_sharding_constraint(x, used)


_gather.defvjp(
    lambda x, used, stored: (_gather(x, used, stored), None),
    lambda used, stored, _, gradient: (jax.lax.with_sharding_constraint(gradient, stored),),
)
