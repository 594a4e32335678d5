"""Compressed files, recognised by their first bytes: gzip, xz, zstd and bzip2.

    with open(path, "rb") as raw, decompressed(raw) as stream:
        for line in stream: ...

A file's name says how its owner meant to compress it, its content how it is compressed: the content decides.
Decompressing takes bounded memory whatever the file asks for: xz at most XZ_MEMORY, zstd a window of 128 MiB.
"""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import IO, Any, Protocol

import pyarrow

MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one to skip, as pzstd writes first
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)"),  # "BZh" alone may begin a text
}
SUFFIXES = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2"}
XZ_MEMORY = 256 << 20  # bytes; `xz -9` needs 65 MiB, a hostile header asks for 4 GiB
INFLATION_LIMIT = 200  # text compresses 3 to 20 times; beyond this, past the first bytes, it is a bomb
INFLATION_FREE = 64_000_000  # bytes
_LONGEST_MAGIC = 10
_BUFFER = 1 << 17


class DamagedFileError(Exception):
    """Compressed data that ends too soon or cannot be decompressed."""


def is_bomb(inflated: int, compressed: int) -> bool:
    """Return whether data inflates beyond any text.

    Args:
        inflated: its bytes, as far as they are known.
        compressed: bytes that they came from.
    """
    return inflated > max(INFLATION_FREE, INFLATION_LIMIT * compressed)


def compression_of(raw: IO[bytes]) -> str | None:
    """Return how a file is compressed, one of MAGIC, or None; its position stays where it is.

    Args:
        raw: the file, seekable, at its start.
    """
    start = raw.read(_LONGEST_MAGIC)
    raw.seek(-len(start), io.SEEK_CUR)
    return next((name for name, magic in MAGIC.items() if magic.match(start)), None)


def decompressed(raw: IO[bytes]) -> io.BufferedReader:
    """Return the decompressed content of a file, or the content itself where it is not compressed.

    Args:
        raw: the file, seekable, at its start. It stays open.

    Returns:
        A stream; reading raises DamagedFileError where the data is damaged, after all that comes before. `peek` shows
        the first 128 KiB, or all there is.
    """
    compression = compression_of(raw)
    read = raw.read if compression is None else _READ[compression](raw)
    return io.BufferedReader(_Decompressed(read, compression), _BUFFER)


class _Decompressor(Protocol):
    """What lzma and bz2 share."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Streams:
    """Compressed streams one after the other, with nothing but NULs (xz's padding) between and after them."""

    def __init__(self, raw: IO[bytes], make: Callable[[], _Decompressor]):
        self._raw, self._make = raw, make
        self._decompressor = make()
        self._unread = b""

    def read(self, size: int) -> bytes:
        while True:
            if self._decompressor.eof:
                self._unread = self._decompressor.unused_data.lstrip(b"\0")
                while not self._unread:
                    piece = self._raw.read(io.DEFAULT_BUFFER_SIZE)
                    if not piece:
                        return b""
                    self._unread = piece.lstrip(b"\0")
                self._decompressor = self._make()
            if self._decompressor.needs_input and not self._unread:
                self._unread = self._raw.read(io.DEFAULT_BUFFER_SIZE)
                if not self._unread:
                    raise EOFError("it ends too soon")
            data = self._decompressor.decompress(self._unread, size)
            self._unread = b""
            if data:
                return data


_READ: dict[str, Callable[[IO[bytes]], Callable[[int], bytes]]] = {
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb").read1,
    "xz": lambda raw: _Streams(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)).read,
    "zstd": lambda raw: pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd").read,
    "bzip2": lambda raw: _Streams(raw, bz2.BZ2Decompressor).read,
}


class _Decompressed(io.RawIOBase):
    """Any of these as a stream with one kind of error, raised after all data before the damage was read."""

    def __init__(self, read: Callable[[int], bytes], compression: str | None):
        self._read, self._compression = read, compression
        self._damage: DamagedFileError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._compression is None:
            data = self._read(len(buffer))
            buffer[: len(data)] = data
            return len(data)
        filled = 0
        while filled < len(buffer) and self._damage is None:
            # Small pieces: where the data is damaged, the piece that holds the damage is lost as a whole.
            data = self._next(min(io.DEFAULT_BUFFER_SIZE, len(buffer) - filled))
            if not data:
                break
            buffer[filled : filled + len(data)] = data
            filled += len(data)
        if not filled and self._damage is not None:
            raise self._damage
        return filled

    def _next(self, size: int) -> bytes:
        try:
            return self._read(size)
        except (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, not the data's
            self._damage = DamagedFileError(f"damaged {self._compression} data ({_reason(error)})")
            self._damage.__cause__ = error
            return b""


def _reason(error: Exception) -> str:
    message = " ".join(str(error).split())
    if "Memory usage limit" in message:
        return f"needs more than {XZ_MEMORY >> 20} MiB to decompress: `xz -d` it yourself"
    if "too much memory" in message:
        return "needs a window of more than 128 MiB: `zstd -d --long=31` it yourself"
    return message
