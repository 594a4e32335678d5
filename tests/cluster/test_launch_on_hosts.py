"""Hostfiles: variables travel, and a run continues on other hosts. test_docs.py has the ways to start."""

from pathlib import Path

import pytest

from .conftest import STEPS, Cluster, losses


def test_environment_travels(cluster: Cluster) -> None:
    """Variables with blanks and quotes reach the other host; what DeepSpeed's shell would read does not hurt."""
    tricky = "a b 'c' \"d\" $(touch hurt) ; e"
    env = {"KSUB_MARK": tricky, "HF_TOKEN": "secret", "KSUB_PLAIN": "word"}
    name = "a run with blanks"
    run = cluster.launch(cluster.hostfile(1, 2), *cluster.arguments(name, max_steps=200), host=0, env=env)
    cluster.wait_for_step(run, name, 1)
    worker = cluster.workers(2, name)[-1]
    found = Path(f"/proc/{worker}/environ").read_bytes().decode().split("\0")
    assert f"KSUB_MARK={tricky}" in found and "KSUB_PLAIN=word" in found
    assert not [word for word in found if word.startswith("HF_TOKEN")]
    (cluster.folder / name / "STOP").touch()
    assert run.finish().code == 0
    assert not (cluster.folder / "hurt").exists() and not Path("/hurt").exists()


def test_other_ranks_continue_a_run(cluster: Cluster, reference: list[float]) -> None:
    """Some steps on two hosts, the rest on a third one alone: the same data, the same losses."""
    arguments = cluster.arguments("moved")
    run = cluster.launch(cluster.hostfile(1, 2), *arguments, host=0)
    cluster.wait_for_step(run, "moved", 2)
    (cluster.folder / "moved" / "STOP").touch()
    assert run.finish().code == 0
    done = cluster.launch(cluster.hostfile(3), *arguments, host=0).finish()
    assert done.code == 0, done.text
    assert losses(cluster.folder / "moved") == pytest.approx(reference, rel=1e-5) and len(reference) == STEPS
