"""Attention as a Pallas kernel for TPU, on one device.

The encoder's rows are short, so the kernel holds whole rows of keys in VMEM: there is no online softmax, no statistics are
saved, and the backward pass needs nothing but query, key and value.

Dimensions: n rows, l query tokens, s key tokens, h heads, g key-value heads, r = h / g heads per key-value head, k head width.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from contrastive_jax.models.dropout import keep_mask

# The score of a masked key. Large but finite: exp underflows to exactly 0 beside any real score, and a query without keys gives
# no NaN.
MASKED = -1e30
# Lanes of a TPU register: the last axis of what a kernel loads is a multiple.
LANES = 128
# The longest row whose keys and values, with the scores of one block of queries, fit in VMEM.
LONGEST_ROW = 4096
VMEM_BYTES = 64 * 2**20


class KernelConfig(NamedTuple):
    """The static settings that the kernels are compiled with.

    A grid step handles some rows and some key-value heads with their query heads.

    Attributes:
      heads: query heads that share a key-value head, r.
      groups: key-value heads per grid step: as many as fill the lanes.
      width: k, the width of a head.
      rows: rows per grid step.
      block: query tokens of a row that are handled at once.
      length: l, tokens per row before padding; dropout numbers its elements by it, so that padding does not change the mask.
      causal: whether tokens attend to no later ones.
      windowed: whether the layers have a window.
      dropout: the dropout rate of the attention weights.
    """

    heads: int
    groups: int
    width: int
    rows: int
    block: int
    length: int
    causal: bool
    windowed: bool
    dropout: float


class KernelInputs(NamedTuple):
    """The inputs of both kernels: arrays, or in a kernel the references to a grid step's part of them.

    Attributes:
      window: int32[1], tokens to attend to on either side; read only if `KernelConfig.windowed`.
      head_offset: int32[1], the number of this device's first query head among all devices' heads.
      last_seed: uint32[1], from `dropout.hash_seeds`.
      row_seed: uint32[n], from `dropout.hash_seeds`.
      query: [n l h·k].
      key: [n l g·k].
      value: [n l g·k].
      segment: int32[n 1 l].
    """

    window: Any
    head_offset: Any
    last_seed: Any
    row_seed: Any
    query: Any
    key: Any
    value: Any
    segment: Any


class Block(NamedTuple):
    """A block of queries: `size` from `start` on, which attend to the first `keys` keys."""

    start: int
    size: int
    keys: int


def blocks_of_row(config: KernelConfig, length: int) -> list[Block]:
    """Splits a row into blocks of queries; with causal attention a block needs no keys after its last query."""
    starts = range(0, length, config.block)
    sizes = [min(config.block, length - start) for start in starts]
    return [Block(start, size, start + size if config.causal else length) for start, size in zip(starts, sizes, strict=True)]


class HeadLanes(NamedTuple):
    """Where a query head and its key-value head lie among the lanes of a grid step.

    Two heads of width 64 fill the 128 lanes. If each query head has its own key-value head, both heads stay in place: with the
    other head's lanes of the query set to zero, a product over all lanes is that of one head, at the same cost.

    Attributes:
      number: the number of the query head within the grid step.
      query: the lanes of query and output.
      key: the lanes of key and value.
      half: which half of these lanes belongs to the head, 0 or 1. None: all of them.
    """

    number: int
    query: slice
    key: slice
    half: int | None

    def zero_others(self, x: jax.Array) -> jax.Array:
        """Sets the lanes of x[l lanes] that belong to another head to zero."""
        if self.half is None:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        first = self.half * x.shape[1] // 2
        return jnp.where((lane >= first) & (lane < first + x.shape[1] // 2), x, jnp.zeros_like(x))

    def write(self, output: Any, i: int, rows: slice, value: jax.Array) -> None:
        """Writes value[l lanes] into output[i, rows]; the second half is added to the first, which is zero there."""
        output[i, rows, self.query] = output[i, rows, self.query] + value if self.half == 1 else value


def heads_of_step(config: KernelConfig) -> list[HeadLanes]:
    """Lists the query heads of a grid step."""
    k = config.width
    if config.groups == 2 and config.heads == 1:
        both = slice(0, 2 * k)
        return [HeadLanes(half, both, both, half) for half in range(2)]
    heads = []
    for group in range(config.groups):
        for head in range(group * config.heads, (group + 1) * config.heads):
            heads.append(HeadLanes(head, slice(head * k, (head + 1) * k), slice(group * k, (group + 1) * k), None))
    return heads


def mask_bias(config: KernelConfig, segment: jax.Array, window: Any, block: Block) -> jax.Array:
    """Returns what is added to the scores of a block, 0 or MASKED: float32[size keys], from segment int32[1 l]."""
    # [1 size] -> [size 1] by way of a square: the hardware transposes nothing else.
    segment_of_query = jnp.broadcast_to(segment[:, block.start : block.start + block.size], (LANES, block.size)).T[:, :1]
    mask = segment_of_query == segment[:, : block.keys]
    if config.causal or config.windowed:
        query = jax.lax.broadcasted_iota(jnp.int32, (block.size, block.keys), 0) + block.start
        distance = query - jax.lax.broadcasted_iota(jnp.int32, (block.size, block.keys), 1)
        if config.causal:
            mask &= distance >= 0
        if config.windowed:
            mask &= jnp.abs(distance) <= window
    return jnp.where(mask, 0.0, MASKED)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Multiplies two matrices over axis contract[0] of a and contract[1] of b, in float32."""
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def softmax_parts(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns exp(scores - max), float32[l s], and the inverse of its sums, float32[l 1]: their product is the softmax."""
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, 1.0 / weights.sum(-1, keepdims=True)


def dropout_factor(config: KernelConfig, inputs: KernelInputs, row: int, head: int, block: Block) -> jax.Array | None:
    """Returns what `dropout.dropout` multiplies a block of weights by, 0 or 1 / (1 - rate): float32[size keys].

    None stands for no dropout. `row` and `head` count from the first of the grid step.
    """
    if not config.dropout:
        return None
    row_seed = inputs.row_seed[pl.program_id(0) * config.rows + row]
    head_number = inputs.head_offset[0] + pl.program_id(1) * config.groups * config.heads + head
    token = jax.lax.broadcasted_iota(jnp.uint32, (block.size, 1), 0) + jnp.uint32(block.start)
    middle_index = (head_number * config.length).astype(jnp.uint32) + token
    last_index = jax.lax.broadcasted_iota(jnp.uint32, (1, block.keys), 1)
    keep = keep_mask(row_seed, middle_index, last_index, inputs.last_seed[0], config.dropout)
    return jnp.where(keep, 1.0 / (1.0 - config.dropout), 0.0)


def forward_kernel(config: KernelConfig, *references: Any) -> None:
    """Computes the output of one grid step, from `KernelInputs`: rows × heads, each row whole in VMEM."""
    inputs, output = KernelInputs(*references[:8]), references[8]
    scale = jnp.asarray(config.width**-0.5, inputs.query.dtype)
    for i in range(config.rows):
        for block in blocks_of_row(config, inputs.segment.shape[-1]):
            rows = slice(block.start, block.start + block.size)
            bias = mask_bias(config, inputs.segment[i], inputs.window[0], block)
            for head in heads_of_step(config):
                query = head.zero_others(inputs.query[i, rows, head.query])
                key, value = inputs.key[i, : block.keys, head.key], inputs.value[i, : block.keys, head.key]
                weights, inverse = softmax_parts(dot(query * scale, key, (1, 1)) + bias)
                factor = dropout_factor(config, inputs, i, head.number, block)
                weights = weights if factor is None else weights * factor
                mixed = dot(weights.astype(value.dtype), value, (1, 0)) * inverse
                head.write(output, i, rows, head.zero_others(mixed.astype(output.dtype)))


def backward_kernel(config: KernelConfig, *references: Any) -> None:
    """Computes the gradients of query, key and value of one grid step; the weights are computed again.

    The references are `KernelInputs`, the output's gradient, the three gradients to write, or one array of them, and two sums
    in VMEM.
    """
    inputs = KernelInputs(*references[:8])
    gradient_ref, *outputs, key_sum, value_sum = references[8:]
    query_gradient, key_gradient, value_gradient = outputs if len(outputs) == 3 else [outputs[0].at[i] for i in range(3)]
    scale = jnp.asarray(config.width**-0.5, inputs.query.dtype)
    for i in range(config.rows):
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)
        for block in blocks_of_row(config, inputs.segment.shape[-1]):
            rows = slice(block.start, block.start + block.size)
            bias = mask_bias(config, inputs.segment[i], inputs.window[0], block)
            for head in heads_of_step(config):
                query = head.zero_others(inputs.query[i, rows, head.query])
                key, value = inputs.key[i, : block.keys, head.key], inputs.value[i, : block.keys, head.key]
                gradient = head.zero_others(gradient_ref[i, rows, head.query])
                query = query * scale
                weights, inverse = softmax_parts(dot(query, key, (1, 1)) + bias)
                weights = weights * inverse
                factor = dropout_factor(config, inputs, i, head.number, block)
                dropped = (weights if factor is None else weights * factor).astype(value.dtype)
                weights_gradient = dot(gradient, value, (1, 1))
                weights_gradient = weights_gradient if factor is None else weights_gradient * factor
                mean = (weights * weights_gradient).sum(-1, keepdims=True)
                scores_gradient = (weights * (weights_gradient - mean)).astype(query.dtype)
                moved = (dot(scores_gradient, key, (1, 0)) * scale).astype(query_gradient.dtype)
                head.write(query_gradient, i, rows, head.zero_others(moved))
                key_sum[: block.keys, head.key] += dot(scores_gradient, query, (0, 0))
                value_sum[: block.keys, head.key] += dot(dropped, gradient, (0, 0))
        key_gradient[i] = key_sum[...].astype(key_gradient.dtype)
        value_gradient[i] = value_sum[...].astype(value_gradient.dtype)


def run_kernel(
    config: KernelConfig, interpret: bool, inputs: KernelInputs, gradient: jax.Array | None = None, stacked: bool = False
) -> list[jax.Array]:
    """Runs a kernel over the grid of rows and heads.

    Args:
      config: the settings that the kernel is compiled with.
      interpret: run it as plain operations, where there is no TPU.
      inputs: of the kernel.
      gradient: of the output, [n l h·k]; None runs the forward kernel.
      stacked: whether the gradients are one array; each query head has its own key-value head then.

    Returns:
      [output [n l h·k]], or the gradients [query, key, value], or if stacked [all three, [3 n l h·k]].
    """
    n, length, width = inputs.query.shape
    key_lanes = config.groups * config.width
    query_lanes = config.heads * key_lanes
    grid = (n // config.rows, width // query_lanes)
    scalar_spec = pl.BlockSpec(memory_space=pltpu.SMEM)
    query_spec = pl.BlockSpec((config.rows, length, query_lanes), lambda i, j: (i, 0, j))
    key_spec = pl.BlockSpec((config.rows, length, key_lanes), lambda i, j: (i, 0, j))
    segment_spec = pl.BlockSpec((config.rows, 1, length), lambda i, j: (i, 0, 0))
    in_specs = [scalar_spec] * 4 + [query_spec, key_spec, key_spec, segment_spec]
    if gradient is None:
        kernel, name, products = forward_kernel, "attention_forward", 2
        out_specs, outputs, scratch = [query_spec], [inputs.query], []
    else:
        kernel, name, products = backward_kernel, "attention_backward", 5
        in_specs, out_specs = [*in_specs, query_spec], [query_spec, key_spec, key_spec]
        outputs = [inputs.query, inputs.key, inputs.value]
        scratch = [pltpu.VMEM((length, key_lanes), jnp.float32)] * 2
        if stacked:
            out_specs = [pl.BlockSpec((3, config.rows, length, key_lanes), lambda i, j: (0, i, 0, j))]
            outputs = [jax.ShapeDtypeStruct((3, n, length, width), inputs.query.dtype)]
    return pl.pallas_call(
        functools.partial(kernel, config),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name=name,
        # `planning` reads these: how often the scheduled instructions run, and the FLOPs of the products.
        metadata={"grid_steps": str(math.prod(grid)), "kernel_flops": str(2 * products * n * length * length * width)},
    )(*inputs, *([] if gradient is None else [gradient]))
