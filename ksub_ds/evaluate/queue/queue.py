"""A queue of jobs in a shared folder, worked on by any number of processes on any number of machines.

    OUT/queue/plan.json                 what is to be done; every worker must ask for the same
    OUT/queue/claims/<job>.<n>          who does it: the job's lease (leases.py)
    OUT/queue/workers/*.worker          which workers are at work, each locked and touched like a lease
    OUT/queue/done/<job>.json           its result, made once
    OUT/work/<job>/                     where it keeps its state between two tries

Each job has one result, whatever dies: a worker whose lease was taken over drops its own.
`ksub evaluate status OUT` shows which jobs are done, who holds which, which are free or waiting (`status`).
"""

import os
import re
import socket
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tyro.conf import Positional

from ksub_ds.common.errors import OTHER_FORM, UserError
from ksub_ds.common.files import json_bytes, read_json, write_json
from ksub_ds.common.logging import format_seconds, get_logger
from ksub_ds.evaluate.queue.leases import Holder, Lease, LeaseFolder, LeaseLost, boot_id, keep_touching, make_once

OTHERS = re.compile(
    r"(adapter_config|config|documents|manifest|modules|predictions|recipe|results)\.json|table\.md|checkpoints?|model"
    r"|.+\.safetensors|(train|validation|dev|valid|val|test)[._-].+"
)
"""Names in a folder that is a model, a run, a data set, or holds the results of something else."""
FINGERPRINT = re.compile("[0-9a-f]{64}")


def check_is_free(folder: Path) -> None:
    """Check that an evaluation may begin in a folder; logs and the like there do no harm.

    Raises:
        UserError: it holds what an evaluation would replace or be mixed up with.
    """
    found = [path.name for path in folder.iterdir() if OTHERS.fullmatch(path.name)] if folder.is_dir() else []
    if found:
        raise UserError(f"--out {folder}: holds {min(found)}, and no evaluation; choose a new or empty folder")


@dataclass(frozen=True)
class Job:
    """One piece of work; a subclass says which, in fields of its own.

    Attributes:
        name: also its file name.
        needs: names of jobs that must be done before.
        group: jobs of one group may be done together by one worker.
    """

    name: str
    needs: tuple[str, ...]
    group: str


