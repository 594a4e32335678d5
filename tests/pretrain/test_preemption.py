"""Ending a run early in order, and keeping a run folder to one run."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ksub_ds.common.exit_codes import REQUEUE
from ksub_ds.pretrain.checkpoint import step_of
from ksub_ds.pretrain.preemption import StopRequest

from .runs import Bench, losses

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
LONG = {"max_steps": 5000, "save_every_steps": 5000, "eval_every": 0}


def wait_for_step(process: Any, run: Path, step: int) -> None:
    path = run / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def latest(run: Path) -> int:
    return step_of(Path((run / "LATEST").read_text().strip()))


def test_signal_then_stop_file(bench: Bench) -> None:
    """SIGTERM saves and ends with 143; the same command goes on; a second run is refused; STOP ends with 0."""
    run = bench.folder / "stopped"
    first = bench.start("stopped", **LONG)
    wait_for_step(first, run, 3)
    first.send_signal(signal.SIGTERM)
    _, log = first.communicate(timeout=100)
    assert first.returncode == 128 + signal.SIGTERM, log
    assert "SIGTERM received" in log
    stopped_at = latest(run)
    assert len(losses(run)) == stopped_at >= 3

    (run / "STOP").touch()  # left from before: not meant for the next start
    second = bench.start("stopped", **LONG)
    wait_for_step(second, run, stopped_at + 2)
    third = bench.start("stopped", **LONG)
    _, refusal = third.communicate(timeout=100)
    assert third.returncode == 2
    errors = [line for line in refusal.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "in use by process" in errors[0] and "Traceback" not in refusal
    (run / "STOP").touch()
    _, log = second.communicate(timeout=100)
    assert second.returncode == 0, log
    assert not (run / "STOP").exists()
    assert latest(run) == len(losses(run)) > stopped_at

    other = bench.start("stopped", **(LONG | {"max_steps": 6000, "peak_lr": 0.5}))
    _, refusal = other.communicate(timeout=100)
    assert other.returncode == 2
    error = next(line for line in refusal.splitlines() if line.startswith("error:"))
    assert "max_steps: 5000 -> 6000" in error and "peak_lr: 0.001 -> 0.5" in error
    assert json.loads((run / "recipe.json").read_text())["max_steps"] == 5000


def test_who_asks_decides_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person's STOP ends with 0; a scheduler, who will start the run again, is told so by 75."""
    stop_file = tmp_path / "STOP"
    with StopRequest(stop_file, None) as stop:
        assert stop.reason() is None
        stop_file.touch()
        assert stop.reason() is not None and stop.exit_code() == 0
        stop_file.write_text("requeue\n")
        assert stop.exit_code() == REQUEUE == 75
        stop_file.unlink()
        signal.raise_signal(signal.SIGUSR1)
        assert stop.reason() == "SIGUSR1 received" and stop.exit_code() == REQUEUE
    with StopRequest(stop_file, None) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code() == 128 + signal.SIGTERM
    with StopRequest(stop_file, 1e-9) as stop:
        assert stop.reason() == "--max-hours 1e-09 is over" and stop.exit_code() == 0
        monkeypatch.setenv("KSUB_REQUEUE", "1")
        assert stop.exit_code() == REQUEUE
        stop_file.touch()  # a person's wish goes before
        assert stop.exit_code() == 0
