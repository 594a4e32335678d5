"""Rows of tables: parquet files, and arrow files and streams as `datasets` saves them.

Only the columns that are wanted are read, so that files of one data set may differ in all others.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from ksub_ds.common.compression import is_bomb
from ksub_ds.common.errors import one_line
from ksub_ds.corpus.text.file_content import FileContent
from ksub_ds.corpus.text.layout import TextLayout
from ksub_ds.corpus.text.text_files import ARROW, PARQUET

ROWS = 16  # read at a time: a column may repeat one long text without taking space on the disk

Row = dict[str, Any]
# Returns the columns to read, none if what is wanted is not there, which it counts.
Columns = Callable[[pyarrow.Schema], Sequence[str]]


def is_table(file: FileContent) -> bool:
    """Return whether a file is a table, or by its name should be one."""
    named = file.form in (PARQUET, ARROW) and not file.head.lstrip().startswith((b"{", b"["))
    return file.table is not None or named


def table_texts(raw: IO[bytes], path: Path, file: FileContent, layout: TextLayout) -> Iterator[Any]:
    """Yield the values of the text column of a table.

    Args:
        raw: the file; its position follows what was read.
        path: where it lies.
        file: the same, for counting what is left out.
        layout: which column holds the text.
    """
    for row in table_rows(raw, path, file, lambda schema: text_column(schema, file, layout)):
        yield from row.values()


def table_rows(raw: IO[bytes], path: Path, file: FileContent, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a table, with the columns that are wanted.

    Args:
        raw: the file; its position follows what was read.
        path: where it lies.
        file: the same, for counting what is left out.
        columns: says which.
    """
    table = file.table or file.form[1:]  # damaged, if its name alone says so, and its reader says that
    if file.compression:
        file.add("compressed_table", f"{table} data inside {file.compression}: decompress it")
        return
    raw.seek(0)
    rows = _parquet_rows(raw, file, columns) if table == "parquet" else _arrow_rows(raw, path, file, columns)
    size, characters = os.fstat(raw.fileno()).st_size, 0
    try:
        for row in rows:
            yield row
            characters += _characters(row)
            if is_bomb(characters, size):  # a dictionary's texts may be repeated for a few bytes each
                file.add("inflates_too_much", f"to more than {characters:,} characters")
                return
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, struct.error) as error:
        # OSError: a torn page; ValueError: two fields of one name; OverflowError: a date beyond Python's
        file.add("damaged_parquet" if table == "parquet" else "damaged_arrow", one_line(error))


def _parquet_rows(raw: IO[bytes], file: FileContent, columns: Columns) -> Iterator[Row]:
    table = pyarrow.parquet.ParquetFile(raw)
    wanted = list(columns(table.schema_arrow))
    if not wanted:
        return
    for index in range(table.num_row_groups):
        if _is_bomb(table.metadata.row_group(index).total_byte_size, raw):
            file.add("inflates_too_much", f"row group {index}")
            return
    for batch in table.iter_batches(ROWS, columns=wanted):
        yield from _rows(_as_bytes(batch), file)


def _arrow_rows(raw: IO[bytes], path: Path, file: FileContent, columns: Columns) -> Iterator[Row]:
    # A file is a stream between a magic number and a table of contents.
    start = 8 if file.table == "arrow" else 0
    with pyarrow.memory_map(str(path)) as mapped:
        mapped.seek(start)
        schema = pyarrow.ipc.open_stream(mapped).schema
        wanted = columns(schema)
        if not wanted:
            return
        mapped.seek(start)
        if any(_is_bomb(_inflated(message), raw) for message in pyarrow.ipc.MessageReader.open_stream(mapped)):
            file.add("inflates_too_much", "a batch of rows")
            return
        mapped.seek(start)
        options = pyarrow.ipc.IpcReadOptions(included_fields=[schema.names.index(name) for name in wanted])
        for batch in pyarrow.ipc.open_stream(mapped, options=options):
            batch = _as_bytes(batch)
            batch.validate(full=True)  # the offsets of a damaged file point anywhere
            for at in range(0, batch.num_rows, ROWS):
                yield from _rows(batch.slice(at, ROWS), file)
            raw.seek(mapped.tell())


