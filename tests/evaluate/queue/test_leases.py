"""Leases: made once, kept alive by a heartbeat, lost to the next number, and damaged files that hold nothing."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ksub_ds.evaluate.queue import leases as module
from ksub_ds.evaluate.queue.leases import LeaseFolder, LeaseLost


def test_a_name_has_one_holder(tmp_path: Path) -> None:
    folder = LeaseFolder(tmp_path)
    assert folder.holder("train") is None and folder.newest_number("train") == 0
    first = folder.take("train", 1)
    assert first is not None and folder.take("train", 1) is None
    holder = folder.holder("train")
    assert holder and holder.alive and (holder.process, holder.number) == (os.getpid(), 1)
    first.check()
    second = folder.take("train", 2)
    assert second is not None
    with pytest.raises(LeaseLost):
        first.check()
    for lease in (first, second):
        lease.release(keep_file=True)
    holder = folder.holder("train")
    assert holder and not holder.alive and holder.number == 2


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_lease_holds_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.1").write_text(content)
    holder = LeaseFolder(tmp_path).holder("train")
    assert holder and not holder.alive and holder.number == 1


def test_a_heartbeat_is_felt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    folder = LeaseFolder(tmp_path)
    lease = folder.take("train", 1)
    assert lease is not None
    os.utime(lease.path, (0, 0))
    time.sleep(0.3)
    assert time.time() - lease.path.stat().st_mtime < 5
    lease.release(keep_file=False)
    assert folder.holder("train") is None


def test_a_heartbeat_outlives_a_file_server_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, touch, calls = tmp_path / "file", os.utime, []

    def away_at_first(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        touch(*arguments)

    path.touch()
    touch(path, (0, 0))
    monkeypatch.setattr(module.os, "utime", away_at_first)
    ended = module.keep_touching(path, 0.01)
    deadline = time.monotonic() + 10
    while path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    ended.set()
    assert path.stat().st_mtime > 0
