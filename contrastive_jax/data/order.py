"""The order of the data: which record the pair at each position of the endless stream is cut from.

Pair i of step k has the position k · batch_size + i. Its record is a pure function of (data, seed, position), so nothing of the
order is ever saved:

```
position ──Deal──> pool, rank in the pool ──> epoch ──permuted chunks──> window ──permuted records of its lane──> record
```

* A *pool* is a set of domains with a share of the positions: all domains, or one of `config.data.weights`. The share is exact
  in each block of BLOCK positions, and evenly spread. A pair's *rank* is the number of the pool's pairs before it.
* In an *epoch* of a pool each of its records comes once. The chunks are permuted anew, and cut into *windows*: runs of chunks
  with about `config.data.shuffle_records` records, all pools' windows together. A pool that fits into a window is one window.
  The windows of pools with small shares are larger, see `window_size`.
* Within a window the records are permuted. Each *lane*, a LANES-th of the places in a batch, has its own run of the window's
  chunks: a process that makes some of the pairs of each batch reads a few lanes, and so only a part of the chunks, while the
  order remains the same for any number of processes.

All permutations sort the words of NumPy's Philox, whose values are the same in all versions of NumPy. In memory are 12
bytes per chunk, and while an epoch is permuted 32 more; and of several pools 256 KB per block that the windows in use touch.

Dimensions: c chunks of the split, p pools, n pairs, b pairs of the global batch, m records of a window, k chunks of a window.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.data.prepared import Records
from contrastive_jax.data.store import CHUNK

# Positions in a block: the share of a pool is exact to 1 / BLOCK.
BLOCK = 65536
LANES = 64
# The fewest records of a window, unless the pool has fewer or there are many pools: one with a small share is shuffled too.
MIN_WINDOW = 2048
# A window that is larger than the share of its pool touches no more blocks: making one takes 10 ms.
MAX_BLOCKS = 64
# The names that a message lists; of more it says how many there are.
MAX_NAMES = 10
# What a permutation is for, as part of its random key.
BLOCK_KEY, EPOCH_KEY, WINDOW_KEY = range(3)


class Pool(NamedTuple):
    """Domains with a share of the positions.

    Attributes:
      name: of the domain or the dataset; "" if it is all there is.
      domains: the numbers of its domains.
    """

    name: str
    domains: list[int]


class Window(NamedTuple):
    """A part of an epoch of a pool, in which records are permuted.

    Attributes:
      first: the rank in the pool of the window's first pair.
      record: int32[m], the record of each pair: its number among the records of the window that can be sampled.
      chunks: uint32[k], the chunks of the window.
      offsets: int64[k + 1], the number of each chunk's first record, and m.
      place: int64[m], the place in its batch of each pair.
    """

    first: int
    record: np.ndarray
    chunks: np.ndarray
    offsets: np.ndarray
    place: np.ndarray

    def locate(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the records of ranks int64[n] lie: the chunk, as an index into `chunks`, and the record's number in it.

        The records of a chunk that are too short for the sampler are not counted.
        """
        record = self.record[ranks - self.first]
        chunk = np.searchsorted(self.offsets, record, side="right") - 1
        return chunk, record - self.offsets[chunk]


def random_words(count: int, seed: int, *key: int) -> np.ndarray:
    """Returns uint64[count], random words that depend on nothing but the seed and the key."""
    return np.random.Philox(np.random.SeedSequence((seed, *key))).random_raw(count)


def find_domains(records: Records, name: str) -> list[int]:
    """Returns the numbers of the domains that a name in `config.data.weights` stands for.

    Args:
      records: the split.
      name: a domain; or, of several datasets, a dataset, a domain wherever it occurs, or DATASET/DOMAIN.

    Raises:
      UserError: there is none, or the name has two meanings.
    """
    if name in records.domains:
        return [records.domains.index(name)]
    several = len(records.datasets) > 1
    dataset = records.datasets.get(name, []) if several else []
    domain = [i for i, full in enumerate(records.domains) if several and full.partition("/")[2] == name]
    if dataset and domain:
        raise UserError(f"config.data.weights: {name!r} is a dataset and a domain; name the domain as DATASET/{name}")
    if not dataset and not domain:
        raise UserError(f"config.data.weights: no domain {name!r}; there are {some_of(records.domains)}")
    return dataset or domain


