"""SLURM: `sbatch launch/*.sbatch` on a real one, over two nodes."""

import os
import signal
from pathlib import Path

from .conftest import ROOT, Cluster, losses, steps_done
from .namespaces import wait_until
from .slurm import Slurm

PRETRAIN = ROOT / "launch" / "pretrain.sbatch"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
SCANCEL = next(line.strip() for line in (ROOT / "docs" / "cluster.md").open() if line.startswith("    scancel"))
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


def test_a_job_whose_time_is_over_goes_back_into_the_queue(slurm: Slurm, cluster: Cluster) -> None:
    """USR1, as --signal sends it: saved, requeued, continued without a word, and the same weights at the end."""
    number = submit(slurm, cluster, "requeued", max_steps=LONG, save_every_steps=LONG)
    wait_for_step(slurm, cluster, number, "requeued", 5)
    slurm.run("bash", "-c", f"job={number}\n{SCANCEL}")
    slurm.wait(number, Restarts="1", JobState="RUNNING")
    stopped = [int(p.name.removeprefix("global_step")) for p in (cluster.folder / "requeued/checkpoints").iterdir()]
    assert len(stopped) == 1 and 5 <= stopped[0] < LONG
    wait_for_step(slurm, cluster, number, "requeued", stopped[0] + 2)
    assert f"continuing from requeued/checkpoints/global_step{stopped[0]}" in output(cluster, number)
    slurm.run("scancel", number)
    slurm.wait(number)


def test_max_hours_goes_back_into_the_queue(slurm: Slurm, cluster: Cluster) -> None:
    """Time for one step in each start: the job comes back by itself until the last step."""
    number = submit(slurm, cluster, "hours", max_steps=2, max_hours=1e-9)
    job = slurm.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(cluster, number)
    assert "--max-hours 1e-09 is over" in output(cluster, number)
    assert "continuing from hours/checkpoints/global_step1" in output(cluster, number)
    assert len(losses(cluster.folder / "hours")) == 2


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
    """Submitted by `ksub submit`."""
    words = ["ksub", "submit", "--nodes=2", "--ntasks-per-node=1", "--time=00:30:00", "--job-name=mine", "--"]
    arguments = cluster.arguments("killed", max_steps=60)
    number = int(slurm.run(*words, *arguments, cwd=cluster.folder).stdout.split()[-1])
    output = cluster.folder / f"mine-{number}.log"
    wait_until(lambda: steps_done(cluster.folder / "killed") >= 5, "step 5", 240)
    os.kill(cluster.workers(2, "killed")[-1], signal.SIGKILL)
    job = slurm.wait(number)
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "0", output.read_text()
    assert job["JobName"] == "mine" and job["TimeLimit"] == "00:30:00"
    assert "start 1 of 3 failed" in output.read_text()
    assert len(losses(cluster.folder / "killed")) == 60


def test_a_mistake_is_told_and_not_repeated(slurm: Slurm, cluster: Cluster) -> None:
    number = submit(slurm, cluster, "mistaken", codes="none.safetensors")
    job = slurm.wait(number)
    assert job["JobState"] == "FAILED" and job["ExitCode"] == "2:0", output(cluster, number)
    last = output(cluster, number).strip().splitlines()[-1]
    assert last.startswith("error: ") and "none.safetensors" in last and "Traceback" not in output(cluster, number)


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
