"""The queue: one holder a job, takeover from the dead, never two results, dependencies, other settings refused."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.evaluate.queue import leases as leases_module
from ksub_ds.evaluate.queue.leases import LeaseLost
from ksub_ds.evaluate.queue.queue import Job, Queue
from ksub_ds.evaluate.queue.worker import Plan, run_worker


@dataclass(frozen=True)
class LanguageJob(Job):
    language: str


JOBS = [
    Job("train", (), "train"),
    *(LanguageJob(f"test-{language}", ("train",), "test", language) for language in ("en", "fr", "sw")),
]


def make_queue(folder: Path, **identity: Any) -> Queue:
    return Queue.join(folder, JOBS, {"kind": "x", **identity})


class WritingPlan(Plan):
    """Notes each job in a file, by appending one line."""

    def __init__(self, folder: Path, seconds: float = 0.0):
        self.queue, self.notes, self.seconds = make_queue(folder), folder / "notes", seconds

    def run(self, jobs: Sequence[Job], check_lease: Callable[[], None]) -> list[dict[str, Any]]:
        with open(self.notes, "a", encoding="utf-8") as notes:
            notes.write("".join(f"{job.name}\n" for job in jobs))
        time.sleep(self.seconds)
        check_lease()
        return [{"name": job.name} for job in jobs]

    def finish(self) -> None:
        (self.queue.folder / "finished").touch()


def test_jobs_in_order_and_groups_together(tmp_path: Path) -> None:
    first = make_queue(tmp_path)
    with first.lease_some() as leases:
        assert [lease.name for lease in leases] == ["train"]
        with make_queue(tmp_path).lease_some() as others:
            assert not others  # what is left waits for it
        first.publish(leases[0], {})
    with first.lease_some() as leases:
        assert [lease.name for lease in leases] == ["test-en", "test-fr", "test-sw"]


def test_a_share_of_the_group_when_others_live(tmp_path: Path) -> None:
    one, two = make_queue(tmp_path), make_queue(tmp_path)
    with one.lease_some() as leases:
        one.publish(leases[0], {})
    with one.presence(), two.presence(), one.lease_some() as mine, two.lease_some() as theirs:
        assert [lease.name for lease in [*mine, *theirs]] == ["test-en", "test-fr", "test-sw"]
        assert len(mine) == 2


def _hold(folder: Path, ready: Any) -> None:
    with make_queue(folder).lease_some() as leases:
        ready.set()
        time.sleep(60 * len(leases))


def test_a_killed_workers_job_is_taken_over_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_hold, args=(tmp_path, ready))
    worker.start()
    assert ready.wait(10) and worker.pid
    queue = make_queue(tmp_path)
    holder = queue.holder("train")
    assert holder and holder.alive and holder.process == worker.pid and queue.lease("train") is None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    lease = queue.lease("train")
    assert lease is not None and lease.number == 2
    lease.release(keep_file=False)


def test_another_machine_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    queue = make_queue(tmp_path)
    path = queue.leases.path / "train.1"
    path.write_text(json.dumps({"host": "far", "process": 1, "boot": "another kernel", "since": 0}))
    assert queue.lease("train") is None
    old = time.time() - leases_module.DEAD_AFTER_SECONDS - 5
    os.utime(path, (old, old))
    lease = queue.lease("train")
    assert lease is not None
    lease.release(keep_file=False)


def test_a_late_worker_cannot_publish(tmp_path: Path) -> None:
    """Held up so long that another took over: its result is dropped, whoever comes first."""
    queue = make_queue(tmp_path)
    late = queue.lease("train")
    assert late is not None
    (queue.leases.path / "train.2").write_text("{}")  # taken over
    with pytest.raises(LeaseLost):
        queue.publish(late, {"from": "late"})
    (queue.leases.path / "train.2").unlink()
    queue.publish(late, {"from": "late"})
    with pytest.raises(LeaseLost):
        queue.publish(late, {"from": "twice"})
    assert queue.result("train") == {"from": "late"}
    late.release(keep_file=True)


def test_an_error_gives_the_job_back(tmp_path: Path) -> None:
    class Failing(WritingPlan):
        def run(self, jobs: Sequence[Job], check_lease: Callable[[], None]) -> list[dict[str, Any]]:
            raise UserError("no")

    with pytest.raises(UserError, match="no"):
        run_worker([Failing(tmp_path)])
    assert make_queue(tmp_path).is_free("train")


def test_other_settings_are_refused(tmp_path: Path) -> None:
    make_queue(tmp_path, settings={"epochs": 1, "seeds": [0]})
    with pytest.raises(UserError, match=r"other settings \(settings.epochs: 1 -> 2\)"):
        make_queue(tmp_path, settings={"epochs": 2, "seeds": [0]})
    make_queue(tmp_path / "a", model="0" * 64)
    with pytest.raises(UserError, match=r"other settings \(model: its files are others\)"):
        make_queue(tmp_path / "a", model="1" * 64)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        make_queue(tmp_path / "file")


def _work(folder: Path) -> None:
    run_worker([WritingPlan(folder, seconds=0.02)], poll_seconds=0.02)


def test_many_workers_do_every_job_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(tmp_path,)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert sorted((tmp_path / "notes").read_text().split()) == sorted(job.name for job in JOBS)
    assert (tmp_path / "finished").exists() and all(worker.exitcode == 0 for worker in workers)


def test_a_lease_taken_between_look_and_lease_is_respected(tmp_path: Path) -> None:
    quick = make_queue(tmp_path)

    class Slow(Queue):
        def is_free(self, name: str) -> bool:
            free = super().is_free(name)
            taken.append(quick.lease(name))
            return free

    taken: list[Any] = []
    assert Slow.join(tmp_path, JOBS, {"kind": "x"}).lease("train") is None
    taken[0].check()
    quick.publish(taken[0], {"from": "quick"})
    taken[0].release(keep_file=True)


def test_a_result_that_does_not_fit_on_the_disk_is_none(tmp_path: Path) -> None:
    """A file size limit stands for the full disk: write() takes a part and says so without an error."""
    queue = make_queue(tmp_path)
    lease = queue.lease("train")
    assert lease is not None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(UserError, match=r"train\.json: cannot be written"):
            queue.publish(lease, {"answers": "0" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not queue.is_done("train")
    queue.publish(lease, {"answers": "0"})
    lease.release(keep_file=True)


def test_what_a_continuation_needs_is_forgotten_after_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten = []

    class Forgetting(WritingPlan):
        def forget(self, job: Job) -> None:
            assert self.queue.is_done(job.name)
            forgotten.append(job.name)

    plan = Forgetting(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Queue, "publish", lambda *_: (_ for _ in ()).throw(UserError("no space")))
        with pytest.raises(UserError, match="no space"):
            run_worker([plan])
    assert forgotten == []
    run_worker([plan], poll_seconds=0.01)
    assert sorted(forgotten) == sorted(job.name for job in JOBS)


def test_a_folder_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(UserError, match=r"No locks available.* file locks"):
        run_worker([WritingPlan(tmp_path)])


@pytest.mark.parametrize("content", ["{}", "[]", "nothing"])
def test_a_damaged_result_is_one_line(tmp_path: Path, content: str) -> None:
    queue = make_queue(tmp_path)
    (queue.done / "train.json").write_text(content)
    with pytest.raises(UserError, match=r"train\.json"):
        queue.result("train")
