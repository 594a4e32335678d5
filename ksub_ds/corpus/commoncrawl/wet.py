"""Reading Common Crawl's WET files, damaged ones included.

A WET file is a sequence of gzip members with one WARC record in each; a record is a header, a blank line and the text
of one page. Common readers accept a truncated file as if it were whole, lose everything after a flipped bit, and
inflate without a limit. This one

    checks      every member's checksum before its record is returned, and every record's Content-Length;
    bounds      the inflated size of a header, a record and a file, and never holds more than one record;
    continues   after damage with the next gzip member that starts a record, and after a bad record with the next
                record of the same member (files of one single member are read too).

Files of other compressions (xz, zstd, bzip2) are read as one member, up to the first damage: unlike gzip's, their parts
cannot be found again. The first bytes of a file say how it is compressed, whatever its name is.

What cannot be read is returned as a `Fault`: where, and why.

Two layers: `Compressed` (or `Inflated`) and `Member` inflate gzip members as far as asked for, and everything inflated
or searched counts against the file's budget, so that no file takes more than its share of time; `_Records` parses WARC
records.
"""

import hashlib
import os
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ksub_ds.common.compression import DamagedFileError, compression_of, decompressed

MAGIC = b"\x1f\x8b\x08"
_PIECE = 1 << 15  # compressed bytes handed to zlib at a time
_WINDOW = 1 << 20  # compressed bytes read from the disk at a time
_OUTPUT = 1 << 18  # inflated bytes taken from zlib at a time
_LOOK = 1 << 10  # bytes of the budget that examining a possible member costs


class Damaged(Exception):
    """The member cannot be inflated to its end."""


class TooMuch(Exception):
    """The file's budget is used up."""


class Compressed:
    """The compressed file, read by offset; counts what is inflated of it.

    Args:
        stream: the open file.
        budget: bytes that may be inflated.
    """

    def __init__(self, stream: BinaryIO, budget: int):
        self._descriptor = stream.fileno()
        self._start, self._window = 0, b""
        self._budget = budget

    def at(self, offset: int) -> memoryview:
        """Return _PIECE bytes from `offset` on, fewer at the end of the file."""
        begin = offset - self._start
        if not 0 <= begin <= len(self._window) - _PIECE:
            self._start, self._window, begin = offset, os.pread(self._descriptor, _WINDOW, offset), 0
        return memoryview(self._window)[begin : begin + _PIECE]

    def spend(self, count: int) -> None:
        """Take bytes from the budget.

        Raises:
            TooMuch: it is used up.
        """
        self._budget -= count
        if self._budget < 0:
            raise TooMuch

    def find_member(self, offset: int, start: bytes) -> int:
        """Return the offset of the next gzip member, from `offset` on, whose content begins with `start`.

        Without one, the size of the file is returned.
        """
        while len(piece := bytes(self.at(offset))) >= len(MAGIC):
            found = piece.find(MAGIC)
            if found < 0:
                offset += len(piece) - len(MAGIC) + 1
                continue
            offset += found
            try:
                self.spend(_LOOK)
                if zlib.decompressobj(31).decompress(self.at(offset), len(start)) == start:
                    return offset
            except zlib.error:
                pass  # the magic bytes alone: no member begins here
            offset += 1
        return offset + len(piece)


class Inflated(Compressed):
    """The content of a file of another compression than gzip, in one piece after the other.

    Args:
        stream: the open file.
        budget: bytes that may be inflated.
    """

    def __init__(self, stream: BinaryIO, budget: int):
        super().__init__(stream, budget)
        self._content, self._damaged = decompressed(stream), False

    def at(self, offset: int) -> memoryview:
        """Return up to _PIECE bytes of the content from `offset` on: where the last piece began, or ended.

        Raises:
            Damaged: the content cannot be inflated that far; after that it is at its end.
        """
        if self._damaged:
            return memoryview(b"")
        if offset != self._start or not self._window:
            assert offset == self._start + len(self._window), "the content is read once, from its start to its end"
            try:
                self._start, self._window = offset, self._content.read1(_PIECE)
            except (DamagedFileError, MemoryError) as error:
                self._damaged = True
                raise Damaged(str(error) or "needs too much memory") from None
        return memoryview(self._window)

    def find_member(self, offset: int, start: bytes) -> int:
        """Return where the file is left: it has no members to be found."""
        return self._start + len(self._window)


