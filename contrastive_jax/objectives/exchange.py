"""Where tiles are scored: on each device alone, with all keys gathered, or with key blocks passed around a ring of devices.

`gathered` and `ring` give equal results. All three have one signature, which the forward and the backward pass share:
(visit, add, of_anchors, keys, ring) → (of_anchors, of_keys), where visit(of_anchors, keys) scores this device's anchors against
some keys and returns what the anchors have now, and what these keys get; add joins what keys get from two devices.

Where the devices are several TPU slices, the ring has two levels: while a key block goes around its slice, over the fast links
between chips, a copy of it is on its way to the next slice, over the hosts' network. Each block enters each other slice once,
and all hosts use their network at the same time; in one ring over all devices a block would cross at every hop, always through
the network of the same few hosts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

Tree = Any


class Ring(NamedTuple):
    """The shards of the batch, by their numbers, in the order in which key blocks are passed on.

    Attributes:
      axes: the mesh axes over which the batch is spread.
      slices: of each slice its shards as a ring. Shards at the same place of their rings exchange blocks between slices.
    """

    axes: tuple[str, ...]
    slices: list[list[int]]

    @property
    def size(self) -> int:
        """The number of shards."""
        return sum(map(len, self.slices))


def make_ring(mesh: Mesh, axes: tuple[str, ...]) -> Ring:
    """Returns the shards of the batch that a mesh spreads over `axes`, one ring per slice.

    Slices with different numbers of shards cannot exchange blocks with each other in step; all shards then form one ring.
    """
    others = tuple(axis for axis in mesh.axis_names if axis not in axes)
    shards = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in (*axes, *others)])
    devices = shards.reshape(math.prod(mesh.shape[axis] for axis in axes), -1)[:, 0]
    slice_of = [getattr(device, "slice_index", 0) for device in devices]
    members = [[i for i, other in enumerate(slice_of) if other == number] for number in sorted(set(slice_of))]
    if len({len(shards) for shards in members}) > 1:
        return Ring(axes, [list(range(len(devices)))])
    return Ring(axes, [[shards[i] for i in ring_order([devices[shard] for shard in shards])] for shards in members])


def ring_order(devices: Sequence[Any]) -> list[int]:
    """Returns the order in which the devices of a slice stand in a ring: physical neighbours where they form a grid.

    With the order of `jax.make_mesh` on 8 × 8 or more chips, where the end of a line is far from the start of the next, the
    TPU's compiler makes every permute blocking; between neighbours all are asynchronous. The ring is a Hamiltonian cycle: out
    in a snake over all columns but one, and back along that one. It needs an even dimension.
    """
    if not hasattr(devices[0], "coords"):
        return list(range(len(devices)))
    coords = np.array([(*device.coords, getattr(device, "core_on_chip", 0)) for device in devices])
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in coords.T], axis=1)
    ranks = ranks[:, ranks.max(0) > 0]
    even = [i for i, size in enumerate(ranks.max(0, initial=0) + 1) if size % 2 == 0]
    if len(np.unique(ranks, axis=0)) != len(ranks) or math.prod(ranks.max(0, initial=0) + 1) != len(ranks) or not even:
        return list(range(len(devices)))
    ranks = np.concatenate([ranks[:, even[:1]], np.delete(ranks, even[0], axis=1)], axis=1)
    shard_at, columns = {tuple(rank): i for i, rank in enumerate(ranks.tolist())}, snake(tuple(ranks.max(0)[1:] + 1))
    height, width = int(ranks.max(0)[0]) + 1, len(columns)
    out = [(row, k if row % 2 == 0 else width - k) for row in range(height) for k in range(1, width)]
    back = [(row, 0) for row in reversed(range(height))]
    return [shard_at[row, *columns[k]] for row, k in (out + back if width > 1 else back)]


def snake(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Lists all points of a grid, each next to the one before."""
    if not sizes:
        return [()]
    rest = snake(sizes[1:])
    return [(i, *point) for i in range(sizes[0]) for point in (rest if i % 2 == 0 else rest[::-1])]


