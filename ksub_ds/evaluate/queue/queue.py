"""A queue of jobs in a shared folder, drained by any number of processes on any number of machines.

    OUT/queue/plan.json                 what is to be done; every worker must ask for the same
    OUT/queue/claims/<job>.<n>          who does it: made once (a hard link cannot be made twice), touched as a sign
                                        of life, numbered from 1; the highest number holds the job
    OUT/queue/done/<job>.json           its result, made once
    OUT/work/<job>/                     where it keeps its state between two tries

A worker that ends gives its claim back. One that is killed cannot: on the same machine its lock on the claim is gone,
and on another machine the claim is no longer touched. Whoever finds that makes the claim with the next number. A
worker that was only held up finds a higher number than its own when it comes to publish, and drops its result: so
each job has one result, whatever dies.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import TEMPORARY_SUFFIX, fsync_path, json_bytes, read_json
from ksub_ds.common.lock import try_lock
from ksub_ds.common.logging import get_logger

# Merged docstring, to be folded in:
# """Claims on jobs: files that can be made once, carry a lock, and are touched as a sign of life.
#
# How a queue uses them is told in queue.py.
# """


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
        return not try_lock(descriptor, shared=True)
    finally:
        os.close(descriptor)


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


HEARTBEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 90.0  # without a heartbeat, seen from another machine


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: also its file name.
        needs: names of jobs that must be done before.
        group: jobs of one group may be done together by one worker.
        settings: what the worker needs to know, as JSON values.
    """

    name: str
    needs: tuple[str, ...]
    group: str
    settings: dict[str, Any]


class Queue:
    """The jobs of one plan below a folder.

    Args:
        folder: shared by all workers.
        identity: what this evaluation is, as JSON values; all workers must have the same.
        jobs: all jobs, those that are needed before those that need them.

    Raises:
        UserError: other settings are in the folder (each changed key is named), or it cannot be written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], jobs: Sequence[Job]):
        self._place(folder, jobs)
        plan = folder / "queue" / "plan.json"
        try:
            for path in (self.claims, self.done):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
        make_once(plan, json_bytes(identity | {"jobs": {job.name: job.needs for job in jobs}}, indent=2))
        before = read_json(plan)
        changed = [key for key in {**identity, **before} if key != "jobs" and before.get(key) != identity.get(key)]
        if changed:
            key = changed[0]
            raise UserError(
                f"--out {folder}: holds an evaluation with other settings "
                f"({_difference(key, before.get(key), identity.get(key))}); give the old ones, or a new --out"
            )

    @classmethod
    def opened(cls, folder: Path, jobs: dict[str, Sequence[str]]) -> "Queue":
        """The queue that is in a folder, to look at.

        Args:
            jobs: name -> names of the jobs it needs, as in plan.json.

        Raises:
            ValueError: a job needs one that is not there.
        """
        unknown = [need for needs in jobs.values() for need in needs if need not in jobs]
        if unknown:
            raise ValueError(f"no job is called {unknown[0]!r}")
        queue = cls.__new__(cls)
        queue._place(folder, [Job(name, tuple(needs), name, {}) for name, needs in jobs.items()])
        return queue

    def _place(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.folder, self.jobs = folder, {job.name: job for job in jobs}
        self.claims, self.done = folder / "queue" / "claims", folder / "queue" / "done"
        self.heartbeat_seconds, self.dead_after_seconds = HEARTBEAT_SECONDS, DEAD_AFTER_SECONDS

    def work(self, name: str) -> Path:
        """The folder where a job keeps its state."""
        return self.folder / "work" / name

    def is_done(self, name: str) -> bool:
        """Whether a job has its result."""
        return (self.done / f"{name}.json").exists()

    def all_done(self) -> bool:
        """Whether every job has its result."""
        return all(self.is_done(name) for name in self.jobs)

    def result(self, name: str) -> dict[str, Any]:
        """The result of a job that is done."""
        return read_json(self.done / f"{name}.json")

    def holder_number(self, name: str) -> int:
        """The number of a job's newest claim, 0 without one."""
        return max((number for number, _ in self._claims_of(name)), default=0)

    def _claims_of(self, name: str) -> Iterator[tuple[int, Path]]:
        for path in self.claims.glob(f"{name}.*"):
            number = path.name.removeprefix(f"{name}.")
            if number.isdigit():
                yield int(number), path

    def is_free(self, name: str) -> bool:
        """Whether a job can be taken now: not done, all it needs is, and nobody living holds it."""
        if self.is_done(name) or not all(self.is_done(need) for need in self.jobs[name].needs):
            return False
        holder = self.holder(name)
        return holder is None or not holder["alive"]

    def holder(self, name: str) -> dict[str, Any] | None:
        """Who holds a job: host, process, since, alive, and how many tries there were."""
        newest = max(self._claims_of(name), default=None)
        if newest is None:
            return None
        number, path = newest
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            silent = self.now() - path.stat().st_mtime
            here = about.get("boot") == boot()
            alive = is_locked(path) if here else silent < self.dead_after_seconds
        except FileNotFoundError:
            return None  # given back this moment
        except ValueError:
            about, silent, alive = {}, 0.0, False
        return about | {"alive": alive, "tries": number, "silent_seconds": silent}

    def now(self) -> float:
        """The time by the clock that stamps the files: the file server's, not ours."""
        probe = self.claims / f".clock.{os.getpid()}.{threading.get_ident()}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:  # a folder that may only be read: the own clock must do
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)

    def claim(self, name: str) -> Claim | None:
        """Take a job if it is free; None when it is not, or another was quicker."""
        number = self.holder_number(name) + 1  # before the look: whoever claims after it takes this number
        if not self.is_free(name):
            return None
        about = {"host": socket.gethostname(), "process": os.getpid(), "boot": boot(), "since": time.time()}
        path = self.claims / f"{name}.{number}"
        descriptor = make_once(path, json_bytes(about), lock=True)
        if descriptor is None:
            return None
        claim = Claim(self, self.jobs[name], path, number, descriptor)
        if self.is_done(name):  # done between our look and our claim
            claim.release(keep_file=False)
            return None
        if number > 1:
            get_logger().info(f"{name}: its worker is gone; taken over (try {number})")
        return claim

    def claim_some(self) -> Claims:
        """Take the first free job, and its share of the free jobs of the same group. Empty: nothing is free."""
        free = [name for name in self.jobs if self.is_free(name)]
        taken, limit = Claims(), 1
        for name in free:
            group = self.jobs[name].group
            if taken and (group != taken[0].job.group or len(taken) >= limit):
                continue
            claim = self.claim(name)
            if claim is None:
                continue
            if not taken:
                alike = sum(self.jobs[other].group == group for other in free)
                limit = max(1, -(-alike // self.living_workers()))
            taken.append(claim)
        return taken

    def living_workers(self) -> int:
        """How many worker processes say they are alive."""
        living = 0
        for path in (self.folder / "queue" / "workers").glob("*.worker"):
            try:
                here = path.read_text(encoding="utf-8").strip() == boot()
                silent = self.now() - path.stat().st_mtime
                living += is_locked(path) if here else silent < self.dead_after_seconds
            except OSError:
                continue
        return max(1, living)

    @contextmanager
    def presence(self) -> Iterator[None]:
        """Count among the living workers while the block runs."""
        path = self.folder / "queue" / "workers" / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.worker"
        descriptor = make_once(path, boot().encode(), lock=True)
        ended = keep_touching(path, self.heartbeat_seconds)
        try:
            yield
        finally:
            ended.set()
            path.unlink(missing_ok=True)
            if descriptor is not None:
                os.close(descriptor)


def _difference(key: str, old: Any, new: Any) -> str:
    """`key: old -> new`; of two objects, their first key that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for inner in {**new, **old}:
            if old.get(inner) != new.get(inner):
                return _difference(f"{key}.{inner}", old.get(inner), new.get(inner))
    return f"{key}: {old} -> {new}"
