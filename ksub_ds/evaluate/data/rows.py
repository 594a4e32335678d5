"""Labelled rows of a task: from a folder of files, or from a data set of the HuggingFace hub.

    FOLDER/<part>/{train,validation,test}.jsonl[.gz]    one JSON object a line
    FOLDER/<part>/{train,validation,test}.parquet
    facebook/xnli, nyu-mll/glue, ...                    by `datasets`; <part> is the configuration

A part is a language (XNLI) or a task (GLUE). Every row is checked, and the first bad one is reported rather than
skipped: an evaluation on fewer rows than expected is worse than none.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_file
from ksub_ds.evaluate.data.hub import hub_rows, hub_splits, hub_version, require_on_hub

SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet")
LONGEST_LINE = 4_000_000  # bytes; a sentence pair has hundreds
LARGEST_FILE = 16_000_000_000  # bytes when inflated; MNLI's training set in 15 languages has 2 billion
INFLATION_LIMIT = 200  # text compresses 3 to 20 times; beyond this, past the first bytes, it is a bomb
INFLATION_FREE = 64_000_000  # bytes
ROWS_AT_ONCE = 32  # of a Parquet file: its text may repeat, so that no number in it tells how much it will be
LARGEST_LABEL = 1e6  # a similarity has 5
UNLABELLED = -1


@dataclass(frozen=True)
class Columns:
    """What a row of a task holds.

    Attributes:
        first: the column of the sentence, or of the first of two.
        second: the column of the second sentence; None where there is one.
        labels: the names of the classes, by number; empty = the label is a real number.
        synonyms: other spellings of a class name ("contradictory" in machine-translated MultiNLI).
    """

    first: str
    second: str | None
    labels: tuple[str, ...]
    synonyms: tuple[tuple[str, int], ...] = ()

    def names(self) -> tuple[str, ...]:
        """Return all columns a row must have."""
        return (self.first, *((self.second,) if self.second else ()), "label")

    def label(self, value: Any) -> float:
        """Convert a label to a number.

        Raises:
            ValueError: it is not a label of this task, with the reason.
        """
        if isinstance(value, str) and self.labels:
            spelt = {name: index for index, name in enumerate(self.labels)} | dict(self.synonyms)
            if value not in spelt:
                raise ValueError(f"label {value!r} is not one of {', '.join(self.labels)}")
            return float(spelt[value])
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST_LABEL:  # nor NaN
            raise ValueError(f"label {repr(value)[:20]} is not a number")
        if value == UNLABELLED:
            raise ValueError("label -1 stands for an unlabelled row, which cannot be learnt from or scored; remove it")
        if self.labels and (value != int(value) or not 0 <= value < len(self.labels)):
            raise ValueError(f"label {value!r} is not one of 0 to {len(self.labels) - 1} ({', '.join(self.labels)})")
        return float(value)


@dataclass(frozen=True)
class Rows:
    """The rows of one split.

    Attributes:
        first: sentences.
        second: the other sentences; None for tasks of single sentences.
        labels: one number a row.
        name: where they come from, for messages.
    """

    first: list[str]
    second: list[str] | None
    labels: list[float]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> "Rows":
        """Return rows [start, stop)."""
        second = None if self.second is None else self.second[start:stop]
        return Rows(self.first[start:stop], second, self.labels[start:stop], f"{self.name}[{start}:{stop}]")

    def fingerprint(self) -> str:
        """Return the sha256 over texts and labels."""
        digest = hashlib.sha256()
        for row in zip(self.first, self.second or [""] * len(self), self.labels, strict=True):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


class Source:
    """Where the splits of a task's parts lie: a folder, or a data set of the hub.

    Args:
        data: a folder, or a name such as facebook/xnli.

    Raises:
        UserError: neither a folder nor a data set's name.
    """

    def __init__(self, data: str):
        self.data = str(data)
        self.folder = Path(data) if Path(data).is_dir() else None
        if self.folder is None and (self.data.count("/") != 1 or self.data.startswith((".", "/"))):
            raise UserError(f"--data {data}: is not a folder, nor a data set's name such as facebook/xnli")
        if self.folder is None:
            require_on_hub(f"--data {data}", self.data, "dataset", "README.md")

    def has(self, part: str, split: str) -> bool:
        """Return whether a split is there."""
        if self.folder is None:
            return split in hub_splits(self.data, part)
        return self._file(part, split) is not None

    def read(self, part: str, split: str, columns: Columns, limit: int | None = None) -> Rows:
        """Read the rows of a split, or the first `limit` of them.

        Raises:
            UserError: a missing, empty or damaged file, or a bad row (file and line are named).
        """
        if self.folder is None:
            name, values = f"{self.data} {part} {split}", hub_rows(self.data, part, split)
        else:
            path = self._file(part, split)
            if path is None:
                wanted = self.folder / part / f"{split}.jsonl[.gz] or .parquet"
                raise UserError(f"{wanted}: is not there")
            name = str(path)
            values = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
        return _checked(values, name, columns, limit)

    def fingerprint(self, part: str, split: str) -> str:
        """Return the sha256 of a split's file; of a hub data set, of what `datasets` calls its version."""
        if self.folder is not None:
            path = self._file(part, split)
            assert path is not None, "ask `has` first"
            return sha256_file(path)
        return hashlib.sha256(f"{self.data} {part} {split} {hub_version(self.data)}".encode()).hexdigest()

    def _file(self, part: str, split: str) -> Path | None:
        assert self.folder is not None
        for suffix in SUFFIXES:
            path = self.folder / part / f"{split}{suffix}"
            if path.is_file():
                return path
        return None


