"""The bytes of one text file: decompressed, in UTF-8, within bounds.

Content decides, not the name: compression, tables (parquet, arrow) and UTF-16 are known by the first bytes. Reading is
streamed: neither an endless line nor a compressed bomb fills the memory.
"""

import codecs
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ksub_ds.common.compression import SUFFIXES, DamagedFileError, compression_of, decompressed, is_bomb
from ksub_ds.common.files import stand_in
from ksub_ds.corpus.text.skipped import Skipped, shown

LONGEST_LINE = 40_000_000  # bytes
PIECE = 1 << 20
HEAD = 1 << 16  # bytes that encodings are known by

TABLES = {"parquet": b"PAR1", "arrow": b"ARROW1", "arrow stream": b"\xff\xff\xff\xff"}
ARCHIVES = {b"PK\x03\x04": "a zip archive: unpack it", b"\x1f\x8b": "compressed twice: decompress it once"}
ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
}
_DECOMPRESS = {"gzip": "gzip -dc", "xz": "xz -dc", "zstd": "zstd -dc", "bzip2": "bzip2 -dc"}
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")


class FileContent:
    """What one file holds.

    Args:
        raw: the file, open, at its start. It stays open.
        path: where it lies, for command lines.
        name: for messages.
        skipped: where damage is counted.

    Attributes:
        name: as a line of the log can show it.
        skipped: the argument.
        compression: how the file is compressed, or None.
        head: the first bytes, decompressed and in UTF-8.
        table: the kind of table the file is, one of TABLES, or None.
        about: what is odd about the whole file, for evidence, or "".
        is_text: whether it may be text, and not an archive or what a failed download left in its place.
        line: number of the line read last.
    """

    def __init__(self, raw: IO[bytes], path: Path, name: str, skipped: Skipped):
        self._raw, self._path, self._suffixes = raw, path, Path(name.lower())
        self.name, self.skipped = shown(name, 200), skipped
        self.compression = compression_of(raw)
        self.line = 0
        self._inflated = 0
        self._stream = decompressed(raw)
        self.head, self.about, self.is_text = b"", "", True
        self.table: str | None = None
        try:
            self._look(self._stream.peek(HEAD))
        except DamagedFileError as damage:
            self._give_up(damage)

    def _look(self, head: bytes) -> None:
        self.table = next((table for table, magic in TABLES.items() if head.startswith(magic)), None)
        other = stand_in(head) or next((words for magic, words in ARCHIVES.items() if head.startswith(magic)), None)
        self.is_text = other is None
        self.about = other or next((words for mark, words in ENCODINGS.items() if head.startswith(mark)), "")
        utf16 = _utf16_of(head[:HEAD])
        if utf16 and head.startswith(codecs.BOM_UTF16_LE if utf16 == "utf-16-le" else codecs.BOM_UTF16_BE):
            self._stream = io.BufferedReader(_FromUtf16(self._stream), PIECE)
            head = self._stream.peek(HEAD)
        elif utf16:
            encoding = "UTF-16LE" if utf16 == "utf-16-le" else "UTF-16BE"
            self.about = f"UTF-16 without a byte-order mark: {self.iconv(encoding)}"
        self.head = head
        suffix = SUFFIXES.get(self._suffixes.suffix)
        if suffix and not (self.compression or self.table or self.about) and _CONTROL.search(head[:HEAD]):
            self._give_up(f"holds no {suffix} data, it starts with the bytes {head[:8].hex(' ')}", suffix)

    def _give_up(self, why: Any, compression: str | None = None) -> None:
        self._stream, self.head = decompressed(io.BytesIO()), b""
        self.damaged(why, compression)

    @property
    def form(self) -> str:
        """The name's last suffix in small letters, those of compression apart: ".jsonl", ".txt"..."""
        path = self._suffixes
        return Path(path.stem).suffix if path.suffix in SUFFIXES else path.suffix

    def add(self, reason: str, found: str = "", place: bool = True) -> None:
        """Count something left out, with the file, the line and what is odd about the file.

        Args:
            reason: a key of the counts.
            found: in words.
            place: whether the line is named.
        """
        where = f"{self.name}, line {self.line}" if place and self.line else self.name
        words = "; ".join(word for word in (found, self.about) if word)
        self.skipped.add(reason, f"{where}: {words}" if words else where)

    def damaged(self, why: Any, compression: str | None = None) -> None:
        """Count the file as damaged.

        Args:
            why: in words.
            compression: that is damaged; None = the file's own.
        """
        self.add(f"damaged_{compression or self.compression}", str(why))

    def iconv(self, encoding: str) -> str:
        """Return the command that makes the file UTF-8.

        Args:
            encoding: that it has now, as iconv calls it.
        """
        path = str(self._path)
        if not path.isprintable():
            return f"convert it with iconv -f {encoding} -t UTF-8"
        source, target = shlex.quote(path), shlex.quote(f"{path}.utf8")
        if self.compression:
            return f"{_DECOMPRESS[self.compression]} {source} | iconv -f {encoding} -t UTF-8 > {target}"
        return f"iconv -f {encoding} -t UTF-8 {source} > {target}"

    def not_utf8(self, raw: bytes) -> None:
        """Count a line or document that is not UTF-8, and say what encoding it may be.

        Args:
            raw: it.
        """
        if self.about:
            self.add("not_utf8")
            return
        at = _first_bad_byte(raw)
        words = f"byte {raw[at]:02X} is not UTF-8"
        near = raw[max(0, at - 20) : at + 20]
        high = sum(byte > 0x7F for byte in raw[:HEAD])
        if self.table:
            words += "; write it anew from its source, with strings in UTF-8"
        elif 4 * high < len(raw[:HEAD]) and (latin := _windows_1252(near)):
            words += f'; as Latin-1 (Windows-1252) it reads "{shown(latin)}"; if so: {self.iconv("WINDOWS-1252")}'
        else:
            words += f"; find its encoding, then: {self.iconv('ENCODING')}"
        self.add("not_utf8", words)

    def lines(self) -> Iterator[bytes]:
        """Yield the lines, each with its end; one that is too long is counted and left out."""
        stream = self._stream
        try:
            while line := stream.readline(LONGEST_LINE):
                self.line += 1
                self._inflated += len(line)
                whole = len(line) < LONGEST_LINE or line.endswith(b"\n")
                while not whole:  # drop the rest of it in pieces
                    piece = stream.readline(PIECE)
                    self._inflated += len(piece)
                    whole = not piece or piece.endswith(b"\n") or self._is_bomb()
                    line = b""
                if line:
                    yield line
                else:
                    self.add("line_too_long", f"has {LONGEST_LINE:,} bytes or more")
                if self._is_bomb():
                    self.add("inflates_too_much", f"to more than {self._inflated:,} bytes")
                    return
        except DamagedFileError as damage:
            self.damaged(damage)

    def pieces(self) -> Iterator[bytes]:
        """Yield all bytes in pieces."""
        try:
            while piece := self._stream.read1(PIECE):  # read() would lose what came before damage
                self._inflated += len(piece)
                yield piece
                if self._is_bomb():
                    self.add("inflates_too_much", f"to more than {self._inflated:,} bytes")
                    return
        except DamagedFileError as damage:
            self.damaged(damage)

    def _is_bomb(self) -> bool:
        return self.compression is not None and is_bomb(self._inflated, self._raw.tell())


