"""The sums over all negatives of a batch, with their gradient, on one device or over a mesh.

The forward pass sweeps the tiles and keeps `NegativeSums` per anchor and key; the backward pass (`jax.custom_vjp`) sweeps them
again, so that memory never grows with the number of anchors times keys.

Dimensions: n anchors and m keys of one device, e embedding.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from contrastive_jax.objectives import exchange, tiles
from contrastive_jax.objectives.tiles import Cotangents, MaskIds, NegativeSums, Side, Sweep

Tree = Any
Sums = tuple[NegativeSums, NegativeSums | None]


class Negatives:
    """The sums over negatives of one device's anchors and keys.

    Args:
      sweep: how to sum.
      ring: the shards of the batch; with axes, the object is called inside `jax.shard_map` over them.
    """

    def __init__(self, sweep: Sweep, ring: exchange.Ring):
        self._sweep, self._ring = sweep, ring
        self._exchange = exchange.EXCHANGES[sweep.where] if ring.axes else exchange.exchange_local
        self._sums = jax.custom_vjp(self._forward)
        self._sums.defvjp(self._forward_and_saved, self._backward)

    def __call__(self, anchors: jax.Array, keys: jax.Array, affine: jax.Array, anchor_ids: MaskIds, key_ids: MaskIds) -> Sums:
        """Returns the sums of the anchors [n] and, with `sweep.columns`, of the keys [m].

        Args:
          anchors: float32[n e].
          keys: float32[m e].
          affine: float32[2]; the logit of a pair is affine[0] · anchor·key + affine[1].
          anchor_ids: of the anchors.
          key_ids: of the keys.
        """
        return self._sums(anchors, keys, affine, anchor_ids, key_ids)

    def _vary(self, tree: Tree) -> Tree:
        """Marks a tree as different on each device, which `jax.shard_map` wants to be told of constants."""
        axes = self._ring.axes
        return jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), tree) if axes else tree

    def _side(self, z: jax.Array, ids: MaskIds, cotangents: Cotangents | None = None) -> Side:
        guide = None if ids.guide is None else ids.guide.astype(self._sweep.dtype)
        return Side(z.astype(self._sweep.dtype), ids._replace(guide=guide), cotangents)

    def _join(self, a: Tree, b: Tree) -> Tree:
        join = functools.partial(tiles.join_sums, self._sweep.term)
        return jax.tree.map(join, a, b, is_leaf=lambda node: isinstance(node, NegativeSums))

    def _forward(self, x: jax.Array, y: jax.Array, affine: jax.Array, x_ids: MaskIds, y_ids: MaskIds) -> Sums:
        sweep, anchors = self._sweep, self._side(x, x_ids)
        score = functools.partial(tiles.score_tile, sweep, affine)

        def empty(size: int) -> NegativeSums | None:
            return self._vary(tiles.empty_sums(sweep, size)) if sweep.columns else None

        def visit(of_anchors: NegativeSums, keys: Side) -> Sums:
            return tiles.sweep_tiles(score, anchors, keys, of_anchors, empty, self._join, sweep.block)

        start = self._vary(tiles.empty_sums(sweep, len(x)))
        return self._exchange(visit, self._join, start, self._side(y, y_ids), self._ring)

    def _forward_and_saved(self, *inputs: Any) -> tuple[Sums, tuple]:
        sums = self._forward(*inputs)
        return sums, (inputs, sums)

    def _backward(self, saved: tuple, cotangent: Sums) -> tuple:
        (x, y, affine, x_ids, y_ids), sums = saved
        sweep = self._sweep
        of_anchors, of_keys = (
            Cotangents(side.largest, gradient.total, gradient.linear) if side and gradient else None
            for side, gradient in zip(sums, cotangent, strict=True)
        )
        anchors, keys = self._side(x, x_ids, of_anchors), self._side(y, y_ids, of_keys)
        differentiate = functools.partial(tiles.differentiate_tile, sweep, affine)

        def add(a: Tree, b: Tree) -> Tree:
            return jax.tree.map(jnp.add, a, b)

        def empty(size: int) -> jax.Array:
            return self._vary(jnp.zeros((size, y.shape[1])))

        def visit(gradients: Tree, keys: Side) -> tuple[Tree, Tree]:
            return tiles.sweep_tiles(differentiate, anchors, keys, gradients, empty, add, sweep.block)

        start = self._vary((jnp.zeros(x.shape), jnp.zeros((len(x), 2))))
        (to_x, to_affine), to_y = self._exchange(visit, add, start, keys, self._ring)
        return to_x, to_y, to_affine.sum(0), None, None


def on_mesh(sweep: Sweep, mesh: Mesh | None, axes: tuple[str, ...]) -> Callable[..., Sums]:
    """Returns `Negatives` over global arrays, whose rows are spread over `axes` of the mesh; without a mesh on one device."""
    if mesh is None:
        return Negatives(sweep, exchange.Ring((), [[0]]))
    per_device = Negatives(sweep, exchange.make_ring(mesh, axes))

    def spread(x: jax.Array, y: jax.Array, affine: jax.Array, x_ids: MaskIds, y_ids: MaskIds) -> Sums:
        return per_device(x, y, lax.pcast(affine, axes, to="varying"), x_ids, y_ids)

    rows = P(axes)
    return jax.shard_map(spread, mesh=mesh, in_specs=(rows, rows, P(), rows, rows), out_specs=rows)
