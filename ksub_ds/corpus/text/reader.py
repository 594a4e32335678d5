"""Reading documents from files, damaged ones included.

    .jsonl .json    one JSON object a line: {"text": ...}, or CCNet's {"raw_content": ...}
    .txt            documents separated by blank lines
    .parquet        a column "text" or "raw_content"

What cannot be read is skipped and counted by reason; a bad file never ends a run. Reading is streamed and bounded:
neither an endless line nor a gzip bomb fills the memory.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from ksub_ds.corpus.text.hub import TEXT_COLUMNS, DatasetSource
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.text.sources import PARQUET, TextFile

PARQUET_ROWS = 16  # read at a time: a column may repeat one long text without taking space on the disk
LONGEST_DOCUMENT = 10_000_000  # characters
LONGEST_LINE = 4 * LONGEST_DOCUMENT  # bytes
INFLATION_LIMIT = 200  # text compresses 3 to 20 times; beyond this, past the first bytes, it is a bomb
INFLATION_FREE = 64_000_000  # bytes


class DocumentReader:
    """Iterates over the documents of some sources, in order.

    Attributes:
        skipped: number of files and documents skipped so far, by reason: the caller's object.
        bytes_read: bytes read from the disk so far.
    """

    def __init__(self, sources: Sequence[TextFile | DatasetSource], skipped: Skipped):
        self._sources, self.skipped = sources, skipped
        self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        for source in self._sources:
            before, silent, skipped = self.bytes_read, True, self.skipped.total()
            texts = self._dataset(source) if isinstance(source, DatasetSource) else self._file(source)
            for text in self._usable(texts):
                silent = False
                yield text
            if silent and self.skipped.total() == skipped:
                self.skipped.add("empty_file")
            if isinstance(source, TextFile):
                self.bytes_read = before + source.size

    def _usable(self, texts: Iterable[Any]) -> Iterator[str]:
        for text in texts:
            reason = rejection_reason(text) if isinstance(text, str) else "no_text_key"
            if reason is None:
                yield text
            else:
                self.skipped.add(reason)

    def _dataset(self, source: DatasetSource) -> Iterator[Any]:
        for text in source.texts():
            self.bytes_read += len(text) if isinstance(text, str) else 0
            yield text

    def _file(self, source: TextFile) -> Iterator[Any]:
        before = self.bytes_read
        try:
            with open(source.path, "rb") as raw:
                parse = self._parquet if source.name.endswith(PARQUET) else self._lines_of_text
                for text in parse(raw, source.name):
                    self.bytes_read = max(self.bytes_read, before + raw.tell())
                    yield text
        except OSError:
            self.skipped.add("unreadable_file")

    def _parquet(self, raw: IO[bytes], name: str) -> Iterator[Any]:
        try:
            table = pyarrow.parquet.ParquetFile(raw)
            columns = [column for column in TEXT_COLUMNS if column in table.schema_arrow.names]
            if not columns:
                self.skipped.add("no_text_column")
                return
            for index in range(table.num_row_groups):
                about = table.metadata.row_group(index)
                if about.total_byte_size > max(INFLATION_FREE, INFLATION_LIMIT * os.fstat(raw.fileno()).st_size):
                    self.skipped.add("inflates_too_much")
                    return
            for rows in table.iter_batches(PARQUET_ROWS, columns=columns[:1]):
                yield from rows.column(0).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError):  # OSError: a torn page
            self.skipped.add("damaged_parquet")

    def _lines_of_text(self, raw: IO[bytes], name: str) -> Iterator[Any]:
        compressed = name.endswith(".gz")
        stream: IO[bytes] = gzip.GzipFile(fileobj=raw, mode="rb") if compressed else raw  # type: ignore[assignment]
        lines = self._lines(stream, raw, compressed)
        parse = _paragraphs if name.removesuffix(".gz").endswith(".txt") else _json_texts
        return parse(lines, self.skipped)

    def _lines(self, stream: IO[bytes], raw: IO[bytes], compressed: bool) -> Iterator[bytes]:
        inflated = 0
        try:
            while line := stream.readline(LONGEST_LINE):
                inflated += len(line)
                whole = len(line) < LONGEST_LINE or line.endswith(b"\n")
                while not whole:  # drop the rest of it in pieces
                    piece = stream.readline(1 << 20)
                    inflated += len(piece)
                    whole = not piece or piece.endswith(b"\n") or _is_bomb(inflated, raw, compressed)
                    line = b""
                if line:
                    yield line
                else:
                    self.skipped.add("line_too_long")
                if _is_bomb(inflated, raw, compressed):
                    self.skipped.add("inflates_too_much")
                    return
        except (EOFError, zlib.error, gzip.BadGzipFile):
            self.skipped.add("damaged_gzip")


def _is_bomb(inflated: int, raw: IO[bytes], compressed: bool) -> bool:
    return compressed and inflated > INFLATION_FREE and inflated > INFLATION_LIMIT * raw.tell()


def _json_texts(lines: Iterator[bytes], skipped: Skipped) -> Iterator[Any]:
    for line in lines:
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            skipped.add("not_utf8")
            continue
        except (ValueError, RecursionError):
            skipped.add("bad_json")
            continue
        yield value.get("text", value.get("raw_content")) if isinstance(value, dict) else None


def _paragraphs(lines: Iterator[bytes], skipped: Skipped) -> Iterator[str]:
    document: list[bytes] = []
    size = 0
    for line in lines:
        if line.strip():
            size += len(line)
            if size <= LONGEST_LINE:
                document.append(line)
            continue
        yield from _paragraph(document, size, skipped)
        document, size = [], 0
    yield from _paragraph(document, size, skipped)


def _paragraph(document: list[bytes], size: int, skipped: Skipped) -> Iterator[str]:
    if size > LONGEST_LINE:
        skipped.add("too_long")
    elif document:
        try:
            yield b"".join(document).decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped.add("not_utf8")


def rejection_reason(text: str) -> str | None:
    """Return why a document cannot be used, or None."""
    if len(text) > LONGEST_DOCUMENT:
        return "too_long"
    if not text or text.isspace():
        return "empty"
    if "\0" in text:
        return "nul_character"  # text in UTF-16, or not text at all
    try:
        text.encode()
    except UnicodeEncodeError:
        return "lone_surrogate"  # JSON can encode halves of characters
    return None
