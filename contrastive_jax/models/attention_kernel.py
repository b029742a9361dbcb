"""Attention as a Pallas kernel for TPU.

The encoder's rows are short, so the kernel holds whole rows of keys in VMEM: no online softmax, no saved statistics, and the
backward pass needs nothing but query, key and value.

Dimensions: n rows, l query tokens, s key tokens, h heads, g key-value heads, r = h / g, k head width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from contrastive_jax.models.layout import Layout
from contrastive_jax.models.rows import Rows, kept, seeds

# Large, finite: exp underflows to exactly 0 beside any real score, and a row without keys gives no NaN.
MASKED = -1e30
LANES = 128
# Longest row whose keys and values, with the scores of one block of queries, stay in VMEM.
LONGEST = 4096


class Shape(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
      heads: query heads that share a key-value head, r.
      groups: key-value heads of a grid step: as many as fill the lanes.
      width: k.
      rows: rows of a grid step.
      block: queries handled at once.
      real: tokens of a row before padding; dropout counts places by it.
      causal: no token sees a later one.
      windowed: whether the window is heeded.
      rate: dropout of the weights.
    """

    heads: int
    groups: int
    width: int
    rows: int
    block: int
    real: int
    causal: bool
    windowed: bool
    rate: float


def bias_of(shape: Shape, segment: jax.Array, window: Any, start: int, size: int, keys: int) -> jax.Array:
    """What is added to the scores of a block of queries: 0 or MASKED, float32[size keys]; segment int32[1 l]."""
    # [1 l] → [l 1]: through a square, the one form of transposition the hardware has.
    column = jnp.broadcast_to(segment[:, start : start + size], (LANES, size)).T[:, :1]
    mask = column == segment[:, :keys]
    if shape.causal or shape.windowed:
        query = jax.lax.broadcasted_iota(jnp.int32, (size, keys), 0) + start
        distance = query - jax.lax.broadcasted_iota(jnp.int32, (size, keys), 1)
        if shape.causal:
            mask &= distance >= 0
        if shape.windowed:
            mask &= jnp.abs(distance) <= window
    return jnp.where(mask, 0.0, MASKED)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product of two matrices over these axes of theirs, in float32."""
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def weights_of(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(scores - max), float32[l s], and the inverse of its sums, float32[l 1]."""
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, 1.0 / weights.sum(-1, keepdims=True)


def keep_factor(shape: Shape, second: Any, row: jax.Array, head: Any, start: int, size: int, keys: int) -> Any:
    """0 or 1 / (1 - rate) of a block of weights, float32[size keys]: what `dropout` does; None: no dropout."""
    if not shape.rate:
        return None
    token = jax.lax.broadcasted_iota(jnp.uint32, (size, 1), 0) + jnp.uint32(start)
    inner = (head * shape.real).astype(jnp.uint32) + token
    last = jax.lax.broadcasted_iota(jnp.uint32, (1, keys), 1)
    return jnp.where(kept(row, inner, last, second[0], shape.rate), 1.0 / (1.0 - shape.rate), 0.0)


def blocks(shape: Shape, length: int) -> list[tuple[int, int, int]]:
    """(first query, queries, keys) of each block of a row: causal ones need no later keys."""
    starts = range(0, length, shape.block)
    return [(s, min(shape.block, length - s), min(s + shape.block, length) if shape.causal else length) for s in starts]


