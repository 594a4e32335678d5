"""Kills at random moments: the final weights are those of a run left alone.

make test-chaos      # 20 kills, about 15 minutes; in make test-cluster there are 3
"""

import os
import random
import signal
import time

import numpy as np
import pytest

from .conftest import Cluster, Fault, Running, losses, steps_done, weights
from .namespaces import wait_until

KILLS = int(os.environ.get("KSUB_CHAOS_KILLS", "3"))
STEPS = 120 if KILLS <= 3 else 100 * KILLS  # 20 a second on a quiet machine, up to 12 s from start to kill
SEED = int(os.environ.get("KSUB_CHAOS_SEED", "0"))

# What is killed: (host, words of its command line). Everything that a run consists of.
VICTIMS = (
    *((host, ("-m ksub_ds.pretrain", "--out chaos ")) for host in (1, 2)),
    *((host, ("-m ksub_ds.cluster.supervisor",)) for host in (1, 2)),
    *((host, ("-m deepspeed.launcher.launch",)) for host in (1, 2)),
    (0, ("pdsh",)),
    (0, ("bin/deepspeed",)),
)


def wait_for_moment(cluster: Cluster, run: Running, draw: random.Random, training: bool) -> str:
    """Wait until a random step (saving falls into every eighth), or a random time in the start-up; tells which."""
    if training:
        step = steps_done(cluster.folder / "chaos") + draw.randint(1, 12)
        seconds = draw.uniform(0, 0.3)
        wait_until(
            lambda: steps_done(cluster.folder / "chaos") >= step or run.process.poll() is not None, f"step {step}", 180
        )
    else:
        step, seconds = 0, draw.uniform(0, 12)
    deadline = time.monotonic() + seconds  # a random time is the point: start-up, rendezvous, saving, training
    while time.monotonic() < deadline and run.process.poll() is None:
        time.sleep(0.02)
    return f"{seconds:.2f} s after step {step}" if training else f"{seconds:.1f} s after the start"


@pytest.mark.timeout(240 + 180 * KILLS)
def test_weights_survive(cluster: Cluster) -> None:
    settings = {"max_steps": STEPS, "save_every_steps": 8}
    quiet = cluster.launch(cluster.hostfile(1, 2), *cluster.arguments("calm", **settings), host=0)
    assert quiet.finish(100 + 2 * STEPS).code == 0
    draw = random.Random(SEED)
    restarts = ("--max-restarts", 2 * KILLS + 2)
    run = cluster.launch(cluster.hostfile(1, 2), *restarts, *cluster.arguments("chaos", **settings), host=0)
    killed = 0
    while killed < KILLS and run.process.poll() is None:
        starts = run.text().count("restart ")
        wait_until(lambda: cluster.workers(1, "chaos") or run.process.poll() is not None, "a worker", 120)
        training = draw.random() < 0.6 if KILLS > 3 else killed != 1
        moment = wait_for_moment(cluster, run, draw, training)
        host, words = draw.choice(VICTIMS) if KILLS > 3 else VICTIMS[(1, 4, 6)[killed]]
        victims = cluster[host].processes(*words)
        if not victims or run.process.poll() is not None:
            continue
        fault = Fault(f"kill {killed + 1}, {words[-1].strip()}: until the restart")
        os.kill(victims[-1], signal.SIGKILL)
        killed += 1
        print(f"kill {killed} {moment}: {' '.join(words)} on {cluster[host].name}", flush=True)
        wait_until(
            lambda n=starts: run.text().count("restart ") > n or run.process.poll() is not None, run.text()[-3000:], 180
        )
        fault.over(180)
    done = run.finish(100 + 4 * STEPS)
    assert done.code == 0, done.text[-6000:]
    assert killed == KILLS, f"the run ended after {killed} kills: make it longer"
    cluster.assert_nothing_left("chaos")
    assert losses(cluster.folder / "chaos") == losses(cluster.folder / "calm")
    ours, theirs = weights(cluster.folder / "chaos", STEPS), weights(cluster.folder / "calm", STEPS)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
