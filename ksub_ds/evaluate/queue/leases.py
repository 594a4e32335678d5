"""Leases in a shared folder: each gives one process the right to a name, until it releases it or dies.

    FOLDER/<name>.<n>    numbered from 1; the highest number holds the name

A lease is a file that can be made once (a hard link cannot be made twice). Its holder keeps a lock on it and touches
it as a sign of life. A holder that ends releases its lease. One that is killed cannot: seen from the same machine its
lock is gone, seen from another one its file is no longer touched. Whoever finds that takes the lease with the next
number, and a holder that was only delayed finds a higher number than its own.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import TEMPORARY_SUFFIX, fsync_path, json_bytes
from ksub_ds.common.lock import try_lock

HEARTBEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 90.0  # without a heartbeat, seen from another machine


class LeaseLost(Exception):
    """Another process has taken the name over."""


def boot_id() -> str:
    """Identify this running kernel: all processes on it see each other's locks, those elsewhere may not."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def make_once(path: Path, content: bytes, lock: bool = False) -> int | None:
    """Create a whole file unless it exists.

    Args:
        path: the file.
        content: all its bytes.
        lock: hold an exclusive lock on it.

    Returns:
        A descriptor that holds the lock if `lock`, else -1; None when the file was there before.

    Raises:
        UserError: the folder cannot be written, or has no hard links or locks.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            if lock:  # before the file has its name: nobody sees it unlocked
                try_lock(stream)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            os.link(temporary, path)
            fsync_path(path.parent)
            return os.dup(stream.fileno()) if lock else -1  # the lock lasts as long as one descriptor
    except FileExistsError:
        return None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); the workers' folder needs space, hard links and file locks"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def keep_touching(path: Path, seconds: float) -> threading.Event:
    """Touch a file every so many seconds, until the returned event is set or the file is gone."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(seconds):
            try:
                os.utime(path)
            except FileNotFoundError:
                return
            except OSError:
                continue  # a file server that is away for a moment

    threading.Thread(target=beat, daemon=True).start()
    return ended


def is_locked(path: Path) -> bool:
    """Return whether a living process of this machine holds a lock on the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return not try_lock(descriptor, shared=True)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Holder:
    """Who holds a name.

    Attributes:
        host: of the process; None in a damaged file.
        process: its id.
        since: when it took the lease, in seconds since 1970.
        alive: whether it still shows a sign of life.
        number: of its lease: how many times the name was taken.
    """

    host: str | None
    process: int | None
    since: float
    alive: bool
    number: int


class Lease:
    """The right to one name, kept alive by a thread until it is released.

    Args:
        folder: that holds all leases.
        name: that is held.
        number: how many times the name was taken, this time included.
        descriptor: of the open, locked file; -1 where there is no lock.
    """

    def __init__(self, folder: "LeaseFolder", name: str, number: int, descriptor: int):
        self.name, self.number, self.path = name, number, folder.path / f"{name}.{number}"
        self._folder, self._descriptor = folder, descriptor
        self._ended = keep_touching(self.path, folder.heartbeat_seconds)

    def check(self) -> None:
        """Check that the name is still ours.

        Raises:
            LeaseLost: another process has taken it over.
        """
        if self._folder.newest_number(self.name) != self.number:
            raise LeaseLost(self.name)

    def release(self, keep_file: bool) -> None:
        """Stop being the holder; without `keep_file` the name is free for anyone at once."""
        self._ended.set()
        if not keep_file:
            self.path.unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class LeaseFolder:
    """The leases below one folder that several machines may share."""

    def __init__(self, path: Path):
        self.path = path
        self.heartbeat_seconds, self.dead_after_seconds = HEARTBEAT_SECONDS, DEAD_AFTER_SECONDS

    def newest_number(self, name: str) -> int:
        """Return the number of a name's newest lease, 0 without one."""
        return max((number for number, _ in self._leases_of(name)), default=0)

    def holder(self, name: str) -> Holder | None:
        """Return who holds a name, alive or not; None when nobody does."""
        newest = max(self._leases_of(name), default=None)
        if newest is None:
            return None
        number, path = newest
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            alive = self.is_alive(path, about.get("boot"))
        except FileNotFoundError:
            return None  # released this moment
        except (AttributeError, ValueError):
            about, alive = {}, False
        return Holder(about.get("host"), about.get("process"), about.get("since", 0.0), alive, number)

    def take(self, name: str, number: int) -> Lease | None:
        """Take a name by the lease of this number; None when another process was faster."""
        about = {"host": socket.gethostname(), "process": os.getpid(), "boot": boot_id(), "since": time.time()}
        descriptor = make_once(self.path / f"{name}.{number}", json_bytes(about), lock=True)
        if descriptor is None:
            return None
        return Lease(self, name, number, descriptor)

    def is_alive(self, path: Path, boot: str | None) -> bool:
        """Return whether the process behind a file, of the kernel `boot`, still shows a sign of life."""
        if boot == boot_id():
            return is_locked(path)
        return self.now() - path.stat().st_mtime < self.dead_after_seconds

    def now(self) -> float:
        """Return the time by the clock that stamps the files: the file server's, not this machine's."""
        probe = self.path / f".clock.{os.getpid()}.{threading.get_ident()}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:  # a folder that may only be read: our own clock must do
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def _leases_of(self, name: str) -> Iterator[tuple[int, Path]]:
        for path in self.path.glob(f"{name}.*"):
            number = path.name.removeprefix(f"{name}.")
            if number.isdigit():
                yield int(number), path
