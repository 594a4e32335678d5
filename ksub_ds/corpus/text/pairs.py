"""Parallel text: files of pairs, a sentence and its translation a row.

    <l1>-<l2>.jsonl  <l1>-<l2>.json         each also with .gz .xz .zst .bz2
    <l1>-<l2>.parquet  <l1>-<l2>.arrow
    <l1>-<l2>/...                           any of these, under any name

    {"translation": {"en": "a house", "sw": "nyumba"}}      as in opus100 and wmt
    {"en": "a house", "sw": "nyumba"}

In a table the keys are columns, and "translation" is one of structs.

The order of the two languages means nothing, in a name and in a row: sw-en.jsonl holds the pair that en-sw.jsonl does,
and goes with it. Files are found and read as all text is (sources.py, reader.py), with the same limits and counts.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow

from ksub_ds.common.errors import UserError
from ksub_ds.common.languages import is_common, language_name, standard_code
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.text.file_content import FileContent
from ksub_ds.corpus.text.json_text import json_values
from ksub_ds.corpus.text.layout import KEYS_SHOWN, TRANSLATION
from ksub_ds.corpus.text.reader import SourceReader, rejection_reason
from ksub_ds.corpus.text.skipped import Skipped, shown
from ksub_ds.corpus.text.sources import LanguageText, text_below
from ksub_ds.corpus.text.tables import holds_text, is_table, table_rows
from ksub_ds.corpus.text.text_files import (
    ARROW,
    PAPERS,
    PARQUET,
    is_hidden,
    parse_text_name,
    printable,
    without_split,
)

FORMS = (".jsonl", ".json", PARQUET, ARROW)

Pair = tuple[str, str]


def pair_of_name(first: str) -> Pair | None:
    """Return the two languages that a name stands for, in alphabetical order; None if there are none.

    Where a name can be cut in several ways, regions in capital letters decide (pt-BR-en), then common codes (zh-cn-en).

    Args:
        first: up to the first dot; words of a split and numbers of shards are left out: en-sw-train is en and sw.
    """
    words = without_split(first).split("-")
    cuts = [("-".join(words[:at]), "-".join(words[at:])) for at in range(1, len(words))]
    cuts = [cut for cut in cuts if all(language_name(side) is not None for side in cut)]
    for better in (lambda side: side[:2].islower(), is_common):
        best = [cut for cut in cuts if all(map(better, cut))]
        cuts = best or cuts
    if len(cuts) != 1:
        return None
    one, two = sorted(language_name(side) or side for side in cuts[0])
    return (one, two) if standard_code(one) != standard_code(two) else None


def find_pairs(
    folder: Path, splits: tuple[str, ...] | None = None, others: Skipped | None = None
) -> dict[Pair, LanguageText]:
    """Find the parallel text below a folder.

    Args:
        folder: of the files.
        splits: as of `find_text`.
        others: where entries of the folder that are not parallel text are counted.

    Returns:
        The text by pair of languages, sorted.

    Raises:
        UserError: no folder, no pair, a language in two spellings, a link leads nowhere, or a file and its compressed
            form differ.
    """
    if not folder.is_dir():
        raise UserError(f"--parallel {folder}: is not a folder; give the folder that holds <l1>-<l2>.jsonl or .parquet")
    others = Skipped() if others is None else others
    entries: dict[Pair, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        name = printable(entry.name)
        if is_hidden(entry.name):
            others.add("hidden", name)
            continue
        first, dot, _ = entry.name.partition(".")
        pair, parts = pair_of_name(first), parse_text_name(entry.name)
        is_form = not dot if entry.is_dir() else parts is not None and parts.form in FORMS
        if pair is not None and is_form:
            entries.setdefault(pair, []).append(entry)
        elif PAPERS.fullmatch(entry.name) and parts is None:
            others.add("not_data", name)
        else:
            why = f"its name is not <l1>-<l2>{FORMS[0]} or <l1>-<l2>/, of two languages"
            if pair is not None and not entry.is_dir():
                why += f": suffix {entry.suffix or 'none'} is not read"
            others.add("no_language", f"{name}: {why}")
            get_logger().info(f"{printable(entry)}: left out, {why}")
    if not entries:
        found = f"; it holds: {', '.join(others.lines())}" if others.total() else ""
        raise UserError(f"--parallel {folder}: holds no pair; name the files <l1>-<l2>.jsonl[.gz] or .parquet{found}")
    _check_spellings(folder, entries)
    return {pair: text_below(entries[pair], folder, splits) for pair in sorted(entries)}


def _check_spellings(folder: Path, entries: dict[Pair, list[Path]]) -> None:
    """Check that each language has one name in all pairs.

    Raises:
        UserError: one has two.
    """
    names: dict[str, tuple[str, Path]] = {}
    for pair, paths in entries.items():
        for language in pair:
            name, path = names.setdefault(standard_code(language), (language, paths[0]))
            if name != language:
                raise UserError(
                    f"{printable(folder)}: {printable(path.name)} and {printable(paths[0].name)} spell one language "
                    f"{name} and {language}; rename one"
                )


class PairReader(SourceReader[Pair]):
    """Iterates over the pairs of the files of two languages, the side of the first language first.

    Args:
        text: the files; what is left out is counted in its `skipped`.
        pair: the languages.
    """

    def __init__(self, text: LanguageText, pair: Pair):
        super().__init__(text.sources, text.skipped)
        self._pair = pair

    def _values(self, raw: IO[bytes], source: Any) -> Iterator[Any]:
        file = FileContent(raw, source.path, source.name, self.skipped)
        if file.form not in FORMS or not file.is_text:
            file.add("not_the_file", f"parallel text is read from {', '.join(FORMS)} only", place=False)
            return
        if is_table(file):
            values: Iterable[Any] = table_rows(raw, source.path, file, lambda schema: self._columns(schema, file))
        else:
            values = json_values(file)
        for value in values:
            row = value.get(TRANSLATION, value) if isinstance(value, Mapping) else None
            if isinstance(row, Mapping):
                yield row, file
            else:
                sides = " and of ".join(self._pair)
                file.add("no_pair", f'not an object with a text of {sides}, nor with "{TRANSLATION}"')

    def _columns(self, schema: pyarrow.Schema, file: FileContent) -> list[str]:
        """Return the columns of a table that hold the sides; count the file and return nothing if there are none."""
        sides = {standard_code(language) for language in self._pair}
        plain = [name for name in schema.names if standard_code(name) in sides]
        found = [TRANSLATION] if TRANSLATION in schema.names else plain
        wrong = next((column for column in schema if column.name in found and not _holds_sides(column, sides)), None)
        if not found:
            names = ", ".join(map(shown, schema.names[:KEYS_SHOWN])) or "nothing"
            file.add("no_text_column", f'no "{TRANSLATION}", no {" or ".join(self._pair)}, only {names}')
        elif wrong is not None:
            file.add("no_text_column", f'column "{shown(wrong.name)}" holds {shown(str(wrong.type))}, not text')
        return found if wrong is None else []

    def _usable(self, values: Iterable[Any], name: str) -> Iterator[Pair]:
        for row, file in values:
            one = self._side(row, self._pair[0], file)
            two = None if one is None else self._side(row, self._pair[1], file)  # a row is counted once
            if one is not None and two is not None:
                yield one, two

    def _side(self, row: Mapping[str, Any], language: str, file: FileContent) -> str | None:
        """Return one side of a row; None if it cannot be used, which is counted."""
        key = language if language in row else None
        key = key or next((key for key in row if standard_code(key) == standard_code(language)), None)
        text = None if key is None else row[key]
        if isinstance(text, str):
            reason = rejection_reason(text)
            if reason is None:
                return text
            file.add(reason, f'"{shown(str(key))}" has {len(text):,} characters')
        elif text is None:
            keys = ", ".join(map(shown, list(row)[:KEYS_SHOWN])) or "nothing"
            found = f'no "{language}", only {keys}' if key is None else f'"{shown(key)}" is null'
            file.add("missing_side", found)
        else:
            file.add("no_text_key", f'"{shown(str(key))}" holds no string')
        return None


def _holds_sides(column: pyarrow.Field, sides: set[str]) -> bool:
    """Return whether a table's column holds text, or structs of text.

    Other fields of a struct are read along with the sides: lists, which take any memory, are refused.
    """
    if column.name != TRANSLATION:
        return holds_text(column.type) or pyarrow.types.is_null(column.type)
    if not pyarrow.types.is_struct(column.type):
        return False
    fields = [column.type.field(index) for index in range(column.type.num_fields)]
    return all(
        holds_text(field.type)
        or pyarrow.types.is_null(field.type)
        or (standard_code(field.name) not in sides and pyarrow.types.is_primitive(field.type))
        for field in fields
    )
