"""The text files below the folder of a language, and what their names say: form, compression, split, language.

    en.train.jsonl.gz          en, train, .jsonl, gzip
    en/test-00000-of-00001.parquet
    rus_Cyrl/                  ru

Files come in a fixed order, and every other file is counted. Links are followed, each folder is visited once, and a
link that leads nowhere is refused. Hidden names are left out at every depth. In a folder that `datasets` saved
(saved.py) the data files are those that it names.
"""

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ksub_ds.common.compression import SUFFIXES as COMPRESSIONS
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_file
from ksub_ds.common.languages import language_name
from ksub_ds.corpus.text.saved import CACHE, DESCRIPTION, SPLITS, STATE, is_saved, saved_files
from ksub_ds.corpus.text.skipped import Skipped

PARQUET, ARROW = ".parquet", ".arrow"
FORMS = (".jsonl", ".json", ".txt", PARQUET, ARROW)

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel", "eval", "heldout", "holdout"),
    "test": ("test", "testing", "devtest"),
}
SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_SHARD_NUMBER = re.compile(r"[-_](\d+[-_]of[-_]\d+|\d{4,})$")  # en-00000-of-00002; 3 digits may be a region
_SPLIT_SUBTAG = re.compile(rf"[-_]({'|'.join(SPLIT_OF)})(?![^-_])", re.IGNORECASE)

# Of any collection of files; their absence from the text surprises nobody.
PAPERS = re.compile(r"(README|LICEN[CS]E|NOTICE|CHANGELOG|CITATION)(\.\w+)?|.*\.md|_SUCCESS", re.IGNORECASE)
_KERNEL = ("/proc", "/sys")  # regular files without an end
_LONGEST_LINK = 1000  # bytes


class TextName(NamedTuple):
    """The parts of a text file's name: `form` is one of FORMS; `compression` a suffix in small letters, or ""."""

    stem: str
    form: str
    compression: str


def parse_text_name(name: str) -> TextName | None:
    """Return the parts of a text file's name; None for other files.

    Args:
        name: of a file, suffixes in letters of any case.
    """
    plain, compression = name, ""
    suffix = "." + name.rpartition(".")[2].lower()
    if suffix in COMPRESSIONS:
        plain, compression = name[: -len(suffix)], suffix
    stem, dot, form = plain.rpartition(".")
    return TextName(stem, "." + form.lower(), compression) if dot and "." + form.lower() in FORMS else None


def is_hidden(name: str) -> bool:
    """Return whether a name is one that systems and editors keep out of sight, or the folder of such names in a zip."""
    return name.startswith(".") or name == "__MACOSX"


def split_of_words(text: str) -> str | None:
    """Return the split, "train", "validation" or "test", that a word of a name stands for; the last such word counts.

    Args:
        text: names, without the suffixes of their form.
    """
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", text)]
    return next((SPLIT_OF[word] for word in reversed(words) if word in SPLIT_OF), None)


def language_of_name(first: str) -> str | None:
    """Return the name of the language that the first part of a file's or folder's name stands for, or None.

    Args:
        first: up to the first dot; words of a split and numbers of shards are left out: en-test-00000-of-00002 is en.
    """
    return language_name(without_split(first))


def without_split(first: str) -> str:
    """Return the first part of a name without words of a split and numbers of shards.

    Args:
        first: up to the first dot.
    """
    return _SHARD_NUMBER.sub("", _SPLIT_SUBTAG.sub("", first))


def utf8_name(path: str | Path) -> str:
    """Return a path as text that UTF-8 can hold; bytes of a name that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def printable(path: str | Path) -> str:
    """Return a path for a line of the log: as `utf8_name`, control characters escaped too."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in utf8_name(path))


@dataclass(frozen=True)
class TextFile:
    """One text file and its name below the input folder; bytes of a name that are not UTF-8 are escaped in `name`."""

    path: Path
    name: str

    @functools.cached_property
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


def link_target(path: Path) -> str | None:
    """Return where a link leads, in its own words; None for what is not a link.

    A small file that holds nothing but the path of another file is a link too: so git, zip and copies to Windows leave
    them.

    Args:
        path: any.
    """
    if path.is_symlink():
        return printable(path.readlink())
    if not path.is_file() or not 0 < path.stat().st_size <= _LONGEST_LINK:
        return None
    try:
        target = os.fsdecode(path.read_bytes()).strip()
        named = "/" in target and "//" not in target and target.isprintable()
        return target if named and (path.parent / target).exists() else None
    except OSError:  # unreadable, or too long for a path
        return None


