"""Sums over all negatives of a batch, tile by tile, on one device or over a mesh. The score matrix is never stored.

A tile is a block of anchors against a block of keys. The forward pass keeps a few numbers a row and a column (`Stats`); the
backward pass recomputes each tile (`jax.custom_vjp`). Where the tiles are computed is one of three exchanges of equal result:
`local` (each device its own batch), `gathered` (every device sees all keys at once), `ring` (keys go from device to device).
One sweep serves anchors (rows) and keys (columns) alike, forward and backward.

Dimensions: n anchors and m keys of one device, e embedding, t texts.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

Tree = Any
MASKED = -1e30  # finite: exp underflows to 0 beside any real score, and no gradient becomes NaN

WHERE = ("local", "gathered", "ring")


class Term(NamedTuple):
    """What a negative adds to the total of its row.

    Attributes:
      value: (logit, shift) → float, elementwise; shift is the row's largest logit.
      rescale: (old shift, new shift) → factor that carries a total from one shift to another.
    """

    value: Callable[[jax.Array, jax.Array], jax.Array]
    rescale: Callable[[jax.Array, jax.Array], jax.Array]


# Σ exp(s - shift): the log-sum-exp of the softmax losses.
EXP = Term(lambda s, shift: jnp.exp(s - shift), lambda old, new: jnp.exp(old - new))
# Σ softplus(s): the negatives of a logistic loss.
SOFTPLUS = Term(lambda s, shift: jax.nn.softplus(s), lambda old, new: jnp.ones_like(old))


class Stats(NamedTuple):
    """What is known of the negatives of each row, float32[n] each.

    Attributes:
      top: the largest logit, MASKED where there is none; no gradient flows through it (totals do not depend on it).
      total: Σ term(logit, top).
      linear: Σ logit, or None if nobody asks.
      number: how many negatives.
    """

    top: jax.Array
    total: jax.Array
    linear: jax.Array | None
    number: jax.Array


class Ids(NamedTuple):
    """Which pairs are negatives. An anchor and a key are not if they have the same row, the same document, or share a text.

    Attributes:
      row: int32[n], number in the global batch; -1 for a key that is nobody's positive.
      valid: bool[n]; rows that are not take part in nothing.
      doc: int32[n], or None: not compared; -1 equals nothing.
      text: int32[n t], hashes, or None: not compared.
      limit: float32[n], or None; above this similarity a pair is no negative of the row (rows and columns each for themselves).
    """

    row: jax.Array
    valid: jax.Array
    doc: jax.Array | None = None
    text: jax.Array | None = None
    limit: jax.Array | None = None


def allowed_pairs(similarity: jax.Array, x: Ids, y: Ids) -> tuple[jax.Array, jax.Array]:
    """The negatives bool[n m] of the rows, and of the columns."""
    allowed = x.valid[:, None] & y.valid & (x.row[:, None] != y.row)
    if x.doc is not None and y.doc is not None:
        allowed &= (x.doc[:, None] != y.doc) | (y.doc < 0)
    if x.text is not None and y.text is not None:
        for i in range(x.text.shape[1]):
            for j in range(y.text.shape[1]):
                allowed &= x.text[:, i, None] != y.text[:, j]
    rows = allowed if x.limit is None else allowed & (similarity <= x.limit[:, None])
    return rows, allowed if y.limit is None else allowed & (similarity <= y.limit)


class Sweep(NamedTuple):
    """How to sum.

    Attributes:
      term: what a negative adds.
      columns: whether keys have sums too (over anchors).
      linear: whether `Stats.linear` is wanted.
      dtype: of the products' inputs, "float32" or "bfloat16"; they accumulate in float32, and everything else is float32.
      block: rows and columns of a tile.
      where: "local", "gathered" or "ring".
    """

    term: Term
    columns: bool
    linear: bool
    dtype: str
    block: int
    where: str


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A matrix product with float32 result; float32 inputs are not rounded to bfloat16 on the way (a TPU's default)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def reduce(sweep: Sweep, logits: jax.Array, allowed: jax.Array, axis: int) -> Stats:
    """Stats of a tile along an axis."""
    masked = jnp.where(allowed, logits, MASKED)
    top = masked.max(axis)
    total = sweep.term.value(masked, jnp.expand_dims(top, axis)).sum(axis)
    linear = jnp.where(allowed, logits, 0).sum(axis) if sweep.linear else None
    return Stats(top, total, linear, allowed.sum(axis, dtype=jnp.float32))


def merge(term: Term, a: Stats, b: Stats) -> Stats:
    """Stats of the union of two disjoint sets of negatives."""
    top = jnp.maximum(a.top, b.top)
    total = a.total * term.rescale(a.top, top) + b.total * term.rescale(b.top, top)
    linear = None if a.linear is None or b.linear is None else a.linear + b.linear
    return Stats(top, total, linear, a.number + b.number)


def nothing(sweep: Sweep, n: int) -> Stats:
    """Stats of no negatives."""
    zero = jnp.zeros(n, jnp.float32)
    return Stats(jnp.full(n, MASKED), zero, zero if sweep.linear else None, zero)


def to_blocks(tree: Tree, size: int) -> Tree:
    """[n ...] → [blocks block ...], the blocks as even as can be and none larger than `size`; padded with zeros (not valid)."""
    n = len(jax.tree.leaves(tree)[0])
    count = -(-n // size)
    block = -(-n // count)

    def one(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, count * block - n)] + [(0, 0)] * (x.ndim - 1)) if count * block != n else x
        return x.reshape(count, block, *x.shape[1:])

    return jax.tree.map(one, tree)


def from_blocks(tree: Tree, n: int) -> Tree:
    """Undoes `to_blocks`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], tree)


