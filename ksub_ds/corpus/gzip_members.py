"""Gzip members of a file, inflated as far as asked for, within bounds.

A file of many members can be damaged in one of them: `Compressed.find_member` finds the next that holds
what is looked for. Everything inflated or looked at is paid from the file's budget, so that no file,
whatever it holds, takes more than its share of time.
"""

import os
import zlib
from typing import BinaryIO

MAGIC = b"\x1f\x8b\x08"
_PIECE = 1 << 15  # compressed bytes handed to zlib at a time
_WINDOW = 1 << 20  # compressed bytes read from the disk at a time
_OUTPUT = 1 << 18  # inflated bytes taken from zlib at a time
_LOOK = 1 << 10  # what one look at a possible member costs of the budget


class Damaged(Exception):
    """The member cannot be inflated to its end."""


class TooMuch(Exception):
    """The file's budget is spent."""


class Compressed:
    """The file as it lies on the disk, by offset; counts what is spent on inflating it."""

    def __init__(self, stream: BinaryIO, budget: int):
        self._descriptor = stream.fileno()
        self._start, self._window = 0, b""
        self._budget = budget

    def at(self, offset: int) -> memoryview:
        """_PIECE bytes from `offset` on, fewer at the end of the file."""
        place = offset - self._start
        if not 0 <= place <= len(self._window) - _PIECE:
            self._start, self._window, place = offset, os.pread(self._descriptor, _WINDOW, offset), 0
        return memoryview(self._window)[place : place + _PIECE]

    def spend(self, count: int) -> None:
        self._budget -= count
        if self._budget < 0:
            raise TooMuch

    def find_member(self, offset: int, start: bytes) -> int:
        """Where the next gzip member whose content begins with `start` lies, from `offset` on; else the file's end."""
        while len(piece := bytes(self.at(offset))) >= len(MAGIC):
            place = piece.find(MAGIC)
            if place < 0:
                offset += len(piece) - len(MAGIC) + 1
                continue
            offset += place
            try:
                self.spend(_LOOK)
                if zlib.decompressobj(31).decompress(self.at(offset), len(start)) == start:
                    return offset
            except zlib.error:
                pass  # the magic bytes alone: no member begins here
            offset += 1
        return offset + len(piece)


class Member:
    """One gzip member, or a whole plain file, inflated as far as asked for.

    Attributes:
        data: inflated bytes not dropped yet.
        dropped: inflated bytes dropped before them.
        position: offset in the file of the first byte not taken yet.
        ended: whether it is inflated to its end, checksum and length verified.
    """

    def __init__(self, source: Compressed, offset: int, plain: bool):
        self.offset = self.position = offset
        self.data, self.dropped, self.ended = bytearray(), 0, False
        self.plain = plain
        self._source = source
        self._inflate = zlib.decompressobj(31)

    def pull(self) -> None:
        """Inflate a little more."""
        piece = self._source.at(self.position)
        if self.plain:
            output, used = bytes(piece), len(piece)
            self.ended = not used
        else:
            try:
                output = self._inflate.decompress(piece, _OUTPUT)
            except zlib.error as error:
                raise Damaged(f"damaged gzip member ({error})") from None
            self.ended = self._inflate.eof
            used = len(piece) - len(self._inflate.unused_data if self.ended else self._inflate.unconsumed_tail)
            if not piece and not output and not self.ended:
                raise Damaged("gzip member is cut off by the end of the file")
        self._source.spend(max(used, len(output)))
        self.position += used
        self.data += output

    def fill(self, size: int) -> bool:
        """Have `size` bytes in `data`; False when the member ends before."""
        while len(self.data) < size and not self.ended:
            self.pull()
        return len(self.data) >= size

    def drop(self, count: int) -> None:
        del self.data[:count]
        self.dropped += count
