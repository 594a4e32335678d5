"""RUN: who holds the folder, what a start finds in it, and where locks do not work."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ksub_ds.cluster import launch
from ksub_ds.codes.positional import positional_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.pretrain.checkpoint import find_start, name_latest
from ksub_ds.pretrain.recipe import Recipe, resolve, to_json
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


class Tokenizer:
    """Stands for one that is loaded from the run folder; only its fingerprint counts."""

    fingerprint = "aa"

    def save(self, folder: Path) -> None:
        (folder / "saved").touch()


def identity(folder: RunFolder, table: CodeTable, **changes: Any) -> dict[str, Any]:
    recipe = Recipe(**{"preset": "tiny", "data": Path("shards"), "out": folder.path, "codes": Path("codes")} | changes)
    return to_json(resolve(recipe, 1, on_gpu=False)) | {"codes_sha256": table.sha256}


@pytest.fixture
def claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunFolder, CodeTable]:
    monkeypatch.setattr("ksub_ds.pretrain.run_folder.load_tokenizer", lambda _: Tokenizer())
    folder, table = RunFolder(tmp_path / "run"), positional_codes(100, 3)
    folder.lock()
    folder.claim(identity(folder, table), table, Tokenizer())
    return folder, table


def test_another_recipe_may_take_a_folder_where_nothing_was_trained(claimed: tuple[RunFolder, CodeTable]) -> None:
    folder, table = claimed
    other = positional_codes(100, 2)
    folder.claim(identity(folder, other, seed=1), other, Tokenizer())
    assert json.loads(folder.recipe.read_text())["seed"] == 1
    assert CodeTable.load(folder.codes).sha256 == other.sha256
    folder.metrics.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"this run has another recipe \(seed: 1 -> 0; codes_sha256"):
        folder.claim(identity(folder, table), table, Tokenizer())
    folder.metrics.unlink()
    folder.recipe.write_text('{"flour": 500}')  # not a run's
    with pytest.raises(UserError, match="lacks the key 'preset'"):
        folder.claim(identity(folder, table), table, Tokenizer())


def test_extend_is_offered_for_a_later_end_only(claimed: tuple[RunFolder, CodeTable]) -> None:
    folder, table = claimed
    folder.metrics.write_text('{"step": 1}\n')
    for steps, offered in ((2_000, True), (900, False)):
        with pytest.raises(UserError, match=f"max_steps: 1000 -> {steps}") as refused:
            folder.claim(identity(folder, table, max_steps=steps, warmup_steps=10), table, Tokenizer())
        assert ("--extend" in str(refused.value)) is offered


def test_damaged_copies_are_written_anew(claimed: tuple[RunFolder, CodeTable]) -> None:
    folder, table = claimed
    folder.codes.write_bytes(b"x")
    folder.claim(identity(folder, table), table, Tokenizer())
    assert CodeTable.load(folder.codes).sha256 == table.sha256


def test_a_file_of_another_kind_is_named(claimed: tuple[RunFolder, CodeTable]) -> None:
    folder, _ = claimed
    folder.unlock()
    folder.metrics.mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: is not a file, as in a run; move it away"):
        folder.lock()
    folder.unlock()
    folder.metrics.rmdir()
    folder.tensorboard.touch()
    with pytest.raises(UserError, match="tensorboard: is not a folder"):
        folder.lock()


def test_checkpoints_that_are_gone_are_missed(tmp_path: Path) -> None:
    assert find_start(tmp_path / "checkpoints") is None
    name_latest(tmp_path / "checkpoints", 30)
    with pytest.raises(UserError, match=r"checkpoints: holds no checkpoint, but .*LATEST names one; bring it back"):
        find_start(tmp_path / "checkpoints")
