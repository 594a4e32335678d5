"""A file is whole or absent, whatever stops the writer; a folder replaces what its command made, and nothing else."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ksub_ds.codes.table import CodeTable
from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import (
    atomic_folder,
    atomic_path,
    check_output_folder,
    read_json,
    sha256_bytes,
    sha256_file,
    write_json,
)


def test_the_file_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "made" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_folder(folder) as temporary:
            (temporary / content).write_text(content)
    assert [path.name for path in folder.iterdir()] == ["two"] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["two"] and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_writer_left_of_a_folder_is_removed_by_the_next_and_a_living_writer_is_not(tmp_path):
    code = (
        "import sys, time; from ksub_ds.common.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as temporary: print(temporary, flush=True); time.sleep(100)"
    )
    folder = tmp_path / "a [1]"
    with contextlib.ExitStack() as stack:
        writers = []
        for _ in range(2):
            command = [sys.executable, "-c", code, str(folder)]
            writers.append(stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
        killed, living = (Path(writer.stdout.readline().strip()) for writer in writers)
        writers[0].kill()
        writers[0].wait()
        assert killed.is_dir()
        for path in (killed, living):
            os.utime(path, (0, 0))
        with atomic_folder(folder):
            pass
        assert not killed.exists() and living.is_dir() and folder.is_dir()
        writers[1].kill()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_others_may_read_what_the_umask_allows(tmp_path, umask, mode):
    def write_private(path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))  # as safetensors does

    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "file") as temporary:
            write_private(temporary)
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "below").mkdir()
            write_private(temporary / "below" / "file")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    for name in ("file", "folder/below/file"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


def test_sigkill_in_the_middle_of_a_write(tmp_path):
    """The old content stands, whenever the kill comes."""
    path = tmp_path / "file.json"
    write_json(path, {"version": 0})
    code = (
        "import sys\nfrom ksub_ds.common.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    stream = open(temporary, 'w')\n"
        "    print('writing', flush=True)\n"
        "    while True: stream.write('x' * 4096)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert read_json(path) == {"version": 0}
    assert all(left.name == "file.json" or left.suffix == ".partial" for left in tmp_path.iterdir())


def test_json_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: cannot be read \(No such file"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('{"a": 1')
    with pytest.raises(UserError, match=r"cut\.json: is not valid JSON .* damaged"):
        read_json(tmp_path / "cut.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_json(tmp_path / "binary.json")


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made a folder"), atomic_path(tmp_path / "file" / "inside"):
        pytest.fail("the block must not run")


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == sha256_bytes(b"abc") == known


def test_bytes_of_a_path_survive_json(tmp_path):
    value = {"path": os.fsdecode(b"donn\xe9es"), "text": "Füße 漢"}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    (tmp_path / "file.json").read_bytes().decode("utf-8")


def test_writers_of_equal_process_id_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as in two containers that share the folder
    with atomic_path(tmp_path / "file") as one, atomic_path(tmp_path / "file") as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "file").read_text() == "one"
    with atomic_folder(tmp_path / "folder") as one, atomic_folder(tmp_path / "other") as two:
        assert one != two


def test_an_older_folder_stays_when_the_new_one_does_not_fit(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "file").read_text() == "old"
    with pytest.raises(UserError, match="cannot be made a folder"), atomic_folder(tmp_path / "folder" / "file" / "x"):
        pass


def test_a_disk_that_refuses_is_for_the_user_to_fix():
    def refuse(number):
        raise OSError(number, os.strerror(number), "RUN/codes.safetensors")

    with pytest.raises(UserError, match=r"RUN/codes\.safetensors: No space left on device; fix it, then run the same"):
        distributed.on_main(lambda: refuse(errno.ENOSPC))
    with pytest.raises(ConnectionResetError):  # not the disk
        distributed.on_main(lambda: refuse(errno.ECONNRESET))


def may_replace(out):
    return check_output_folder(out, "an export", lambda folder: (folder / "mark").is_file(), r"mark|.+\.json")


def test_what_a_folder_may_replace(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mark").touch()
    assert [may_replace(tmp_path / name) for name in ("absent", "empty", "ours")] == [False, False, True]
    (tmp_path / "ours" / "checkpoint-500").mkdir()
    with pytest.raises(UserError, match=r"--out .*ours: is an export, but holds 'checkpoint-500' too, which would be"):
        may_replace(tmp_path / "ours")


def test_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "link") as temporary:
        (temporary / "file").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").exists()


def test_what_a_folder_may_not_replace(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").touch()
    for name in ("file", "foreign"):
        with pytest.raises(UserError, match=f"--out .*{name}: is not an export and not empty; choose another folder"):
            may_replace(tmp_path / name)
    (tmp_path / "foreign" / "mark").touch()
    (tmp_path / "foreign" / ".git").mkdir()
    with pytest.raises(UserError, match="is a git repository, which would be lost"):
        may_replace(tmp_path / "foreign")
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for out in (".", "..", tmp_path, tmp_path / "a", "/", "b/.."):
        with pytest.raises(UserError, match="is or holds the current folder"):
            may_replace(type(tmp_path)(out))
    assert may_replace(type(tmp_path)("b")) is False


def test_json_is_not_read_from_what_may_have_no_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"^/dev/zero: cannot be read"):
        read_json("/dev/zero")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match=f"^{path}: not a readable code file"):
            CodeTable.load(path)