class Heads(NamedTuple):
    """How to take one query head, and its key-value head, out of a grid step's lanes.

    Two heads of 64 fill the 128 lanes. Where each query head has its own key-value head, both stay where they are: with the
    other's lanes of the query set to zero the products over all lanes are those of one head, and cost the same.
    """

    number: int
    query: slice
    key: slice
    half: int | None

    def of(self, x: jax.Array) -> jax.Array:
        """x[l lanes] with the lanes of the other heads set to zero."""
        if self.half is None:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        first = self.half * x.shape[1] // 2
        return jnp.where((lane >= first) & (lane < first + x.shape[1] // 2), x, jnp.zeros_like(x))


def each_head(shape: Shape) -> list[Heads]:
    """The query heads of a grid step."""
    if shape.groups == 2 and shape.heads == 1:
        return [Heads(half, slice(0, 2 * shape.width), slice(0, 2 * shape.width), half) for half in range(2)]
    pairs = [(group * shape.heads + head, group) for group in range(shape.groups) for head in range(shape.heads)]
    k = shape.width
    return [Heads(head, slice(head * k, (head + 1) * k), slice(group * k, (group + 1) * k), None) for head, group in pairs]


def first_head(shape: Shape, offset_ref: Any) -> Any:
    """The number, among all devices' heads, of the first query head of this grid step."""
    return offset_ref[0] + pl.program_id(1) * shape.groups * shape.heads


def forward_kernel(
    shape: Shape, window: Any, offset: Any, second: Any, row: Any, query: Any, key: Any, value: Any, segment: Any, out: Any
) -> None:
    """One grid step forward: rows × heads, each whole in VMEM."""
    scale = jnp.asarray(shape.width**-0.5, query.dtype)
    for i in range(shape.rows):
        number = row[pl.program_id(0) * shape.rows + i]
        for start, size, keys in blocks(shape, segment.shape[-1]):
            rows = slice(start, start + size)
            bias = bias_of(shape, segment[i], window[0], start, size, keys)
            for head in each_head(shape):
                q, k, v = head.of(query[i, rows, head.query]), key[i, :keys, head.key], value[i, :keys, head.key]
                weights, inverse = weights_of(dot(q * scale, k, (1, 1)) + bias)
                keep = keep_factor(shape, second, number, first_head(shape, offset) + head.number, start, size, keys)
                weights = weights if keep is None else weights * keep
                mixed = dot(weights.astype(v.dtype), v, (1, 0)) * inverse
                mixed = head.of(mixed.astype(out.dtype))
                out[i, rows, head.query] = out[i, rows, head.query] + mixed if head.half else mixed


def backward_kernel(
    shape: Shape,
    window: Any,
    offset: Any,
    second: Any,
    row: Any,
    query: Any,
    key: Any,
    value: Any,
    segment: Any,
    gradient: Any,
    query_gradient: Any,
    key_gradient: Any,
    value_gradient: Any,
    key_sum: Any,
    value_sum: Any,
) -> None:
    """One grid step backward: the weights are computed again, and all three gradients from them."""
    scale = jnp.asarray(shape.width**-0.5, query.dtype)
    for i in range(shape.rows):
        number = row[pl.program_id(0) * shape.rows + i]
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)
        for start, size, keys in blocks(shape, segment.shape[-1]):
            rows = slice(start, start + size)
            bias = bias_of(shape, segment[i], window[0], start, size, keys)
            for head in each_head(shape):
                q, k, v = head.of(query[i, rows, head.query]), key[i, :keys, head.key], value[i, :keys, head.key]
                given = head.of(gradient[i, rows, head.query])
                q = q * scale
                weights, inverse = weights_of(dot(q, k, (1, 1)) + bias)
                weights = weights * inverse
                keep = keep_factor(shape, second, number, first_head(shape, offset) + head.number, start, size, keys)
                used = (weights if keep is None else weights * keep).astype(v.dtype)
                towards = dot(given, v, (1, 1))
                towards = towards if keep is None else towards * keep
                change = (weights * (towards - (weights * towards).sum(-1, keepdims=True))).astype(q.dtype)
                moved = head.of((dot(change, k, (1, 0)) * scale).astype(query_gradient.dtype))
                query_gradient[i, rows, head.query] = query_gradient[i, rows, head.query] + moved if head.half else moved
                key_sum[:keys, head.key] += dot(change, q, (0, 0))
                value_sum[:keys, head.key] += dot(used, given, (0, 0))
        key_gradient[i] = key_sum[...].astype(key_gradient.dtype)
        value_gradient[i] = value_sum[...].astype(value_gradient.dtype)


def call(shape: Shape, kernel: Callable, name: str, arguments: tuple, outputs: int, interpret: bool) -> Any:
    """Runs a kernel over the grid of rows and heads; arguments: window, offset, second, row, query, key, value, segment, ..."""
    query, key, value, _, *more = arguments[4:]
    n, length, width = query.shape
    q_lanes, k_lanes = shape.heads * shape.groups * shape.width, shape.groups * shape.width
    grid = (n // shape.rows, width // q_lanes)
    of_query = pl.BlockSpec((shape.rows, length, q_lanes), lambda i, j: (i, 0, j))
    of_key = pl.BlockSpec((shape.rows, length, k_lanes), lambda i, j: (i, 0, j))
    of_row = pl.BlockSpec((shape.rows, 1, length), lambda i, j: (i, 0, 0))
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    out_specs = [of_query, of_key, of_key][:outputs]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)][:outputs]
    return pl.pallas_call(
        functools.partial(kernel, shape),
        grid=grid,
        in_specs=[scalar] * 4 + [of_query, of_key, of_key, of_row] + [of_query] * len(more),
        out_specs=out_specs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((length, k_lanes), jnp.float32)] * 2 * (outputs > 1),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=64 * 2**20),
        interpret=interpret,
        name=name,
        # For the plan: how often the scheduled instructions run, and the products that count.
        metadata={
            "grid_steps": str(math.prod(grid)),
            "kernel_flops": str((10 if outputs > 1 else 4) * n * length * length * width),
        },
    )(*arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def rows_attention(shape: Shape, interpret: bool, query: jax.Array, key: jax.Array, value: jax.Array, rest: tuple) -> jax.Array:
    """Attention of one device: query [n l h·k], key and value [n l g·k]; rest: the scalars, segment."""
    *scalars, segment = rest
    arguments = (*scalars, query, key, value, segment)
    return call(shape, forward_kernel, "attention_forward", arguments, 1, interpret)[0]


def rows_attention_forward(
    shape: Shape, interpret: bool, query: jax.Array, key: jax.Array, value: jax.Array, rest: tuple
) -> tuple[jax.Array, tuple]:
    """The value, and what its gradient needs."""
    return rows_attention(shape, interpret, query, key, value, rest), (query, key, value, rest)


def rows_attention_backward(shape: Shape, interpret: bool, saved: tuple, gradient: jax.Array) -> tuple:
    """The gradients of query, key and value."""
    query, key, value, rest = saved
    *scalars, segment = rest
    arguments = (*scalars, query, key, value, segment, gradient)
    return *call(shape, backward_kernel, "attention_backward", arguments, 3, interpret), None


rows_attention.defvjp(rows_attention_forward, rows_attention_backward)


def rows_of_step(n: int, length: int) -> int:
    """Rows of a grid step: short rows go together, so that a step outweighs its start."""
    return next(rows for rows in (8, 4, 2, 1) if n % rows == 0 and (rows == 1 or rows * length <= 512))


def fused(
    config: ConfigDict,
    layout: Layout,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: Rows,
) -> jax.Array:
    """The Pallas kernel, on every device's own rows and heads; off TPU it is interpreted, for tests.

    Raises:
      ValueError: rows are longer than VMEM allows.
    """
    (n, real, h, k), window, noise = query.shape, rows.window, rows.noise
    if real > LONGEST:
        raise ValueError(f"config.data.length={real}: config.model.attention='fused' takes rows of at most {LONGEST} tokens")
    length = -(-real // LANES) * LANES
    shards, tensor = layout.parts
    groups = config.num_kv_heads // tensor
    if layout.platform == "tpu" and (groups * k) % LANES:
        raise ValueError(
            f"config.model.attention='fused' on TPU: {groups} key-value heads × config.model.head_dim={k} on a device must be "
            f"a multiple of {LANES}; change them, config.mesh.tensor, or choose 'plain'"
        )
    shape = Shape(
        heads=h // config.num_kv_heads,
        groups=math.gcd(max(LANES // k, 1), groups),
        width=k,
        rows=rows_of_step(n // shards, length),
        block=256 if config.causal else 512,
        real=real,
        causal=config.causal,
        windowed=window is not None,
        rate=config.attention_dropout if noise is not None else 0.0,
    )
    row, second = (jnp.zeros(n, jnp.uint32), jnp.uint32(0)) if noise is None else seeds(noise)

    def flat(x: jax.Array) -> jax.Array:
        return jnp.pad(x.reshape(n, real, -1), ((0, 0), (0, length - real), (0, 0)))

    def local(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        row: jax.Array,
        segment: jax.Array,
        size: jax.Array,
        second: jax.Array,
    ) -> jax.Array:
        part = jax.lax.axis_index(layout.tensor) if layout.mesh is not None and layout.tensor else 0
        offset = jnp.full(1, part * (h // tensor), jnp.int32)
        return rows_attention(shape, layout.platform != "tpu", query, key, value, (size, offset, second, row, segment))

    padded = jnp.pad(rows.segment, ((0, 0), (0, length - real)))[:, None]
    size = jnp.full(1, 0 if window is None else window, jnp.int32)
    arguments = (flat(query), flat(key), flat(value), row, padded, size, second[None])
    if layout.mesh is not None:
        by_head, by_row = P(layout.batch, None, layout.tensor), P(layout.batch)
        local = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(by_head, by_head, by_head, by_row, by_row, P(), P()),
            out_specs=by_head,
            check_vma=False,
        )
    return local(*arguments)[:, :real].reshape(n, real, h, k)
