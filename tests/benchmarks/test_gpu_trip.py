"""benchmarks/gpu: the trip's parts at a very small size, its guards, and the derived times that are kept."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """Import modules of benchmarks/gpu by name; their names are common ones, and do not outlive the test."""
    for folder in (BENCHMARKS, BENCHMARKS / "gpu"):
        monkeypatch.syspath_prepend(str(folder))
    for path in (*BENCHMARKS.glob("*.py"), *(BENCHMARKS / "gpu").glob("*.py")):  # other tests have a `run` too
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(BENCHMARKS):
            del sys.modules[name]


def test_two_parts_as_one_command(tmp_path):
    """Without Triton the loss has one form, in torch; with it, also what it chooses in Triton's interpreter."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, BENCHMARKS / "gpu" / "run.py", "--rehearse", "--out", tmp_path]
    done = subprocess.run(
        [*map(str, command), "--only", "machine", "errors"],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "rehearsal.json").read_text())
    assert set(results) == {"machine", "errors"} and " 0 failed" in done.stdout
    assert results["machine"]["bf16 product"]["tflops"] >= 0
    assert len(results["errors"]) > 6 and all(row["ok"] for row in results["errors"].values())
    for name in (*results["machine"], *results["errors"]):
        assert name in done.stdout


def test_a_variant_that_fails_is_one_line_and_no_variant_begins_late(modules, tmp_path, monkeypatch):
    run, trip = modules("run"), modules("trip")
    setting = trip.Trip(tmp_path, True, "cpu", math.inf)

    def variants(_):
        yield "breaks", lambda: 1 / 0
        yield "works", lambda: {"ms": 1.5}
        raise ImportError("no such package")

    monkeypatch.setattr(modules("ceilings"), "variants", variants)
    path = run.results_file(tmp_path, rehearsal=True)
    run.measure(setting, "machine", path)
    results = run.read_results(path)
    assert results["machine"]["breaks"]["error"].startswith("ZeroDivisionError")
    assert results["machine"]["works"]["ms"] == 1.5
    assert results["machine"]["machine"]["error"] == "ImportError: no such package"
    run.measure(trip.Trip(tmp_path, True, "cpu", 0.0), "machine", path)
    assert run.read_results(path)["machine"]["works"] == {"skipped": "no time left"}


def test_a_part_that_hangs_or_dies_is_one_line_and_the_next_one_begins(modules, tmp_path, monkeypatch):
    run = modules("run")
    path = run.results_file(tmp_path, rehearsal=False)
    script = tmp_path / "part.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "part = sys.argv[sys.argv.index('--only') + 1]\n"
        "if part == 'errors': time.sleep(60)\n"
        "if part == 'loss': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "print('measured', part, flush=True)\n"
    )
    monkeypatch.setattr(run, "__file__", str(script))
    monkeypatch.setattr(run, "SECONDS", {"errors": 1})
    monkeypatch.setattr(run, "LATE_SECONDS", 1)
    run.measure_in_processes(run.Options(tmp_path, seconds=20), ["machine", "errors", "loss", "step"], path)
    results = run.read_results(path)
    assert results == {
        "errors": {"errors": {"error": "stopped after 2 s"}},
        "loss": {"loss": {"error": "ended with exit code -11"}},
    }


def test_runs_are_compared_at_a_time_that_all_have(modules):
    real_runs = modules("real_runs")
    rows = {
        "plain": {"held_out": [[0, 0.0, 10.0], [10, 20.0, 8.0]]},
        "clustered": {"held_out": [[0, 0.0, 10.0], [50, 30.0, 7.0]]},
        "positional": {"error": "stopped after 60 s"},
    }
    assert real_runs.at_equal_time(rows) == {"seconds": 20.0, "plain": 8.0, "clustered": 8.0}
    assert real_runs.at_equal_time({"plain": rows["plain"]}) == {}


