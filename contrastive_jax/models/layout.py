"""How activations and parameters lie on the mesh."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Layout(NamedTuple):
    """How activations and parameters lie on the mesh; the default: one device.

    Attributes:
      mesh: the mesh or None.
      batch: the mesh axes over which rows are spread.
      tensor: the mesh axis over which heads and widths are spread, in use too; over all others parameters are only stored.
      rules: logical axis of a parameter → mesh axis or None.
    """

    mesh: Mesh | None = None
    batch: tuple[str, ...] = ()
    tensor: str | None = None
    rules: Mapping[str, str | None] = {}

    def rows(self, x: jax.Array) -> jax.Array:
        """Keeps x[n ...] spread by rows: left alone, the compiler may spread the width as it does the parameters'."""
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(self.batch)))

    def gather(self, parameter: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """A stored parameter, cast already, as it is used: whole but for the tensor axis; its gradient is spread again."""
        if self.mesh is None:
            return parameter
        stored = [self.rules[axis] if axis else None for axis in axes]
        used = [axis if axis == self.tensor else None for axis in stored]
        return gathered(parameter, NamedSharding(self.mesh, P(*used)), NamedSharding(self.mesh, P(*stored)))

    @property
    def parts(self) -> tuple[int, int]:
        """Into how many parts rows and heads are spread."""
        if self.mesh is None:
            return 1, 1
        return math.prod(self.mesh.shape[axis] for axis in self.batch), self.mesh.shape[self.tensor] if self.tensor else 1

    @property
    def platform(self) -> str:
        """Of the mesh's devices, present or only described."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
    """The identity: x lies as `used`, its gradient as `stored`. A plain constraint would have the gradient whole as well."""
    del stored
    return jax.lax.with_sharding_constraint(x, used)


gathered.defvjp(
    lambda x, used, stored: (gathered(x, used, stored), None),
    lambda used, stored, _, gradient: (jax.lax.with_sharding_constraint(gradient, stored),),
)
