"""The WET files of a run, in the order that everything follows."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger

SUFFIXES = (".gz", ".wet", ".warc")


class WetFile(NamedTuple):
    """One input file. `name` is what the report calls it; size in bytes, modified in ns."""

    path: Path
    name: str
    size: int
    modified: int


def find_wet_files(inputs: Sequence[Path]) -> list[WetFile]:
    """The WET files among files and below folders, sorted by name (for folders: the path below them).

    Raises:
        UserError: an input that is not there, no file at all, or two files of one name.
    """
    found: dict[str, Path] = {}
    for entry in inputs:
        if entry.is_dir():
            paths = _below(entry)
        elif entry.is_file():
            paths = {entry.name: entry}
        else:
            raise UserError(f"--input {entry}: no such file or folder; give WET files or the folders that hold them")
        for name, path in paths.items():
            if name in found and not path.samefile(found[name]):
                raise UserError(
                    f"--input {path}: {found[name]} has the same name; rename one, or give the folder above"
                )
            found[name] = path
    if not found:
        where = " ".join(map(str, inputs))
        raise UserError(f"--input {where}: holds no WET file (*.warc.wet.gz, or any of *{', *'.join(SUFFIXES)})")
    return [describe(path, name) for name, path in sorted(found.items())]


def describe(path: Path, name: str) -> WetFile:
    """A file by its path, with its size and time; a file that cannot be looked at has neither."""
    shown = os.fsencode(name).decode("utf-8", "backslashreplace")
    try:
        status = path.stat()
    except OSError:
        return WetFile(path, shown, 0, 0)
    return WetFile(path, shown, status.st_size, status.st_mtime_ns)


def _below(folder: Path) -> dict[str, Path]:
    paths, others = {}, 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            # No pipe and no device, however it is named: reading one would never end.
            if name.endswith(SUFFIXES) and not name.startswith(".") and path.is_file():
                paths[path.relative_to(folder).as_posix()] = path
            else:
                others += 1
    if others:
        get_logger().info(f"{folder}: {others:,} other files left out (not *{', *'.join(SUFFIXES)})")
    return paths