def some_of(names: Sequence[str]) -> str:
    """Returns names for a message: at most MAX_NAMES, and how many more there are."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def make_pools(records: Records, counts: np.ndarray, config: ConfigDict) -> tuple[list[Pool], np.ndarray]:
    """Divides the domains into pools.

    Args:
      records: the split.
      counts: int64[domains], the records of each domain that can be sampled.
      config: `config.data`, of which `weights`, `alpha` and `one_source` are used.

    Returns:
      The pools, and int64[p], the positions that each has in a block; they sum to BLOCK.

    Raises:
      UserError: a name is unknown, empty or occurs twice, or a weight is negative or too small.
    """
    if config.weights:
        return named_pools(records, counts, config)
    if not config.one_source and config.alpha == 1:
        return [Pool("", list(range(len(counts))))], np.array([BLOCK])
    if config.one_source == "dataset":
        pools = [Pool(name, domains) for name, domains in records.datasets.items()]
    else:
        pools = [Pool(name, [number]) for number, name in enumerate(records.domains)]
    pools = [pool for pool in pools if counts[pool.domains].any()]
    sizes = np.array([counts[pool.domains].sum() for pool in pools], np.float64)
    return pools, quotas((sizes / sizes.sum()) ** config.alpha, minimum=1)


def named_pools(records: Records, counts: np.ndarray, config: ConfigDict) -> tuple[list[Pool], np.ndarray]:
    """Returns the pools that `config.data.weights` names; see `make_pools`."""
    if config.alpha != 1:
        raise UserError(f"config.data.alpha={config.alpha}: config.data.weights sets the shares already; leave one of them out")
    pools: list[Pool] = []
    for name, weight in config.weights:
        domains = find_domains(records, name)
        twice = [pool.name for pool in pools if set(pool.domains) & set(domains)]
        if twice:
            raise UserError(f"config.data.weights: {name!r} is in {twice[0]!r} already; name each domain once")
        if not counts[domains].any():
            raise UserError(f"config.data.weights: {name!r} has no record long enough for the sampler; leave it out")
        if not weight > 0:
            raise UserError(f"config.data.weights: {name!r} has weight {weight}; weights are positive")
        if config.one_source and not is_one_source(records, domains, config.one_source):
            raise UserError(
                f"config.data.one_source={config.one_source!r}: {name!r} in config.data.weights is more than one "
                f"{config.one_source}; name each of them"
            )
        pools.append(Pool(name, domains))
    quota = quotas(np.array([weight for _, weight in config.weights], np.float64))
    if quota.min() == 0:
        raise UserError(f"config.data.weights: {pools[int(quota.argmin())].name!r} gets less than 1 in {BLOCK} pairs; raise it")
    return pools, quota


def is_one_source(records: Records, domains: list[int], kind: str) -> bool:
    """Returns whether domains are one domain (kind "domain"), or lie in one dataset (kind "dataset")."""
    if kind == "domain":
        return len(domains) == 1
    return any(set(domains) <= set(inside) for inside in records.datasets.values())


def quotas(weights: np.ndarray, minimum: int = 0) -> np.ndarray:
    """Divides a block by weights float64[p]: returns int64[p] that sum to BLOCK, each at least `minimum`.

    As the number of a domain has 16 bits, there are at most BLOCK pools: each can have one position.
    """
    exact = np.maximum(weights / weights.sum() * BLOCK, minimum)
    # What the pools below the minimum get is taken from the others, each of which keeps the minimum.
    above = exact - minimum
    exact = minimum + above * ((BLOCK - minimum * len(weights)) / (above.sum() or 1))
    quota = np.floor(exact).astype(np.int64)
    # The positions that rounding down left over go to the pools that lost most by it.
    quota[np.argsort(quota - exact, kind="stable")[: BLOCK - quota.sum()]] += 1
    return quota


def window_size(shuffle_records: int, quota: int, pools: int, one_source: bool) -> int:
    """Returns about how many records a window of a pool has.

    That is the pool's share of `config.data.shuffle_records`, but at least MIN_WINDOW: less where there are so many pools that
    their windows together would have more than 4 · shuffle_records, and where such a window would touch too many blocks.
    """
    least = min(MIN_WINDOW, max(CHUNK, 4 * shuffle_records // pools))
    if not one_source:
        least = min(least, MAX_BLOCKS * quota)
    return max(shuffle_records * quota // BLOCK, least)


def warn_of_small_pools(pools: Sequence[Pool], sizes: Sequence[int], shares: np.ndarray) -> None:
    """Warns of pools that have fewer records than pairs in a batch.

    Args:
      pools: the pools.
      sizes: the records of each that can be sampled.
      shares: float64[p], the pairs of each in a batch.
    """
    small = [
        f"{pool.name or 'the data'} ({size:,} records, {share:,.0f} pairs)"
        for pool, size, share in zip(pools, sizes, shares.tolist(), strict=True)
        if size < share
    ]
    if small:
        logging.warning("batches repeat records, for too few are long enough: %s", some_of(small))


class Deal:
    """Deals positions to pools: with `one_source` all positions of a step together, otherwise one by one.

    Args:
      quota: int64[p], of each block of positions or steps.
      batch_size: b.
      one_source: whether all pairs of a step come from one pool.
      seed: of the order of the pools.
    """

    def __init__(self, quota: np.ndarray, batch_size: int, one_source: bool, seed: int):
        self._quota, self._batch_size, self._one_source, self._seed = quota, batch_size, one_source, seed
        # The windows of all pools need about the same blocks, at about the same time: two windows of each, of whole chunks.
        self._block = functools.lru_cache(5 * MAX_BLOCKS)(self._make_block)

    def _make_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pool of each position of a block, and how many positions of its pool come before it there, uint16."""
        first = np.cumsum(self._quota) - self._quota
        pool = np.repeat(np.arange(len(self._quota)), self._quota)
        # Each pool's positions are evenly spread, but for a random shift of each.
        shift = (random_words(BLOCK, self._seed, BLOCK_KEY, number) >> np.uint64(11)) * 2.0**-53
        slot = np.argsort((np.arange(BLOCK) - first[pool] + shift) / self._quota[pool], kind="stable")
        return pool[slot].astype(np.uint16), (slot - first[pool[slot]]).astype(np.uint16)

    def ranks(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pool and the rank in it of each pair of a step, int64[b] each."""
        place = np.arange(self._batch_size)
        if len(self._quota) == 1:
            return np.zeros_like(place), step * self._batch_size + place
        if self._one_source:
            block, offset = divmod(step, BLOCK)
            pools, before = self._block(block)
            pool = pools[offset]
            rank = block * self._quota[pool] + int(before[offset])
            return np.full_like(place, pool), rank * self._batch_size + place
        first, end = step * self._batch_size, (step + 1) * self._batch_size
        parts = []
        for block in range(first // BLOCK, (end - 1) // BLOCK + 1):
            part = slice(max(0, first - block * BLOCK), end - block * BLOCK)
            pools, before = (array[part] for array in self._block(block))
            parts.append((pools, block * self._quota[pools] + before))
        pool, rank = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return pool, rank

    def places(self, pool: int, first: int, end: int) -> np.ndarray:
        """Returns the place in its batch of each pair of a pool from rank `first` to before rank `end`, int64[end - first]."""
        if len(self._quota) == 1 or self._one_source:
            return np.arange(first, end) % self._batch_size
        quota = int(self._quota[pool])
        blocks = range(first // quota, (end - 1) // quota + 1)
        positions = np.concatenate([np.flatnonzero(self._block(block)[0] == pool) + block * BLOCK for block in blocks])
        return positions[first - blocks[0] * quota :][: end - first] % self._batch_size


class Order:
    """The order of a split.

    Args:
      records: the split.
      config: `config.data`.
      seed: of all permutations.
      usable: uint8[c], the records of each chunk that can be sampled.

    Attributes:
      pools: the pools.
      usable: as given.

    Raises:
      UserError: from `make_pools`.
    """

    def __init__(self, records: Records, config: ConfigDict, seed: int, usable: np.ndarray):
        counts = np.bincount(records.chunk_domain, usable, len(records.domains)).astype(np.int64)
        self.pools, quota = make_pools(records, counts, config)
        self.usable, self._seed, self._batch_size = usable, seed, config.batch_size
        self._deal = Deal(quota, config.batch_size, bool(config.one_source), seed)
        self._sizes = [int(counts[pool.domains].sum()) for pool in self.pools]
        self._window_sizes = [
            window_size(config.shuffle_records, share, len(quota), bool(config.one_source)) for share in quota.tolist()
        ]
        shares = np.ones(len(quota)) if config.one_source else quota / BLOCK
        warn_of_small_pools(self.pools, self._sizes, shares * config.batch_size)
        pool_of = np.full(len(records.domains), -1, np.int32)
        for number, pool in enumerate(self.pools):
            pool_of[pool.domains] = number
        self._pool_of_chunk = np.where(usable > 0, pool_of[records.chunk_domain], np.int32(-1))
        # Of each pool the epochs and windows in use and those that are read ahead, however fast those of other pools change.
        numbers = range(len(self.pools))
        self._epoch = [functools.lru_cache(2)(functools.partial(self._make_epoch, pool)) for pool in numbers]
        self._window = [functools.lru_cache(2)(functools.partial(self._make_window, pool)) for pool in numbers]

    def _make_epoch(self, pool: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Permutes the chunks of a pool and cuts them into windows.

        Returns:
          The chunks; the first chunk of each window and the end, as indices into the chunks; and the first record of each
          window, by its rank in the epoch, and the end.
        """
        chunks = np.flatnonzero(self._pool_of_chunk == pool).astype(np.uint32)
        chunks = chunks[np.argsort(random_words(len(chunks), self._seed, EPOCH_KEY, pool, epoch), kind="stable")]
        ends = np.cumsum(self.usable[chunks], dtype=np.int64)
        windows = -(-self._sizes[pool] // self._window_sizes[pool])
        inner = np.searchsorted(ends, np.arange(1, windows) * self._sizes[pool] // windows) + 1
        bounds = np.unique(np.concatenate([[0], inner, [len(chunks)]]))
        return chunks, bounds, np.concatenate([[0], ends[bounds[1:] - 1]])

    def _make_window(self, pool: int, epoch: int, number: int) -> Window:
        chunks, bounds, starts = self._epoch[pool](epoch)
        first, size = epoch * self._sizes[pool] + int(starts[number]), int(starts[number + 1] - starts[number])
        chunks = chunks[bounds[number] : bounds[number + 1]]
        place = self._deal.places(pool, first, first + size)
        words = random_words(size, self._seed, WINDOW_KEY, pool, epoch, number)
        # In a pool of one window each lane may have all records: the order is then any of all orders.
        lane = place * LANES // self._batch_size if len(bounds) > 2 else np.zeros_like(place)
        record = np.empty(size, np.int32)
        record[np.lexsort((words, lane))] = np.arange(size, dtype=np.int32)
        return Window(first, record, chunks, np.concatenate([[0], np.cumsum(self.usable[chunks], dtype=np.int64)]), place)

    def window(self, pool: int, rank: int) -> Window:
        """Returns the window of a rank in a pool."""
        epoch, offset = divmod(rank, self._sizes[pool])
        number = int(np.searchsorted(self._epoch[pool](epoch)[2], offset, side="right")) - 1
        return self._window[pool](epoch, number)

    def runs(self, step: int, pairs: np.ndarray) -> Iterator[tuple[int, Window, np.ndarray, np.ndarray]]:
        """Yields the pairs int64[n] of a step by windows: (pool, window, which of the pairs, their ascending ranks)."""
        pools, ranks = (array[pairs] for array in self._deal.ranks(step))
        for pool in np.unique(pools).tolist():
            which = np.flatnonzero(pools == pool)
            while len(which):
                window = self.window(pool, int(ranks[which[0]]))
                count = int(np.searchsorted(ranks[which], window.first + len(window.record)))
                yield pool, window, which[:count], ranks[which[:count]]
                which = which[count:]

    def locate(self, step: int, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the records of some pairs of a step: the chunk, and the number among its records that can be sampled."""
        chunks, numbers = np.empty((2, len(pairs)), np.int64)
        for _, window, which, ranks in self.runs(step, pairs):
            chunk, numbers[which] = window.locate(ranks)
            chunks[which] = window.chunks[chunk]
        return chunks, numbers
