"""Labelled rows of a task: from a folder of files, or from a data set of the HuggingFace hub.

    FOLDER/<part>/{train,validation,test}.jsonl    or another form and compression of row_files.py
    facebook/xnli, nyu-mll/glue, ...               by `datasets`; <part> is the configuration

A part is a language (XNLI) or a task (GLUE). Every row is checked, and the first bad one is reported rather than
skipped: an evaluation on fewer rows than expected is worse than none.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_file
from ksub_ds.evaluate.data import row_files
from ksub_ds.evaluate.data.hub import hub_class_names, hub_rows, hub_splits, hub_version, require_on_hub
from ksub_ds.evaluate.data.row_files import Row

LARGEST_LABEL = 1e6  # a similarity has 5
UNLABELLED = math.nan
MOST_CLASSES = 1_000


@dataclass(frozen=True)
class Columns:
    """What a row of a task holds.

    Attributes:
        first: the column of the sentence, or of the first of two.
        second: the column of the second sentence; None where there is one.
        labels: the names of the classes, by number; empty = the label is a real number.
        synonyms: other spellings of a class name ("contradictory" in machine-translated MultiNLI).
        label_column: the column of the label.
        label_map: what stands in the files -> the name of the class, where they do not agree.
        ordered: whether the names stand in the order of the numbers that files may have in their place.
    """

    first: str
    second: str | None
    labels: tuple[str, ...]
    synonyms: tuple[tuple[str, int], ...] = ()
    label_column: str = "label"
    label_map: tuple[tuple[str, str], ...] = ()
    ordered: bool = True

    def names(self) -> tuple[str, ...]:
        """Return all columns a row must have."""
        return (self.first, *((self.second,) if self.second else ()), self.label_column)

    def mapped(self, entries: tuple[str, ...]) -> "Columns":
        """Return these columns with the entries VALUE=CLASS of a label map; those of other tasks' classes are not."""
        pairs = (entry.rsplit("=", 1) for entry in entries)
        return dataclasses.replace(self, label_map=tuple((a.strip(), b) for a, b in pairs if b in self.labels))

    def label(self, value: Any, file_names: tuple[str, ...] | None = None) -> float:
        """Convert a label to a number; UNLABELLED (not a number) stands for none: -1, null or nothing.

        Args:
            value: as it stands in a row.
            file_names: the class names of the numbers in this file, where it says so.

        Raises:
            ValueError: it is not a label of this task, with the reason.
        """
        text = spelling(value)
        if text == "":
            return UNLABELLED
        if text is None:
            raise ValueError(f"label {repr(value)[:20]} is not a number")
        if not self.labels:
            return _real_number(text)
        index = self._spellings.get(text, self._spellings.get(_plain(text)))
        if index is None and text == "-1":
            return UNLABELLED
        if index is None and self._numbers_are_mapped and _is_number(text):
            raise ValueError(f"label {text[:20]} is not in --label-map")
        if index is None and file_names is not None and _is_number(text) and 0 <= int(text) < len(file_names):
            name = file_names[int(text)]
            index = self._spellings.get(name, self._spellings.get(_plain(name)))
            if index is None and not _is_number(name):
                raise ValueError(
                    f"label {text} is {name!r} by the file's own class names, which is not one of "
                    f"{self.described()}; give --label-map '{name}=CLASS'"
                )
        if index is None:
            index = self._by_position(value, text)
        return float(index)

    def described(self) -> str:
        """Return the class names, for a message."""
        return ", ".join(self.labels[:10]) + (f" and {len(self.labels) - 10} more" if len(self.labels) > 10 else "")

    @functools.cached_property
    def _numbers_are_mapped(self) -> bool:
        return any(_is_number(key) for key, _ in self.label_map)

    @functools.cached_property
    def _spellings(self) -> dict[str, int]:
        """Spelling -> number of the class: the map's first, then exact ones, then those without case and hyphens."""
        exact = {name: index for index, name in enumerate(self.labels)} | dict(self.synonyms)
        spelt = exact | {text: exact[name] for text, name in self.label_map}
        plain = [_plain(text) for text in spelt]
        return {_plain(text): index for text, index in spelt.items() if plain.count(_plain(text)) == 1} | spelt

    def _by_position(self, value: Any, text: str) -> int:
        named = any(_is_number(name) for name in self.labels)  # then a number is a name
        if isinstance(value, str) and (named or not _is_number(text)):
            shown = text[:40]
            raise ValueError(f"label {shown!r} is not one of {self.described()}; fix it, or map it: --label-map")
        if isinstance(value, bool) or (not isinstance(value, str) and not abs(value) < LARGEST_LABEL):
            raise ValueError(f"label {repr(value)[:20]} is not a number")
        if named or not _is_number(text) or not 0 <= int(text) < len(self.labels):
            raise ValueError(f"label {text[:20]} is not one of 0 to {len(self.labels) - 1} ({self.described()})")
        if not self.ordered:
            raise ValueError(
                f"label {text[:20]} is a number, and the training set has names ({self.described()}); say which is "
                "which by --label-map, or give --classes in the order of the numbers"
            )
        return int(text)