def tiles(visit: Callable, x: Tree, y: Tree, rows: Tree, column: Tree, add: Callable, block: int) -> tuple[Tree, Tree]:
    """Visits each tile of x[n ...] by y[m ...] once.

    Args:
      visit: (block of x, block of y) → (what it adds to the rows of x, what it adds to the rows of y).
      x: the anchors' arrays.
      y: the keys' arrays.
      rows: what the rows of x have so far, [n ...].
      column: what a block of y starts with: a function of its size.
      add: (tree, tree) → tree, joins what two tiles add.
      block: the largest tile.

    Returns:
      `rows` with all added, and what was added to the rows of y, [m ...].
    """
    n, m = (len(jax.tree.leaves(tree)[0]) for tree in (x, y))
    xs, ys, start = to_blocks(x, block), to_blocks(y, block), to_blocks(rows, block)

    def key_block(rows: Tree, y: Tree) -> tuple[Tree, Tree]:
        def anchor_block(columns: Tree, item: Tree) -> tuple[Tree, Tree]:
            x, row = item
            to_row, to_column = visit(x, y)
            return add(columns, to_column), add(row, to_row)

        columns, rows = lax.scan(anchor_block, column(len(jax.tree.leaves(y)[0])), (xs, rows))
        return rows, columns

    rows, columns = lax.scan(key_block, start, ys)
    return from_blocks(rows, n), from_blocks(columns, m)


def ring_order(mesh: Mesh, axes: tuple[str, ...]) -> list[int]:
    """The order in which the shards of the batch stand in a ring: physical neighbours where the devices form a grid.

    With the order of `jax.make_mesh` on 8 × 8 or more chips, where a row's end is far from the next row's start, the TPU's
    compiler makes every permute blocking; between neighbours all are asynchronous. The ring is a Hamiltonian cycle: there in
    a snake over all columns but one, and back along that one. It needs an even dimension.
    """
    others = tuple(axis for axis in mesh.axis_names if axis not in axes)
    shards = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in (*axes, *others)])
    devices = shards.reshape(math.prod(mesh.shape[axis] for axis in axes), -1)[:, 0]
    if not hasattr(devices[0], "coords"):
        return list(range(len(devices)))
    coords = np.array([(*device.coords, getattr(device, "core_on_chip", 0)) for device in devices])
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in coords.T], axis=1)
    ranks = ranks[:, ranks.max(0) > 0]
    even = [i for i, size in enumerate(ranks.max(0, initial=0) + 1) if size % 2 == 0]
    if len(np.unique(ranks, axis=0)) != len(ranks) or math.prod(ranks.max(0, initial=0) + 1) != len(ranks) or not even:
        return list(range(len(devices)))
    ranks = np.concatenate([ranks[:, even[:1]], np.delete(ranks, even[0], axis=1)], axis=1)
    place, column = {tuple(rank): i for i, rank in enumerate(ranks.tolist())}, snake(tuple(ranks.max(0)[1:] + 1))
    height, width = int(ranks.max(0)[0]) + 1, len(column)
    there = [(row, k if row % 2 == 0 else width - k) for row in range(height) for k in range(1, width)]
    back = [(row, 0) for row in reversed(range(height))]
    return [place[row, *column[k]] for row, k in (there + back if width > 1 else back)]


