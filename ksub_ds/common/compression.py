"""Compressed files, recognised by their first bytes: gzip, xz, zstd and bzip2.

    with open(path, "rb") as raw, decompressed(raw) as stream:
        for line in stream: ...

A file's name says how its owner meant to compress it, its content how it is compressed: the content decides.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

import pyarrow

MAGIC = {"gzip": b"\x1f\x8b", "xz": b"\xfd7zXZ\x00", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh"}
SUFFIXES = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2"}


class DamagedFileError(Exception):
    """Compressed data that ends too soon or cannot be decompressed."""


def compression_of(raw: IO[bytes]) -> str | None:
    """Return how a file is compressed, one of MAGIC, or None; its position stays where it is.

    Args:
        raw: the file, seekable, at its start.
    """
    start = raw.read(max(map(len, MAGIC.values())))
    raw.seek(-len(start), io.SEEK_CUR)
    return next((name for name, magic in MAGIC.items() if start.startswith(magic)), None)


def decompressed(raw: IO[bytes]) -> io.BufferedReader:
    """Return the decompressed content of a file, or the content itself where it is not compressed.

    Args:
        raw: the file, seekable, at its start. It stays open.

    Returns:
        A stream; reading raises DamagedFileError where the data is damaged.
    """
    compression = compression_of(raw)
    return io.BufferedReader(_Decompressed(raw if compression is None else _OPEN[compression](raw), compression))


_OPEN: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    "xz": lambda raw: lzma.LZMAFile(raw),  # noqa: SIM115 - the caller closes the file
    "zstd": lambda raw: pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"),
    "bzip2": lambda raw: bz2.BZ2File(raw),
}


class _Decompressed(io.RawIOBase):
    """A decompressor's stream with one kind of error."""

    def __init__(self, stream: Any, compression: str | None):
        self._stream, self._compression = stream, compression

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._compression is None:
            data = self._stream.read(len(buffer))
        else:
            try:
                data = self._stream.read(len(buffer))
            except (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
                raise DamagedFileError(f"damaged {self._compression} data ({error})") from error
        buffer[: len(data)] = data
        return len(data)
