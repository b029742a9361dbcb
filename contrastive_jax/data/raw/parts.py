"""Cuts files into parts, so that many tasks can read one large file; the parts are the same for everyone who asks."""

import contextlib
import itertools
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from contrastive_jax.data.raw.sources import Part, Shard, is_compressed, is_parquet
from contrastive_jax.data.raw.text_stream import DamagedError, Frame, TextStream


def cut(shard: Shard, part_bytes: int) -> list[Part]:
    """Returns the parts of a shard, of about `part_bytes` bytes of text each; depends on the shard and that number alone.

    A file whose text is longer is read once, as fast as it can be decompressed, to find ends and numbers of lines. So is each
    compressed file, which may have a hundred times as much text as bytes; a small plain file is one part and is not read. No
    part is shorter than half of `part_bytes`, unless it is the only one.
    """
    if shard.tfds:
        count = min(shard.size, shard.max_lines or shard.size)
        return [Part(shard, 0, count, 1, 0, True)]
    if is_parquet(shard):
        return _cut_table(shard, part_bytes)
    size = shard.size or epath.Path(shard.name).stat().length
    if size <= part_bytes and not is_compressed(shard) and not shard.is_limited:
        return [Part(shard, 0, size, 1, size, True)]
    return _cut_text(shard, part_bytes)


class _Boundary(NamedTuple):
    """The end of a line in the text, the number of the next line, and the frame it lies in."""

    position: int
    line: int
    frame: Frame


def _boundaries(stream: TextStream, part_bytes: int, max_lines: int, max_bytes: int) -> Iterator[_Boundary]:
    """Yields the first end of a line behind each `part_bytes` bytes of text, and the one at which a limit is reached, the last.

    Raises:
      DamagedError: the file is damaged there.
    """
    line, before = 1, 0
    for chunk in stream.chunks():
        start = 0  # what lies before it in the chunk is counted
        while True:
            target = min(before + part_bytes, max_bytes) - stream.position
            stop = chunk.find(b"\n", max(start, target - 1))
            end = stop + 1 or len(chunk)
            line += chunk.count(b"\n", start, end)
            if line > max_lines:
                for _ in range(line - max_lines):
                    end = chunk.rindex(b"\n", 0, end)
                end += 1
                yield _Boundary(stream.position + end, max_lines + 1, stream.frame)
                return
            start = end
            if stop < 0:
                break
            before = stream.position + end
            yield _Boundary(before, line, stream.frame)
            if before >= max_bytes:
                return


def _cut_text(shard: Shard, part_bytes: int) -> list[Part]:
    """Returns the parts of a file of lines; stops at a damage, which the last part reaches."""
    stream, bounds = TextStream(shard.name), [_Boundary(0, 1, Frame())]
    max_lines, max_bytes = shard.max_lines or sys.maxsize, shard.max_bytes or sys.maxsize
    try:
        for boundary in _boundaries(stream, part_bytes, max_lines, max_bytes):
            bounds.append(boundary)
    except DamagedError:
        pass  # the reader of the last part finds it
    finally:
        stream.close()
    is_whole = bounds[-1].line <= max_lines and bounds[-1].position < max_bytes
    if is_whole:
        bounds.append(_Boundary(stream.position, 0, stream.frame))
    if len(bounds) > 2 and bounds[-1].position - bounds[-2].position < part_bytes // 2:
        del bounds[-2]  # a short rest belongs to the part before it
    frame_window = (stream.window_bytes,)
    return [
        Part(
            shard,
            a.position,
            b.position,
            a.line,
            b.position - a.position,
            is_whole and b is bounds[-1],
            *a.frame,
            *frame_window,
        )
        for a, b in itertools.pairwise(bounds)
    ]


def _cut_table(shard: Shard, part_bytes: int) -> list[Part]:
    """Returns the parts of a Parquet file: several small row groups, one, or some rows of a large one."""
    from contrastive_jax.data.raw import parquet  # takes a second, and most inputs need none

    try:
        with contextlib.closing(parquet.ParquetTable(shard.name, shard.text_field, shard.domain_field, shard.pair)) as table:
            groups = table.groups()
    except parquet.DamagedError:
        groups = []  # the reader says what is wrong
    # (row at the end, bytes) of pieces of at most about `part_bytes`
    pieces, before = list[tuple[int, float]](), 0
    for group in groups:
        count = min(max(1, math.ceil(group.text_bytes / part_bytes)), max(1, group.rows))
        pieces += [(before + group.rows * (i + 1) // count, group.text_bytes / count) for i in range(count)]
        before += group.rows
    max_rows, max_bytes = min(shard.max_lines or before, before), shard.max_bytes or sys.maxsize
    parts, first, row, size, total = list[Part](), 0, 0, 0.0, 0.0
    for end, piece_bytes in pieces:
        share = min(1, (max_bytes - total) / max(piece_bytes, 1))  # of this piece, where a limit ends within it
        row = min(row + math.ceil(share * (end - row)), max_rows)
        size, total = size + piece_bytes, total + piece_bytes
        if size >= 0.75 * part_bytes or row == max_rows or total >= max_bytes:
            parts.append(Part(shard, first, row, first + 1, round(size), row == before))
            first, size = row, 0.0
        if row == max_rows or total >= max_bytes:
            break
    return parts or [Part(shard, 0, 0, 1, 0, True)]