def snake(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All places of a grid, each next to the one before."""
    if not sizes:
        return [()]
    rest = snake(sizes[1:])
    return [(i, *place) for i in range(sizes[0]) for place in (rest if i % 2 == 0 else rest[::-1])]


class Ring(NamedTuple):
    """The shards of the batch: the mesh axes over which it is spread, and the order in which they stand in a ring."""

    axes: tuple[str, ...]
    order: list[int]


def exchange_local(visit: Callable, add: Callable, here: Tree, keys: Tree, ring: Ring) -> tuple[Tree, Tree]:
    """Each device visits its own keys alone."""
    return visit(here, keys)


def exchange_gathered(visit: Callable, add: Callable, here: Tree, keys: Tree, ring: Ring) -> tuple[Tree, Tree]:
    """Each device visits all keys at once; what they are given is sent home and joined there."""
    size = len(ring.order)
    everyone = jax.tree.map(lambda x: lax.all_gather(x, ring.axes, tiled=True), keys)
    here, given = visit(here, everyone)
    parts = jax.tree.map(lambda x: lax.all_to_all(x.reshape(size, -1, *x.shape[1:]), ring.axes, 0, 0), given)
    first = jax.tree.map(lambda x: x[0], parts)
    rest = jax.tree.map(lambda x: x[1:], parts)
    return here, lax.scan(lambda total, part: (add(total, part), None), first, rest, length=size - 1)[0]


def exchange_ring(visit: Callable, add: Callable, here: Tree, keys: Tree, ring: Ring) -> tuple[Tree, Tree]:
    """Keys travel once around; what they are given follows them one hop behind, so that both transfers overlap the visit."""
    neighbours = list(zip(ring.order, ring.order[1:] + ring.order[:1], strict=True))

    def to_next(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: lax.ppermute(x, ring.axes, neighbours), tree)

    here, given = visit(here, keys)

    def hop(carry: tuple[Tree, Tree, Tree], _: None) -> tuple[tuple[Tree, Tree, Tree], None]:
        here, keys, given = carry
        following, before = to_next(keys), to_next(given)
        here, added = visit(here, keys)
        return (here, following, add(before, added)), None

    (here, _, given), _ = lax.scan(hop, (here, to_next(keys), given), length=len(neighbours) - 1)
    return here, to_next(given)


EXCHANGE = {"local": exchange_local, "gathered": exchange_gathered, "ring": exchange_ring}


class Pull(NamedTuple):
    """What the backward pass knows of a row: its largest logit, and the cotangents of its sums; float32[n] each."""

    top: jax.Array
    total: jax.Array
    linear: jax.Array | None


def score_tile(sweep: Sweep, affine: jax.Array, x: Tree, y: Tree) -> tuple[Stats, Stats | None]:
    """Stats of a tile's rows and columns, from (z, Ids) of each side."""
    similarity = product(x[0], y[0], (1, 1))
    logits = similarity * affine[0] + affine[1]
    in_row, in_column = allowed_pairs(similarity, x[1], y[1])
    return reduce(sweep, logits, in_row, 1), reduce(sweep, logits, in_column, 0) if sweep.columns else None


def pull_tile(sweep: Sweep, affine: jax.Array, x: Tree, y: Tree) -> tuple[Tree, Tree]:
    """What a tile adds to the gradients of ((x, the affine map), y), from (z, Ids, Pull) of each side."""
    similarity = product(x[0], y[0], (1, 1))
    in_row, in_column = allowed_pairs(similarity, x[1], y[1])

    def one_side(logits: jax.Array, allowed: jax.Array, pull: Pull) -> jax.Array:
        value = (sweep.term.value(jnp.where(allowed, logits, MASKED), pull.top) * pull.total).sum()
        return value if pull.linear is None else value + (jnp.where(allowed, logits, 0) * pull.linear).sum()

    def weighted(similarity: jax.Array, affine: jax.Array) -> jax.Array:
        """The tile's part of the sums, each times its cotangent: the gradient of this number is what flows back."""
        logits = similarity * affine[:, :1] + affine[:, 1:]
        value = one_side(logits, in_row, jax.tree.map(lambda a: a[:, None], x[2]))
        return value + one_side(logits, in_column, y[2]) if sweep.columns else value

    # One copy of the affine map a row, so that its gradient too is a sum along rows.
    each = jnp.broadcast_to(affine, (len(similarity), 2))
    to_similarity, to_affine = jax.grad(weighted, argnums=(0, 1))(similarity, each)
    slope = to_similarity.astype(sweep.dtype)
    return (product(slope, y[0], (1, 0)), to_affine), product(slope, x[0], (0, 0))


def make_sums(sweep: Sweep, ring: Ring) -> Callable:
    """The sums over negatives of one device's rows, with their gradient.

    Args:
      sweep: how to sum.
      ring: the shards of the batch; the function returned is called inside `jax.shard_map` over its axes, if it has any.

    Returns:
      (x float32[n e], y float32[m e], affine float32[2], Ids of x, Ids of y) → (Stats[n], Stats[m] or None), where the logit of
      a pair is affine[0] · x·y + affine[1].
    """
    exchange = EXCHANGE[sweep.where] if ring.axes else exchange_local

    def vary(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: lax.pcast(x, ring.axes, to="varying"), tree) if ring.axes else tree

    def join(a: Tree, b: Tree) -> Tree:
        return jax.tree.map(lambda p, q: merge(sweep.term, p, q), a, b, is_leaf=lambda node: isinstance(node, Stats))

    def add(a: Tree, b: Tree) -> Tree:
        return jax.tree.map(jnp.add, a, b)

    def forward(x: jax.Array, y: jax.Array, affine: jax.Array, x_ids: Ids, y_ids: Ids) -> tuple[Stats, Stats | None]:
        def visit(rows: Stats, keys: Tree) -> tuple[Stats, Stats | None]:
            return tiles(functools.partial(score_tile, sweep, affine), anchors, keys, rows, empty, join, sweep.block)

        def empty(size: int) -> Stats | None:
            return vary(nothing(sweep, size)) if sweep.columns else None

        anchors, keys = (x.astype(sweep.dtype), x_ids), (y.astype(sweep.dtype), y_ids)
        return exchange(visit, join, vary(nothing(sweep, len(x))), keys, ring)

    def backward(saved: tuple, cotangent: tuple[Stats, Stats | None]) -> tuple:
        (x, y, affine, x_ids, y_ids), *stats = saved

        def visit(rows: Tree, keys: Tree) -> tuple[Tree, Tree]:
            return tiles(functools.partial(pull_tile, sweep, affine), anchors, keys, rows, empty, add, sweep.block)

        def empty(size: int) -> jax.Array:
            return vary(jnp.zeros((size, y.shape[1])))

        pulls = [Pull(a.top, b.total, b.linear) if a and b else None for a, b in zip(stats, cotangent, strict=True)]
        anchors, keys = (x.astype(sweep.dtype), x_ids, pulls[0]), (y.astype(sweep.dtype), y_ids, pulls[1])
        start = vary((jnp.zeros(x.shape), jnp.zeros((len(x), 2))))
        (dx, to_affine), dy = exchange(visit, add, start, keys, ring)
        return dx, dy, to_affine.sum(0), None, None

    def sums_and_saved(*inputs: Any) -> tuple:
        rows, columns = forward(*inputs)
        return (rows, columns), (inputs, rows, columns)

    sums = jax.custom_vjp(forward)
    sums.defvjp(sums_and_saved, backward)
    return sums


def negatives(sweep: Sweep, mesh: Mesh | None, axes: tuple[str, ...]) -> Callable:
    """`make_sums` over global arrays, whose rows are spread over `axes` of the mesh; without a mesh on one device."""
    if mesh is None:
        return make_sums(sweep, Ring((), [0]))
    inner = make_sums(sweep, Ring(axes, ring_order(mesh, axes)))

    def spread(x: jax.Array, y: jax.Array, affine: jax.Array, x_ids: Ids, y_ids: Ids) -> tuple[Stats, Stats | None]:
        return inner(x, y, lax.pcast(affine, axes, to="varying"), x_ids, y_ids)

    rows = P(axes)
    return jax.shard_map(spread, mesh=mesh, in_specs=(rows, rows, P(), rows, rows), out_specs=rows)
