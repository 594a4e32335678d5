"""A rank that breaks ends all ranks, and one line, the last, says which it was."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ksub_ds.common.distributed import wrong_gpus
from ksub_ds.common.exit_codes import FAILED, USER_ERROR

from .runs import HERE, Bench, environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
WATCH = {"KSUB_TIMEOUT_SECONDS": "150", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_broken(
    bench: Bench, name: str, how: str, rank: int, call: int, *more: str
) -> tuple[list[int], list[str], dict]:
    """Two ranks, of which one breaks. Returns exit codes, the lines of both in their order, and failure.json."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    log = bench.folder / f"{name}.log"
    arguments = bench.arguments(name, *more, save_every_steps=2, eval_every=0)
    command = [sys.executable, str(HERE / "broken_rank.py"), how, str(rank), str(call), *arguments]
    with open(log, "a") as stream:
        start = stream.tell()
        ranks = [
            subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                env=environment() | WATCH | place | {"RANK": each, "LOCAL_RANK": each},
            )
            for each in ("0", "1")
        ]
        codes = [process.wait(timeout=200) for process in ranks]
    lines = log.read_text()[start:].splitlines()
    return codes, lines, json.loads((bench.folder / name / "failure.json").read_text())


def test_a_rank_that_raises_then_one_that_is_killed(bench: Bench) -> None:
    codes, lines, failure = run_broken(bench, "broken", "raises", 1, 4)
    here = socket.gethostname()
    assert codes == [FAILED, FAILED], lines
    assert lines[-1].startswith(f"failed: rank 1 on {here} at step 4: KeyError: 'a bug on this rank alone'")
    assert sum(line.startswith("Traceback") for line in lines) == 1
    assert (failure["rank"], failure["host"], failure["step"]) == (1, here, 4)
    assert failure["restart_may_help"] and failure["exit_code"] == FAILED
    log = (bench.folder / "broken" / "train.log").read_text()
    assert log.splitlines()[-1].endswith(lines[-1])

    codes, lines, failure = run_broken(bench, "broken", "killed", 0, 4)  # rank 0 serves the store
    assert codes == [-signal.SIGKILL, FAILED], lines
    assert any("continuing from" in line for line in lines)
    assert lines[-1].startswith(f"failed: rank 0 on {here} at step ") and "Traceback" not in "".join(lines)
    assert failure["rank"] == 0 and failure["step"] > 4


def test_a_rank_that_hangs_is_named(bench: Bench) -> None:
    codes, lines, failure = run_broken(bench, "hanging", "hangs", 1, 3)
    seconds = time.time() - (bench.folder / "hanging" / "metrics.jsonl").stat().st_mtime  # since the step before
    print(f"measured: a rank hangs: {seconds:.1f} s with a timeout of 2")
    assert seconds < 2 + 60  # as docs/cluster.md says
    assert codes == [FAILED, FAILED], lines
    assert lines[-1].startswith(
        f"failed: rank 1 on {socket.gethostname()} at step 3: hangs: for 0:00:02 it is at step 3"
    )
    assert "broken_rank.py" in lines[-1] and "Traceback" not in "".join(lines)
    assert failure["restart_may_help"]


def test_a_mistake_that_one_rank_alone_meets(bench: Bench) -> None:
    codes, lines, failure = run_broken(bench, "mistaken", "errs", 1, 2)
    assert codes == [USER_ERROR, USER_ERROR], lines
    assert lines[-1] == f"error: the disk of this rank alone is full (rank 1 on {socket.gethostname()})"
    assert "Traceback" not in "".join(lines) and not failure["restart_may_help"]


def test_a_rank_without_a_compiler_and_then_without_memory(bench: Bench) -> None:
    """Where one rank cannot compile, none does; where one is out of memory, all end, and its line says what to do."""
    codes, lines, failure = run_broken(bench, "small", "runs out", 1, 4, "--compile")
    assert codes == [USER_ERROR, USER_ERROR], lines
    told = next(line for line in lines if "device: cpu" in line)
    assert "encoder not compiled (BackendCompilerFailed: " in told and told.endswith("(on rank 1))"), told
    advice = "--micro-batch-size 4 of 64 tokens is too much; try --micro-batch-size 2"
    assert lines[-1] == f"error: out of memory on cpu: {advice} (rank 1 on {socket.gethostname()})"
    assert "Traceback" not in "".join(lines) and not failure["restart_may_help"]
    assert failure["step"] > 1


