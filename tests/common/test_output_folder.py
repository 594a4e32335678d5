"""Nothing is replaced but what the same command made, and never the folder one stands in."""

import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.common.output_folder import check_output_folder


def check(out):
    return check_output_folder(out, "an export", lambda folder: (folder / "mark").is_file())


def test_what_may_stand_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mark").touch()
    assert [check(tmp_path / name) for name in ("absent", "empty", "ours")] == [False, False, True]


def test_what_may_not(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").touch()
    for name in ("file", "foreign"):
        with pytest.raises(UserError, match=f"--out .*{name}: is not an export and not empty; choose another folder"):
            check(tmp_path / name)
    (tmp_path / "foreign" / "mark").touch()
    (tmp_path / "foreign" / ".git").mkdir()
    with pytest.raises(UserError, match="is a git repository, which would be lost"):
        check(tmp_path / "foreign")
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for out in (".", "..", tmp_path, tmp_path / "a", "/", "b/.."):
        with pytest.raises(UserError, match="is or holds the current folder"):
            check(type(tmp_path)(out))
    assert check(type(tmp_path)("b")) is False
