"""launch/pretrain.sh: one file for sh, bash and Python; hostfiles; both launch lines on two real ranks."""

import json
import os
import py_compile
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ksub_ds.cluster.launch_spec import LaunchSpec

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "pretrain.sh"
EXAMPLE = ROOT / "launch" / "hostfile.example"


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def call(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    parts = [str(part) for part in command]
    return subprocess.run(parts, capture_output=True, text=True, env=environment(), cwd=cwd, timeout=280)


def test_three_readers(tmp_path: Path) -> None:
    assert call("sh", "-n", SCRIPT).returncode == call("bash", "-n", SCRIPT).returncode == 0
    copy = tmp_path / "pretrain.py"
    copy.write_bytes(SCRIPT.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        py_compile.compile(str(copy), doraise=True)
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "names no host"),
        ("# localhost slots=2\n\n", "names no host"),
        ("localhost slots=0\n", "gives 'localhost' no slots"),
        ("node1 slots=2\nnode2 slots=2\nnode1 slots=4\n", "line 3 names 'node1' again"),
        ("localhost\n", "line 1 is 'localhost', not `host slots=N`"),
        ("localhost slots=two\n", "not `host slots=N`"),
    ],
)
def test_bad_hostfiles(tmp_path: Path, content: str | None, message: str) -> None:
    hostfile = tmp_path / "hosts with a space; and $(more)"
    if content is not None:
        hostfile.write_text(content)
    done = call(SCRIPT, "--hostfile", hostfile, "--preset", "tiny", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --hostfile {hostfile}") and message in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout
    assert not (tmp_path / ".deepspeed_env").exists()


def test_other_wrong_launcher_options(tmp_path: Path) -> None:
    for options, message in (
        (["--hostfile"], "--hostfile: needs a value"),
        (["--hostfile", EXAMPLE, "--include", "elsewhere"], "'elsewhere' is not in the hostfile"),
        (["--hostfile", EXAMPLE, "--exclude=localhost"], "leaves no host"),
        (["--hostfile", EXAMPLE, "--max-restarts", "some"], "--max-restarts some: must be a whole number"),
        (["--hostfile", EXAMPLE, "--min-hosts", "2"], "the hostfile has 1 hosts"),
        (["--hostfile", EXAMPLE, "--master_port", "port"], "--master_port port: is not a port"),
        (["--hostfile", EXAMPLE, "--force_multi", "--launcher", "rsh"], "choose one of pdsh, ssh, openmpi"),
    ):
        done = call(SCRIPT, "--out", "run", *options, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and message in done.stderr


def passed(folder: Path, *arguments: object, **variables: str) -> tuple[list[str], dict[str, str], LaunchSpec]:
    """What the script gives to `deepspeed`: its options, its environment, and what every rank is to run."""
    program, seen = folder / "deepspeed", folder / "seen.json"
    lines = ("import json, os, sys", f"json.dump([sys.argv[1:], dict(os.environ)], open({str(seen)!r}, 'w'))")
    program.write_text(f"#!{sys.executable}\n" + "\n".join(lines) + "\n")
    program.chmod(0o755)
    changed = environment() | {"PATH": f"{folder}{os.pathsep}{environment()['PATH']}"} | variables
    command = [str(part) for part in (SCRIPT, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=changed, cwd=folder)
    assert done.returncode == 70 and "no rank started" in done.stderr.splitlines()[-1], done.stderr
    options, found = json.loads(seen.read_text())
    seen.unlink()
    return options[:-1], found, LaunchSpec.unpack(options[-1])


def test_options_are_divided_and_never_reparsed(tmp_path: Path) -> None:
    words = ["--out", "a run; $(touch hacked) 'x' \"y\" *", "--max-steps=3"]
    launcher, _, spec = passed(tmp_path, "--hostfile", EXAMPLE, *words, "--master_port=1234", "--bind_cores_to_rank")
    assert spec.arguments == words and spec.folder == str(tmp_path)
    assert launcher[-3:] == ["--no_local_rank", "--module", "ksub_ds.cluster.supervisor"]
    for name, value in (("--master_port", "1234"), ("--master_addr", "127.0.0.1")):
        assert launcher[launcher.index(name) + 1] == value
    assert {"--no_ssh_check", "--bind_cores_to_rank"} <= set(launcher)
    assert [path.name for path in tmp_path.iterdir()] == ["deepspeed"]
    assert re.fullmatch(r"[\w-]+", spec.pack())


def test_outer_ranks_are_cleared(tmp_path: Path) -> None:
    """As DeepSpeed's launcher starts it: rank 0 starts the run afresh, the others end."""
    outer = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    options = ("--local_rank=0", "--hostfile", EXAMPLE, "--out", "run")
    _, found, _ = passed(tmp_path, *options, CUDA_VISIBLE_DEVICES="0,1", **outer)
    assert not ({*outer, "CUDA_VISIBLE_DEVICES"} & found.keys())
    second = environment() | outer | {"RANK": "1", "LOCAL_RANK": "1"}
    command = [sys.executable, str(SCRIPT), "--local_rank=1", "--hostfile", "no such file"]
    done = subprocess.run(command, env=second, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def codes(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ksub_ds import positional_codes
    from ksub_ds.corpus.shards.dataset import ShardDataset

    path = tmp_path_factory.mktemp("launch") / "codes.safetensors"
    positional_codes(ShardDataset.open(tiny_shards).manifest["tokenizer"]["vocab_size"], 3).save(path)
    return path


@pytest.mark.timeout(300)
@pytest.mark.parametrize("program", [[str(SCRIPT)], ["deepspeed", str(SCRIPT)]], ids=["script", "deepspeed"])
def test_both_launch_lines(program: list[str], codes: Path, tiny_shards: Path, tmp_path: Path) -> None:
    common = ["--hostfile", EXAMPLE, "--preset", "tiny", "--codes", codes, "--data", tiny_shards]
    done = call(*program, *common, "--out", "my run", "--max-steps", 3, "--global-batch-size", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "my run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "2 ranks" in done.stderr and "micro 4 x accumulation 1 x ranks 2 = 8" in done.stderr


@pytest.mark.timeout(300)
def test_exit_code_of_a_mistake_reaches_the_shell(codes: Path, tiny_shards: Path, tmp_path: Path) -> None:
    common = ["--hostfile", EXAMPLE, "--preset", "tiny", "--codes", codes, "--data", tiny_shards]
    done = call(SCRIPT, *common, "--out", "run", "--global-batch-size", 9, cwd=tmp_path)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "9 is not a multiple" in errors[0]
    assert "Traceback" not in done.stderr
