"""--help of every command: sections, whole sentences, defaults told once, nothing wider than the terminal."""

import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from ksub_ds.cli import COMMANDS, main
from ksub_ds.cluster.launch import help_text
from ksub_ds.common.option_help import Section, options_of
from ksub_ds.common.options import parse, print_help
from ksub_ds.corpus.commoncrawl.config import ShardCC
from ksub_ds.corpus.text.pipeline import ShardText
from ksub_ds.pretrain.recipe import Recipe
from ksub_ds.vectors.build import ClusterVectors

SCRIPTS = Path(__file__).resolve().parents[2] / "preprocessing"
WIDTHS = [80, 100, 120]


def shown(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def check_rows(text: str, width: int) -> None:
    """Each line is as wide as it can be, so that none ends in the middle of a sentence."""
    lines = text.splitlines()
    assert all(len(line) <= width for line in lines), max(lines, key=len)
    assert not [word for word in ("None", "(default", "╭", "==") if word in text], text
    indent = "      "
    for line, following in itertools.pairwise(lines):
        if line.startswith(indent) and following.startswith(indent):
            word = following.split()[0]
            assert len(line) + 1 + len(word) > width - 2, (line, word)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command(
    name: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = shown(capsys, *name.split())
    check_rows(text, width)
    assert text.startswith(f"usage: ksub {name} [-h]")
    options = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  -")]
    assert "-h" in options and len(options) == len(set(options))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", [Recipe, ShardText, ShardCC, ClusterVectors])
def test_settings_are_described_in_full(
    kind: type, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        print_help(kind, "program")
    text = capsys.readouterr().out
    check_rows(text, width)
    words = " ".join(text.split())
    for option in options_of(kind):
        assert option.description and option.description in words, option.name


def test_sections(capsys: pytest.CaptureFixture[str]) -> None:
    """A section goes from the field that begins it to the next one, whatever is added in between."""
    text = shown(capsys, "pretrain")
    titles = [line.strip() for line, rule in itertools.pairwise(text.splitlines()) if rule.startswith(" ---")]
    assert titles == [
        "options",
        "length options",
        "optimizer options",
        "data options",
        "engine options",
        "saving, evaluation and logging options",
    ]
    places = [
        text.index(word) for word in ("--codes", "length options", "--max-hours", "optimizer options", "--dropout")
    ]
    assert places == sorted(places)
    for option in options_of(Recipe):
        assert option.section or text.index(f"--{option.name.replace('_', '-')}") < text.index("length options")


@dataclass
class Sectioned:
    """Do something.

    In two
    lines.
    """

    first: int
    """How many,
    `at least`."""
    second: Annotated[str | None, Section("rest")] = None
    """What. [the
    first]"""
    third: bool = True
    plain: tuple[int, ...] = ()
    """Numbers."""


def test_sections_leave_the_command_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(Sectioned, ["--first", "1", "--second", "None", "--no-third", "--plain", "1", "2"], "p") == Sectioned(
        1, None, False, (1, 2)
    )
    with pytest.raises(SystemExit):
        parse(Sectioned, ["--help"], "p")
    out = capsys.readouterr().out
    assert "\n\nDo something.\n\nIn two lines.\n\n" in out
    assert "How many, `at least`. (required)" in out and "What. [the first]" in out and "[on]" in out
    assert "--plain INT ..." in out and "Numbers. [none]" in out
    places = [out.index(text) for text in ("\n  --first", "rest options", "\n  --second", "\n  --third")]
    assert places == sorted(places)


@pytest.mark.parametrize("width", WIDTHS)
def test_lists_of_commands(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for command in (["--help"], ["codes", "--help"], ["evaluate", "--help"]):
        assert main(command) == 0
        check_rows(capsys.readouterr().out, width)
    assert all(len(line) <= width for line in help_text().splitlines())


@pytest.mark.parametrize("script", ["shard_cc.py", "shard_text.py", "build_codes.py"])
def test_scripts_into_a_pipe(script: str) -> None:
    done = subprocess.run([sys.executable, SCRIPTS / script, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: preprocessing/{script} [-h]") and not done.stderr
    check_rows(done.stdout, 80)
