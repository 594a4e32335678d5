"""What ends a machine does not end a run: it starts again, or it ends with one clear line, within a minute or two.

Each test holds the time that docs/cluster.md states for its fault, from the fault to the end of the last rank; the
end of the session prints what it took. A silence of 25 s stands for the default of 60.
"""

import os
import re
import signal
from pathlib import Path

from .conftest import STEPS, Cluster, Fault, Running, losses
from .namespaces import Host, wait_until

SILENCE = 25  # a rank without a sign of life for so many seconds is lost; 60 by default
IMPATIENT = {"KSUB_SILENCE_SECONDS": str(SILENCE)}
LONG = 400  # steps: long enough for something to happen before the end


def end(cluster: Cluster, run: Running, name: str, seconds: float = 150.0) -> str:
    """The last line of a run that must fail with code 70 in time and leave nothing behind."""
    done = run.finish(seconds)
    assert done.code == 70, done.text
    cluster.assert_nothing_left(name)
    assert "Traceback" not in done.last_line()
    return done.last_line()


def start(
    cluster: Cluster, name: str, *words: object, env: dict[str, str] | None = None, **settings: object
) -> Running:
    """A long run on two hosts, as it trains its fifth step."""
    settings = {"max_steps": LONG} | settings
    run = cluster.launch(cluster.hostfile(1, 2), *words, *cluster.arguments(name, **settings), host=0, env=env)
    cluster.wait_for_step(run, name, 5)
    return run


def ranks_end(cluster: Cluster, name: str, *hosts: int) -> None:
    """Wait until the hosts have no rank of a run."""
    wait_until(lambda: not any(cluster.workers(host, name) for host in hosts), f"the ranks of {name} end", 300)


def last_step_at(host: Host, run: Path) -> float:
    """When the last line of metrics.jsonl was written, as that host sees it."""
    return Path(f"/proc/{host.init}/root", *run.parts[1:], "metrics.jsonl").stat().st_mtime


def test_a_killed_worker_is_named(cluster: Cluster) -> None:
    run = start(cluster, "worker")
    fault = Fault("a worker is killed")
    os.kill(cluster.workers(2, "worker")[-1], signal.SIGKILL)
    ranks_end(cluster, "worker", 1, 2)
    fault.over(60)
    last = end(cluster, run, "worker")
    assert last.startswith("failed: rank 1 on node2 was killed by signal 9 (SIGKILL); last checkpoint: worker/"), last


def test_a_host_that_is_cut_off(cluster: Cluster) -> None:
    """The first one: its link goes down, nobody says so. The run goes on with the other; its own rank ends too."""
    words = ("--max-restarts", 1, "--min-hosts", 1, "--host-wait", 1)
    run = start(cluster, "cut", *words, env=IMPATIENT, max_steps=60)
    fault, other = Fault("a host is cut off: the others"), Fault("a host is cut off: its own ranks")
    first = set(cluster.workers(2, "cut"))
    cluster[1].cut()
    try:
        wait_until(lambda: not first & set(cluster.workers(2, "cut")), "the rank of the host that is left", 300)
        fault.over(120)
        ranks_end(cluster, "cut", 1)
        other.over(SILENCE + 30)
        done = run.finish(400)
        assert done.code == 0, done.text
    finally:
        cluster[1].join()
        wait_until(lambda: cluster[1].answers(cluster[0]), "the host is back")
    assert re.search(r"^failed: host node1 \(rank 0\) is lost: ", done.text, re.MULTILINE), done.text
    assert "restart 1 of 1 on node2" in done.text and len(losses(cluster.folder / "cut")) == 60
    cluster.assert_nothing_left("cut")


