"""A file of text among those of a language."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.common.files import sha256_file


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
