"""Reading documents from files, damaged ones included.

    .jsonl .json        one JSON object a line: {"text": ...}, or CCNet's {"raw_content": ...}; an array of objects
    .txt                documents separated by blank lines, or one a line (TextLayout)
    .parquet .arrow     a column "text" or "raw_content"

Any of them may be compressed (file_content.py). What cannot be read is skipped and counted by reason, the first of each
with evidence; a bad file never ends a run. Reading is streamed and bounded: neither an endless line nor a compressed
bomb fills the memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Generic, TypeVar

from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.text import file_content
from ksub_ds.corpus.text.file_content import FileContent
from ksub_ds.corpus.text.hub import DatasetSource
from ksub_ds.corpus.text.json_text import json_texts
from ksub_ds.corpus.text.layout import DEFAULT_LAYOUT, TextLayout
from ksub_ds.corpus.text.skipped import Skipped, is_unread, shown
from ksub_ds.corpus.text.tables import is_table, table_texts
from ksub_ds.corpus.text.text_files import TextFile

Item = TypeVar("Item")

LONGEST_DOCUMENT = 10_000_000  # characters
# A .txt with this much and no blank line is told of: perhaps each of its lines is a document. So is one whose lines
# end in CR alone, of any size.
SUSPECT_LINES, SUSPECT_BYTES = 20, 50_000


class SourceReader(Generic[Item]):
    """Iterates over what some sources hold, in order.

    Args:
        sources: files and data sets.
        skipped: where what is left out is counted.

    Attributes:
        skipped: number of files and documents skipped so far, by reason: the caller's object.
        bytes_read: bytes read from the disk so far.
    """

    def __init__(self, sources: Sequence[TextFile | DatasetSource], skipped: Skipped):
        self._sources, self.skipped = sources, skipped
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Item]:
        for source in self._sources:
            before, silent, skipped = self.bytes_read, True, self.skipped.counts.copy()
            values = self._dataset(source) if isinstance(source, DatasetSource) else self._file(source)
            for item in self._usable(values, shown(source.name, 200)):
                silent = False
                yield item
            reasons = self.skipped.counts - skipped
            if silent and not any(map(is_unread, reasons)):  # those say already that the file is lost
                self.skipped.add("file_without_document" if reasons else "empty_file", shown(source.name, 200))
            if isinstance(source, TextFile):
                self.bytes_read = before + source.size

    def _dataset(self, source: DatasetSource) -> Iterator[Any]:
        for text in source.texts():
            self.bytes_read += len(text) if isinstance(text, str) else 0
            yield text

    def _file(self, source: TextFile) -> Iterator[Any]:
        before = self.bytes_read
        try:
            with open(source.path, "rb") as raw:
                for value in self._values(raw, source):
                    self.bytes_read = max(self.bytes_read, before + raw.tell())
                    yield value
        except OSError as error:
            self.skipped.add("unreadable_file", f"{shown(source.name, 200)}: {error.strerror or error}")

    def _values(self, raw: IO[bytes], source: TextFile) -> Iterator[Any]:
        """Yield the values of one file, open at its start; what cannot be read is counted."""
        raise NotImplementedError

    def _usable(self, values: Iterable[Any], name: str) -> Iterator[Item]:
        """Yield what can be used of the values of a source, and count the rest."""
        raise NotImplementedError


class DocumentReader(SourceReader[str]):
    """Iterates over the documents of some sources, in order.

    Args:
        sources: of documents.
        skipped: where what is left out is counted.
        layout: how documents lie in files.
    """

    def __init__(
        self, sources: Sequence[TextFile | DatasetSource], skipped: Skipped, layout: TextLayout = DEFAULT_LAYOUT
    ):
        super().__init__(sources, skipped)
        self._layout = layout
        self._hinted = False

    def _usable(self, values: Iterable[Any], name: str) -> Iterator[str]:
        for number, text in enumerate(values, 1):
            reason = rejection_reason(text) if isinstance(text, str) else "no_text_key"
            if reason is None:
                yield text
            else:
                found = (
                    f"{len(text):,} characters" if isinstance(text, str) else f"a value of type {type(text).__name__}"
                )
                self.skipped.add(reason, f"{name}, text {number}: {found}")

    def _values(self, raw: IO[bytes], source: TextFile) -> Iterator[Any]:
        file = FileContent(raw, source.path, source.name, self.skipped)
        if is_table(file):
            return table_texts(raw, source.path, file, self._layout)
        if file.form == ".txt":
            return self._plain_text(file)
        return json_texts(file, self._layout)

    def _plain_text(self, file: FileContent) -> Iterator[str]:
        if not file.is_text:
            file.add("not_the_file")
            return
        documents, largest = 0, 0
        document: list[bytes] = []
        size = 0
        for line in file.lines():
            if not line.strip():
                pass
            elif self._layout.line_documents:
                yield from _decoded(line.rstrip(b"\r\n"), file)
                continue
            else:
                size += len(line)
                if size <= file_content.LONGEST_LINE:
                    document.append(line)
                continue
            documents, largest = documents + bool(size), max(largest, size)
            yield from self._paragraph(document, size, file)
            document, size = [], 0
        documents, largest = documents + bool(size), max(largest, size)
        if documents == 1:
            self._hint(file, largest)
        yield from self._paragraph(document, size, file)

    def _paragraph(self, document: list[bytes], size: int, file: FileContent) -> Iterator[str]:
        if size > file_content.LONGEST_LINE:
            file.add("too_long", f"a document of {size:,} bytes ends here; {_ONE_A_LINE}")
        elif document:
            for text in _decoded(b"".join(document), file):
                if len(text) > LONGEST_DOCUMENT:
                    file.add("too_long", f"a document of {len(text):,} characters ends here; {_ONE_A_LINE}")
                else:
                    yield text

    def _hint(self, file: FileContent, size: int) -> None:
        """Say once that a large text is one document, where its lines suggest that it is many."""
        carriage_returns = file.head.count(b"\r") > 1 and b"\n" not in file.head
        if self._hinted or not (carriage_returns or (size >= SUSPECT_BYTES and file.line >= SUSPECT_LINES)):
            return
        self._hinted = True
        if carriage_returns:
            why = f"its lines end in CR alone, so that it is one document of {size:,} bytes; convert it: tr '\\r' '\\n'"
        else:
            why = f"its {file.line:,} lines have no blank line among them and are one document of {size:,} bytes"
            why += f"; {_ONE_A_LINE}"
        get_logger().info(f"warning: {file.name}: {why}")


_ONE_A_LINE = "where each line is a document, give --line-documents"


def _decoded(raw: bytes, file: FileContent) -> Iterator[str]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        file.not_utf8(raw)
        return
    if "\0" in text and file.about:
        file.add("nul_character")
    else:
        yield text


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
