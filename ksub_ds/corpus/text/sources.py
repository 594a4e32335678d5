"""Finding the text of each language below a folder.

    <lang>.jsonl[.gz]  <lang>.json[.gz]  <lang>.txt[.gz]  <lang>.parquet
    <lang>/...                                           any of these, under any name

hub.py opens data sets by name; reader.py reads both.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePath

from ksub_ds.common.compression import SUFFIXES as COMPRESSED
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_file
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.shards.dataset import LANGUAGE_CODE
from ksub_ds.corpus.text.hub import DatasetSource
from ksub_ds.corpus.text.saved import is_saved, saved_files
from ksub_ds.corpus.text.skipped import Skipped

SUFFIXES = (".jsonl", ".json", ".txt")
PARQUET, ARROW = ".parquet", ".arrow"


@dataclass(frozen=True)
class TextFile:
    """One text file and its name below the input folder."""

    path: Path
    name: str

    @property
    def digest(self) -> str:
        """sha256 of the content; "" if the file cannot be read, which the reader counts."""
        try:
            return sha256_file(self.path)
        except OSError:
            return ""

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.path.stat().st_size


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


def find_text(folder: Path, languages: tuple[str, ...] = (), flag: str = "--input") -> dict[str, LanguageText]:
    """Find the text of each language below a folder.

    Args:
        folder: of the text.
        languages: to take; empty = all.
        flag: the option that names the folder, for messages.

    Returns:
        The text by language, sorted.

    Raises:
        UserError: no folder, no language, or one of `languages` is missing.
    """
    if not folder.is_dir():
        raise UserError(
            f"{flag} {folder}: is not a folder; give the folder that holds <lang>.jsonl, <lang>.txt or <lang>/"
        )
    found: dict[str, LanguageText] = {}
    others: list[str] = []
    root = folder.resolve()
    for entry in sorted(folder.iterdir()):
        language = entry.name.split(".")[0]
        wanted = LANGUAGE_CODE.fullmatch(language) and (entry.is_dir() or _is_text_name(entry.name))
        if not wanted or (entry.is_dir() and "." in entry.name):
            if not entry.name.startswith("."):
                get_logger().info(f"{entry}: left out, its name is not <lang>.jsonl, <lang>.txt or <lang>/")
            continue
        if languages and language not in languages:
            others.append(language)
            continue
        text = found.setdefault(language, LanguageText([], Skipped()))
        for path in _files_below(entry, text.skipped):
            if not path.resolve().is_relative_to(root):
                text.skipped.add("link_out_of_the_folder")
            elif not path.is_file():
                text.skipped.add("not_a_regular_file")
            else:
                text.sources.append(TextFile(path, path.relative_to(folder).as_posix()))
    if not found and not others:
        raise UserError(
            f"{flag} {folder}: holds no language; name the files <lang>.jsonl[.gz], <lang>.txt[.gz] or <lang>/"
        )
    missing = sorted(set(languages) - set(found))
    if missing:
        there = ", ".join(sorted({*found, *others}))
        raise UserError(f"--languages {missing[0]}: {folder} holds no such language, only {there}")
    return found


def _is_text_name(name: str) -> bool:
    path = PurePath(name.lower())
    return (path.stem if path.suffix in COMPRESSED else path.name).endswith((*SUFFIXES, PARQUET, ARROW))


def _files_below(entry: Path, skipped: Skipped) -> list[Path]:
    if not entry.is_dir():
        return [entry]
    if entry.is_symlink():
        skipped.add("linked_folder")
        return []
    paths = []
    for parent, folders, names in os.walk(entry):
        for name in folders:
            if (Path(parent) / name).is_symlink():
                skipped.add("linked_folder")
        if is_saved(Path(parent)):
            paths += saved_files(Path(parent))
            folders.clear()
            continue
        paths += [Path(parent) / name for name in names if _is_text_name(name)]
    return sorted(paths)