def _real_number(text: str) -> float:
    """Read the label of a regression; -1 stands for a missing one.

    Raises:
        ValueError: it is not a number, or too large.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) < LARGEST_LABEL:  # nor NaN
        raise ValueError(f"label {text[:20]!r} is not a number")
    return UNLABELLED if number == -1 else number


def spelling(value: Any) -> str | None:
    """Return how a label is written: 1 and 1.0 as "1"; "" for null and NaN; None for what cannot be a label."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip() if isinstance(value, (str, int, float)) else None


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _plain(text: str) -> str:
    return text.casefold().replace("-", "_").replace(" ", "_")


@dataclass(frozen=True)
class Rows:
    """The rows of one split.

    Attributes:
        first: sentences.
        second: the other sentences; None for tasks of single sentences.
        labels: one number a row; UNLABELLED where there is none.
        name: where they come from, for messages.
        without: how a row says that it has no label, for messages.
    """

    first: list[str]
    second: list[str] | None
    labels: list[float]
    name: str
    without: str = "label -1 or null"

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> "Rows":
        """Return rows [start, stop)."""
        second = None if self.second is None else self.second[start:stop]
        return Rows(self.first[start:stop], second, self.labels[start:stop], f"{self.name}[{start}:{stop}]")

    def labelled(self) -> int:
        """Count the rows with a label."""
        return sum(not math.isnan(label) for label in self.labels)

    def fingerprint(self) -> str:
        """Return the sha256 over texts and labels."""
        digest = hashlib.sha256()
        for row in zip(self.first, self.second or [""] * len(self), self.labels, strict=True):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


class RowSource:
    """Where the splits of a task's parts lie: a folder, or a data set of the hub.

    Args:
        data: a folder, or a name such as facebook/xnli.

    Raises:
        UserError: neither a folder nor a data set's name.
    """

    def __init__(self, data: str):
        self.data = str(data)
        self.folder = Path(data) if Path(data).is_dir() else None
        self._found: dict[tuple[str, str], list[Path]] = {}
        if self.folder is None and (self.data.count("/") != 1 or self.data.startswith((".", "/"))):
            raise UserError(f"--data {data}: is not a folder, nor a data set's name such as facebook/xnli")
        if self.folder is None:
            require_on_hub(f"--data {data}", self.data, "dataset", "README.md")

    def has(self, part: str, split: str) -> bool:
        """Return whether a split is there."""
        if self.folder is None:
            return split in hub_splits(self.data, part)
        return bool(self._files(part, split))

    def read(self, part: str, split: str, columns: Columns, limit: int | None = None, unlabelled: bool = False) -> Rows:
        """Read the rows of a split, or the first `limit` of them.

        Args:
            part: a language or a task.
            split: of the part.
            columns: what a row holds.
            limit: how many rows at most.
            unlabelled: rows without a label are kept, not refused; the label's column may be absent.

        Raises:
            UserError: a missing, empty or damaged file, or a bad row (file and line are named).
        """
        reading = _Reading(columns, unlabelled)
        for rows, names in self._raw(part, split, columns.label_column):
            for row in rows:
                if limit is not None and len(reading.labels) >= limit:
                    break
                reading.add(row, names)
        return reading.rows(self.name(part, split))

    def classes(self, part: str, split: str, column: str) -> tuple[tuple[str, ...], bool]:
        """Find the classes of a split.

        Returns:
            Their names, and whether their order is that of numbers: as the file itself lists them; else they are
            sorted, and say nothing of numbers unless they are some.

        Args:
            part: language, task, or part of a data set.
            split: of the rows.
            column: that holds the labels.

        Raises:
            UserError: as `read`; a column that is absent, or whose values are not classes.
        """
        values: set[str] = set()
        for rows, names in self._raw(part, split, column):
            if names is not None:
                return names, True
            for where, number, row in rows:
                if not isinstance(row, dict) or column not in row:
                    raise UserError(f"{where}: line {number} has no column {column!r}{_found(row)}")
                text = spelling(row[column])
                if text is None:
                    raise UserError(f"{where}: line {number}: {column} is {_kind(row[column])}, not a class")
                values.add(text)
                if len(values) > MOST_CLASSES:
                    raise UserError(f"{where}: {column} has more than {MOST_CLASSES:,} values; it names no class")
        classes = values - {"", "-1"}
        if len(classes) < 2:
            found = f"one class ({', '.join(classes)})" if classes else "no class"
            raise UserError(f"{self.name(part, split)}: {column} holds {found}; at least two are needed")
        whole = all(_is_number(text) for text in classes)
        return tuple(sorted(classes, key=lambda text: (int(text) if whole else 0, text))), whole

    def fingerprint(self, part: str, split: str) -> str:
        """Return the sha256 of a split's file; of a hub data set, of what `datasets` calls its version."""
        if self.folder is None:
            return hashlib.sha256(f"{self.data} {part} {split} {hub_version(self.data)}".encode()).hexdigest()
        files = [sha256_file(path) for path in self._files(part, split)]
        assert files, "ask `has` first"
        return files[0] if len(files) == 1 else hashlib.sha256(" ".join(files).encode()).hexdigest()

    def name(self, part: str, split: str) -> str:
        """Return where a split lies, for messages."""
        if self.folder is None:
            return f"{self.data} {part} {split}"
        files = self._files(part, split)
        return str(files[0] if files else self.folder / part / split)

    def _raw(self, part: str, split: str, column: str) -> Iterator[tuple[Iterator[Row], tuple[str, ...] | None]]:
        """Yield the rows of each file of a split, with the class names that the file itself gives.

        Yields:
            (rows, names).

        Raises:
            UserError: there is no such file.
        """
        if self.folder is None:
            name = f"{self.data} {part} {split}"
            rows = ((name, number, row) for number, row in hub_rows(self.data, part, split))
            yield rows, hub_class_names(self.data, part, column)
            return
        files = self._files(part, split)
        if not files:
            wanted = self.folder / part / f"{split}.jsonl, .csv, .tsv (.gz, .xz, .zst, .bz2) or .parquet"
            raise UserError(f"{wanted}: is not there; {row_files.seen_in(self.folder / part)}")
        for path in files:
            yield row_files.read_rows(path), row_files.class_names(path, column)

    def _files(self, part: str, split: str) -> list[Path]:
        assert self.folder is not None
        if (part, split) not in self._found:
            self._found[part, split] = row_files.find_files(self.folder / part, split)
        return self._found[part, split]