class Queue:
    """Jobs and their state below a folder; `Queue.join` is the way to work on it, `Queue.read` to look at it.

    Args:
        folder: shared by all workers.
        jobs: all jobs, those that are needed before those that need them.
        identity: what this evaluation is, as JSON values; all workers must have the same.
        notes: kept in plan.json beside it; these may change.
    """

    def __init__(
        self, folder: Path, jobs: Sequence[Job], identity: dict[str, Any], notes: dict[str, Any] | None = None
    ):
        self.folder, self.identity, self._notes = folder, identity, notes or {}
        self.jobs = {job.name: job for job in jobs}
        self.done, self._workers = folder / "queue" / "done", folder / "queue" / "workers"
        self.leases = LeaseFolder(folder / "queue" / "claims")

    @classmethod
    def join(
        cls, folder: Path, jobs: Sequence[Job], identity: dict[str, Any], notes: dict[str, Any] | None = None
    ) -> Self:
        """Begin a queue, or join the one in the folder.

        Args:
            folder: shared by all workers.
            jobs: all jobs, those that are needed before those that need them.
            identity: what this evaluation is, as JSON values.
            notes: kept beside it; these may change. [none]

        Raises:
            UserError: other settings are in the folder (each changed key is named), or it cannot be written.
        """
        queue = cls(folder, jobs, identity, notes)
        path = folder / "queue" / "plan.json"
        if not path.exists():
            check_is_free(folder)
        try:
            for each in (queue.leases.path, queue.done):
                each.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
        plan = identity | queue._notes | {"jobs": {job.name: list(job.needs) for job in jobs}}
        make_once(path, json_bytes(plan, indent=2))
        before = read_json(path)
        free = {"jobs", *queue._notes}
        changed = [key for key in {**identity, **before} if key not in free and before.get(key) != identity.get(key)]
        if changed:
            key = changed[0]
            raise UserError(
                f"--out {folder}: holds an evaluation with other settings "
                f"({_difference(key, before.get(key), identity.get(key))}); give the old ones, or a new --out"
            )
        if before != plan:
            write_json(path, plan)
        return queue

    @staticmethod
    def recorded(folder: Path) -> dict[str, Any]:
        """Return identity, notes and jobs of the queue in a folder; nothing where there is none.

        Raises:
            UserError: plan.json is damaged.
        """
        path = folder / "queue" / "plan.json"
        plan = read_json(path) if path.exists() else {}
        if not isinstance(plan, dict):
            raise UserError(f"{path}: is damaged; evaluate into a new --out")
        return plan

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Open the queue in a folder to look at it: names, needs and state of its jobs.

        Raises:
            UserError: plan.json is damaged.
        """
        path = folder / "queue" / "plan.json"
        plan = read_json(path)
        try:
            needs: dict[str, Sequence[str]] = dict(plan["jobs"].items())
            for each in needs.values():
                for need in each:
                    needs[need]  # a job that is needed must be among them
            identity = {key: value for key, value in plan.items() if key != "jobs"}
            return cls(folder, [Job(name, tuple(each), name) for name, each in needs.items()], identity)
        except OTHER_FORM as error:
            raise UserError(f"{path}: is damaged ({error!r}); evaluate into a new --out") from error

    # ---------------------------------------------------------------- state

    def work(self, name: str) -> Path:
        """Return the folder where a job keeps its state."""
        return self.folder / "work" / name

    def is_done(self, name: str) -> bool:
        """Return whether a job has its result."""
        return (self.done / f"{name}.json").exists()

    def all_done(self) -> bool:
        """Return whether every job has its result."""
        return all(self.is_done(name) for name in self.jobs)

    def result(self, name: str, *keys: str) -> dict[str, Any]:
        """Read the result of a job that is done.

        Args:
            name: of the job.
            keys: that it must have.

        Raises:
            UserError: it is damaged.
        """
        try:
            result = read_json(self.done / f"{name}.json")
        except UserError as error:
            raise self.damaged(name) from error
        if not (isinstance(result, dict) and result and set(keys) <= result.keys()):
            raise self.damaged(name)
        return result

    def damaged(self, name: str) -> UserError:
        """Return the error of a job whose result is damaged."""
        path = self.done / f"{name}.json"
        return UserError(f"{path}: is damaged; remove it, and the same command does that job again")

    def holder(self, name: str) -> Holder | None:
        """Return who holds a job; None when nobody does."""
        return self.leases.holder(name)

    def is_free(self, name: str) -> bool:
        """Return whether a job can be taken now: not done, all it needs is, and nobody living holds it."""
        if self.is_done(name) or not all(self.is_done(need) for need in self.jobs[name].needs):
            return False
        holder = self.holder(name)
        return holder is None or not holder.alive

    # ---------------------------------------------------------------- work

    def lease(self, name: str) -> Lease | None:
        """Take a job if it is free; None when it is not, or another worker was faster."""
        number = self.leases.newest_number(name) + 1  # before the look: whoever takes it after the look has this number
        if not self.is_free(name):
            return None
        lease = self.leases.take(name, number)
        if lease is not None and self.is_done(name):  # done between our look and our lease
            lease.release(keep_file=False)
            return None
        if lease is not None and number > 1:
            get_logger().info(f"{name}: its worker is gone; taken over (try {number})")
        return lease

    @contextmanager
    def lease_some(self) -> Iterator[list[Lease]]:
        """Hold the first free job, and its share of the free jobs of the same group, while the block runs.

        Leaving the block gives back the jobs without a result.

        Yields:
            One lease a job, in the order of the jobs; none when nothing is free.
        """
        free = [name for name in self.jobs if self.is_free(name)]
        taken: list[Lease] = []
        limit, group = 1, ""
        try:
            for name in free:
                if taken and (self.jobs[name].group != group or len(taken) >= limit):
                    continue
                lease = self.lease(name)
                if lease is None:
                    continue
                if not taken:
                    group = self.jobs[name].group
                    alike = sum(self.jobs[other].group == group for other in free)
                    limit = max(1, -(-alike // self.living_workers()))
                taken.append(lease)
            yield taken
        finally:
            for lease in taken:
                lease.release(keep_file=self.is_done(lease.name))

    def publish(self, lease: Lease, result: dict[str, Any]) -> None:
        """Write the result of a leased job.

        Raises:
            LeaseLost: the job is another worker's now.
        """
        lease.check()
        if make_once(self.done / f"{lease.name}.json", json_bytes(result)) is None:
            raise LeaseLost(lease.name)

    # ---------------------------------------------------------------- workers

    def living_workers(self) -> int:
        """Count the workers that show a sign of life; at least 1."""
        living = 0
        for path in self._workers.glob("*.worker"):
            try:
                living += self.leases.is_alive(path, path.read_text(encoding="utf-8").strip())
            except OSError:
                continue
        return max(1, living)

    @contextmanager
    def presence(self) -> Iterator[None]:
        """Count among the living workers while the block runs.

        Yields:
            Nothing.
        """
        path = self._workers / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.worker"
        descriptor = make_once(path, boot_id().encode(), lock=True)
        ended = keep_touching(path, self.leases.heartbeat_seconds)
        try:
            yield
        finally:
            ended.set()
            path.unlink(missing_ok=True)
            if descriptor is not None:
                os.close(descriptor)


def _difference(key: str, old: Any, new: Any) -> str:
    """Return `key: old -> new`; of two objects, their first key that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for inner in {**new, **old}:
            if old.get(inner) != new.get(inner):
                return _difference(f"{key}.{inner}", old.get(inner), new.get(inner))
    if isinstance(old, str) and isinstance(new, str) and FINGERPRINT.fullmatch(old) and FINGERPRINT.fullmatch(new):
        return f"{key}: its files are others"
    return f"{key}: {old} -> {new}"