def _checked(values: Iterator[tuple[int, Any]], name: str, columns: Columns, limit: int | None) -> Rows:
    first: list[str] = []
    second: list[str] | None = [] if columns.second else None
    labels: list[float] = []
    expected: set[str] | None = None
    for number, row in values:
        if limit is not None and len(labels) >= limit:
            break
        if not isinstance(row, dict):
            raise UserError(f"{name}: line {number} is not a JSON object with {', '.join(columns.names())}")
        missing = [column for column in columns.names() if column not in row]
        if missing:
            raise UserError(
                f"{name}: line {number} has no column {missing[0]!r}; every row needs {', '.join(columns.names())}"
            )
        expected = expected or set(row)
        if set(row) != expected:
            raise UserError(
                f"{name}: line {number} has {len(row)} columns, the first row {len(expected)}; fix the file"
            )
        texts = [row[column] for column in columns.names()[:-1]]
        for column, text in zip(columns.names(), texts, strict=False):
            if not isinstance(text, str):
                raise UserError(f"{name}: line {number}: {column} is {type(text).__name__}, not text")
            if len(text) > LONGEST_LINE:
                raise UserError(f"{name}: line {number}: {column} has {len(text):,} characters; not a row of a task")
        try:
            labels.append(columns.label(row["label"]))
        except ValueError as error:
            raise UserError(f"{name}: line {number}: {error}") from error
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # JSON can spell halves of characters
        first.append(texts[0])
        if second is not None:
            second.append(texts[1])
    if not labels:
        raise UserError(f"{name}: holds no rows")
    return Rows(first, second, labels, name)


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with open(path, "rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            inflated = 0
            for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), 1):
                inflated += len(line)
                if len(line) >= LONGEST_LINE:
                    raise UserError(f"{path}: line {number} has more than {LONGEST_LINE:,} bytes; not a row of a task")
                _check_inflation(path, inflated, raw.tell())
                if line.strip():
                    try:
                        yield number, json.loads(line.decode("utf-8-sig"))
                    except (ValueError, RecursionError) as error:
                        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "is not JSON"
                        raise UserError(f"{path}: line {number} {reason}; the file is damaged") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); the file is damaged or cut short") from error


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
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: row {number + 1} or soon after is not UTF-8; the file is damaged") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _check_inflation(path: Path, inflated: int, read: int) -> None:
    """Refuse what inflates beyond any text.

    Args:
        path: the file, for the message.
        inflated: bytes so far.
        read: bytes of the file they came from.

    Raises:
        UserError: it is too much.
    """
    if inflated > LARGEST_FILE or inflated > max(INFLATION_FREE, INFLATION_LIMIT * read):
        raise UserError(f"{path}: inflates to more than {inflated:,} bytes; not the file of a task")