def test_a_run_is_summarised_by_its_own_files(modules, tmp_path):
    real_runs = modules("real_runs")
    lines = [
        {"step": n, "loss": 10.0 - n, "step_seconds": 9.0 if n == 1 else 2.0, "eta_seconds": 1.0} for n in (1, 2, 3, 4)
    ]
    for line in lines:
        line |= {"data_wait_seconds": 0.5, "tokens_per_second": 100.0 * line["step"]}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "evaluation.jsonl").write_text("")
    row = real_runs.outcome(tmp_path)
    assert row["step"] == 4 and row["trained_seconds"] == 6.0 and row["data_wait_share"] == 0.25
    assert row["tokens_per_second"] == 350.0 and "eta_seconds" not in row and "held_out" not in row
    score = {"step": 2, "loss": 7.0, "languages": {"en": {"loss": 6.5}}}
    (tmp_path / "evaluation.jsonl").write_text(json.dumps(score) + "\n")
    row = real_runs.outcome(tmp_path)
    assert row["held_out"] == [[2, 2.0, 7.0]] and row["held_out_by_language"] == {"en": 6.5}


def test_a_run_keeps_nothing_of_an_earlier_try(modules, tmp_path, monkeypatch):
    real_runs, trip = modules("real_runs"), modules("trip")
    kept = tmp_path / "runs" / "run_plain"
    kept.mkdir(parents=True)
    score = {"step": 1, "loss": 7.0, "languages": {"en": {"loss": 6.5}}}
    (kept / "evaluation.jsonl").write_text(json.dumps(score) + "\n")

    ends: list[int | None] = [0, 70, None]

    def run(command, timeout, **_):
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        lines = [{"step": step, "loss": 9.0, "step_seconds": 1.0} for step in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        code = ends.pop(0)
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(real_runs.subprocess, "run", run)
    setting = trip.Trip(tmp_path, True, "cpu", math.inf, tmp_path / "no data")
    first, failed, late = (real_runs.train(setting, "run plain", "plain", ()) for _ in range(3))
    assert "held_out" not in first and "error" not in first
    assert failed["step"] == late["step"] == 3
    assert failed["error"] == "exit code 70:" and late["error"] == "stopped after 3600 s"


def test_the_wait_at_the_end_of_a_profile_is_none_of_the_step(modules, tmp_path, monkeypatch):
    step_cost, trip = modules("step_cost"), modules("trip")
    setting = trip.Trip(tmp_path, True, "cpu", math.inf)
    step = lambda: torch.ones(3).nonzero()  # noqa: E731
    monkeypatch.setattr(step_cost, "model_of", lambda *_, **__: None)
    monkeypatch.setattr(step_cost, "batch", lambda *_: {})
    monkeypatch.setattr(step_cost, "forward_and_backward", lambda *_: step)
    monkeypatch.setattr(trip.Trip, "synchronize", lambda _: step())
    row = step_cost.profiled(setting, 2, "eager")
    assert row["waits"] == 1 and row["host_waits"] == {"aten::nonzero": 1}
    assert step_cost.STEP not in row["count_and_ms"]


def test_the_kept_derived_times_are_those_of_the_model(modules):
    cost_model = modules("cost_model")
    kept = json.loads((BENCHMARKS / "results" / "gpu_derived.json").read_text())
    assert kept["derived"] is True and kept["rows"] == cost_model.rows_of_table()


def test_loss_without_torchs_own_fused_loss(modules, monkeypatch, capsys):
    """torch 2.11 has no F.linear_cross_entropy, and a GPU takes fewer rows of the dense decoder."""
    loss, measuring = modules("loss"), modules("measuring")
    monkeypatch.setattr(loss, "HAS_LINEAR_CROSS_ENTROPY", False)
    monkeypatch.setattr(loss, "rows_of", lambda name, options: 4 if name.startswith("dense") else options.positions)
    monkeypatch.setattr(measuring, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "in_fresh_process", lambda *_: 1000)
    options = loss.Options(positions=16, tokens=512, repeats=1)
    rows = loss.measure_time_and_memory(options)
    assert [row["variant"] for row in rows[:2]] == ["dense (4 rows, scaled)", "dense + bias (4 rows, scaled)"]
    assert rows[0]["extra_megabytes"] == 0.004 and rows[2]["extra_megabytes"] == 0.001
    assert all(row["times_faster_than_linear_cross_entropy"] is None for row in rows)
    loss.report(rows, {})
    assert "left out" in capsys.readouterr().err
