"""The text files below the folder of a language, in a fixed order; every other file is counted.

Links are followed, each folder is visited once, and a link that leads nowhere is refused. Hidden names are left out at
every depth. In a folder that `datasets` saved (saved.py) the data files are those that it names.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.text.names import is_hidden, parse_text_name
from ksub_ds.corpus.text.saved import SPLITS, STATE, is_saved, saved_files
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.text.text_file import printable

DESCRIPTION = "dataset_info.json"  # `datasets` writes it beside the data
CACHE = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")  # what map() and filter() of `datasets` leave there
# Of any collection of files; their absence from the text surprises nobody.
PAPERS = re.compile(r"(README|LICEN[CS]E|NOTICE|CHANGELOG|CITATION)(\.\w+)?|.*\.md|_SUCCESS", re.IGNORECASE)
_KERNEL = ("/proc", "/sys")  # regular files without an end
_LONGEST_LINK = 1000  # bytes


def link_target(path: Path) -> str | None:
    """Return where a link leads, in its own words; None for what is no link.

    A small file that holds nothing but the path of another file is a link too: so git, zip and copies to Windows leave
    them.

    Args:
        path: any.
    """
    if path.is_symlink():
        return printable(path.readlink())
    if not path.is_file() or not 0 < path.stat().st_size <= _LONGEST_LINK:
        return None
    target = os.fsdecode(path.read_bytes()).strip()
    try:
        named = "/" in target and "//" not in target and target.isprintable()
        return target if named and (path.parent / target).exists() else None
    except OSError:  # too long for a path
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
        return sorted(_Walk(root, skipped).files(top))
    if not top.is_file():
        skipped.add("not_a_regular_file", printable(top.relative_to(root)))
        return []
    return [top]


class _Walk:
    def __init__(self, root: Path, skipped: Skipped):
        self._root, self._skipped = root, skipped

    def files(self, top: Path) -> Iterator[Path]:
        folders, links, visited = [top], list[Path](), set[tuple[int, int]]()
        while folders or links:
            # Folders before links, so that a file has its own name and not the one that a link gives it.
            folder = folders.pop() if folders else links.pop(0)
            status = folder.stat()
            if (status.st_dev, status.st_ino) in visited:
                self._count("same_folder", folder, f"is {printable(folder.resolve())} once more")
                continue
            visited.add((status.st_dev, status.st_ino))
            try:
                paths = sorted(folder.iterdir())
            except OSError as error:
                self._count("unreadable_folder", folder, error.strerror or "")
                continue
            data = self._data_files(folder)
            for path in paths:
                if is_hidden(path.name):
                    self._count("hidden", path)
                    continue
                check_link(path)
                if path.is_dir():
                    (links if path.is_symlink() else folders).append(path)
                elif self._is_text(path, data):
                    yield path

    def _data_files(self, folder: Path) -> set[Path] | None:
        """Return the data files that a saved data set names; None in other folders."""
        return set(saved_files(folder)) if (folder / STATE).is_file() and is_saved(folder) else None

    def _is_text(self, path: Path, data: set[Path] | None) -> bool:
        """Return whether a file is text to read; count it if it is not."""
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

    def _count(self, reason: str, path: Path, found: str = "") -> None:
        name = printable(path.relative_to(self._root))
        self._skipped.add(reason, f"{name}: {found}" if found else name)
