"""What launch/pretrain.sh calls, without a cluster: what travels, what is killed, what the last line says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ksub_ds.cluster import host_check, hostfile, launchers, remote
from ksub_ds.cluster.attempt import AttemptOutcome, RankStatus, classify_exit
from ksub_ds.cluster.cleanup import processes_of_launch
from ksub_ds.cluster.launch import Launch, split_arguments
from ksub_ds.cluster.launch_spec import LAUNCH_ID, LaunchSpec, travelling_environment, write_environment_file
from ksub_ds.common.errors import UserError


def test_words_survive_a_shell() -> None:
    spec = LaunchSpec("id", "/a folder/$(x)", {"HF_HOME": "a'b\"c"}, ["--out", "r;n *", "$HOME", "\\", "ü"])
    word = spec.pack()
    shown = subprocess.run(["sh", "-c", f"printf %s {word}"], capture_output=True, text=True, check=True).stdout
    assert LaunchSpec.unpack(shown) == spec


def test_environment_travels_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    values = {"HF_HOME": "/a b", "OMP_NUM_THREADS": "2", "PYTHONPATH": "/lib", "TOKENIZERS_PARALLELISM": "no"}
    values |= {"PYTORCH_ALLOC_CONF": "a:b", "UCX_TLS": "tcp ib", "CXX": "g++ -O1", "FI_PROVIDER": "a;b"}
    others = {
        "HF_TOKEN": "hf_x",
        "HF_TOKEN_2": "hf_y",
        "WANDB_API_KEY": "k",
        "KSUB_PASSWORD": "p",
        "EDITOR": "vi",
        "CXXFLAGS": "x",
    }
    for name, value in (values | others | {"HOME": str(tmp_path / "home"), LAUNCH_ID: "outer"}).items():
        monkeypatch.setenv(name, value)
    assert travelling_environment() == values
    (tmp_path / ".deepspeed_env").write_text("# mine\nNCCL_DEBUG=INFO\n\nOMP_NUM_THREADS=4\n")
    write_environment_file(tmp_path / "written", tmp_path)
    lines = (tmp_path / "written").read_text().splitlines()
    shared = ["PYTHONPATH=/lib", "PYTORCH_ALLOC_CONF=a:b", "TOKENIZERS_PARALLELISM=no"]
    assert lines == ["OMP_NUM_THREADS=4", *shared, "NCCL_DEBUG=INFO"]


def test_deepspeeds_shell_line_gets_neither_secrets_nor_syntax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    plain = {"NCCL_DEBUG": "INFO", "UCX_TLS": "tcp,sm", "PYTHONPATH": "/lib"}
    unfit = {"NCCL_SOCKET_IFNAME": "a;b", "MLFLOW_RUN": "my run", "MV2_X": "$(x)", "PYTHONWARNINGS": "a b"}
    secret = {"MLFLOW_TRACKING_TOKEN": "word", "MLFLOW_TRACKING_PASSWORD": "word"}
    for name, value in (plain | unfit | secret).items():
        monkeypatch.setenv(name, value)
    environment = Launch(split_arguments(["-H", "hosts", "--out", "run"]))._environment(tmp_path / "written")
    assert {name: environment.get(name) for name in plain} == plain
    assert not environment.keys() & (unfit | secret).keys()


@pytest.mark.parametrize("words", [[], ["--out"], ["--out="]])
def test_a_launch_without_a_run_folder_touches_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder may hold a failure.json or a STOP of its own."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--out: name the run folder"):
        Launch(split_arguments(["--preset", "tiny", *words]))


def test_the_trainers_last_value_counts() -> None:
    options = split_arguments(["-H", "h", "--out", "a", "--out=b", "--max-restarts=2", "--codes", "--local_rank=0"])
    assert options.of_trainer("--out") == "b" and options.of_trainer("--data") == ""
    assert options.deepspeed == {"--hostfile": "h"} and options.max_restarts == 2
    assert options.trainer == ["--out", "a", "--out=b", "--codes"]


def test_hosts_that_are_gone_leave_the_filters() -> None:
    assert hostfile.without_hosts("node1@node2:0,1@node3", {"node2"}) == "node1@node3"
    assert hostfile.chosen_hosts({"node1": 2, "node2": 2}, "", "node1@node2:1") == {"node2": 2}


def test_the_launcher_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launchers.choose(None) == "ssh"
    with pytest.raises(UserError, match="mpirun is not installed here"):
        launchers.choose("openmpi")
    (tmp_path / "pdsh").write_text("")
    (tmp_path / "pdsh").chmod(0o755)
    assert launchers.choose(None) == "pdsh"


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a;b", "$(x)", "a/b"])
def test_a_host_is_a_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "hosts").write_text(f"{name} slots=1\n")
    with pytest.raises(UserError, match="not `host slots=N`"):
        hostfile.read_hostfile(str(tmp_path / "hosts"))


def outcome(*codes: int | None, reported: str = "", lost: dict[str, str] | None = None) -> AttemptOutcome:
    """Ranks 0, 1, ... on node1, node2, ..., which ended in this order."""
    ranks = {number: RankStatus(f"node{number + 1}", 0.0, code, number) for number, code in enumerate(codes)}
    return AttemptOutcome(ranks, lost or {}, launcher_codes=[1], failure_lines=[reported] if reported else [])


def test_exit_statuses(tmp_path: Path) -> None:
    record = tmp_path / "failure.json"
    for given, code, line, restart in (
        (outcome(0, 0), 0, "", False),
        (outcome(2, 2, reported="error: x"), 2, "error: x", False),
        (outcome(2, -15), 2, "error: rank 0 on node1 ended first: exit code 2", False),
        (outcome(70, -9, reported="failed: rank 0 on node1: reset"), 70, "failed: rank 1 on node2 was killed by", True),
        (outcome(70, 70, reported="failed: rank 1 hangs"), 70, "failed: rank 1 hangs", True),
        (outcome(-15, 70), 70, "failed: rank 0 on node1 ended first: killed by signal 15 (SIGTERM)", True),
        (outcome(None, None), 70, "failed: the launcher ended with exit code 1, and with it rank 0 on node1", True),
        (outcome(70, None, lost={"node2": "cut"}), 70, "failed: host node2 (rank 1) is lost: cut", True),
        (outcome(75, 75), 75, "", False),
        (outcome(143, 0), 70, "failed: rank 0 on node1 ended first: exit code 143", True),
        (outcome(), 70, "failed: no rank started", False),
    ):
        status = classify_exit(given, record, None)
        assert (status.code, status.restart_may_help) == (code, restart), given
        assert status.line.startswith(line) and bool(status.line) == bool(line), status
    assert classify_exit(outcome(0, 0), record, signal.SIGTERM).code == 143
    half = outcome(None, 70)
    half.launcher_failed["node1"] = 247
    assert classify_exit(half, record, None).line.startswith(
        "failed: rank 0 on node1 is gone: DeepSpeed's launcher there"
    )
    record.write_text(json.dumps({"rank": 1, "host": "node2", "step": 4, "reason": "hangs", "exit_code": 70}))
    assert classify_exit(outcome(70, -15), record, None).line == "failed: rank 1 on node2 at step 4: hangs"


def supervisor(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    word = LaunchSpec("the-launch", str(folder), {}, list(arguments)).pack()
    command = [sys.executable, "-m", "ksub_ds.cluster.supervisor", word]
    changed = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=changed, text=True)


def test_the_supervisor_reports_how_its_rank_ended(tmp_path: Path) -> None:
    done = supervisor(tmp_path, "--help")
    lines = done.communicate(timeout=60)[1].splitlines()
    marks = [line.split("|")[:4] for line in lines]
    assert {tuple(mark[:3]) for mark in marks} == {("ksub", os.uname().nodename, "1")}
    assert marks[0][3] == "start" and lines[-1].endswith("|1|end|0")
    assert any("--max-steps" in line for line in lines[1:-1]) and done.returncode == 0
    assert supervisor(tmp_path / "missing").wait(timeout=60) == 2


@pytest.mark.parametrize("cause", ["lifeline", "supervisor killed", "worker killed"])
def test_no_worker_outlives_its_launch(tmp_path: Path, cause: str) -> None:
    """The worker here waits for a rank 0 that never comes."""
    shards, codes = tmp_path / "shards", tmp_path / "codes"
    process = supervisor(tmp_path, *f"--preset tiny --data {shards} --codes {codes} --out run".split())
    assert process.stderr is not None
    worker = int(process.stderr.readline().split("|")[-1])
    assert worker in processes_of_launch("the-launch")
    if cause == "lifeline":
        process.stderr.close()
    else:
        os.kill(process.pid if cause.startswith("supervisor") else worker, signal.SIGKILL)
    code = process.wait(timeout=60)
    deadline = time.monotonic() + 30
    while processes_of_launch("the-launch") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of_launch("the-launch")
    if cause == "worker killed":
        assert code == 137 and process.stderr.read().endswith("|1|end|-9\n")


def test_the_cleanup_ends_its_own_launch_only() -> None:
    changed = os.environ | {LAUNCH_ID: "mine"}
    sleepers = [subprocess.Popen(["sleep", "60"], env=changed | {LAUNCH_ID: name}) for name in ("mine", "other")]
    try:
        command = [sys.executable, "-m", "ksub_ds.cluster.cleanup", "mine", "0"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"
        assert sleepers[0].wait(timeout=10) == -9 and sleepers[1].poll() is None
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


def test_a_host_inspects_itself(tmp_path: Path) -> None:
    check = {"folder": str(tmp_path), "out": "run", "codes": "none", "data": "none", "peer": "localhost"}
    words = remote.python_module("ksub_ds.cluster.host_check")
    report = json.loads(remote.run_on("localhost", None, words, json.dumps(check)).output)
    assert [problem.split(":")[0] for problem in report["problems"]] == ["--codes", "--data"]
    assert report["versions"] == host_check.versions() and report["port"] > 0
    assert list(tmp_path.iterdir()) == []  # whether the run folder can be made was tried beside it
    (tmp_path / "file").write_text("")
    again = host_check.inspect(host_check.HostCheck(str(tmp_path), out="file/run"))
    assert again.problems == ["--out file/run: cannot be written (Not a directory)"]


def test_a_host_whose_shell_complains_is_not_refused() -> None:
    noise = "pyenv: cannot rehash: couldn't acquire lock\nmv: cannot stat 'x': No such file or directory\n"
    report = host_check._read(remote.CommandResult(0, '{"hostname": "node1"}\n', noise))
    assert report == host_check.HostReport(hostname="node1")
    told = host_check._read(remote.CommandResult(1, "", "python: No module named ksub_ds"))
    assert told.startswith("has no ksub_ds at the same path as here (python: No module named ksub_ds)")
    assert host_check._read(remote.CommandResult(1, "", "killed")) == "the inspection failed: killed"
