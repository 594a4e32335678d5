"""experiments/causal at a very small size: from the learning rate to what the best model writes."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from experiments.equal_time.points import Point
from ksub_ds.common.errors import UserError

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
CAUSAL = ROOT / "experiments/causal"


def load(name, monkeypatch):
    """Import a file of the experiment, which finds its neighbours as a script does."""
    monkeypatch.syspath_prepend(CAUSAL)
    spec = importlib.util.spec_from_file_location(name, CAUSAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def outcome(monkeypatch):
    return load("outcome", monkeypatch)


@pytest.mark.timeout(600)
def test_the_best_run_goes_on_is_exported_and_writes(tiny_shards, tmp_path):
    out = tmp_path / "experiment"
    out.mkdir()
    (out / "prices.json").write_text('{"plain": 1.0}')  # so that the steps do not depend on this machine
    network = ["--width", 16, "--layers", 1, "--rows", 2, "--warmup-steps", 1, "--table-size", 16]
    length = ["--seconds", 2, 4, "--rates", 1e-3, "--most-rates", 1, "--eval-sequences", 2, "--kinds", "plain"]
    words = ["--data", tiny_shards, "--out", out, *network, *length]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, CAUSAL / "run.py", *map(str, words)],
        env=os.environ | {"PYTHONPATH": paths, "MPLCONFIGDIR": str(tmp_path / "matplotlib")},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    (point,) = json.loads((out / "results.json").read_text())["points"]
    assert [(end["steps"], end["seed"]) for end in point["ends"]] == [(2, 0), (4, 0)]
    for end in point["ends"]:  # both count the same text
        tokens = sum(each["count"] for each in end["languages"].values())
        assert end["bits_per_byte"] * end["bytes"] == pytest.approx(end["loss"] * tokens / 0.6931471805599453)
    assert (out / "export" / "plain-lr0.001-seed0-step4" / "config.json").exists()
    written = (out / "continuations.md").read_text().splitlines()
    assert [line.split()[1] for line in written[2:]] == ["en"]
    assert (out / "causal.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_that_ends_in_the_warm_up_is_refused(outcome, monkeypatch):
    run, options = load("run", monkeypatch), Namespace(seconds=[60.0, 20.0], warmup_steps=20)
    run.check_budgets(options, [Point("plain")], {"plain": 0.9})
    with pytest.raises(UserError, match=r"--seconds 20: buys 10 of the dearest steps, of 2.00 s.*give at least 42"):
        run.check_budgets(options, [Point("plain"), Point("positional", 63)], {"plain": 2.0, "positional-63": 0.1})


def test_the_table_gives_the_mean_of_the_seeds_and_leaves_out_what_is_missing(outcome, tmp_path):
    ends = [
        {"seed": seed, "steps": 50, "loss": loss, "bits_per_byte": bits, "languages": {"en": {"bits_per_byte": bits}}}
        for seed, loss, bits in ((0, 8.0, 3.0), (1, 8.5, 3.1))
    ]
    point = {
        "name": "plain",
        "kind": "plain",
        "embedding_parameters": 1000,
        "learning_rate": 0.002,
        "seconds_a_step": 2.0,
        "steps_of_budgets": [50, 150],
        "ends": ends,
    }
    results = {"budgets_seconds": [90.0, 300.0], "points": [point]}
    table = outcome.write_outcome(tmp_path, results).splitlines()
    assert table[0].endswith("| 1.5 min | 5 min |")
    cells = "**3.050** [3.000, 3.100] of 2, 8.25 nats (50 steps) |  |"
    assert table[-1] == f"| plain | 1,000 | 0.002 | 2.000 | {cells}"
    assert (tmp_path / "causal.png").read_bytes().startswith(b"\x89PNG")
