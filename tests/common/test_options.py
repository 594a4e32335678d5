"""Mistakes in options: one line that names the option and the command, exit code 2, for every command there is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ksub_ds.cli import COMMANDS, main
from ksub_ds.common.errors import UserError
from ksub_ds.common.options import call, parse
from ksub_ds.pretrain.recipe import Recipe

SCRIPTS = Path(__file__).resolve().parents[2] / "preprocessing"
MINIMAL = ["--preset", "tiny", "--data", "d", "--out", "o"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_an_unknown_option_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--no-such-option"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert f"see `ksub {name} --help`" in error
    assert "--no-such-option" in error or ": needs a value" in error  # of what must stand before it


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*name.split(), "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: ksub {name} [-h]")


@pytest.mark.parametrize("columns", ["40", "80", "200"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MINIMAL, "--max-stps", "9"], "Unrecognized options: --max-stps, 9; did you mean --max-steps?; see"),
        ([*MINIMAL, "--max-steps"], "--max-steps: needs a value; see"),
        (["--preset", "tinny", *MINIMAL[2:]], "--preset tinny: must be llama_medium, llama_small,"),
        ([*MINIMAL, "--objective", "None!"], "--objective None!: must be clm, mlm or tlm; see"),
        ([*MINIMAL, "--max-steps", "9.5"], "--max-steps 9.5: must be a whole number; see"),
        ([*MINIMAL, "--peak-lr", "fast"], "--peak-lr fast: must be a number; see"),
        (MINIMAL[:4], "give --out; see"),
        ([], "give --preset, --data, --out; see"),
    ],
)
def test_what_is_wrong(arguments: list[str], message: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError) as raised:
        parse(Recipe, arguments, "ksub pretrain")
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_options_of_a_function() -> None:
    found = []

    def add(left: int, right: int = 2) -> None:
        """Add.

        Args:
            left: One number.
            right: The other.
        """
        found.append(left + right)

    call(add, ["--left", "3"], "add")
    assert found == [5]
    with pytest.raises(UserError, match="give --left"):
        call(add, [], "add")
    with pytest.raises(UserError, match="--left x: must be a whole number"):
        call(add, ["--left", "x"], "add")


def test_several_values_stand_behind_one_option() -> None:
    found = []

    def add(some_numbers: tuple[int, ...], start: int = 0) -> None:
        """Add.

        Args:
            some_numbers: Numbers.
            start: One more.
        """
        found.append(start + sum(some_numbers))

    call(add, ["--some-numbers", "3", "4", "--start", "1", "--start", "2"], "add")
    assert found == [9]
    for again in (["--some-numbers", "4"], ["--some_numbers=4"]):
        with pytest.raises(UserError, match="--some-numbers: is given twice; put all its values behind one"):
            call(add, ["--some-numbers", "3", *again], "add")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "a", "--data", "b"], "--data: is given twice; it takes one"),
        (["--data", ""], "--data: is empty; give a path"),
        (["--data="], "--data: is empty; give a path"),
    ],
)
def test_a_path_is_neither_lost_nor_empty(arguments: list[str], message: str) -> None:
    """An empty one would be the folder that the command runs in."""
    with pytest.raises(UserError, match=message):
        parse(Recipe, [*MINIMAL[:2], "--out", "o", *arguments], "ksub pretrain")


@pytest.mark.parametrize("script", ["shard_cc.py", "shard_text.py", "build_codes.py"])
def test_scripts_and_ranks(script: str) -> None:
    """Of several ranks, the first one speaks."""
    for rank, lines in (("0", 1), ("1", 0)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, SCRIPTS / script, "--no-such-option"],
            capture_output=True,
            text=True,
            env=os.environ | place,
        )
        assert done.returncode == 2 and done.stdout == ""
        if script != "shard_text.py":  # one process alone
            assert done.stderr.count("\n") == lines, done.stderr
        assert done.stderr.startswith("error: give ") or not lines
