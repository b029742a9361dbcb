"""Sums over the negatives of each row, tile by tile. The score matrix is never stored.

A tile is a block of anchors against a block of keys. The forward pass keeps a few numbers per anchor and per key
(`NegativeSums`); the backward pass recomputes each tile. One sweep serves anchors (rows) and keys (columns) alike, forward and
backward.

Dimensions: n anchors, m keys, e embedding, f embedding of a guide, t span hashes of an anchor or key.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Tree = Any
MASKED = -1e30  # finite: exp underflows to 0 beside any real score, and no gradient becomes NaN


class Term(NamedTuple):
    """What a negative adds to the sum of its row.

    Attributes:
      value: (logit, shift) → float, elementwise; shift is the largest logit of the row.
      rescale: (old shift, new shift) → the factor that carries a sum from one shift to another.
    """

    value: Callable[[jax.Array, jax.Array], jax.Array]
    rescale: Callable[[jax.Array, jax.Array], jax.Array]


# Σ exp(s - shift): the log-sum-exp of the softmax losses.
EXP = Term(lambda s, shift: jnp.exp(s - shift), lambda old, new: jnp.exp(old - new))
# Σ softplus(s): the negatives of a logistic loss.
SOFTPLUS = Term(lambda s, shift: jax.nn.softplus(s), lambda old, new: jnp.ones_like(old))


class NegativeSums(NamedTuple):
    """Sums over the negatives of each row, float32[n] each.

    Attributes:
      largest: the largest logit, MASKED without negatives. No gradient flows through it: the other sums do not depend on it.
      total: Σ term(logit, largest).
      linear: Σ logit, or None if the loss does not need it.
      number: how many negatives there are.
    """

    largest: jax.Array
    total: jax.Array
    linear: jax.Array | None
    number: jax.Array


class MaskIds(NamedTuple):
    """What decides which anchors and keys are each other's negatives.

    An anchor and a key are not negatives of each other if they have the same row or document, or share a span.

    Attributes:
      row: int32[n], the pair's index in the global batch; -1 for a key of no pair of the batch.
      valid: bool[n]; False excludes the row: it has no loss and is nobody's negative.
      document: int32[n], or None: not compared. -1 equals nothing. Below -1 it is that of a source without in-batch negatives:
        of equal ones, the hard negatives of the anchor's own row alone are its negatives.
      span_hash: int32[n t], or None: not compared.
      limit: float32[n], or None; a pair more similar than this is not a negative of the row (anchors and keys each have their
        own limit).
      hard: bool[n] of keys, or None: no key is. A hard negative is one of the anchor of its own row, too.
      guide: [n f], or None: the vectors of a guide, whose similarity `limit` is about, instead of that of the embeddings.
    """

    row: jax.Array
    valid: jax.Array
    document: jax.Array | None = None
    span_hash: jax.Array | None = None
    limit: jax.Array | None = None
    hard: jax.Array | None = None
    guide: jax.Array | None = None


class Cotangents(NamedTuple):
    """What the backward pass knows of each row, float32[n] each: its largest logit and the cotangents of its sums."""

    largest: jax.Array
    total: jax.Array
    linear: jax.Array | None


class Side(NamedTuple):
    """The anchors or the keys: embeddings [n e], their ids and, in the backward pass, the cotangents of their sums."""

    z: jax.Array
    ids: MaskIds
    cotangents: Cotangents | None = None


class Sweep(NamedTuple):
    """How to sum over the negatives.

    Attributes:
      term: what a negative adds.
      columns: whether keys have sums (over anchors) too.
      linear: whether `NegativeSums.linear` is wanted.
      dtype: type of the products' inputs, "float32" or "bfloat16"; they accumulate in float32, and all else is float32.
      block: the most rows and columns of a tile.
      where: "local", "gathered" or "ring", see `exchange`.
      hardness: (of keys of other pairs, of hard negatives of the anchor's own pair): what is added to a negative's logit in the
        sums of the anchors, per similarity. No gradient flows through it, and the sums of the keys do without.
    """

    term: Term
    columns: bool
    linear: bool
    dtype: str
    block: int
    where: str
    hardness: tuple[float, float] = (0.0, 0.0)


def negative_mask(similarity: jax.Array, anchors: MaskIds, keys: MaskIds) -> tuple[jax.Array, jax.Array]:
    """Returns the negatives of the anchors bool[n m], and those of the keys bool[n m], from similarity float32[n m]."""
    other = anchors.row[:, None] != keys.row
    allowed = anchors.valid[:, None] & keys.valid & (other if keys.hard is None else other | keys.hard)
    if anchors.document is not None and keys.document is not None:
        differs = (anchors.document[:, None] != keys.document) | (keys.document == -1)
        allowed &= differs if keys.hard is None else differs | ~other
    if anchors.span_hash is not None and keys.span_hash is not None:
        for i in range(anchors.span_hash.shape[1]):
            for j in range(keys.span_hash.shape[1]):
                allowed &= anchors.span_hash[:, i, None] != keys.span_hash[:, j]
    if anchors.guide is not None and keys.guide is not None:
        similarity = product(anchors.guide, keys.guide, (1, 1))
    of_anchors = allowed if anchors.limit is None else allowed & (similarity <= anchors.limit[:, None])
    return of_anchors, allowed if keys.limit is None else allowed & (similarity <= keys.limit)


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Multiplies matrices with a float32 result.

    float32 inputs are not rounded to bfloat16 on the way, which a TPU does by default.

    Args:
      a: a matrix.
      b: a matrix.
      contract: the axis of a and the axis of b to sum over.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def hardness_shift(sweep: Sweep, similarity: jax.Array, anchors: MaskIds, keys: MaskIds) -> jax.Array | float:
    """Returns what `sweep.hardness` adds to the logits of a tile, float32[n m], from similarity float32[n m]."""
    if not any(sweep.hardness):
        return 0.0
    of_others, of_own = sweep.hardness
    return lax.stop_gradient(similarity) * jnp.where(anchors.row[:, None] == keys.row, of_own, of_others)


def sum_tile(sweep: Sweep, logits: jax.Array, allowed: jax.Array, axis: int) -> NegativeSums:
    """Sums the negatives of one tile.

    Args:
      sweep: how to sum.
      logits: float32[n m] of the tile's n anchors and m keys.
      allowed: bool[n m], True where the key is a negative of the anchor (or the anchor of the key).
      axis: the axis that is summed over: 1 gives sums per anchor, 0 sums per key.
    """
    # A row without negatives has a meaningless total: `join_sums` scales it to 0 beside a real logit, losses look at `number`.
    masked = jnp.where(allowed, logits, MASKED)
    largest = masked.max(axis)
    total = sweep.term.value(masked, jnp.expand_dims(largest, axis)).sum(axis)
    linear = jnp.where(allowed, logits, 0).sum(axis) if sweep.linear else None
    return NegativeSums(largest, total, linear, allowed.sum(axis, dtype=jnp.float32))


def join_sums(term: Term, a: NegativeSums, b: NegativeSums) -> NegativeSums:
    """Returns the sums over the union of two disjoint sets of negatives."""
    largest = jnp.maximum(a.largest, b.largest)
    total = a.total * term.rescale(a.largest, largest) + b.total * term.rescale(b.largest, largest)
    linear = None if a.linear is None or b.linear is None else a.linear + b.linear
    return NegativeSums(largest, total, linear, a.number + b.number)


def sums_of_one(sweep: Sweep, logits: jax.Array) -> NegativeSums:
    """Returns the sums of rows of which each has one negative, from its logit."""
    fixed = lax.stop_gradient(logits)
    linear = logits if sweep.linear else None
    return NegativeSums(fixed, sweep.term.value(logits, fixed), linear, jnp.ones_like(logits))


def empty_sums(sweep: Sweep, n: int) -> NegativeSums:
    """Returns the sums of n rows without negatives."""
    zero = jnp.zeros(n, jnp.float32)
    return NegativeSums(jnp.full(n, MASKED), zero, zero if sweep.linear else None, zero)


def score_tile(sweep: Sweep, affine: jax.Array, anchors: Side, keys: Side) -> tuple[NegativeSums, NegativeSums | None]:
    """Returns the sums of a tile for its anchors and, with `sweep.columns`, for its keys.

    Args:
      sweep: how to sum.
      affine: float32[2]; a logit is affine[0] · similarity + affine[1].
      anchors: [n].
      keys: [m].
    """
    similarity = product(anchors.z, keys.z, (1, 1))
    logits = similarity * affine[0] + affine[1]
    of_anchors, of_keys = negative_mask(similarity, anchors.ids, keys.ids)
    shifted = logits + hardness_shift(sweep, similarity, anchors.ids, keys.ids)
    return sum_tile(sweep, shifted, of_anchors, 1), sum_tile(sweep, logits, of_keys, 0) if sweep.columns else None


def differentiate_tile(sweep: Sweep, affine: jax.Array, anchors: Side, keys: Side) -> tuple[Tree, Tree]:
    """Returns what a tile adds to the gradients: ((of anchors [n e], of the affine map [n 2]), of keys [m e])."""
    similarity = product(anchors.z, keys.z, (1, 1))
    of_anchors, of_keys = negative_mask(similarity, anchors.ids, keys.ids)
    shift = hardness_shift(sweep, similarity, anchors.ids, keys.ids)

    def weighted_side(logits: jax.Array, allowed: jax.Array, cotangents: Any) -> jax.Array:
        terms = sweep.term.value(jnp.where(allowed, logits, MASKED), cotangents.largest)
        value = (terms * cotangents.total).sum()
        if cotangents.linear is None:
            return value
        return value + (jnp.where(allowed, logits, 0) * cotangents.linear).sum()

    def weighted(similarity: jax.Array, affine: jax.Array) -> jax.Array:
        """The tile's part of the sums, each times its cotangent: the gradient of this number is what flows back."""
        logits = similarity * affine[:, :1] + affine[:, 1:]
        value = weighted_side(logits + shift, of_anchors, jax.tree.map(lambda x: x[:, None], anchors.cotangents))
        return value + weighted_side(logits, of_keys, keys.cotangents) if sweep.columns else value

    # The affine map once per row, so that its gradient is a sum along rows too.
    affine_per_row = jnp.broadcast_to(affine, (len(similarity), 2))
    to_similarity, to_affine = jax.grad(weighted, argnums=(0, 1))(similarity, affine_per_row)
    slope = to_similarity.astype(sweep.dtype)
    return (product(slope, keys.z, (1, 0)), to_affine), product(slope, anchors.z, (0, 0))


def to_blocks(tree: Tree, size: int) -> Tree:
    """Cuts arrays [n ...] into [blocks block ...]: even blocks, none larger than `size`, padded with zeros (not valid)."""
    n = len(jax.tree.leaves(tree)[0])
    count = -(-n // size)
    block = -(-n // count)

    def cut_leaf(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, count * block - n)] + [(0, 0)] * (x.ndim - 1)) if count * block != n else x
        return x.reshape(count, block, *x.shape[1:])

    return jax.tree.map(cut_leaf, tree)


def from_blocks(tree: Tree, n: int) -> Tree:
    """Undoes `to_blocks`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], tree)


def sweep_tiles(
    visit: Callable, anchors: Side, keys: Side, of_anchors: Tree, empty: Callable, add: Callable, block: int
) -> tuple[Tree, Tree]:
    """Visits each tile of n anchors by m keys once.

    Args:
      visit: (block of anchors, block of keys) → (what the tile adds for its anchors, what it adds for its keys).
      anchors: [n ...].
      keys: [m ...].
      of_anchors: what the anchors have so far, [n ...].
      empty: number of keys → what a block of keys starts with.
      add: (tree, tree) → tree, joins what two tiles add.
      block: the most rows and columns of a tile.

    Returns:
      `of_anchors` with all added, and what was added for the keys, [m ...].
    """
    n, m = len(anchors.z), len(keys.z)
    anchor_blocks, key_blocks, start = to_blocks(anchors, block), to_blocks(keys, block), to_blocks(of_anchors, block)

    def visit_keys(of_anchors: Tree, keys: Side) -> tuple[Tree, Tree]:
        def visit_anchors(of_keys: Tree, item: tuple[Side, Tree]) -> tuple[Tree, Tree]:
            anchors, so_far = item
            to_anchors, to_keys = visit(anchors, keys)
            return add(of_keys, to_keys), add(so_far, to_anchors)

        of_keys, of_anchors = lax.scan(visit_anchors, empty(len(keys.z)), (anchor_blocks, of_anchors))
        return of_anchors, of_keys

    of_anchors, of_keys = lax.scan(visit_keys, start, key_blocks)
    return from_blocks(of_anchors, n), from_blocks(of_keys, m)