def check_link(path: Path) -> None:
    """Check that a path, if it is a link, leads to something to read.

    Args:
        path: any.

    Raises:
        UserError: it is a link that leads nowhere, in a circle, to files of the kernel, or was unpacked as text.
    """
    target = link_target(path)
    if target is None:
        return
    where = f"{printable(path)}: is a link to {target}"
    if not path.is_symlink():
        raise UserError(f"{where} that was copied as text; copy it again with links (cp -a, git core.symlinks)")
    if not path.exists():
        raise UserError(f"{where}, which is not there; mount or copy it, or remove the link")
    end = path.resolve()
    if any(end.is_relative_to(folder) for folder in _KERNEL):
        raise UserError(f"{where}, files of the kernel; remove the link")
    if path.is_dir() and path.parent.resolve().is_relative_to(end):
        raise UserError(f"{where}, a folder that it lies in; remove the link")


def text_files_below(top: Path, root: Path, skipped: Skipped) -> list[Path]:
    """Return the text files below a folder, sorted.

    Args:
        top: the folder of a language, or a text file, which is then all there is.
        root: the input folder; names in messages are relative to it.
        skipped: where everything else is counted.

    Raises:
        UserError: a link leads nowhere or in a circle, or a file of a saved data set is missing.
    """
    check_link(top)
    if top.is_dir():
        walk = FolderWalk(root, skipped)
        names = _TextNames(walk)
        return sorted(path for path in walk.files(top) if names.is_text(path))
    if not top.is_file():
        skipped.add("not_a_regular_file", printable(top.relative_to(root)))
        return []
    return [top]


class FolderWalk:
    """Goes through folders: links are followed, each folder is visited once, hidden names are left out and counted.

    Args:
        root: names in messages are relative to it.
        skipped: where what is left out is counted.
    """

    def __init__(self, root: Path, skipped: Skipped):
        self._root, self._skipped = root, skipped

    def files(self, top: Path) -> Iterator[Path]:
        """Yield whatever lies below a folder and is not a folder, in a fixed order.

        Args:
            top: the folder.

        Raises:
            UserError: a link leads nowhere or in a circle.
        """
        folders, links, visited = [top], list[Path](), set[tuple[int, int]]()
        while folders or links:
            # Folders before links, so that a file has its own name and not the one that a link gives it.
            folder = folders.pop() if folders else links.pop(0)
            status = folder.stat()
            if (status.st_dev, status.st_ino) in visited:
                self.count("same_folder", folder, f"is {printable(folder.resolve())} once more")
                continue
            visited.add((status.st_dev, status.st_ino))
            try:
                paths = sorted(folder.iterdir())
            except OSError as error:
                self.count("unreadable_folder", folder, error.strerror or "")
                continue
            for path in paths:
                if is_hidden(path.name):
                    self.count("hidden", path)
                    continue
                check_link(path)
                if path.is_dir():
                    (links if path.is_symlink() else folders).append(path)
                else:
                    yield path

    def count(self, reason: str, path: Path, found: str = "") -> None:
        """Count a path that is left out.

        Args:
            reason: a key of the counts.
            path: below the root.
            found: what it is, in words.
        """
        name = printable(path.relative_to(self._root))
        self._skipped.add(reason, f"{name}: {found}" if found else name)


class _TextNames:
    def __init__(self, walk: FolderWalk):
        self._count = walk.count
        self._data = dict[Path, set[Path] | None]()  # of each folder

    def _data_files(self, folder: Path) -> set[Path] | None:
        """Return the data files that a saved data set names; None in other folders."""
        if folder not in self._data:
            saved = (folder / STATE).is_file() and is_saved(folder)
            self._data[folder] = set(saved_files(folder)) if saved else None
        return self._data[folder]

    def is_text(self, path: Path) -> bool:
        """Return whether a file is text to read; count it if it is not."""
        data = self._data_files(path.parent)
        if data is not None and path in data:
            return True
        describes = data is not None and path.name in (STATE, DESCRIPTION)
        paper = PAPERS.fullmatch(path.name) and parse_text_name(path.name) is None
        if describes or paper or (path.name == SPLITS and is_saved(path.parent)):
            self._count("not_data", path)
        elif CACHE.fullmatch(path.name):
            self._count("cache", path, "what map() or filter() of datasets left there")
        elif data is not None:
            self._count("not_in_state_json", path, f"{STATE} beside it does not name it")
        elif parse_text_name(path.name) is None:
            self._count("other_suffix", path, f"suffix {printable(path.suffix) or 'none'}")
        elif not path.is_file():
            self._count("not_a_regular_file", path)
        else:
            return True
        return False