@dataclass(frozen=True)
class StatusSettings:
    """Show the queue of an evaluation: every job that is not done, and who holds it."""

    out: Positional[Path]
    """The --out folder of `ksub evaluate xnli`, `glue`, `classify` or `lm` (or of several models)."""


def status(settings: StatusSettings) -> str:
    """Describe the queues below a folder in text.

    Raises:
        UserError: there is none, or its plan.json is damaged.
    """
    found = sorted(settings.out.glob("**/queue/plan.json"))
    if not found:
        raise UserError(
            f"{settings.out}: holds no evaluation; give the --out folder of `ksub evaluate xnli`, `glue`, `classify` "
            "or `lm`"
        )
    return "\n\n".join(_describe(Queue.read(path.parent.parent)) for path in found)


def _describe(queue: Queue) -> str:
    lines, states = [], Counter[str]()
    for name in queue.jobs:
        state, detail = _state(queue, name)
        states[state] += 1
        if state != "done":
            lines.append((name, state, detail))
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    text = f"{queue.folder} ({queue.identity.get('kind')}): {len(queue.jobs)} jobs: {counts}"
    if not lines:
        return text + ("" if (queue.folder / "results.json").exists() else "; any worker will write results.json")
    width = max(len(name) for name, *_ in lines)
    return "\n".join([text, *(f"  {name:<{width}}  {state:<8} {detail}".rstrip() for name, state, detail in lines)])


def _state(queue: Queue, name: str) -> tuple[str, str]:
    """Return the state of a job in one word, and what else there is to say of it."""
    if queue.is_done(name):
        return "done", ""
    holder = queue.holder(name)
    if holder is not None:
        who = f"process {holder.process} on {holder.host}"
        tries = f", try {holder.number}" if holder.number > 1 else ""
        if holder.alive:
            since = max(0.0, queue.leases.now() - holder.since)
            return "running", f"{who}, for {format_seconds(since)}{tries}"
        return "left", f"by {who}{tries}; the next worker takes it over"
    waits = [need for need in queue.jobs[name].needs if not queue.is_done(need)]
    if waits:
        return "waiting", f"for {waits[0]}" + (f" and {len(waits) - 1} more" if len(waits) > 1 else "")
    return "free", ""
