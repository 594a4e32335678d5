"""A file of text among those of a language."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.common.files import sha256_file


def printable(path: str | Path) -> str:
    """Return a path as text that UTF-8 can hold; bytes of a name that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


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
