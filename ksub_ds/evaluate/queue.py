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

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import TEMPORARY_SUFFIX, fsync_path, read_json
from ksub_ds.common.logging import get_logger

HEARTBEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 90.0  # without a heartbeat, seen from another machine


class ClaimLost(Exception):
    """Another worker has taken the job over."""


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


def _boot() -> str:
    """Identifies this running kernel: locks are seen by all processes on it, and maybe by none elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _make_once(path: Path, content: str, lock: bool = False) -> int | None:
    """Create a whole file that must not be there yet; False-like None if it is.

    Returns:
        A descriptor that holds the lock if `lock`, else -1; None when the file was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if lock:  # before the file has its name: nobody sees it unlocked
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, content.encode())
        os.fsync(descriptor)
        os.link(temporary, path)
        fsync_path(path.parent)
    except FileExistsError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if lock:
        return descriptor
    os.close(descriptor)
    return -1


class Claim:
    """The right to do one job, kept alive by a thread until it is released."""

    def __init__(self, queue: "Queue", job: Job, path: Path, number: int, descriptor: int):
        self.queue, self.job, self.path, self.number = queue, job, path, number
        self._descriptor: int | None = descriptor
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(self.queue.heartbeat_seconds):
            try:
                os.utime(self.path)
            except OSError:
                return

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
        made = _make_once(self.queue.done / f"{self.job.name}.json", json.dumps(result, ensure_ascii=False) + "\n")
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
            _make_once(
                plan,
                json.dumps(identity | {"jobs": {job.name: job.needs for job in jobs}}, indent=2, ensure_ascii=False)
                + "\n",
            )
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
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
        """The queue that is in a folder, to look at: it is not written to.

        Args:
            jobs: name -> names of the jobs it needs, as in plan.json.
        """
        queue = cls.__new__(cls)
        queue._place(folder, [Job(name, tuple(needs), name, {}) for name, needs in jobs.items()])
        return queue

    def _place(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.folder, self.jobs = folder, {job.name: job for job in jobs}
        self.claims, self.done = folder / "queue" / "claims", folder / "queue" / "done"
        self.heartbeat_seconds, self.dead_after_seconds = HEARTBEAT_SECONDS, DEAD_AFTER_SECONDS
        for job in jobs:
            assert all(need in self.jobs for need in job.needs), job

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
            here = about.get("boot") == _boot()
            alive = self._is_locked(path) if here else silent < self.dead_after_seconds
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

    @staticmethod
    def _is_locked(path: Path) -> bool:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def claim(self, name: str) -> Claim | None:
        """Take a job if it is free; None when it is not, or another was quicker."""
        if not self.is_free(name):
            return None
        number = self.holder_number(name) + 1
        about = {"host": socket.gethostname(), "process": os.getpid(), "boot": _boot(), "since": time.time()}
        path = self.claims / f"{name}.{number}"
        descriptor = _make_once(path, json.dumps(about), lock=True)
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
                boot = path.read_text(encoding="utf-8").strip()
                living += self._is_locked(path) if boot == _boot() else self.now() - path.stat().st_mtime < 90
            except OSError:
                continue
        return max(1, living)

    @contextmanager
    def presence(self) -> Iterator[None]:
        """Count among the living workers while the block runs."""
        path = self.folder / "queue" / "workers" / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.worker"
        descriptor = _make_once(path, _boot(), lock=True)
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self.heartbeat_seconds):
                try:
                    os.utime(path)
                except OSError:
                    return

        threading.Thread(target=beat, daemon=True).start()
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


class Plan:
    """What workers drain: a queue, how to do its jobs, and what to write when all are done."""

    queue: Queue

    def run(self, jobs: list[Job], still_ours: Callable[[], None]) -> list[dict[str, Any]]:
        """Do some jobs of one group; `still_ours` raises ClaimLost when going on is useless."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write what follows from all results; may be called by several workers."""
        raise NotImplementedError


def drain(plans: Sequence[Plan], poll_seconds: float = 1.0) -> None:
    """Work until every job of every plan is done, by this process or another.

    Raises:
        UserError: a job cannot be done.
    """
    open_plans, told = list(plans), 0.0
    with ExitStack() as stack:
        for plan in plans:
            stack.enter_context(plan.queue.presence())
        while open_plans:
            for plan in list(open_plans):
                if plan.queue.all_done():
                    plan.finish()
                    open_plans.remove(plan)
                elif _work_once(plan):
                    break
            else:
                if open_plans:
                    if time.monotonic() - told > 60:
                        told = time.monotonic()
                        get_logger().info("waiting: other workers hold the jobs that are left")
                    time.sleep(poll_seconds)


def _work_once(plan: Plan) -> bool:
    """Do one round of work; False when nothing was free."""
    with plan.queue.claim_some() as claims:
        if not claims:
            return False
        try:
            results = plan.run([claim.job for claim in claims], claims.check)
            for claim, result in zip(claims, results, strict=True):
                claim.publish(result)
        except ClaimLost as lost:
            get_logger().info(f"{lost}: another worker has it; dropped here")
    return True
