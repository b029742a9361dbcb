"""From a prepared dataset to batches, with tf.data.

The batch of step k is a pure function of (data, seed, k): nothing of an iterator is ever saved, and the tokens of step k are
the same whatever the number of processes. Dimensions: b pairs of the global batch, n rows of this process, v views, l tokens.
"""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from array_record.python import array_record_data_source
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax.data import FORMAT, packing, spans, token_type

# TensorFlow only reads data here; it must not take the accelerator's memory.
tf.config.set_visible_devices([], "GPU")

# Positions are dealt out to domains in blocks of this many: a domain's share is exact to 1 / BLOCK.
BLOCK = 65536


class Windows(NamedTuple):
    """One split of a prepared dataset, read by index.

    Attributes:
      manifest: the dataset's manifest.json.
      source: `source[i]` and `source.__getitems__([i, ...])` give serialised records.
      length: int32[w] tokens of each window.
      document: int32[w] number of its document.
      domain: int32[w] index into `domains`.
      domains: names.
    """

    manifest: dict
    source: array_record_data_source.ArrayRecordDataSource
    length: np.ndarray
    document: np.ndarray
    domain: np.ndarray
    domains: list[str]


def load_manifest(directory: epath.PathLike) -> dict:
    """The manifest of a prepared dataset.

    Raises:
      ValueError: the folder is not a finished prepared dataset.
    """
    path = epath.Path(directory) / "manifest.json"
    if not path.exists():
        raise ValueError(
            f"config.data.dir={directory}: no manifest.json there; make it with `python -m contrastive_jax.prepare "
            f"--output={directory}` and --python or --input=GLOB"
        )
    manifest = json.loads(path.read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: format {manifest['format']}, this version reads {FORMAT}; prepare the data again")
    return manifest


def open_split(directory: epath.PathLike, split: str) -> Windows:
    """Opens a split ("train" or "validation") of the dataset that `prepare` wrote to `directory`.

    Raises:
      ValueError: no dataset there, or it has no such split.
    """
    root = epath.Path(directory)
    manifest = load_manifest(root)
    index_path = root / f"index-{split}.npz"
    if split not in manifest["splits"] or not index_path.exists():
        raise ValueError(f"{root}: no split {split!r} among {', '.join(manifest['splits'])}")
    shards = sorted(root.glob(f"pile/*/*-{split}.array_record-*"))
    with index_path.open("rb") as file, np.load(file) as index:
        windows = Windows(
            manifest=manifest,
            source=array_record_data_source.ArrayRecordDataSource([str(path) for path in shards]),
            length=index["length"],
            document=index["document"],
            domain=index["domain"],
            domains=[str(name) for name in index["domains"]],
        )
    if len(windows.source) != len(windows.length):
        raise ValueError(
            f"{index_path} lists {len(windows.length)} records, the shards hold {len(windows.source)}; prepare again"
        )
    return windows


def read_tokens(windows: Windows, index: tf.Tensor) -> tf.Tensor:
    """Tokens [n w] of the records at index int64[n], zero after a window's end; uint16 where the vocabulary allows."""
    source, size, kind = windows.source, windows.manifest["window"], token_type(windows.manifest["vocab_size"])
    records = tf.numpy_function(
        lambda wanted: np.asarray(source.__getitems__(wanted.tolist()), dtype=object), [index], tf.string, stateful=False
    )
    records.set_shape([None])
    raw = tf.io.parse_example(records, {"tokens": tf.io.FixedLenFeature([], tf.string)})["tokens"]
    return tf.io.decode_raw(raw, tf.as_dtype(kind), fixed_length=size * kind.itemsize)


def gather_spans(tokens: tf.Tensor, start: tf.Tensor, size: tf.Tensor, length: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Cuts spans out of windows.

    Args:
      tokens: [n w].
      start: int32[n v], the spans' first tokens.
      size: int32[n v], their lengths, at most `length`.
      length: l, the width of the result.

    Returns:
      tokens int32[n v l], zero after the span, and mask bool[n v l], True on the span.
    """
    offset = tf.range(length)
    mask = offset < size[:, :, None]
    n, width = tf.unstack(tf.shape(tokens))
    first = (tf.range(n) * width)[:, None, None] + start[:, :, None]
    # Beyond a span lies whatever follows it in its window or the next; the mask removes it.
    index = tf.minimum(first + offset, n * width - 1)
    return tf.where(mask, tf.cast(tf.gather(tf.reshape(tokens, [-1]), index), tf.int32), 0), mask


def hash_texts(tokens: tf.Tensor) -> tf.Tensor:
    """A hash int32[n v] of each span of tokens int32[n v l], zero after the span: equal spans have equal hashes.

    Multiply-shift (Dietzfelbinger): the upper half of a sum of products with fixed random numbers, modulo 2**64.
    """
    key = np.random.default_rng(0).integers(-(2**63), 2**63, tokens.shape[2], np.int64) | 1
    return tf.cast(tf.bitwise.right_shift(tf.reduce_sum(tf.cast(tokens, tf.int64) * key, axis=2), 32), tf.int32)


def delimit(tokens: tf.Tensor, mask: tf.Tensor, delimiters: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
    """Puts each view's opening and closing id around its span.

    Args:
      tokens: int32[n v l].
      mask: bool[n v l].
      delimiters: int32[v 2], the ids.

    Returns:
      tokens int32[n v l + 2], mask bool[n v l + 2].
    """
    edge = tf.ones_like(mask[:, :, :1])
    opening, closing = delimiters[None, :, :1], delimiters[None, :, 1:]
    tokens = tf.concat([opening * tf.ones_like(tokens[:, :, :1]), tokens, tf.zeros_like(tokens[:, :, :1])], axis=2)
    inside = tf.concat([edge, mask, tf.zeros_like(edge)], axis=2)
    size = tf.reduce_sum(tf.cast(inside, tf.int32), axis=2, keepdims=True)
    last = tf.range(tokens.shape[2]) == size
    return tf.where(last, closing, tokens), inside | last


def mixture(weights: tuple, domains: list[str], counts: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """Pools of domains and how many positions of a block each gets.

    Args:
      weights: (domain, weight) pairs; empty: one pool of all domains, each window once an epoch.
      domains: names there are.
      counts: int64[domains], windows that can be sampled.

    Returns:
      The domain numbers of each pool, and int64[pools] that sum to BLOCK.

    Raises:
      ValueError: an unknown or empty domain, or a weight too small or negative.
    """
    if not weights:
        return [list(range(len(domains)))], np.array([BLOCK])
    for name, weight in weights:
        if name not in domains:
            raise ValueError(f"config.data.weights: no domain {name!r}; there are {', '.join(domains)}")
        if not counts[domains.index(name)]:
            raise ValueError(f"config.data.weights: {name!r} has no window long enough for the sampler; leave it out")
        if not weight > 0:
            raise ValueError(f"config.data.weights: {name!r} has weight {weight}; weights are positive")
    share = np.array([weight for _, weight in weights], np.float64)
    exact = share / share.sum() * BLOCK
    quota = np.floor(exact).astype(np.int64)
    # Largest remainders take what rounding left.
    quota[np.argsort(quota - exact, kind="stable")[: BLOCK - quota.sum()]] += 1
    if quota.min() == 0:
        raise ValueError(f"config.data.weights: {weights[int(quota.argmin())][0]!r} gets less than 1 in {BLOCK} pairs")
    return [[domains.index(name)] for name, _ in weights], quota


def make_index(windows: Windows, config: ConfigDict, seed: int, min_window: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """The order of the data: position int64[n] in the endless stream of pairs → record number int64[n].

    Each pool of domains is walked in a keyed permutation per epoch; which pool a position belongs to is a keyed permutation per
    block, so that every block holds each pool's exact share.

    Raises:
      ValueError: no window is long enough, or from `mixture`.
    """
    usable = windows.length >= min_window
    counts = np.bincount(windows.domain[usable], minlength=len(windows.domains))
    if not usable.any():
        raise ValueError(
            f"no window has the {min_window} tokens that two spans need (longest: {windows.length.max(initial=0)}); "
            "lower config.data.min_span or config.data.min_gap"
        )
    if not usable.all():
        logging.info("%d of %d windows are shorter than %d tokens and left out", (~usable).sum(), len(usable), min_window)
    pools, quota = mixture(config.weights, windows.domains, counts)
    members = [np.flatnonzero(usable & np.isin(windows.domain, pool)) for pool in pools]
    sizes = tf.constant([len(pool) for pool in members], tf.int64)
    firsts = tf.constant(np.cumsum([0] + [len(pool) for pool in members[:-1]]), tf.int64)
    records = tf.constant(np.concatenate(members), tf.int64)
    ends = np.cumsum(quota)
    quotas, begins = tf.constant(quota, tf.int64), tf.constant(ends - quota, tf.int64)

    def permute(index: tf.Tensor, key: tf.Tensor, salt: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        keys = tf.stack([tf.fill(tf.shape(index), tf.constant(seed, tf.int64)), key, salt], axis=1)
        # The op behind tf.random.experimental.index_shuffle, which takes no more than two words of key.
        return tf.raw_ops.RandomIndexShuffle(index=index, seed=keys, max_index=last)

    def index(position: tf.Tensor) -> tf.Tensor:
        block, offset = position // BLOCK, position % BLOCK
        last = tf.fill(tf.shape(offset), tf.constant(BLOCK - 1, tf.int64))
        slot = permute(offset, block, tf.fill(tf.shape(offset), tf.constant(-1, tf.int64)), last)
        pool = tf.searchsorted(tf.constant(ends, tf.int64), slot, side="right", out_type=tf.int64)
        rank = block * tf.gather(quotas, pool) + slot - tf.gather(begins, pool)
        size = tf.gather(sizes, pool)
        return tf.gather(records, tf.gather(firsts, pool) + permute(rank % size, rank // size, pool, size - 1))

    return index


def delimiter_ids(manifest: dict) -> np.ndarray:
    """Opening and closing id of each view, int32[2 2]."""
    ids = manifest["reserved"]
    return np.array([[ids["x_open"], ids["x_close"]], [ids["y_open"], ids["y_close"]]], np.int32)


def check_length(config: ConfigDict, span: int, key: str) -> None:
    """Raises ValueError if a row cannot hold a span of this many tokens."""
    needed = span + 2 * config.delimiters
    if needed > config.length:
        raise ValueError(
            f"config.data.length={config.length}: {key}={span} needs {needed} (with delimiters); raise it, or lower {key}"
        )


def sampling(windows: Windows, config: ConfigDict, seed: int) -> tuple[spans.Sampler, Callable[[tf.Tensor], tf.Tensor]]:
    """The sampler and the order of the data, as `batches` takes them.

    Raises:
      ValueError: a value is out of range or the data cannot serve it.
    """
    sampler = spans.make(config)
    check_length(config, sampler.max_span, "config.data.max_span")
    packing.check(config, sampler.min_span + 2 * config.delimiters)
    return sampler, make_index(windows, config, seed, sampler.min_window)


def batches(
    windows: Windows, config: ConfigDict, seed: int, rows: np.ndarray | None = None, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The endless batches from step `start` on.

    Args:
      windows: the split to sample from.
      config: `config.data`.
      seed: of the order and of the spans.
      rows: int64[n], the rows of the global batch to make; None: all.
      start: the first step.

    Returns:
      An iterator over {"tokens": int32[r v l], "segment": int32[r v l], "doc": int32[n], "text": int32[n v]}: each
      pack_pairs pairs have pack_rows of the r rows, where `segment` numbers their spans from 1 and is 0 beside them; `text` is
      a hash of the span without its delimiters.

    Raises:
      ValueError: a value is out of range or the data cannot serve it.
    """
    sampler, index = sampling(windows, config, seed)
    rows = np.arange(config.batch_size) if rows is None else rows
    documents, lengths = tf.constant(windows.document), tf.constant(windows.length)
    delimiters = delimiter_ids(windows.manifest)
    edges = 2 * config.delimiters
    inner = config.length - edges

    def shorten(size: tf.Tensor) -> tf.Tensor:
        """Sizes int32[n v] that fit into the rows of their groups."""
        if config.pack_pairs == config.pack_rows:
            return size
        by_view = tf.transpose(tf.reshape(size + edges, [-1, config.pack_pairs, sampler.views]), [0, 2, 1])
        fitting = packing.shorten(tf.reshape(by_view, [-1, config.pack_pairs]), config.pack_rows, config.length) - edges
        by_view = tf.reshape(fitting, [-1, sampler.views, config.pack_pairs])
        return tf.reshape(tf.transpose(by_view, [0, 2, 1]), [-1, sampler.views])

    @tf.autograph.experimental.do_not_convert  # plain tensor code: converting it costs seconds at each start
    def make_batch(step: tf.Tensor) -> dict[str, tf.Tensor]:
        record = index(step * config.batch_size + rows)
        # Drawn for the whole batch, then cut to this process's rows: the numbers must not depend on who draws them.
        uniform = tf.random.stateless_uniform([config.batch_size, sampler.uniforms], tf.stack([tf.cast(seed, tf.int64), step]))
        begin, size = sampler.cut(tf.gather(lengths, record), tf.gather(uniform, rows))
        tokens, mask = gather_spans(read_tokens(windows, record), begin, shorten(size), inner)
        text = hash_texts(tokens)
        if config.delimiters:
            tokens, mask = delimit(tokens, mask, delimiters)
        tokens, segment = packing.pack(tokens, mask, config.pack_pairs, config.pack_rows)
        shape = [len(rows) // config.pack_pairs * config.pack_rows, sampler.views, config.length]
        return {
            "tokens": tf.ensure_shape(tokens, shape),
            "segment": tf.ensure_shape(segment, shape),
            "doc": tf.gather(documents, record),
            "text": text,
        }

    dataset = tf.data.Dataset.range(start, np.iinfo(np.int64).max).map(
        make_batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    return iter(dataset.prefetch(2).as_numpy_iterator())
