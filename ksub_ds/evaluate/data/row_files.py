"""Files of rows as people have them: JSON lines, CSV, TSV and Parquet, compressed or not.

    FOLDER/train.jsonl  FOLDER/dev.csv.xz  FOLDER/test-00000-of-00001.parquet

The name says which split a file holds and how its rows are written; its content says how it is compressed.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ksub_ds.common.compression import SUFFIXES as COMPRESSIONS
from ksub_ds.common.compression import DamagedFileError, decompressed, is_bomb
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import refuse_stand_in
from ksub_ds.common.logging import get_logger

FORMS = (".jsonl", ".json", ".csv", ".tsv")
# Where several forms of a split lie in a folder, the first of these is read.
SUFFIXES = (
    *(".jsonl.gz", ".jsonl", ".parquet"),
    *(form + compression for form in FORMS for compression in ("", *COMPRESSIONS)),
)
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet")  # as the hub's data sets have them
OTHER_NAMES = {"validation": ("dev", "valid", "val")}
LONGEST_LINE = 4_000_000  # bytes; a sentence pair has hundreds
LARGEST_FILE = 16_000_000_000  # bytes when inflated; MNLI's training set in 15 languages has 2 billion
ROWS_AT_ONCE = 32  # of a Parquet file: its text may repeat, so that no number in it tells how much it will be

Row = tuple[Path | str, int, Any]  # where it comes from, its line, and what was found there


def find_files(folder: Path, split: str) -> list[Path]:
    """Return the file of a split, or its Parquet shards in their order; nothing where there is none.

    Hidden files are not looked at. Other files of the same split are named in the log.

    Raises:
        UserError: a shard is missing.
    """
    paths = {path.name.lower(): path for path in sorted(_files(folder), reverse=True)}
    base, mark, rest = split.partition("_")  # validation_matched
    found = []  # in the order of preference: each a file, or the shards of one
    for name in (split, *(other + mark + rest for other in OTHER_NAMES.get(base, ()))):
        found += [[paths[name + suffix]] for suffix in dict.fromkeys(SUFFIXES) if name + suffix in paths]
        found += [[path for key, path in sorted(paths.items()) if key.startswith(f"{name}-") and SHARD.fullmatch(key)]]
    found = list(filter(None, found))
    if not found:
        return []
    first, *others = found
    if SHARD.fullmatch(first[0].name.lower()):
        _check_shards(first)
    if others:
        beside = ", ".join(path.name for each in others for path in each)
        get_logger().warning(f"{first[0]}: is read; beside it {beside}: not read")
    return first


def seen_in(folder: Path) -> str:
    """Return what lies in a folder, for a message about what does not."""
    names = sorted(path.name for path in _files(folder))
    return f"found {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}" if names else "no file lies there"


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    except OSError:
        return []


def _check_shards(shards: Sequence[Path]) -> None:
    """Refuse a split of which a shard is missing.

    Raises:
        UserError: with the number of shards.
    """
    found = [match for path in shards if (match := SHARD.fullmatch(path.name.lower()))]
    whole = int(found[0]["count"])
    if [(int(each["number"]), int(each["count"])) for each in found] != [(number, whole) for number in range(whole)]:
        names = ", ".join(path.name for path in shards[1:4])
        beside = f"beside it are {names}" if names else "it is alone"
        raise UserError(f"{shards[0]}: says that there are {whole} shards, but {beside}; put all of them there")


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, not checked: objects of JSON, or of column names and values.

    Yields:
        (path, line, row).

    Raises:
        UserError: a damaged file, or one that is not what its name says.
    """
    refuse_stand_in(path)
    name = path.name.lower()
    if name.endswith(".parquet"):
        rows = _parquet_rows(path)
    elif ".csv" in name or ".tsv" in name:
        rows = _table_rows(path, "\t" if ".tsv" in name else ",")
    else:
        rows = _json_rows(path)
    for number, row in rows:
        yield path, number, row


def class_names(path: Path, column: str) -> tuple[str, ...] | None:
    """Return the class names that a Parquet file of `datasets` gives a column's numbers; None where there are none."""
    import pyarrow
    from pyarrow import parquet

    if not path.name.lower().endswith(".parquet"):
        return None
    try:
        about = json.loads((parquet.read_schema(path).metadata or {})[b"huggingface"])
        names = about["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError, OSError, pyarrow.ArrowException):
        return None
    whole = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
    return tuple(names) if whole else None


# ---------------------------------------------------------------- forms


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, with their ends, numbered from 1.

    Yields:
        (number, line).

    Raises:
        UserError: not UTF-8, damaged, or far too large.
    """
    try:
        with open(path, "rb") as raw, decompressed(raw) as stream:
            inflated = 0
            for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), 1):
                inflated += len(line)
                if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UserError(f"{path}: is UTF-16; convert it (iconv -f UTF-16 -t UTF-8)")
                if len(line) >= LONGEST_LINE:
                    raise UserError(f"{path}: line {number} has more than {LONGEST_LINE:,} bytes; not a row of a task")
                _check_inflation(path, inflated, raw.tell())
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise UserError(
                        f"{path}: line {number} is not UTF-8; the file is damaged, or in another encoding "
                        "(iconv -f LATIN1 -t UTF-8)"
                    ) from None
    except (OSError, DamagedFileError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the file is damaged or cut short") from error


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        if number == 1 and line.lstrip().startswith("["):
            raise UserError(f"{path}: line 1 begins a JSON array; write one object a line (jq -c '.[]')")
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not JSON; the file is damaged") from error


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a CSV file, or of a TSV file, whose quotes are text (as in GLUE's).

    Yields:
        (number of the line, column -> value).

    Raises:
        UserError: as `_lines`; a row with more or fewer fields than the first; columns of one name.
    """
    lines = (line for _, line in _lines(path))
    if delimiter == "\t":
        rows = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    else:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for values in rows:
            if header is None:
                header = [name.strip() for name in values]
                if len(set(header)) < len(header):
                    raise UserError(f"{path}: two columns have one name; its first line is {', '.join(header)}")
            elif values:
                if len(values) != len(header):
                    raise UserError(
                        f"{path}: line {rows.line_num} has {len(values)} fields, the first line {len(header)} "
                        f"({', '.join(header)}); quotes or delimiters are amiss: write it as .jsonl"
                    )
                yield rows.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num}: {error}; quotes are amiss: write it as .jsonl") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    size = path.stat().st_size
    number = inflated = 0
    try:
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            _check_inflation(path, sum(group.total_byte_size for group in groups), size)
            for batch in file.iter_batches(ROWS_AT_ONCE):
                inflated += batch.nbytes
                _check_inflation(path, inflated, size)
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: row {number + 1} or soon after is not UTF-8; the file is damaged") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a readable Parquet file ({str(error).splitlines()[0]})") from error
    except (OverflowError, ValueError) as error:  # a date beyond Python's
        raise UserError(f"{path}: row {number + 1} or soon after: {error}; leave such columns out") from error


def _check_inflation(path: Path, inflated: int, read: int) -> None:
    """Refuse what inflates beyond any text.

    Args:
        path: the file, for the message.
        inflated: bytes so far.
        read: bytes of the file they came from.

    Raises:
        UserError: it is too much.
    """
    if inflated > LARGEST_FILE or is_bomb(inflated, read):
        raise UserError(f"{path}: inflates to more than {inflated:,} bytes; not the file of a task")
