"""`ksub submit`: the sbatch line, its wrong values, and the scripts that it names."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ksub_ds.cli import main

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def line(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["submit", "--dry-run", *words]) == 0
    return shlex.split(capsys.readouterr().out)


def test_what_would_be_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    behind = ["--preset", "xlmr_medium", "--codes", "a b; $(x)", "--data", "shards", "--out", "run4"]
    found = line(capsys, "--nodes", "4", "--time", "12:00:00", "--", *behind)
    assert found == ["sbatch", "--nodes=4", "--time=12:00:00", str(LAUNCH / "pretrain.sbatch"), *behind]
    found = line(capsys, "--gpus-per-node=8", "--partition=long", "--", "--out=run")
    assert found[1:4] == ["--ntasks-per-node=8", "--gpus-per-node=8", "--partition=long"]
    found = line(capsys, "--job", "evaluate", "--array", "0-15", "--", "xnli", "--model", "m")
    assert found == ["sbatch", "--array=0-15", str(LAUNCH / "evaluate.sbatch"), "xnli", "--model", "m"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0", "--", "--out", "r"], "--nodes 0: must be 1 or more"),
        (["--time", "tomorrow", "--", "--out", "r"], "--time tomorrow: write"),
        (["--", "--preset", "tiny"], "--out is missing"),
        (["--array", "0-3", "--", "--out", "r"], "pretrain is one job"),
        (["--job", "evaluate", "--array", "a", "--", "xnli"], "--array a: write a range"),
        (["--job", "evaluate", "--array", "15-0", "--", "xnli"], "15-0 runs backwards; write 0-15"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["submit", "--dry-run", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_without_slurm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["submit", "--", "--out", "r"]) == 2
    assert "sbatch is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sbatch")))
def test_scripts(script: str) -> None:
    text = (LAUNCH / script).read_text()
    assert subprocess.run(["bash", "-n", LAUNCH / script]).returncode == 0
    head = text.split("\n\n")[0]  # sbatch stops reading at the first command
    assert text.count("#SBATCH") == len(re.findall(r"^#SBATCH --", head, re.MULTILINE))
