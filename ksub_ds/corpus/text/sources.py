"""Finding the text of each language below a folder.

    <lang>.jsonl  <lang>.json  <lang>.txt  <lang>.parquet  <lang>.arrow     each also with .gz .xz .zst .bz2
    <lang>/...                                                              any of these, under any name

    <lang> is a code: en, zh-Hant, rus_Cyrl (common/languages.py)

text_files.py knows which files a folder holds and what a name says, copies.py which of them are there twice. hub.py
opens data sets by name; reader.py reads both.
"""

import hashlib
import string
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.common.errors import UserError
from ksub_ds.common.languages import is_common, standard_code
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.text.copies import without_copies
from ksub_ds.corpus.text.hub import DatasetSource
from ksub_ds.corpus.text.saved import is_saved
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.text.text_files import (
    PAPERS,
    SPLIT_OF,
    TextFile,
    is_hidden,
    language_of_name,
    link_target,
    parse_text_name,
    printable,
    split_of_words,
    text_files_below,
    utf8_name,
)


@dataclass
class LanguageText:
    """The sources of one language, and how many files and documents were skipped, by reason."""

    sources: list[TextFile | DatasetSource]
    skipped: Skipped

    def fingerprint(self) -> str:
        """Return the sha256 of the names and contents of all sources."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(f"{source.name}\0{source.digest}\n".encode())
        return digest.hexdigest()

    def size(self) -> int:
        """Return the bytes of all sources: of files on the disk, of data sets as text."""
        return sum(source.size for source in self.sources)


def find_text(
    folder: Path,
    languages: tuple[str, ...] = (),
    flag: str = "--input",
    splits: tuple[str, ...] | None = None,
    others: Skipped | None = None,
) -> dict[str, LanguageText]:
    """Find the text of each language below a folder.

    Args:
        folder: of the text.
        languages: to take, in any spelling; empty = all.
        flag: the option that names the folder, for messages.
        splits: "train", "validation", "test": of files whose names say a split, those to take, and a name without
            one says train; () = train, but tell of the others; None = whatever the names say.
        others: where entries of the folder that belong to no language are counted.

    Returns:
        The text by language, sorted.

    Raises:
        UserError: no folder, no language, one of `languages` is missing or is there in two spellings, a link leads
            nowhere, or a file and its compressed form differ.
    """
    if not folder.is_dir():
        raise UserError(
            f"{flag} {folder}: is not a folder; give the folder that holds <lang>.jsonl, <lang>.txt or <lang>/"
        )
    if is_saved(folder):
        raise UserError(f"{flag} {folder}: is a data set that save_to_disk wrote; give it as --datasets {folder}")
    others = Skipped() if others is None else others
    asked = {standard_code(language): language for language in languages}
    entries = _entries(folder, set(asked), others)
    if not entries:
        found = f"; it holds: {', '.join(others.lines())}" if others.total() else ""
        raise UserError(
            f"{flag} {folder}: holds no language; name the files <lang>.jsonl[.gz], <lang>.txt[.gz] or <lang>/{found}"
        )
    for code, language in sorted(asked.items()):
        if code not in entries:
            there = ", ".join(sorted({name for same in entries.values() for name, _ in same}))
            raise UserError(f"--languages {language}: {folder} holds no such language, only {there}")
    text: dict[str, LanguageText] = {}
    for code, same in entries.items():
        if not asked or code in asked:
            text[_one_name(folder, same)] = text_below([entry for _, entry in same], folder, splits)
    uncommon = [language for language in text if not is_common(language) and language not in asked.values()]
    if uncommon:
        get_logger().info(f"{printable(folder)}: read as languages, though not common codes: {', '.join(uncommon)}")
    _tell_of_shared_files(text)
    if others.counts["hidden"]:
        get_logger().info(
            f"{folder}: hidden names left out: {others.counts['hidden']:,} ({others.examples['hidden']}...)"
        )
    return text


def _entries(folder: Path, asked: set[str], others: Skipped) -> dict[str, list[tuple[str, Path]]]:
    """Return the entries of each language, by its standard code, each with the language's name as the entry has it."""
    entries: dict[str, list[tuple[str, Path]]] = {}
    for entry in sorted(folder.iterdir()):
        shown = printable(entry.name)
        if is_hidden(entry.name):
            others.add("hidden", shown)
            continue
        first, dot, _ = entry.name.partition(".")
        language = language_of_name(first)
        is_folder = entry.is_dir() or (not dot and language is not None and link_target(entry) is not None)
        is_text = not dot if is_folder else parse_text_name(entry.name) is not None
        if language is not None and is_text and (language not in SPLIT_OF or language in asked):
            entries.setdefault(standard_code(language), []).append((language, entry))
        elif PAPERS.fullmatch(entry.name) and not is_text:
            others.add("not_data", shown)
        else:
            why = "its name is not <lang>.jsonl, <lang>.txt or <lang>/"
            if language in SPLIT_OF and is_text:
                why = f"its name is that of a split; put it in <lang>/, or give --languages {language} for the language"
            elif language is not None and not is_folder:
                why += f": suffix {entry.suffix or 'none'} is not read"
            others.add("no_language", f"{shown}: {why}")
            get_logger().info(f"{printable(entry)}: left out, {why}")
    return entries