class Member:
    """A gzip member, or a whole file that is uncompressed or of another compression, inflated as far as asked for.

    Attributes:
        data: inflated bytes that are not dropped yet.
        dropped: number of inflated bytes dropped before them.
        position: offset in the file of the first byte not inflated yet.
        ended: whether it is inflated to its end, with checksum and length verified.
    """

    def __init__(self, source: Compressed, offset: int, plain: bool):
        self.offset = self.position = offset
        self.data, self.dropped, self.ended = bytearray(), 0, False
        self.plain = plain
        self._source = source
        self._inflate = zlib.decompressobj(31)

    def pull(self) -> None:
        """Inflate a little more.

        Raises:
            Damaged: the member cannot be inflated further.
        """
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
        """Inflate until `data` has `size` bytes; return False when the member ends before."""
        while len(self.data) < size and not self.ended:
            self.pull()
        return len(self.data) >= size

    def drop(self, count: int) -> None:
        """Remove bytes from the front of `data`."""
        del self.data[:count]
        self.dropped += count


_RECORD = b"WARC/1."
_LENGTH = re.compile(rb"[0-9]{1,18}")
_NEXT_RECORD = re.compile(rb"(?:\r?\n){0,2}(?:WARC/1\.|\Z)")  # two line ends are due, some writers leave them out
_FOLD = re.compile(rb"\r?\n[ \t]+")  # a header line that continues the one before
RECORD_TYPES = ("warcinfo", "response", "resource", "request", "metadata", "revisit", "conversion", "continuation")


@dataclass(frozen=True)
class Limits:
    """Limits of a file; all but `header_lines`, `records` and `faults` are in bytes.

    Attributes:
        record: text of a page. Common Crawl cuts pages at 1 MiB (5 MiB since 2024) of HTML, most of which is not
            text; tokenising a page of one endless word takes 60 times its size in memory.
        header: header of a record.
        header_lines: lines of a header.
        skip: how far to inflate in search of the next record of a member.
        file: inflated size of a file; real ones inflate to less than 1 GiB.
        records: records of a file; real ones hold 40,000.
        faults: faults of a file; after so many the rest of it is skipped.
    """

    record: int = 4 << 20
    header: int = 64 << 10
    header_lines: int = 200
    skip: int = 2 << 30
    file: int = 8 << 30
    records: int = 2_000_000
    faults: int = 100_000


class Page(NamedTuple):
    """One page. `text` has no NUL, no byte-order mark in front, and newlines as line ends."""

    offset: int
    url: str
    date: str
    digest: str
    text: str


class Fault(NamedTuple):
    """Something that could not be read.

    Attributes:
        offset: first byte of its gzip member in the file.
        reason: what is wrong.
        inflated: its offset in the inflated member.
        url: of the page, if it was readable.
        is_whole: whether the record is whole and only its page is refused; else a part of the file is not read.
    """

    offset: int
    reason: str
    inflated: int = 0
    url: str = ""
    is_whole: bool = False


class Other(NamedTuple):
    """A record that is not a page, such as the warcinfo at the head of a file.

    Attributes:
        offset: as a page's.
        kind: its WARC-Type, one of RECORD_TYPES or "other".
    """

    offset: int
    kind: str


def read_wet(path: Path, limits: Limits | None = None) -> Iterator[Page | Fault | Other]:
    """Yield everything in one WET file, in order.

    Args:
        path: a file in gzip, xz, zstd or bzip2, or a plain one that starts with "WARC/".
        limits: None = the defaults; tests take smaller ones.
    """
    limits = limits or Limits()
    try:
        with open(path, "rb") as stream:
            other = compression_of(stream) not in (None, "gzip")
            source = Inflated(stream, limits.file) if other else Compressed(stream, limits.file)
            yield from _capped(_read_file(source, other, limits), limits)
    except OSError as error:
        yield Fault(0, f"cannot be read: {error.strerror}")


