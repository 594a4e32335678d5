"""`ksub submit`: the sbatch line, its wrong values and those of the job, and the scripts that it names."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ksub_ds.cli import main

MINIMAL = ["--preset", "tiny", "--codes", "c", "--data", "d", "--out", "r"]
XNLI = ["xnli", "--model", "m", "--data", "d", "--setting", "cross-lingual", "--out", "r"]
LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def line(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["submit", "--dry-run", *words]) == 0
    return shlex.split(capsys.readouterr().out)


def test_what_would_be_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    behind = ["--preset", "xlmr_medium", "--codes", "a b; $(x)", "--data", "shards", "--out", "run4"]
    found = line(capsys, "--nodes", "4", "--time", "12:00:00", "--", *behind)
    assert found == ["sbatch", "--nodes=4", "--time=12:00:00", str(LAUNCH / "pretrain.sbatch"), *behind]
    found = line(capsys, "--gpus-per-node=8", "--partition=long", "--", *MINIMAL, "--max-restarts", "5")
    assert found[1:4] == ["--ntasks-per-node=8", "--gpus-per-node=8", "--partition=long"]
    assert found[4:] == [str(LAUNCH / "pretrain.sbatch"), *MINIMAL, "--max-restarts", "5"]
    found = line(capsys, "--job", "evaluate", "--array", "0-15", "--", *XNLI)
    assert found == ["sbatch", "--array=0-15", str(LAUNCH / "evaluate.sbatch"), *XNLI]
    behind = ["--input", "wet", "--tokenizer", "spm.model", "--out", "shards"]
    assert line(capsys, "--job", "shard_cc", "--", *behind)[2:] == behind


@pytest.mark.parametrize("job", ["pretrain", "shard_cc"])
def test_tasks_get_the_cores_that_the_job_was_given(job: str, tmp_path: Path) -> None:
    """srun does not inherit sbatch's --cpus-per-task."""
    programs = {"scontrol": f"echo 'JobId=1 Command={LAUNCH}/{job}.sbatch'", "srun": "echo cores=$SRUN_CPUS_PER_TASK"}
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    job_variables = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node1"}
    for given in ({"SLURM_CPUS_PER_TASK": "7"}, {}):
        done = subprocess.run(
            ["bash", LAUNCH / f"{job}.sbatch", "--out", "run"],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"} | job_variables | given,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert f"cores={given.get('SLURM_CPUS_PER_TASK', '')}\n" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0", "--", "--out", "r"], "--nodes 0: must be 1 or more"),
        (["--time", "tomorrow", "--", "--out", "r"], "--time tomorrow: write"),
        (["--", "--preset", "tiny"], "--out is missing"),
        (["--array", "0-3", "--", "--out", "r"], "pretrain is one job"),
        (["--partition", "", "--", *MINIMAL], "--partition '': is empty; give a name, or leave it out"),
        (["--", *MINIMAL, "--max-restarts"], "--max-restarts without a value: must be a whole number"),
        (["--job", "evaluate", "--array", "a", "--", "xnli"], "--array a: write a range"),
        (["--job", "evaluate", "--array", "15-0", "--", "xnli"], "15-0 runs backwards; write 0-15"),
        # the job's own options, as its own parser sees them
        (["--", *MINIMAL, "--max-stps", "9"], "Unrecognized options: --max-stps, 9; did you mean --max-steps?"),
        (["--", *MINIMAL, "--max-steps", "many"], "--max-steps many: must be a whole number"),
        (["--", *MINIMAL, "--preset", "tinny"], "--preset tinny: must be llama_medium,"),
        (["--", "--out", "r"], "pretrain: give --preset, --data"),
        (["--", *MINIMAL, "--max-restarts=x"], "--max-restarts x: must be a whole number"),
        (["--", *MINIMAL, "--deepspeed", "zero9"], "--deepspeed zero9: no such file"),
        (["--nodes=3", "--ntasks-per-node=2", "--", *MINIMAL, "--micro-batch-size=2"], "is not a multiple of"),
        (["--job", "evaluate", "--", *XNLI[:-2]], "evaluate: give --out"),
        (["--job", "evaluate", "--"], "name one of xnli, glue, classify, lm, watch, status"),
        (
            ["--job", "shard_cc", "--", "--out=r", "--tokenizer=t", "--snapshot=2019-09", "--segments=64:0"],
            "--segments 64:0: must be like 0:40",
        ),
        (["--job", "shard_cc", "--", "--out", "r", "--tokenizer", "t"], "give either --input FILES or --snapshot"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["submit", "--dry-run", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_without_slurm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["submit", "--", *MINIMAL]) == 2
    assert "sbatch is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sbatch")))
def test_scripts(script: str) -> None:
    text = (LAUNCH / script).read_text()
    assert subprocess.run(["bash", "-n", LAUNCH / script]).returncode == 0
    head = text.split("\n\n")[0]  # sbatch stops reading at the first command
    assert text.count("#SBATCH") == len(re.findall(r"^#SBATCH --", head, re.MULTILINE))
