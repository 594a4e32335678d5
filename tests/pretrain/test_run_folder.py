"""RUN/.lock: who holds the folder, and where locks do not work."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from ksub_ds.cluster import launch
from ksub_ds.common.errors import UserError
from ksub_ds.pretrain.run_folder import RunFolder


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="its file system cannot lock files"):
        RunFolder(tmp_path / "run").lock()


def test_a_run_folder_without_a_run_is_not_left(tmp_path: Path) -> None:
    """The lock goes with the folders that it made; a second one who waited for it takes a new file."""
    (tmp_path / "mine").mkdir()
    folder = RunFolder(tmp_path / "mine" / "new" / "run")
    folder.lock()
    second = RunFolder(folder.path)
    with pytest.raises(UserError, match="in use by process"):
        second.lock()
    folder.unlock()
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"] and not list((tmp_path / "mine").iterdir())
    second.lock()
    (folder.path / "logs").mkdir()  # not the lock's
    second.unlock()
    assert [path.name for path in folder.path.iterdir()] == ["logs"]
    folder.lock()
    folder.recipe.write_text("{}")
    folder.unlock()
    assert {path.name for path in folder.path.iterdir()} == {".lock", "logs", "recipe.json"}


def test_a_restart_waits_for_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where an exclusive lock needs a file that is open for writing."""
    lock = fcntl.flock

    def as_on_nfs(stream: Any, how: int) -> None:
        if not os.access(f"/proc/self/fd/{stream.fileno()}", os.W_OK) or not stream.writable():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        lock(stream, how)

    folder = RunFolder(tmp_path / "run")
    folder.lock()
    waits: list[float] = []

    def release(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            folder.unlock()
            (tmp_path / "run" / ".lock").touch()

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", as_on_nfs)
        patch.setattr(launch.time, "sleep", release)
        (tmp_path / "run" / "recipe.json").touch()  # a run: the lock's file stays
        launch.wait_for_lock(tmp_path / "run")
    assert len(waits) == 3
