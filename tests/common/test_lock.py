"""Locks on files: one holder, many readers, and file systems that have none."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from ksub_ds.common.lock import try_lock


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert try_lock(first) and not try_lock(second) and not try_lock(second.fileno(), shared=True)
        first.close()
        assert try_lock(second, shared=True)
        with open(tmp_path / "lock") as third:
            assert try_lock(third, shared=True) and not try_lock(third)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with open(tmp_path / "lock", "w") as stream, pytest.raises(OSError, match="No locks available"):
        try_lock(stream)
