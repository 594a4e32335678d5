"""Claims on jobs: files that can be made once, carry a lock, and are touched as a sign of life.

How a queue uses them is told in queue.py.
"""

import contextlib
import fcntl
import os
import socket
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import TEMPORARY_SUFFIX, fsync_path, json_bytes

if TYPE_CHECKING:
    from ksub_ds.evaluate.queue import Job, Queue


class ClaimLost(Exception):
    """Another worker has taken the job over."""


def boot() -> str:
    """Identifies this running kernel: locks are seen by all processes on it, and maybe by none elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def make_once(path: Path, content: bytes, lock: bool = False) -> int | None:
    """Create a whole file that must not be there yet; None if it is.

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
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    """Give a sign of life on a file every so many seconds, until the event is set or the file is gone."""
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
    """Whether a living process of this machine holds a lock on the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class Claim:
    """The right to do one job, kept alive by a thread until it is released."""

    def __init__(self, queue: "Queue", job: "Job", path: Path, number: int, descriptor: int):
        self.queue, self.job, self.path, self.number = queue, job, path, number
        self._descriptor: int | None = descriptor
        self._ended = keep_touching(path, queue.heartbeat_seconds)

    def check(self) -> None:
        """Raise ClaimLost if another worker has taken the job over."""
        if self.queue.holder_number(self.job.name) != self.number:
            raise ClaimLost(self.job.name)

    def publish(self, result: dict[str, Any]) -> None:
        """Hand in the result.

        Raises:
            ClaimLost: the job is another's now.
        """
        self.check()
        made = make_once(self.queue.done / f"{self.job.name}.json", json_bytes(result))
        if made is None:
            raise ClaimLost(self.job.name)

    def release(self, keep_file: bool) -> None:
        """Stop being its holder; without `keep_file` the job is free for anyone at once."""
        self._ended.set()
        if not keep_file:
            self.path.unlink(missing_ok=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Claims(list[Claim]):
    """Claims taken together; leaving the `with` block gives back those without a result."""

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for claim in self:
            claim.release(keep_file=claim.queue.is_done(claim.job.name))

    def check(self) -> None:
        """Raise ClaimLost if one of them is another's now."""
        for claim in self:
            claim.check()
