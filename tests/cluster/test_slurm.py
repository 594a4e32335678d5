"""SLURM: `sbatch launch/*.sbatch` on a real one, over two nodes."""

import os
import signal
from pathlib import Path

import pytest

from .conftest import ROOT, Cluster, losses, steps_done
from .namespaces import wait_until
from .slurm import Slurm

PRETRAIN = ROOT / "launch" / "pretrain.sbatch"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
LONG = 400  # steps: long enough for something to happen before the end


def submit(slurm: Slurm, cluster: Cluster, name: str, *options: object, **settings: object) -> int:
    arguments = cluster.arguments(name, **settings)
    return slurm.submit(*TWO_NODES, *options, PRETRAIN, *arguments, cwd=cluster.folder)


def output(cluster: Cluster, number: int) -> str:
    return (cluster.folder / f"ksub-pretrain-{number}.log").read_text(errors="replace")


def wait_for_step(slurm: Slurm, cluster: Cluster, number: int, name: str, step: int) -> None:
    def trained() -> bool:
        assert slurm.job(number)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), output(cluster, number)
        return steps_done(cluster.folder / name) >= step

    wait_until(trained, f"step {step} of {name}", 240)


def test_losses_agree_with_one_host(slurm: Slurm, cluster: Cluster, reference: list[float]) -> None:
    number = submit(slurm, cluster, "by-slurm")
    job = slurm.wait(number)
    assert job["JobState"] == "COMPLETED", output(cluster, number)
    assert losses(cluster.folder / "by-slurm") == pytest.approx(reference, rel=1e-5)
    logs = cluster.folder / "by-slurm" / "logs"
    assert (logs / "hostfile").read_text() == "node1 slots=1\nnode2 slots=1\n"
    assert "0: " in (logs / f"slurm-{number}.log").read_text() and "2 ranks (node1 x 1, node2 x 1)" in output(
        cluster, number
    )


def test_a_job_whose_time_is_over_goes_back_into_the_queue(slurm: Slurm, cluster: Cluster) -> None:
    """USR1, as --signal sends it: saved, requeued, continued without a word, and the same weights at the end."""
    number = submit(slurm, cluster, "requeued", max_steps=LONG, save_every_steps=LONG)
    wait_for_step(slurm, cluster, number, "requeued", 5)
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    slurm.wait(number, Restarts="1", JobState="RUNNING")
    stopped = [int(p.name.removeprefix("global_step")) for p in (cluster.folder / "requeued/checkpoints").iterdir()]
    assert len(stopped) == 1 and 5 <= stopped[0] < LONG
    wait_for_step(slurm, cluster, number, "requeued", stopped[0] + 2)
    assert f"continuing from requeued/checkpoints/global_step{stopped[0]}" in output(cluster, number)
    slurm.run("scancel", number)
    slurm.wait(number)


def test_scancel_saves_and_ends(slurm: Slurm, cluster: Cluster) -> None:
    number = submit(slurm, cluster, "cancelled", max_steps=LONG, save_every_steps=LONG)
    wait_for_step(slurm, cluster, number, "cancelled", 3)
    slurm.run("scancel", number)
    assert slurm.wait(number)["JobState"] == "CANCELLED"
    for host in (1, 2):
        wait_until(lambda host=host: not cluster.workers(host, "cancelled"), "workers of a cancelled job", 60)
    saved = sorted((cluster.folder / "cancelled" / "checkpoints").glob("global_step*"))
    assert len(saved) == 1 and not (cluster.folder / "cancelled" / "STOP").exists()


def test_a_killed_rank_starts_again_within_the_job(slurm: Slurm, cluster: Cluster) -> None:
    number = submit(slurm, cluster, "killed-by-slurm", max_steps=60)
    wait_for_step(slurm, cluster, number, "killed-by-slurm", 5)
    os.kill(cluster.workers(2, "killed-by-slurm")[-1], signal.SIGKILL)
    job = slurm.wait(number)
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "0", output(cluster, number)
    assert "start 1 of 3 failed" in output(cluster, number)
    assert len(losses(cluster.folder / "killed-by-slurm")) == 60


def test_a_mistake_is_told_and_not_repeated(slurm: Slurm, cluster: Cluster) -> None:
    number = submit(slurm, cluster, "mistaken", codes="none.safetensors")
    job = slurm.wait(number)
    assert job["JobState"] == "FAILED" and job["ExitCode"] == "2:0", output(cluster, number)
    last = output(cluster, number).strip().splitlines()[-1]
    assert "error: " in last and "none.safetensors" in last and "Traceback" not in output(cluster, number)


def test_the_other_scripts_find_their_way(slurm: Slurm, cluster: Cluster, tmp_path: Path) -> None:
    """Submitted from elsewhere: --help of the commands that they run, as an array where it is one."""
    numbers = [
        slurm.submit("--array=0-1", ROOT / "launch" / "evaluate.sbatch", "xnli", "--help", cwd=tmp_path),
        slurm.submit("--ntasks-per-node=2", ROOT / "launch" / "shard_cc.sbatch", "--help", cwd=tmp_path),
    ]
    for number in numbers:
        assert slurm.wait(number)["JobState"] == "COMPLETED", [p.read_text() for p in tmp_path.iterdir()]
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sum("--model" in text for text in texts.values()) == 2
    assert any("--segments" in text for text in texts.values())


def test_submit_submits(slurm: Slurm, cluster: Cluster) -> None:
    words = ["ksub", "submit", "--nodes=2", "--ntasks-per-node=1", "--time=00:10:00", "--job-name=mine", "--"]
    done = slurm.run(*words, *cluster.arguments("submitted", max_steps=4), cwd=cluster.folder)
    number = int(done.stdout.split()[-1])
    job = slurm.wait(number)
    assert job["JobState"] == "COMPLETED" and job["JobName"] == "mine" and job["TimeLimit"] == "00:10:00"
    assert len(losses(cluster.folder / "submitted")) == 4
