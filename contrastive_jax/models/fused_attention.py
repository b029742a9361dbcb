"""The Pallas kernel of attention on each device's own rows and heads; where there is no TPU it is interpreted, for tests.

Dimensions: n rows, l tokens per row, d width of x, h heads, g key-value heads, k head width, m = h · k.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.models.attention_kernel import LANES, LONGEST_ROW, KernelConfig, KernelInputs, run_kernel
from contrastive_jax.models.dropout import hash_seeds
from contrastive_jax.models.layer_context import LayerContext
from contrastive_jax.runtime.layout import Layout


def rows_per_grid_step(n: int, length: int) -> int:
    """Returns how many of n rows a grid step handles: several short ones, so that its work outweighs its start."""
    return next(rows for rows in (8, 4, 2, 1) if n % rows == 0 and (rows == 1 or rows * length <= 512))


def heads_per_grid_step(config: ConfigDict, layout: Layout) -> int:
    """Returns how many key-value heads a grid step handles: as many as fill the lanes, if they divide the heads of a device."""
    return math.gcd(max(LANES // config.head_dim, 1), config.num_kv_heads // layout.tensor_shards)


def fills_lanes(config: ConfigDict, layout: Layout) -> bool:
    """Returns whether the heads of a grid step fill a whole number of a TPU's lanes, as its compiler asks."""
    return heads_per_grid_step(config, layout) * config.head_dim % LANES == 0


