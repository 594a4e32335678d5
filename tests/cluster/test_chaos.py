"""Kills at random moments: the final weights are those of a run left alone.

make test-chaos      # 20 kills, about 15 minutes; in make test-cluster there are 3
"""

import os
import random
import signal
import time

import numpy as np
import pytest

from .conftest import Cluster, losses, weights
from .namespaces import wait_until

KILLS = int(os.environ.get("KSUB_CHAOS_KILLS", "3"))
STEPS = 24 * max(3, KILLS)
SEED = int(os.environ.get("KSUB_CHAOS_SEED", "0"))

# What is killed: (host, words of its command line). Everything that a run consists of.
VICTIMS = (
    *((host, ("-m ksub_ds.pretrain", "--out chaos ")) for host in (1, 2)),
    *((host, ("-m ksub_ds.cluster.rank",)) for host in (1, 2)),
    *((host, ("-m deepspeed.launcher.launch",)) for host in (1, 2)),
    (0, ("pdsh",)),
    (0, ("bin/deepspeed",)),
)


@pytest.mark.timeout(120 + 120 * KILLS)
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
        moment, (host, words) = draw.uniform(0, 14), draw.choice(VICTIMS) if KILLS > 3 else VICTIMS[(1, 4, 6)[killed]]
        deadline = time.monotonic() + moment  # random moments are the point: start-up, rendezvous, saving, training
        while time.monotonic() < deadline and run.process.poll() is None:
            time.sleep(0.02)
        victims = cluster[host].processes(*words)
        if not victims or run.process.poll() is not None:
            continue
        os.kill(victims[-1], signal.SIGKILL)
        killed += 1
        print(f"kill {killed} after {moment:.1f} s: {words[0]} on {cluster[host].name}", flush=True)
        wait_until(
            lambda n=starts: run.text().count("restart ") > n or run.process.poll() is not None, run.text()[-3000:], 180
        )
    done = run.finish(100 + 4 * STEPS)
    assert done.code == 0, done.text[-6000:]
    assert killed == KILLS, f"the run ended after {killed} kills: make it longer"
    cluster.assert_nothing_left("chaos")
    assert losses(cluster.folder / "chaos") == losses(cluster.folder / "calm")
    ours, theirs = weights(cluster.folder / "chaos", STEPS), weights(cluster.folder / "calm", STEPS)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
