"""Reads the records of each step ahead of time, in whole chunks, from many file shards at once.

The chunks of a window are read together, since any of its records may come first. While the pairs of a window are made, the
next window's chunks are read at the pace at which its records are used: a step never waits at the end of a window. In memory
are at most READ_AHEAD windows of records, of which a process holds those of its own pairs alone. A record of 1,024 tokens takes
2.2 KB, and so each record of a window 2.8: the default `config.data.shuffle_records` takes 370 MB in a run of one process, and
in others a share of that.

Dimensions: n pairs of this process.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from contrastive_jax.config import UserError
from contrastive_jax.data import token_type
from contrastive_jax.data.order import Order, Window
from contrastive_jax.data.prepared import THREADS, Chunk, RecordBatch, Records

# The records in memory, in windows.
READ_AHEAD = 1.25


class Loading:
    """A window whose chunks are read, or will be.

    Attributes:
      window: the window.
      records: the records of this process's pairs in it.
      tokens: the bytes of the tokens of each record of the window: None before it is read, and again when it has been used.
      document: int32[m], the document of each.
      numbers: object[m], the bytes of the numbers of each pair.
    """

    def __init__(self, window: Window, mine: np.ndarray, first: int):
        """Plans the reading.

        Args:
          window: the window.
          mine: bool[b], the pairs of the global batch that this process makes.
          first: the rank before which pairs are not made any more.
        """
        wanted = mine[window.place]
        wanted[: max(0, first - window.first)] = False
        self.window, self.records = window, int(wanted.sum())
        self._wanted = np.zeros(len(window.record), bool)
        self._wanted[window.record[wanted]] = True
        self._counts = np.add.reduceat(self._wanted, window.offsets[:-1], dtype=np.int64)
        self._next = iter(np.flatnonzero(self._counts).tolist())
        self.tokens: list[bytes | None] = [None] * len(window.record)
        self.document = np.zeros(len(window.record), np.int32)
        self.numbers = np.full(len(window.record), b"", object)
        self._reading: dict[int, concurrent.futures.Future[None]] = {}  # of the chunks that are read, or will be

    def start_next(self, reader: "Reader") -> int:
        """Starts to read one more chunk; returns how many of its records are this process's, 0 at the end."""
        index = next(self._next, None)
        if index is None:
            return 0
        begin, end = self.window.offsets[index : index + 2].tolist()
        self._reading[index] = reader.submit(self._read, reader, int(self.window.chunks[index]), begin, end)
        return int(self._counts[index])

    def _read(self, reader: "Reader", chunk: int, begin: int, end: int) -> None:
        """Reads a chunk, whose records are those from `begin` to before `end` of the window."""
        tokens, self.document[begin:end], self.numbers[begin:end] = reader.read_chunk(chunk, end - begin)
        wanted = self._wanted[begin:end].tolist()
        self.tokens[begin:end] = [record if keep else None for record, keep in zip(tokens, wanted, strict=True)]

    def take(self, ranks: np.ndarray) -> tuple[list[bytes], np.ndarray, np.ndarray]:
        """Returns the tokens of the records of ranks int64[n], int32[n], their documents, and numbers; forgets the tokens."""
        chunks, _ = self.window.locate(ranks)
        for index in np.unique(chunks).tolist():
            self._reading[index].result()
        record = self.window.record[ranks - self.window.first]
        numbers = record.tolist()
        tokens = [self.tokens[number] for number in numbers]
        for number in numbers:
            self.tokens[number] = None
        return cast(list[bytes], tokens), self.document[record], self.numbers[record]


class Reader:
    """Reads the records of this process's pairs, step after step.

    Args:
      records: the split.
      order: its order.
      min_record: records with fewer tokens are passed over.
      pairs: int64[n], which pairs of the global batch this process makes, ascending.
      batch_size: b, the pairs of the global batch.
    """

    def __init__(self, records: Records, order: Order, min_record: int, pairs: np.ndarray, batch_size: int):
        self._records, self._order, self._pairs = records, order, pairs
        self._min_bytes = min_record * token_type(records.manifest["vocab_size"]).itemsize
        self._mine = np.zeros(batch_size, bool)
        self._mine[pairs] = True
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS[records.remote])
        self._loading: dict[int, list[Loading]] = {}  # of each pool, the window in use and the next one
        self._held: dict[int, int] = {}  # of each pool, the records that are in memory or on their way

    def read(self, step: int) -> RecordBatch:
        """Returns the records of this process's pairs in a step; to be called for one step after the other."""
        tokens, document, numbers = (np.empty(len(self._pairs), dtype) for dtype in (object, np.int32, object))
        for pool, window, which, ranks in self._order.runs(step, self._pairs):
            tokens[which], document[which], numbers[which] = self._current(pool, window, int(ranks[0])).take(ranks)
            self._held[pool] -= len(ranks)
            self._read_ahead(pool)
        return self._records.join(tokens.tolist(), document, numbers.tolist())

    def _current(self, pool: int, window: Window, rank: int) -> Loading:
        """Returns the window in use of a pool, all of whose chunks are read or on their way; drops the windows before it."""
        queue = self._loading.setdefault(pool, [])
        while queue and queue[0].window.first != window.first:
            queue.pop(0)
        if not queue:
            queue.append(Loading(window, self._mine, rank))
        while started := queue[0].start_next(self):
            self._held[pool] = self._held.get(pool, 0) + started
        return queue[0]

    def _read_ahead(self, pool: int) -> None:
        """Starts to read chunks of the window after the one in use, as far as memory allows."""
        queue = self._loading[pool]
        if len(queue) == 1:
            end = queue[0].window.first + len(queue[0].window.record)
            queue.append(Loading(self._order.window(pool, end), self._mine, end))
        limit = READ_AHEAD * max(loading.records for loading in queue)
        while self._held[pool] < limit and (started := queue[1].start_next(self)):
            self._held[pool] += started

    def submit(self, function: Callable[..., None], *arguments: Any) -> concurrent.futures.Future[None]:
        """Calls a function in a thread of the reader."""
        return self._threads.submit(function, *arguments)

    def read_chunk(self, chunk: int, count: int) -> Chunk:
        """Returns the `count` records of a chunk that can be sampled.

        Raises:
          UserError: there are more or fewer.
        """
        whole = self._records.read_chunk(chunk)
        usable = [i for i, record in enumerate(whole.tokens) if len(record) >= self._min_bytes]
        if len(usable) != count:
            raise UserError(
                f"{self._records.path_of(chunk)}: chunk {chunk} has {len(usable)} records of enough tokens, but the index "
                f"lists {count}; prepare the data again"
            )
        return Chunk._make([column[i] for i in usable] for column in whole)

    def close(self) -> None:
        """Stops reading ahead."""
        self._threads.shutdown(wait=False, cancel_futures=True)