def _capped(found: Iterator[Page | Fault | Other], limits: Limits) -> Iterator[Page | Fault | Other]:
    faults = 0
    for records, item in enumerate(found, start=1):
        yield item
        faults += isinstance(item, Fault)
        if faults >= limits.faults or records >= limits.records:
            what = f"{faults:,} faults" if faults >= limits.faults else f"{records:,} records"
            yield Fault(item.offset, f"the rest of the file is left: {what} so far")
            return


def _read_file(source: Compressed, inflated: bool, limits: Limits) -> Iterator[Page | Fault | Other]:
    seen: set[bytes] = set()
    offset = 0
    try:
        head = bytes(source.at(0)[: len(BOM_UTF8) + len(_RECORD)])
        if not head:
            yield Fault(0, "the file is empty")
            return
        plain = inflated or head.removeprefix(BOM_UTF8).startswith(b"WARC/")
        while source.at(offset):
            if not plain and source.at(offset)[: len(MAGIC)] != MAGIC:
                yield Fault(offset, "no gzip member starts here" if offset else "is neither gzip nor WARC")
                offset = source.find_member(offset + 1, _RECORD)
                continue
            member = Member(source, offset, plain)
            try:
                yield from _Records(member, limits, seen)
                offset = member.position
            except Damaged as error:
                yield Fault(offset, str(error))
                offset = source.find_member(offset + 1, _RECORD)
    except Damaged as error:  # of a file without members: at its first byte
        yield Fault(offset, str(error))
    except TooMuch:
        yield Fault(offset, f"the rest of the file is left: it inflates to more than {limits.file:,} bytes")