class _FromUtf16(io.RawIOBase):
    """UTF-16 with a byte-order mark as UTF-8 without one; half characters become bytes that are not UTF-8."""

    def __init__(self, stream: io.BufferedReader):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")
        self._waiting = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting:
            data = self._stream.read1(io.DEFAULT_BUFFER_SIZE)
            try:
                self._waiting = self._decoder.decode(data, final=not data).encode("utf-8", "surrogatepass")
            except UnicodeDecodeError:  # the file ends in the middle of a character
                self._decoder.reset()
                self._waiting = b"\xff"
                continue
            if not data:
                break
        taken = self._waiting[: len(buffer)]
        buffer[: len(taken)] = taken
        self._waiting = self._waiting[len(taken) :]
        return len(taken)


def _utf16_of(head: bytes) -> str | None:
    """Return "utf-16-le" or "utf-16-be" if that is what a file's first bytes are."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return None
    for mark, name in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if head.startswith(mark):  # no UTF-8 starts so, unless two stray bytes stand before a good text
            return None if _is_text(head[2:]) else name
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if 1 < max(even, odd) > len(head) // 20 and 20 * min(even, odd) < max(even, odd):
        return "utf-16-be" if even > odd else "utf-16-le"
    return None


def _is_text(head: bytes) -> bool:
    """Return whether the first bytes of something are UTF-8 without control characters."""
    if _CONTROL.search(head):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _first_bad_byte(raw: bytes) -> int:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _windows_1252(raw: bytes) -> str:
    try:
        return " ".join(raw.decode("cp1252").split())
    except UnicodeDecodeError:
        return ""
