"""The layers that blocks are made of: a parameter with the names of its axes, norms and linear maps.

Dimensions: n rows, l tokens per row, d width.
Each parameter carries the names of its logical axes as metadata `axes`; `runtime.sharding` maps them to axes of the mesh.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from ml_collections import ConfigDict

from contrastive_jax.models import ops
from contrastive_jax.runtime.layout import Layout


def parameter(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """Returns a float32 parameter; `axes` has one logical axis name, or None, per dimension."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def kernel_init(config: ConfigDict, fan_in: int, std: float | None = None) -> Callable:
    """Returns the initialiser of a kernel with this many inputs, whose standard deviation `config.init` decides.

    Args:
      config: `config.model`.
      fan_in: the number of inputs that an output sums over.
      std: the standard deviation, before it is divided by √fan_in if `config.init` is "fan_in". None: `config.init_std`.
    """
    std = config.init_std if std is None else std
    if config.init == "fan_in":
        std /= fan_in**0.5
    return initializers.normal(std) if std else initializers.zeros


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, with statistics in float32; or "affine", scale · x + bias without statistics.

    Args:
      config: `config.model`.
      rngs: for the initial values.
      width: the size of the last axis. None: `config.d_model`.
    """

    def __init__(self, config: ConfigDict, rngs: nnx.Rngs, width: int | None = None):
        self.kind, self.eps = config.norm, config.norm_eps
        shape = (width or config.d_model,)
        has_bias = config.bias and config.norm != "rmsnorm"
        self.scale = parameter(rngs, initializers.ones, shape, (None,))
        self.bias = parameter(rngs, initializers.zeros, shape, (None,)) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x[... d]."""
        bias = None if self.bias is None else self.bias[...]
        if self.kind == "affine":
            y = x * self.scale[...].astype(x.dtype)
            return y if bias is None else y + bias.astype(x.dtype)
        return ops.normalize(self.kind == "layernorm", self.eps, x, self.scale[...], bias)


class Linear(nnx.Module):
    """A linear map in the type of its input: y[n l out] = x[n l in] · kernel[in out] (+ bias[out]).

    With `config.products` "bfloat16" the factors of the product of float32 states, and of its gradients, are rounded to it.
    "int8" is for the forward pass alone.

    Args:
      config: `config.model`.
      layout: how parameters lie on the mesh.
      shape: of the kernel: the input dimensions, then the output dimensions. In x and y, heads × width is one axis.
      axes: a logical axis name, or None, per dimension of the kernel.
      rngs: for the initial values.
      contract: the number of input dimensions of the kernel.
      init_std: standard deviation of the kernel's initial values, as `std` of `kernel_init`. None: `config.init_std`.
      bias: whether it has a bias. None: as `config.bias` says.
    """

    def __init__(
        self,
        config: ConfigDict,
        layout: Layout,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        rngs: nnx.Rngs,
        contract: int = 1,
        init_std: float | None = None,
        bias: bool | None = None,
    ):
        init = kernel_init(config, math.prod(shape[:contract]), init_std)
        self.contract, self.axes, self.layout, self.products = contract, axes, layout, config.products
        self.kernel = parameter(rngs, init, shape, axes)
        has_bias = config.bias if bias is None else bias
        self.bias = parameter(rngs, initializers.zeros, shape[contract:], axes[contract:]) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[n l in] to [n l out]."""
        kernel = self.weight(x.dtype)
        # A product with more than two axes would leave its result in a memory layout that attention would have to copy.
        kernel = kernel.reshape(math.prod(kernel.shape[: self.contract]), -1)  # e.g. [d h k] -> [d h·k], [h k d] -> [h·k d]
        if self.products == "int8":
            y = ops.int8_product(x, kernel)
        elif self.products == "bfloat16" and x.dtype == jnp.float32:
            y = ops.bfloat16_product(x, kernel)
        else:
            y = x @ kernel
        return y if self.bias is None else y + self.bias[...].astype(x.dtype).reshape(-1)  # e.g. [h k] -> [h·k]

    def weight(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns the kernel in this type, whole on each device in its sharded axis."""
        return self.layout.gather(self.kernel[...].astype(dtype), self.axes)