class _Records:
    """Iterates over the records of a member."""

    def __init__(self, member: Member, limits: Limits, seen: set[bytes]):
        self._member, self._limits, self._seen = member, limits, seen

    def __iter__(self) -> Iterator[Page | Fault | Other]:
        member = self._member
        if member.fill(len(BOM_UTF8)) and member.data.startswith(BOM_UTF8):
            member.drop(len(BOM_UTF8))
        while self._skip_line_ends():
            item = self._record()
            if isinstance(item, str):  # the record is malformed: its end is unknown
                yield self._fault(item)
                if not self._find_record():
                    # No record within the limit: skip the rest of the member, not of the file.
                    raise Damaged(f"no further record within {self._limits.skip:,} bytes of this member")
            else:
                yield item
        assert member.ended, "the loop stops only at the end of a member"

    def _skip_line_ends(self) -> bool:
        """Go to the next record; return False at the end of the member."""
        while self._member.fill(1):
            data = self._member.data
            count = len(data) - len(data.lstrip(b"\r\n"))
            if not count:
                return True
            self._member.drop(count)
        return False

    def _fault(self, reason: str) -> Fault:
        offset, inflated = self._member.offset, self._member.dropped
        return Fault(inflated, reason) if self._member.plain else Fault(offset, reason, inflated)

    def _refused(self, reason: str, url: str) -> Fault:
        return self._fault(reason)._replace(url=url, is_whole=True)

    def _find_record(self) -> bool:
        """Drop everything up to the next line that starts a record, or to the end of the member.

        Returns:
            False when neither is within the limit.
        """
        mark = b"\n" + _RECORD
        begin, skipped = 1, 0
        while True:
            found = self._member.data.find(mark, begin)
            if found >= 0:
                self._member.drop(found + 1)
                return True
            if self._member.ended:
                self._member.drop(len(self._member.data))
                return True
            if skipped > self._limits.skip:
                return False
            rest = max(len(self._member.data) - len(mark), 0)
            self._member.drop(rest)
            skipped += rest
            begin = 0
            self._member.pull()

    def _record(self) -> Page | Fault | Other | str:
        """Take the record at the front and return it; if it is malformed, leave it there and return the reason."""
        member, limits = self._member, self._limits
        member.fill(len(_RECORD))
        if not member.data.startswith(_RECORD):
            return "no WARC record starts here"
        found = self._header()
        if isinstance(found, str):
            return found
        fields, begin = found
        text_length = fields.get(b"content-length", b"")
        if not _LENGTH.fullmatch(text_length):
            return "has no Content-Length" if not text_length else "Content-Length is not a number"
        length = int(text_length)
        if length > limits.record:
            return f"Content-Length is {length:,}, more than the {limits.record:,} bytes a record may have"
        end = begin + length
        if not member.fill(end):
            return f"Content-Length is {length:,}, but only {len(member.data) - begin:,} bytes follow"
        # Pull as far as the member's checksum, when this is its only record.
        member.fill(end + 5)
        content = bytes(member.data[begin:end])
        if not b"\r\n\r\n".startswith(member.data[end : end + 4]) and member.data[end : end + 2] != b"\n\n":
            member.fill(end + 4 + len(_RECORD))
            if not _NEXT_RECORD.match(member.data[end : end + 4 + len(_RECORD)]):
                return f"Content-Length is {length:,}, but the record goes on after that"
        item = self._page(fields, content)
        member.drop(end)  # not the line ends: there may be two, four or no bytes of them
        return item

    def _header(self) -> tuple[dict[bytes, bytes], int] | str:
        """Return the fields by lower-case name and the header's length, or what is wrong with it."""
        member, limits = self._member, self._limits
        size = 1 << 11
        while True:
            whole = not member.fill(size)
            end, mark = member.data.find(b"\r\n\r\n", 0, limits.header), 4
            # A header with LF ends before a blank line with CRLF in its text.
            bare = member.data.find(b"\n\n", 0, end if end >= 0 else limits.header)
            if bare >= 0:
                end, mark = bare, 2
            if end >= 0:
                break
            if whole:
                return "header without an end"
            if len(member.data) >= limits.header:
                return f"header of more than {limits.header:,} bytes"
            size = min(4 * size, limits.header)
        head = bytes(member.data[:end])
        count = head.count(b"\n") + 1
        if count > limits.header_lines:
            return f"header of {count:,} lines"
        fields: dict[bytes, bytes] = {}
        for line in _FOLD.sub(b" ", head).split(b"\n")[1:]:
            name, colon, value = line.partition(b":")
            name, value = name.strip().lower(), value.strip()
            if not colon:
                return "header line without a colon"
            if fields.setdefault(name, value) != value and name == b"content-length":
                return "two different Content-Length"
        return fields, end + mark

    def _page(self, fields: dict[bytes, bytes], content: bytes) -> Page | Fault | Other:
        url = fields.get(b"warc-target-uri", b"").strip(b"<>").decode("utf-8", "replace")
        kind = fields.get(b"warc-type", b"")
        if not kind:
            return self._refused("has no WARC-Type", url)
        if b"warc-record-id" in fields:
            identity = hashlib.blake2b(fields[b"warc-record-id"], digest_size=8).digest()
            if identity in self._seen:
                return self._refused("duplicate WARC-Record-ID", url)
            self._seen.add(identity)
        offset = self._member.dropped if self._member.plain else self._member.offset
        name = kind.lower().decode("latin-1")
        if name != "conversion":
            return Other(offset, name if name in RECORD_TYPES else "other")
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            bad = content[error.start : error.start + 2]
            what = " (half a surrogate pair)" if bad[:1] == b"\xed" and bad[1:] >= b"\xa0" else ""
            return self._refused(f"not UTF-8 at byte {error.start:,} of the text{what}", url)
        if "\0" in text:
            return self._refused("NUL character in the text", url)
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").strip("\n")
        date, digest = (
            fields.get(name, b"").decode("utf-8", "replace") for name in (b"warc-date", b"warc-block-digest")
        )
        return Page(offset, url, date, digest, text)