def text_column(schema: pyarrow.Schema, file: FileContent, layout: TextLayout) -> list[str]:
    """Return the column that holds the text; count the file and return nothing if there is none.

    Args:
        schema: of the table.
        file: for counting.
        layout: which columns are wanted.
    """
    kinds = dict(zip(schema.names, schema.types, strict=True))
    there = [name for name in layout.columns() if name in kinds]
    texts = [name for name in schema.names if holds_text(kinds[name])]
    found = next((name for name in there if name in texts or pyarrow.types.is_null(kinds[name])), None)
    if found is None and there:
        file.add("no_text_column", f'column "{there[0]}" holds {kinds[there[0]]}, not strings')
    elif found is None:
        file.add("no_text_column", layout.missing(schema.names, texts[::-1]))
    return [] if found is None else [found]


def holds_text(kind: pyarrow.DataType) -> bool:
    """Return whether a column of this kind holds text, or bytes that may be text."""
    if pyarrow.types.is_dictionary(kind):
        return holds_text(kind.value_type)
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pyarrow.types, f"is_{name}")(kind) for name in names)


def _as_bytes(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Return a batch with bytes in place of strings, so that one that is not UTF-8 costs its row and no other."""
    columns = [column.view(_bytes_of(column.type)) for column in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _bytes_of(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return a column's type with bytes in place of strings, in the fields of structs and in dictionaries too."""
    types = pyarrow.types
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_bytes_of(field.type)) for field in kind])
    if types.is_dictionary(kind):
        return pyarrow.dictionary(kind.index_type, _bytes_of(kind.value_type), kind.ordered)
    plain = {"string": pyarrow.binary, "large_string": pyarrow.large_binary, "string_view": pyarrow.binary_view}
    return next((make() for name, make in plain.items() if getattr(types, f"is_{name}")(kind)), kind)


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(each) for key, each in value.items()}
    return value.decode() if isinstance(value, bytes) else value


def _rows(batch: pyarrow.RecordBatch, file: FileContent) -> Iterator[Row]:
    for row in batch.to_pylist():
        try:
            yield _decoded(row)
        except UnicodeDecodeError as error:
            file.not_utf8(error.object)


def _characters(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return len(value) if isinstance(value, str) else 0


def _is_bomb(size: int, raw: IO[bytes]) -> bool:
    return is_bomb(size, os.fstat(raw.fileno()).st_size)


def _inflated(message: pyarrow.Message) -> int:
    """Return how many bytes a message's compressed buffers say they take when they are decompressed.

    pyarrow allocates what they say before it looks at the data, and says no number itself: it is read from the
    message's flatbuffer (Message.header is a RecordBatch, or a DictionaryBatch with one in `data`).
    """
    if message.type not in ("record batch", "dictionary"):
        return 0
    metadata, body = message.metadata.to_pybytes(), message.body
    table = _target(metadata, _field(metadata, _target(metadata, 0), 2))
    if message.type == "dictionary":
        table = _target(metadata, _field(metadata, table, 1))
    buffers, compression = _field(metadata, table, 2), _field(metadata, table, 3)
    if not buffers or not compression:
        return 0
    vector = _target(metadata, buffers)
    (count,) = struct.unpack_from("<I", metadata, vector)
    total = 0
    for index in range(count):
        offset, length = struct.unpack_from("<qq", metadata, vector + 4 + 16 * index)
        if length >= 8:
            (size,) = struct.unpack("<q", body.slice(offset, 8).to_pybytes())
            total += max(size, 0)  # -1: this buffer is stored as it is
    return total


def _field(metadata: bytes, table: int, index: int) -> int:
    """Return the position of a table's field in a flatbuffer, 0 if it is not there."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    (size,) = struct.unpack_from("<H", metadata, vtable)
    slot = 4 + 2 * index
    offset = struct.unpack_from("<H", metadata, vtable + slot)[0] if slot < size else 0
    return table + offset if offset else 0


def _target(metadata: bytes, position: int) -> int:
    return position + int(struct.unpack_from("<I", metadata, position)[0])