def make_kernel_config(
    config: ConfigDict, layout: Layout, shape: tuple[int, ...], padded_length: int, context: LayerContext
) -> KernelConfig:
    """Chooses the static settings that the kernels are compiled with.

    Args:
      config: `config.model`.
      layout: how rows and heads lie on the mesh.
      shape: of the query, (n, l, h, k), over all devices.
      padded_length: l with its padding.
      context: of the layer.

    Returns:
      The settings; their counts of rows and heads are per device and grid step.

    Raises:
      UserError: a row does not fit in VMEM, or the heads of a device do not fill the TPU's lanes.
    """
    n, length, h, k = shape
    if length > LONGEST_ROW:
        raise UserError(
            f"config.model.attention='fused' takes rows of at most {LONGEST_ROW} tokens, not {length}; lower "
            "config.data.length (or --max_tokens), or set config.model.attention='plain'"
        )
    if layout.platform == "tpu" and not fills_lanes(config, layout):
        raise UserError(
            f"config.model.attention='fused': {config.num_kv_heads // layout.tensor_shards} key-value heads per device with "
            f"config.model.head_dim={k} do not fill the {LANES} lanes of a TPU with whole heads; take a head_dim that divides "
            f"{LANES} or is a multiple of it, with enough heads per device, or set config.model.attention='plain'"
        )
    return KernelConfig(
        heads=h // config.num_kv_heads,
        groups=heads_per_grid_step(config, layout),
        width=k,
        rows=rows_per_grid_step(n // layout.batch_shards, padded_length),
        block=256 if config.causal else 512,  # smaller blocks skip more of the keys that causal attention masks
        length=length,
        causal=config.causal,
        windowed=context.window is not None,
        dropout=config.attention_dropout if context.noise is not None else 0.0,
    )


class MeshKernel:
    """The kernel over all devices of a mesh.

    Args:
      config: `config.model`.
      layout: how rows and heads lie on the mesh.
      shape: of the query, (n, l, h, k), over all devices.
      context: of the layer.

    Raises:
      UserError: from `make_kernel_config`.
    """

    def __init__(self, config: ConfigDict, layout: Layout, shape: tuple[int, ...], context: LayerContext):
        self._layout, self._heads, self._length = layout, shape[2], shape[1]
        self._padding = -shape[1] % LANES
        self._config = make_kernel_config(config, layout, shape, shape[1] + self._padding, context)

    def scalars_and_segments(self, context: LayerContext) -> KernelInputs:
        """Returns the inputs of the kernel but for queries, keys, values and the number of a device's first head."""
        rows = len(context.segment)
        noise = context.noise
        row_seed, last_seed = (jnp.zeros(rows, jnp.uint32), jnp.uint32(0)) if noise is None else hash_seeds(noise)
        return KernelInputs(
            window=jnp.full(1, 0 if context.window is None else context.window, jnp.int32),
            head_offset=None,
            last_seed=last_seed[None],
            row_seed=row_seed,
            query=None,
            key=None,
            value=None,
            segment=jnp.pad(context.segment, ((0, 0), (0, self._padding)))[:, None],  # [n l] -> [n 1 l+padding]
        )

    def run(self, inputs: KernelInputs, gradient: jax.Array | None = None, stacked: bool = False) -> list[jax.Array]:
        """Runs `run_kernel` on each device; queries, keys, values, gradients and results are those of all devices.

        Args:
          inputs: those of `scalars_and_segments`, with query [n l h·k], key and value [n l g·k].
          gradient: see `run_kernel`.
          stacked: see `run_kernel`.

        Returns:
          What `run_kernel` returns, for the rows and heads of all devices.
        """
        layout, large = self._layout, (inputs.query, inputs.key, inputs.value, *([] if gradient is None else [gradient]))

        def run_on_device(inputs: KernelInputs, *large: jax.Array) -> list[jax.Array]:
            tensor_index = jax.lax.axis_index(layout.tensor) if layout.mesh is not None and layout.tensor else 0
            offset = jnp.full(1, tensor_index * (self._heads // layout.tensor_shards), jnp.int32)
            query, key, value = large[:3]
            filled = inputs._replace(head_offset=offset, query=query, key=key, value=value)
            return list(run_kernel(self._config, layout.platform != "tpu", filled, large[3] if large[3:] else None, stacked))

        if layout.mesh is not None:
            by_row, by_row_and_head = P(layout.batch), P(layout.batch, None, layout.tensor)
            small = KernelInputs(P(), None, P(), by_row, None, None, None, by_row)
            results = [P(None, *by_row_and_head)] if stacked else [by_row_and_head] * (1 if gradient is None else 3)
            run_on_device = jax.shard_map(
                run_on_device,
                mesh=layout.mesh,
                in_specs=(small, *[by_row_and_head] * len(large)),
                out_specs=results,
                check_vma=False,
            )
        padded = (jnp.pad(x, ((0, 0), (0, self._padding), (0, 0))) for x in large)
        out = run_on_device(inputs._replace(query=None, key=None, value=None), *padded)
        return [x[..., : self._length, :] for x in out]  # [n l+padding h·k] -> [n l h·k]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel: MeshKernel, inputs: KernelInputs) -> jax.Array:
    """Attention, [n l h·k]; differentiable in query, key and value."""
    return kernel.run(inputs)[0]


def _attend_backward(kernel: MeshKernel, inputs: KernelInputs, gradient: jax.Array) -> tuple:
    """Returns the gradients of query, key and value."""
    query, key, value = kernel.run(inputs, gradient)
    return (KernelInputs(None, None, None, None, query, key, value, None),)


_attend.defvjp(lambda kernel, inputs: (_attend(kernel, inputs), inputs), _attend_backward)


def fused(
    config: ConfigDict, layout: Layout, query: jax.Array, key: jax.Array, value: jax.Array, context: LayerContext
) -> jax.Array:
    """Runs the kernel. Arguments and result are those of `attention.plain`, and `layout` says how rows and heads lie.

    Raises:
      UserError: from `make_kernel_config`.
    """
    kernel = MeshKernel(config, layout, query.shape, context)
    q, k, v = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))  # [n l h k] -> [n l h·k]
    with jax.named_scope("kernel"):
        inputs = kernel.scalars_and_segments(context)._replace(query=q, key=k, value=v)
        return _attend(kernel, inputs).reshape(query.shape)


# The matrices of the projections to queries, keys and values.
Weights = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_and_attend(kernel: MeshKernel, x: jax.Array, weights: Weights, inputs: KernelInputs) -> jax.Array:
    """Attention of the projections of x[n l d] by three matrices [d m]: [n l m]; differentiable in x and the matrices."""
    return _project_and_attend_forward(kernel, x, weights, inputs)[0]


def _project_and_attend_forward(
    kernel: MeshKernel, x: jax.Array, weights: Weights, inputs: KernelInputs
) -> tuple[jax.Array, tuple]:
    """Returns the value and what its gradient needs."""
    names = ("query", "key", "value")
    with jax.named_scope("qkv"):
        projections = {name: checkpoint_name(x @ matrix, name) for name, matrix in zip(names, weights, strict=True)}
    with jax.named_scope("kernel"):
        inputs = inputs._replace(**projections)
        return kernel.run(inputs)[0], (x, weights, inputs)


def _project_and_attend_backward(kernel: MeshKernel, saved: tuple, gradient: jax.Array) -> tuple:
    """Returns the gradients of x and of the matrices."""
    x, weights, inputs = saved
    with jax.named_scope("kernel"):
        stacked = kernel.run(inputs, gradient, stacked=True)[0]
    with jax.named_scope("qkv"):
        of_x = jnp.einsum("cnlm,cdm->nld", stacked, jnp.stack(weights))
        of_weights = jnp.einsum("cnlm,nld->cdm", stacked, x)
    return of_x, tuple(of_weights), None


_project_and_attend.defvjp(_project_and_attend_forward, _project_and_attend_backward)


def project_and_attend(config: ConfigDict, layout: Layout, x: jax.Array, weights: Weights, context: LayerContext) -> jax.Array:
    """Projects x to queries, keys and values, and attends; for as many key-value heads as heads, without rotary positions.

    The kernel writes the gradients of all three into one array, so that the gradient of x is one product over it. The three
    products of separate arrays would each read and write the sum.

    Args:
      config: `config.model`.
      layout: how rows and heads lie on the mesh.
      x: the states of the tokens, [n l d].
      weights: of the projections, [d h·k] each.
      context: of the layer.

    Returns:
      [n l h·k].

    Raises:
      UserError: from `make_kernel_config`.
    """
    kernel = MeshKernel(config, layout, (*x.shape[:2], config.num_heads, config.head_dim), context)
    return _project_and_attend(kernel, x, weights, kernel.scalars_and_segments(context))
