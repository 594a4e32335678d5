"""Atomic writes, which leave a file either whole or absent, and reads with a clear error.

Every file that must be whole is written through here (logs and metrics are appended): a temporary
name in the same folder, fsync, rename, fsync of the folder. A kill at any moment leaves the old file
or the new one. What may stand in the place of a folder that a command makes is asked before the long work
(`check_output_folder`).
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.lock import try_lock

TEMPORARY_SUFFIX = ".partial"
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.(partial|old)")  # names that only a killed process leaves
NOT_LOCKED_YET = 1.0  # seconds: the age at which a temporary folder has the lock of its writer


def fsync_path(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _allow_as_umask(path: Path) -> None:
    """Let others read a file as the umask says: safetensors writes with mode 0600 whatever the umask is.

    Permissions are only added. A file system that refuses to change them keeps its own.
    """
    mask = os.umask(0o077)  # there is no way to ask for it without setting it
    os.umask(mask)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode | (0o666 & ~mask) != mode:
        with contextlib.suppress(PermissionError):
            path.chmod(mode | (0o666 & ~mask))


def _own_name(path: Path) -> str:
    return f".{path.name}.{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; publish it as `path` when the block ends well.

    The temporary name is unique (process ids repeat in containers), so two writers cannot mix their bytes.

    Yields:
        The temporary path.

    Raises:
        UserError: the folder of `path` cannot be made.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made a folder ({error.strerror}); choose another place") from error
    temporary = path.with_name(_own_name(path) + TEMPORARY_SUFFIX)
    try:
        yield temporary
        _allow_as_umask(temporary)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def publish_folder(temporary: Path, final: Path) -> None:
    """Flush every file of a finished folder, then give it its final name (which must be free)."""
    _flush_folder(temporary)
    os.rename(temporary, final)
    fsync_path(final.parent)


def _flush_folder(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _allow_as_umask(path)
        fsync_path(path)
    fsync_path(folder)


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; publish it as `folder`, replacing an older one, when the block ends well.

    The older one is moved aside only when the new one is whole on the disk, and moved back if the new one cannot be
    renamed. A kill between the two renames leaves it beside, as .NAME.*.old. What killed writers of this folder left
    half-filled is removed first; a living one has a lock on its own.

    Yields:
        The temporary folder.

    Raises:
        UserError: no folder can be made at this path.
        OSError: the disk refused a write or a rename; the older folder is still there.
    """
    folder = Path(folder)
    folder = folder.resolve() if folder.is_symlink() else folder  # what it points to is replaced, not the link
    name = _own_name(folder)
    temporary, old = folder.with_name(name + TEMPORARY_SUFFIX), folder.with_name(name + ".old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror}); choose another place") from error
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        if _lock(descriptor):
            _remove_abandoned(folder)
        yield temporary
        _flush_folder(temporary)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(temporary, folder)
        except OSError:
            if old.exists():
                os.rename(old, folder)
            raise
        fsync_path(folder.parent)
        remove_path(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open folder, if nobody else has; return whether that was possible (a network may not know such locks)."""
    try:
        return try_lock(descriptor)
    except OSError:
        return False


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders in which killed processes were making `folder`: those that nobody locks."""
    for path in folder.parent.glob(f"{glob.escape(f'.{folder.name}.')}*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):
            if not LEFTOVER.fullmatch(path.name) or time.time() - path.stat().st_mtime < NOT_LOCKED_YET:
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _lock(descriptor):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def remove_path(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link and not what it leads to; what cannot be, stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def check_place(out: Path) -> None:
    """Check that a file or folder can be made at the path of --out.

    Raises:
        UserError: what is above it is no folder, or cannot be written to.
    """
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(f"--out {out}: {place} is not a folder that can be written to; choose another place")


def check_output_folder(
    out: Path, kind: str, is_one: Callable[[Path], bool], written: str, source: str | Path | None = None
) -> bool:
    """Check that a command may make a folder, or replace one of its own that holds nothing else.

    Args:
        out: the folder, of --out.
        kind: what the command makes, as in "an export".
        is_one: whether a folder that is not empty is what the command made earlier.
        written: a regular expression that the names of all match that the command writes there.
        source: the folder that the command reads; a name that is no path does no harm.

    Returns:
        Whether something is replaced.

    Raises:
        UserError: another folder or file is there, or one of the command's with something else in it, a git
            repository, or the current folder, the source, or one above; or nothing can be made there.
    """
    here = Path.cwd()
    if out.name in ("", "..") or out.resolve() in (here, *here.parents):
        raise UserError(f"--out {out}: is or holds the current folder; name one that can be made")
    check_place(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if source is not None and Path(source).resolve().is_relative_to(out.resolve()):
        raise UserError(f"--out {out}: is or holds {source}, which is read; choose another folder")
    if not out.is_dir() or not is_one(out):
        raise UserError(f"--out {out}: is not {kind} and not empty; choose another folder")
    if (out / ".git").exists():
        raise UserError(f"--out {out}: is a git repository, which would be lost; choose another folder")
    others = sorted(path.name for path in out.iterdir() if not re.fullmatch(written, path.name))
    if others:
        raise UserError(
            f"--out {out}: is {kind}, but holds {others[0]!r} too, which would be lost; move that, or choose another "
            "folder"
        )
    return True


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(json_bytes(value, indent=2))


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """Encode JSON and a newline in UTF-8; what UTF-8 cannot hold (bytes of a path) is escaped and reads back equal."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, unreadable, or not JSON.
    """
    path = Path(path)
    try:
        if path.is_char_device():
            raise UserError(f"{path}: cannot be read (a device, which may have no end)")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); the file is damaged") from error


def canonical_safetensors(content: bytes) -> bytes:
    """Sort the header of a safetensors file: the library's order is random, and equal tensors make equal files."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors start at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + content[end:]


def sha256_bytes(data: Any) -> str:
    """Return the hexadecimal sha256 of a bytes-like object (a contiguous numpy array is one)."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stand_in(head: bytes) -> str | None:
    """Return what the first bytes of a file show to be left in its place by a failed download, with the remedy.

    Args:
        head: some hundred bytes.

    Returns:
        In words: a Git LFS pointer, or a web page; None for anything else.
    """
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
    if head[:200].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return (
            "a web page saved under this name; download the file itself (on the hub: the link `download`, or /resolve/ "
            "in place of /blob/ in the address)"
        )
    return None


def refuse_stand_in(path: Path) -> None:
    """Refuse a file that a failed download left in the place of another.

    Raises:
        UserError: it is one, with the remedy.
    """
    with open(path, "rb") as stream:
        found = stand_in(stream.read(200))
    if found:
        raise UserError(f"{path}: is {found}")
