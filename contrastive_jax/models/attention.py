"""Attention within the spans of a row: plain, or fused (a Pallas kernel on TPU, cuDNN on GPU), equal in value and gradient.

A token attends to the tokens of its own segment: segment int32[n l] numbers the spans packed into a row, 0 is padding. The
encoder's rows are short, so the TPU kernel holds whole rows of keys in VMEM: no online softmax, no saved statistics, and the
backward pass needs nothing but query, key and value.

Dimensions: n rows, l query tokens, s key tokens, h heads, g key-value heads, r = h / g, k head width.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

# Large, finite: exp underflows to exactly 0 beside any real score, and a row without keys gives no NaN.
MASKED = -1e30
LANES = 128
# Longest row whose keys and values, with the scores of one block of queries, stay in VMEM.
LONGEST = 4096

# (query [n l h k], key [n s g k], value [n s g k], segment int32[n l], window int32[] or None, noise or None) → [n l h k].
Attend = Callable[..., jax.Array]


class Noise(NamedTuple):
    """Where dropout takes its randomness from: a key, and row int32[n], the number of each row in the global batch."""

    key: jax.Array
    row: jax.Array


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


def hash32(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that changes half of the bits when any one changes (Wellons, "lowbias32")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def seeds(noise: Noise) -> tuple[jax.Array, jax.Array]:
    """What an element's fate is hashed from: uint32[n], one a row, and uint32[], for the last axis."""
    first, second = jax.random.bits(noise.key, (2,), jnp.uint32)
    return hash32(noise.row.astype(jnp.uint32) ^ first), second


def kept(row: jax.Array, inner: jax.Array, last: jax.Array, second: jax.Array, rate: float) -> jax.Array:
    """Whether dropout keeps an element, from `seeds` and its place: inner among the middle axes, last on the last one."""
    return hash32(hash32(hash32(row + inner) + last ^ second)) >= jnp.uint32(rate * 2**32)


def dropout(x: jax.Array, rate: float, noise: Noise | None) -> jax.Array:
    """Zeroes a share `rate` of x[n ... d] and scales the rest by 1 / (1 - rate); the identity where `noise` is None.

    An element's fate is a hash of the key, its row's number and its place in the row: the same on any mesh and in any
    micro-batch, and fused into what surrounds it. Threefry would take four fifths of a step of the debug recipe.
    """
    if noise is None or rate == 0.0:
        return x
    row, second = seeds(noise)
    inner = jax.lax.iota(jnp.uint32, math.prod(x.shape[1:-1])).reshape(1, *x.shape[1:-1], 1)
    last = jax.lax.iota(jnp.uint32, x.shape[-1])
    keep = kept(row.reshape(-1, *(1,) * (x.ndim - 1)), inner, last, second, rate)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def make(config: ConfigDict, layout: Layout) -> Attend:
    """The attention of `config.attention`: "plain", "fused", or "auto", the fused one where the device has it and it pays.

    Raises:
      ValueError: a fused attention is asked for that the device does not have; the message names the key.
    """
    platform, kind = layout.platform, config.attention
    if kind == "auto":
        # The kernel's lanes hold whole heads. cuDNN has no dropout that is ours, and no float32.
        on_tpu = platform == "tpu" and (config.num_kv_heads // layout.parts[1] * config.head_dim) % LANES == 0
        on_gpu = platform in ("gpu", "cuda") and config.dtype == "bfloat16" and not config.attention_dropout
        kind = "fused" if on_tpu or on_gpu else "plain"
    if kind == "plain":
        return functools.partial(plain, config)
    if platform in ("gpu", "cuda"):
        if config.dtype != "bfloat16" or config.attention_dropout:
            raise ValueError(
                "config.model.attention='fused' on GPU is cuDNN's: it needs config.model.dtype='bfloat16' and "
                "config.model.attention_dropout=0; or choose 'plain'"
            )
        return functools.partial(cudnn, config, implementation="cudnn")
    return functools.partial(fused, config, layout)


def plain(
    config: ConfigDict,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment: jax.Array,
    window: jax.Array | None,
    noise: Noise | None,
) -> jax.Array:
    """The definition: softmax(q kᵀ / √k) v, in XLA; scores are float32 and stored."""
    n, length, h, k = query.shape
    grouped = query.reshape(n, length, config.num_kv_heads, h // config.num_kv_heads, k)
    scores = jnp.einsum("nlgrk,nsgk->ngrls", grouped, key, preferred_element_type=jnp.float32) / k**0.5
    scores = jnp.where(allowed(config.causal, segment, window)[:, None, None], scores, MASKED)
    weights = dropout(jax.nn.softmax(scores, axis=-1).astype(query.dtype), config.attention_dropout, noise)
    return jnp.einsum("ngrls,nsgk->nlgrk", weights, value).reshape(n, length, h, k)


def allowed(causal: bool, segment: jax.Array, window: jax.Array | None) -> jax.Array:
    """Who may attend to whom, bool[n l s]: the same segment, no later token if causal, none further than `window`."""
    mask = segment[:, :, None] == segment[:, None, :]
    distance = jnp.arange(segment.shape[1])[:, None] - jnp.arange(segment.shape[1])
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= jnp.abs(distance) <= window
    return mask


def cudnn(
    config: ConfigDict,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment: jax.Array,
    window: jax.Array | None,
    noise: Noise | None,
    implementation: str,
) -> jax.Array:
    """The flash attention of cuDNN through jax.nn.dot_product_attention."""
    del noise  # no dropout: `make` saw to it
    mask = allowed(config.causal, segment, window)[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)  # type: ignore[call-overload]


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
    segment: jax.Array,
    window: jax.Array | None,
    noise: Noise | None,
) -> jax.Array:
    """The Pallas kernel, on every device's own rows and heads; off TPU it is interpreted, for tests.

    Raises:
      ValueError: rows are longer than VMEM allows.
    """
    n, real, h, k = query.shape
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

    padded = jnp.pad(segment, ((0, 0), (0, length - real)))[:, None]
    size = jnp.full(1, 0 if window is None else window, jnp.int32)
    arguments = (flat(query), flat(key), flat(value), row, padded, size, second[None])
    if layout.mesh is not None:
        heads, rows = P(layout.batch, None, layout.tensor), P(layout.batch)
        local = jax.shard_map(
            local, mesh=layout.mesh, in_specs=(heads, heads, heads, rows, rows, P(), P()), out_specs=heads, check_vma=False
        )
    return local(*arguments)[:, :real].reshape(n, real, h, k)