def exchange_local(visit: Callable, add: Callable, of_anchors: Tree, keys: Tree, ring: Ring) -> tuple[Tree, Tree]:
    """Scores each device's anchors against its own keys only."""
    return visit(of_anchors, keys)


def exchange_gathered(visit: Callable, add: Callable, of_anchors: Tree, keys: Tree, ring: Ring) -> tuple[Tree, Tree]:
    """All-gathers the keys and scores every tile locally; per-key sums go back to the key's owner and are joined there."""
    size = ring.size
    all_keys = jax.tree.map(lambda x: lax.all_gather(x, ring.axes, tiled=True), keys)
    of_anchors, of_keys = visit(of_anchors, all_keys)
    by_device = jax.tree.map(lambda x: lax.all_to_all(x.reshape(size, -1, *x.shape[1:]), ring.axes, 0, 0), of_keys)
    first = jax.tree.map(lambda x: x[0], by_device)
    rest = jax.tree.map(lambda x: x[1:], by_device)
    return of_anchors, lax.scan(lambda total, part: (add(total, part), None), first, rest, length=size - 1)[0]


def exchange_ring(visit: Callable, add: Callable, of_anchors: Tree, keys: Tree, ring: Ring) -> tuple[Tree, Tree]:
    """Passes key blocks around the ring of each slice and, with several slices, from each slice to the next."""
    within = [pair for shards in ring.slices for pair in zip(shards, shards[1:] + shards[:1], strict=True)]
    across = [
        pair
        for shards, following in zip(ring.slices, ring.slices[1:] + ring.slices[:1], strict=True)
        for pair in zip(shards, following, strict=True)
    ]

    def visit_slice(of_anchors: Tree, keys: Tree) -> tuple[Tree, Tree]:
        return pass_around(visit, add, of_anchors, keys, ring.axes, within, len(ring.slices[0]))

    return pass_around(visit_slice, add, of_anchors, keys, ring.axes, across, len(ring.slices), last_apart=True)


def pass_around(
    visit: Callable,
    add: Callable,
    of_anchors: Tree,
    keys: Tree,
    axes: tuple[str, ...],
    hops: list[tuple[int, int]],
    size: int,
    last_apart: bool = False,
) -> tuple[Tree, Tree]:
    """Scores the anchors against the key blocks of a ring of devices, which are passed on from each to the next.

    The sums of each block follow it one hop behind, so that both transfers overlap the scoring.

    Args:
      visit: see the head of this file.
      add: see the head of this file.
      of_anchors: what the anchors have so far.
      keys: this device's block of keys.
      axes: the mesh axes over which the devices are numbered.
      hops: the numbers of each device and of the next one in its ring.
      size: the number of devices of a ring.
      last_apart: score the last block after the loop, which would pass it on once more, for nothing. The program then has
        another copy of `visit`.

    Returns:
      What the anchors have now, and what this device's block of keys gets.
    """

    def to_next(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: lax.ppermute(x, axes, hops), tree)

    def hop(carry: tuple[Tree, Tree, Tree], _: None) -> tuple[tuple[Tree, Tree, Tree], None]:
        of_anchors, keys, of_keys = carry
        next_keys, so_far = to_next(keys), to_next(of_keys)
        of_anchors, added = visit(of_anchors, keys)
        return (of_anchors, next_keys, add(so_far, added)), None

    if size == 1:
        return visit(of_anchors, keys)
    of_anchors, of_keys = visit(of_anchors, keys)
    carry = of_anchors, to_next(keys), of_keys
    (of_anchors, keys, of_keys), _ = lax.scan(hop, carry, length=size - 1 - last_apart)
    if last_apart:
        so_far = to_next(of_keys)
        of_anchors, added = visit(of_anchors, keys)
        of_keys = add(so_far, added)
    return of_anchors, to_next(of_keys)


EXCHANGES = {"local": exchange_local, "gathered": exchange_gathered, "ring": exchange_ring}