def test_without_permission_no_host_is_left_out(cluster: Cluster) -> None:
    run = start(cluster, "all-or-none", "--max-restarts", 5, "--host-wait", 1, env=IMPATIENT)
    cluster[2].cut()
    try:
        done = run.finish(200)
    finally:
        cluster[2].join()
        wait_until(lambda: cluster[2].answers(cluster[0]), "node2 is back")
    assert done.code == 2 and done.last_line().startswith("error: no restart: node2 cannot be reached; --min-hosts N")
    wait_until(lambda: not cluster.workers(2, "all-or-none"), "the rank of the host that was cut off", 200)
    cluster.assert_nothing_left("all-or-none")


def test_a_killed_launcher_takes_all_with_it(cluster: Cluster) -> None:
    """The program that the user started, killed so that it can say nothing: the ranks save and end."""
    run = start(cluster, "orphans", save_every_steps=LONG)
    fault = Fault("the program you started is killed")
    os.kill(cluster[0].processes("launch/pretrain.sh", "--out orphans")[0], signal.SIGKILL)
    ranks_end(cluster, "orphans", 1, 2)
    fault.over(120)
    run.process.wait(30)
    cluster.assert_nothing_left("orphans")
    assert len(list((cluster.folder / "orphans" / "checkpoints").glob("global_step*"))) == 1


def test_a_signal_to_the_launcher_saves(cluster: Cluster) -> None:
    run = start(cluster, "stopped", save_every_steps=LONG)
    os.kill(cluster[0].processes("launch/pretrain.sh", "--out stopped")[0], signal.SIGTERM)
    assert run.finish(150).code == 143
    cluster.assert_nothing_left("stopped")
    assert len(list((cluster.folder / "stopped" / "checkpoints").glob("global_step*"))) == 1
    assert not (cluster.folder / "stopped" / "STOP").exists()


def test_a_rank_that_hangs(cluster: Cluster) -> None:
    run = start(cluster, "hung", env=IMPATIENT)
    fault = Fault("a rank is stopped")
    os.kill(cluster.workers(2, "hung")[-1], signal.SIGSTOP)
    ranks_end(cluster, "hung", 1, 2)
    fault.over(SILENCE + 60)
    last = end(cluster, run, "hung")
    assert "rank 1" in last and "node2" in last, last


def test_a_full_disk(cluster: Cluster) -> None:
    """The run folder of node1 is a disk of its own, too small for the third checkpoint; the first two stay whole."""
    name, folder = "disk", cluster.folder / "disk"
    folder.mkdir()
    cluster[1].mount("-t", "tmpfs", "-o", "size=20m", "tmpfs", folder)
    try:
        run = cluster.launch(cluster.hostfile(1, 2), *cluster.arguments(name, max_steps=60), host=1)
        done = run.finish()
        Fault("the disk is full", last_step_at(cluster[1], folder)).over(30)
        assert done.code == 2 and "Traceback" not in done.text, done.text
        assert done.last_line().startswith("error: ") and "No space left" in done.last_line(), done.text
        cluster.assert_nothing_left(name)
        found = cluster[1].run(
            "sh", "-c", f"ls {folder}/checkpoints; cat {folder}/checkpoints/global_step4/manifest.json"
        )
        assert "global_step4" in found.stdout and '"step": 4' in found.stdout
    finally:
        cluster[1].unmount(folder)


def test_nan_on_one_rank(cluster: Cluster, tmp_path: Path) -> None:
    """One rank of two computes a loss that is not a number: both end, no update is made, one line names the rank."""
    broken = Path(__file__).parent / "nan_on_one_rank"
    run = cluster.launch(
        cluster.hostfile(1, 2),
        "--max-restarts", 3,
        *cluster.arguments("nan"),
        host=0,
        env={"KSUB_TEST_NAN": "1 11", "PYTHONPATH": str(broken)},
    )  # fmt: skip
    done = run.finish()
    Fault("a NaN on one rank", last_step_at(cluster[0], cluster.folder / "nan")).over(30)
    assert done.code == 2, done.text
    assert done.last_line().startswith("error: step 6: the loss is not finite on rank 1"), done.text
    assert len(losses(cluster.folder / "nan")) == 5 and STEPS > 6
    cluster.assert_nothing_left("nan")