def test_two_ranks_with_one_gpu(tmp_path: Path) -> None:
    """As seen before NCCL starts; on CPUs that say they were the same GPU."""
    words = ["--preset", "tiny", "--plain", "--data", "d", "--out", "o"]
    program = (
        "import sys; from ksub_ds.common import distributed; from ksub_ds.pretrain.__main__ import main\n"
        f"distributed._gpu_id = lambda: 'GPU-7'\nsys.exit(main({words}))"
    )
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment() | WATCH | place | {"RANK": each, "LOCAL_RANK": each},
        )
        for each in ("0", "1")
    ]
    errors = [process.communicate(timeout=200)[1].splitlines() for process in ranks]
    assert [process.returncode for process in ranks] == [USER_ERROR, USER_ERROR], errors
    here = socket.gethostname()
    expected = f"error: {here} has 2 ranks (0, 1) and 1 GPU for them; start 1 rank there"
    assert errors[0][-1].startswith(expected) and not errors[1], errors


def test_which_gpus_are_shared() -> None:
    assert wrong_gpus(["a GPU-1", "a GPU-2", "b GPU-3"]) is None
    assert wrong_gpus(["a", "a", "b"]) is None, "CPUs"
    assert wrong_gpus(["a 0", "b 0"]) is None, "of different hosts"
    message = wrong_gpus(["a GPU-1", "b ", "a GPU-2", "b ", "c "])
    assert message is not None and message.startswith("ranks without a GPU on b, c, others have one: check")
    message = wrong_gpus(["b GPU-9", "a GPU-1", "a GPU-2", "a GPU-1"])
    assert message is not None and message.startswith(
        "a has 3 ranks (1, 2, 3) and 2 GPUs for them; start 2 ranks there"
    )


def test_a_rank_that_never_comes_is_named(bench: Bench, tmp_path: Path) -> None:
    place = {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "ksub_ds.pretrain", *bench.arguments("lonely")]
    patience = {"KSUB_TIMEOUT_SECONDS": "1"}
    done = subprocess.run(
        command, env=environment() | WATCH | place | patience, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == FAILED, done.stderr
    assert f"rank 1, 2 did not come to 127.0.0.1:{place['MASTER_PORT']} in 1 s" in done.stderr.splitlines()[-1]


def lonely(tmp_path: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a run with left-over variables of a launcher; it waits for ranks that never come."""
    place = {"MASTER_PORT": str(free_port()), "TORCH_CPP_LOG_LEVEL": "FATAL"}
    command = [sys.executable, "-m", "ksub_ds.pretrain", "--preset", "tiny", "--plain", "--data", "d", "--out", "o"]
    env = environment() | place | variables
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("variables", "who", "told"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "rank 1 of 2 waits for rank 0", "RANK=1 WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "3"}, "rank 0 of 3 waits for rank 1, 2", "RANK=0 WORLD_SIZE=3"),
        (
            {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "rank 1 of 2 waits for rank 0",
            "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2",
        ),
    ],
)
def test_waiting_says_for_whom_and_why(tmp_path: Path, variables: dict[str, str], who: str, told: str) -> None:
    process = lonely(tmp_path, MASTER_ADDR="127.0.0.1", KSUB_TIMEOUT_SECONDS="600", **variables)
    try:
        line = process.stderr.readline()  # the first one; the test's own time limit is the wait's
    finally:
        process.kill()
        process.communicate()
    names = " ".join(pair.split("=")[0] for pair in told.split())
    assert f"{who} at 127.0.0.1:" in line and "up to 600 s" in line, line
    assert f"{told} in the environment say so; if you started one process alone: unset {names}" in line


@pytest.mark.parametrize("rank", ["0", "1"])
def test_left_over_variables_without_an_address(tmp_path: Path, rank: str) -> None:
    """Rank 1 says it as well: nobody knows whether there is a rank 0."""
    process = lonely(tmp_path, RANK=rank, WORLD_SIZE="2")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == USER_ERROR and errors.count("\n") == 1, errors
    assert errors.startswith("error: MASTER_ADDR is not set") and "unset RANK WORLD_SIZE" in errors