class _Reading:
    """Rows being read and checked."""

    def __init__(self, columns: Columns, unlabelled: bool):
        self.columns, self.unlabelled = columns, unlabelled
        self.first: list[str] = []
        self.second: list[str] | None = [] if columns.second else None
        self.labels: list[float] = []
        self._expected: dict[str, Any] | None = None  # the first row
        self._first_without: tuple[Path | str, int, Any] | None = None
        self._without = 0  # rows without a label

    def add(self, row: Row, file_names: tuple[str, ...] | None) -> None:
        """Check a row and keep it.

        Raises:
            UserError: a bad row.
        """
        where, number, values = row
        texts, label = self._values(where, number, values)
        try:
            self.labels.append(self.columns.label(label, file_names))
        except ValueError as error:
            raise UserError(f"{where}: line {number}: {error}") from error
        if math.isnan(self.labels[-1]):
            self._without += 1
            self._first_without = self._first_without or (where, number, label)
        self.first.append(texts[0])
        if self.second is not None:
            self.second.append(texts[1])

    def _values(self, where: Path | str, number: int, row: Any) -> tuple[list[str], Any]:
        columns = self.columns
        if not isinstance(row, dict):
            raise UserError(f"{where}: line {number} is not a JSON object with {', '.join(columns.names())}")
        needed = columns.names()[:-1] if self.unlabelled else columns.names()
        missing = [column for column in needed if column not in row]
        if missing:
            raise UserError(
                f"{where}: line {number} has no column {missing[0]!r}; every row needs {', '.join(needed)}{_found(row)}"
            )
        self._expected = self._expected or row
        if set(row) != set(self._expected):
            raise UserError(
                f"{where}: line {number} has {len(row)} columns, the first row {len(self._expected)}; fix the file"
            )
        texts = [_text(where, number, column, row[column]) for column in columns.names()[:-1]]
        return texts, row.get(columns.label_column)

    def rows(self, name: str) -> Rows:
        """Return all rows.

        Raises:
            UserError: there are none, or rows without a label that must have one.
        """
        if not self.labels:
            raise UserError(f"{name}: holds no rows")
        if self._first_without is not None and not self.unlabelled:
            where, number, label = self._first_without
            text = spelling(label)
            otherwise = ", or say which class it is (--label-map=-1=CLASS, or --classes)" if text == "-1" else ""
            raise UserError(
                f"{where}: line {number}: label {text or 'null'} stands for an unlabelled row, which cannot be learnt "
                f"from or selected on; remove it{otherwise} ({self._without:,} of {len(self.labels):,} rows are such)"
            )
        column, present = self.columns.label_column, self._expected or {}
        if column in present:
            return Rows(self.first, self.second, self.labels, name)
        return Rows(self.first, self.second, self.labels, name, f"no column {column!r}{_found(present)}")


def _text(where: Path | str, number: int, column: str, text: Any) -> str:
    """Return the text of a column.

    Raises:
        UserError: it is not text, or far too long.
    """
    if isinstance(text, bytes):  # of a Parquet file
        try:
            text = text.decode()
        except UnicodeDecodeError:
            raise UserError(f"{where}: line {number}: {column} is not UTF-8") from None
    if not isinstance(text, str):
        raise UserError(f"{where}: line {number}: {column} is {_kind(text)}, not text")
    if len(text) > row_files.LONGEST_LINE:
        raise UserError(f"{where}: line {number}: {column} has {len(text):,} characters; not a row of a task")
    return text.encode("utf-8", "replace").decode()  # JSON can spell halves of characters


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _found(row: Any) -> str:
    if not isinstance(row, dict):
        return ""
    names = [str(name)[:30] for name in row]
    return f"; found {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
