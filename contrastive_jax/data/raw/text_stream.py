"""The text of a file as a stream of bytes: plain, gzip, Zstandard, bzip2 or xz, and its lines.

Offsets count bytes of the decompressed text. A `Frame` is a place in a compressed file at which decompression can begin: the
members of a .gz, the frames of a .zst and the streams of a .bz2 or .xz that were written one after another.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import zstandard

from contrastive_jax.files import listing

MAX_LINE_BYTES = 256 << 20  # a longer line is rejected
LONG_LINE_BYTES = 16 << 20  # a longer line takes much memory: see `TextStream.lines`
# Frames that zstd --long=31 writes need a window of 2 GiB in memory while they are read; others a few MB.
MAX_WINDOW_BYTES = 1 << 31
# Compressed bytes that are decoded at once. Zeros expand 50,000-fold, so this bounds the memory that a hostile file can take
# (to about 100 MB). A damaged file loses only the good lines that end in the same kilobyte as the damage.
FEED_BYTES = 1024
PADDED = (".gz", ".xz")  # formats in which zeros may follow a member: backups and tapes fill blocks with them
_READ_BYTES = 1 << 20  # bytes that are taken from storage at once

DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj(),
    ".gz": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_WINDOW_BYTES),
}


class DamagedError(Exception):
    """A compressed file is truncated or corrupt; all text before the damage was read."""


class Frame(NamedTuple):
    """A place at which decompression can begin: its offset in the file, and in the text."""

    file: int = 0
    text: int = 0


START = Frame()


class TextStream:
    """The text of a file from a frame on.

    Attributes:
      position: the offset in the text of the next line, or of the chunk that `chunks` has just yielded.
      file_position: the offset in the file up to which it was decoded.
      frame: the frame in which the chunk lies that was decoded last.
      window_bytes: the memory that the decompressor takes for that frame.
    """

    def __init__(self, name: str, frame: Frame = START):
        """Opens a file, local, on a bucket or on hf://, at a frame; its suffix says how it is compressed."""
        self.position, self.file_position, self.frame, self.window_bytes = frame.text, frame.file, frame, 0
        suffix = "." + name.rpartition(".")[2]
        self._decompressor, self._is_padded = DECOMPRESSORS.get(suffix), suffix in PADDED
        self._name, self._file = name, listing.open_binary(name)
        self._file.seek(frame.file)
        self._chunks = self._decoded() if self._decompressor else self._pieces(_READ_BYTES)
        self._chunk, self._offset = b"", 0  # the text from `_offset` on in `_chunk` is not yet given out

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _pieces(self, size: int) -> Iterator[bytes]:
        """Yields the bytes of the file up to each multiple of `size`: the same pieces, wherever the stream began."""
        while True:
            with listing.hub_errors(self._name):
                block = self._file.read(_READ_BYTES)
            if not block:
                return
            start = 0
            while start < len(block):
                piece = block[start : start + size - self.file_position % size]
                start += len(piece)
                self.file_position += len(piece)
                yield piece

    def _decoded(self) -> Iterator[bytes]:
        """Yields the text of the frames; the libraries' own readers would not notice that a .zst file is truncated."""
        frame, text, is_first = None, self.position, True
        for piece in self._pieces(FEED_BYTES):
            rest = piece
            while rest:
                if frame is None:
                    if self._is_padded and not is_first and not (rest := rest.lstrip(b"\0")):
                        break
                    is_first = False
                    frame, self.frame = self._decompressor(), Frame(self.file_position - len(rest), text)  # type: ignore[misc]
                    self.window_bytes = max(self.window_bytes, window_of(rest))
                try:
                    chunk = frame.decompress(rest)
                except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError) as error:  # bz2 raises an OSError
                    raise DamagedError(str(error)) from error
                text += len(chunk)
                if chunk:
                    yield chunk
                rest = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise DamagedError("truncated")

    def chunks(self) -> Iterator[bytes]:
        """Yields the rest of the text in pieces of any length.

        Raises:
          DamagedError: the file is damaged there.
        """
        for chunk in self._chunks:
            yield chunk
            self.position += len(chunk)

    def skip(self, position: int) -> None:
        """Goes forward to a position in the text.

        Raises:
          DamagedError: the file is damaged, or ends, before it.
        """
        while self.position + len(self._chunk) - self._offset < position:
            self.position += len(self._chunk) - self._offset
            self._chunk, self._offset = next(self._chunks, b""), 0
            if not self._chunk:
                raise DamagedError("truncated")
        self._offset += position - self.position
        self.position = position

    def lines(self, end: int, long_line: Callable[[], None] = lambda: None) -> Iterator[bytes | None]:
        """Yields the lines from `position` on that begin before `end`; None in the place of a line over MAX_LINE_BYTES.

        Args:
          end: an offset in the text.
          long_line: called, once or more, before the part of a line after LONG_LINE_BYTES is read.

        Raises:
          DamagedError: the file is damaged there.
        """
        while self.position < end:
            pieces, size, stop = list[bytes](), 0, -1
            while stop < 0:
                stop = self._chunk.find(b"\n", self._offset)
                piece = self._chunk[self._offset : stop if stop >= 0 else len(self._chunk)]
                size += len(piece)
                if size > LONG_LINE_BYTES:
                    long_line()
                pieces = [*pieces, piece] if size <= MAX_LINE_BYTES else []
                self._offset = stop + 1
                if stop < 0:
                    self._chunk, self._offset = next(self._chunks, b""), 0
                    if not self._chunk:
                        break
            self.position += size + (stop >= 0)
            if size or stop >= 0:
                pieces = [b"".join(pieces)] if size <= MAX_LINE_BYTES else []
                yield pieces.pop() if pieces else None  # of a long line, nothing is held here while it is worked on
            if stop < 0:
                return


def window_of(head: bytes) -> int:
    """Returns the window of the Zstandard frame that begins with these bytes; 0: of another format, or unknown."""
    try:
        return zstandard.get_frame_parameters(head).window_size
    except zstandard.ZstdError:
        return 0