def _one_name(folder: Path, same: list[tuple[str, Path]]) -> str:
    """Return the one name that a language's entries agree on.

    Raises:
        UserError: there are two.
    """
    entries = {name: printable(entry.name) for name, entry in same}
    if len(entries) > 1:
        raise UserError(
            f"{printable(folder)}: {' and '.join(entries.values())} are one language in two spellings; rename one"
        )
    (name,) = entries
    others = [printable(entry.name) for _, entry in same if entry.name.partition(".")[0] != name]
    if others:
        get_logger().info(f"{', '.join(others)}: read as language {name}")
    return name


def text_below(entries: list[Path], folder: Path, splits: tuple[str, ...] | None) -> LanguageText:
    """Return the text files of some entries of a folder, without copies, as one text.

    Args:
        entries: files, and folders of files.
        folder: where they lie; names are relative to it.
        splits: as of `find_text`.

    Raises:
        UserError: a link leads nowhere, or a file and its compressed form differ.
    """
    skipped, files = Skipped(), []
    for entry in entries:
        for path in text_files_below(entry, folder, skipped):
            file = TextFile(path, utf8_name(path.relative_to(folder).as_posix()))
            split = _split_of(path.relative_to(folder))
            if splits is None or (split or "train") in (splits or ("train",)):
                files.append(file)
            elif splits:
                skipped.add("other_split", f"{printable(file.name)}: {split or 'train, as its name says no split'}")
            else:
                skipped.add(
                    "held_out_split",
                    f"{printable(file.name)}: {split} text by its name; --splits train {split} takes it too",
                )
    _tell_of_links(files, folder)
    return LanguageText([*without_copies(files, skipped)], skipped)


def _split_of(path: Path) -> str | None:
    """Return the split that the words of a path name, below the input folder; the language's code is none of them."""
    name = parse_text_name(path.name)
    words = [*path.parts[:-1], name.stem if name else path.name]
    words[0] = words[0].lstrip(string.ascii_letters)
    return split_of_words(" ".join(words))


def _tell_of_links(files: list[TextFile], folder: Path) -> None:
    root = folder.resolve()
    ends = [(file, file.path.resolve()) for file in files]
    outside = [(file, end) for file, end in ends if not end.is_relative_to(root)]
    if outside:
        file, end = outside[0]
        first = f"{printable(file.name)} is {printable(end)}"
        get_logger().info(f"files read through links out of the folder: {len(outside):,} (first: {first})")


def _tell_of_shared_files(text: dict[str, LanguageText]) -> None:
    """Warn of files that two languages share by links."""
    seen: dict[tuple[int, int], tuple[str, str]] = {}
    for language, entry in text.items():
        for file in entry.sources:
            if isinstance(file, TextFile):
                status = file.path.stat()
                other, name = seen.setdefault((status.st_dev, status.st_ino), (language, file.name))
                if other != language:
                    get_logger().info(
                        f"warning: {printable(file.name)} and {printable(name)} are one file, read as two languages"
                    )
