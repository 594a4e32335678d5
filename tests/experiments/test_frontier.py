"""experiments/frontier at a very small size: it runs, goes on where it was killed, and refuses to mix settings."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from experiments.equal_time.experiment import SETTINGS, Experiment, Training, beyond, decay_steps
from experiments.equal_time.points import Point, all_points
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
FRONTIER = ROOT / "experiments/frontier"


def load(name, monkeypatch):
    """Import a file of the experiment, which finds its neighbours as a script does."""
    monkeypatch.syspath_prepend(FRONTIER)
    spec = importlib.util.spec_from_file_location(name, FRONTIER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def frontier(monkeypatch):
    load("outcome", monkeypatch)
    return load("run", monkeypatch)


@pytest.fixture
def outcome(monkeypatch):
    return load("outcome", monkeypatch)


def start(out, shards, *more):
    network = ["--width", 16, "--layers", 1, "--rows", 2, "--warmup-steps", 1, "--table-sizes", 16, "--rounds", 1]
    length = [
        "--rates",
        1e-3,
        "--most-rates",
        1,
        "--seeds",
        1,
        "--search-sequences",
        1,
        "--eval-sequences",
        2,
        "--only",
        "plain",
    ]
    words = ["--data", shards, "--out", out, *network, *length, *more]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, FRONTIER / "run.py", *map(str, words)],
        env=os.environ | {"PYTHONPATH": paths, "MPLCONFIGDIR": str(out.parent / "matplotlib")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.timeout(600)
def test_a_run_goes_on_from_the_search_to_its_budget_and_after_a_kill(tiny_shards, tmp_path):
    out = tmp_path / "experiment"
    out.mkdir()
    (out / "prices.json").write_text('{"plain": 1.0}')  # so that the steps do not depend on this machine
    (out / "calibration-0.json").write_text("{}")
    budgets = ("--search-seconds", 2, "--seconds", 4)
    done = start(out, tiny_shards, *budgets)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    (point,) = results["points"]
    assert [(end["steps"], end["seed"]) for end in point["ends"]] == [(4, 0)]
    assert all(4 < end["loss"] < 9 for end in point["ends"])
    assert results["equal_steps"] == 4 and "dedicated-16-512" in results["not_run"]
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.rstrip().endswith((out / "table.md").read_text().rstrip())
    run = out / "runs" / "plain-lr0.001-seed0"
    assert [path.name for path in (run / "ends").iterdir()] == ["step2"]

    # A kill between the last checkpoint and its evaluation: that alone is made again, and gives the same numbers.
    lines = (run / "evaluation.jsonl").read_text().splitlines()
    (run / "evaluation.jsonl").write_text("".join(f"{line}\n" for line in lines[:-1]))
    again = start(out, tiny_shards, *budgets)
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "results.json").read_text())["points"] == results["points"]
    assert again.stderr.count("+ ") == 1

    less = start(out, tiny_shards, "--search-seconds", 2, "--seconds", 3)
    assert less.returncode == 2 and "goes to 4 steps already" in less.stderr and "--seconds as it was" in less.stderr
    other = start(out, tiny_shards, *budgets, "--rows", 3)
    assert other.returncode == 2 and "--rows 3" in other.stderr and "give another --out" in other.stderr


def test_each_kind_of_codes_is_made_by_the_command_line(tiny_shards, tmp_path):
    options = Namespace(data=tiny_shards, out=tmp_path / "out")
    vars(options).update(dict.fromkeys(SETTINGS, 2))
    experiment = Experiment(options)
    tables = {}
    for point in all_points(512, [16], [32]):
        codes = experiment.codes(point)
        tables[point.kind] = codes and CodeTable.load(codes)
    assert tables.keys() == {"plain", "clustered", "dedicated", "positional"} and tables["plain"] is None
    assert tables["dedicated"].num_dedicated == 32 and tables["clustered"].table_sizes == (16, 16, 16)


def test_points_of_the_whole_vocabulary():
    found = all_points(250_002, [64, 128], [8192, 512])
    assert [point.name for point in found] == [
        *("plain", "clustered-64", "dedicated-64-8192", "dedicated-64-512"),
        *("positional-63", "clustered-128", "positional-128"),
    ]
    with pytest.raises(UserError, match=r"--table-sizes 40: 3 tables of 40 rows code 64,000 tokens.*at least 63"):
        all_points(250_002, [40], [])


def test_stages_train_each_run_upwards(frontier):
    plain, clustered, dedicated, less = (
        *(Point("plain"), Point("clustered", 64)),
        *(Point("dedicated", 64, 8192), Point("dedicated", 64, 512)),
    )
    prices = {plain.name: 2.0, clustered.name: 0.5, dedicated.name: 0.6, less.name: 1.0}
    rates = {"plain": 4e-3, "clustered": 2e-3, "dedicated": 1e-3}
    options = Namespace(seconds=[300.0, 100.0], seeds=2, all_seeds=False)
    stages = list(frontier.stages(options, [plain, clustered, dedicated, less], prices, rates))
    first = {training.point.name: ends for training, ends in stages[0].items()}
    assert first == {  # plain makes 150 steps in 300 s
        "plain": [50],
        "clustered-64": [150, 200],
        "dedicated-64-8192": [150, 167],
        "dedicated-64-512": [100],
    }
    assert {training.point.name: ends for training, ends in stages[1].items()} == {
        "plain": [150],
        "clustered-64": [600],
        "dedicated-64-8192": [500],
    }
    assert [{training.seed for training in stage} for stage in stages] == [{0}, {0}, {1}, {1}]
    assert all(decay_steps(each) < each for stage in stages for ends in stage.values() for each in ends)

    options.all_seeds = True
    every = list(frontier.stages(options, [plain, clustered, dedicated, less], prices, rates))
    assert every[0] == stages[0] and [len(stage) for stage in every] == [4] * 4
    assert every[3][Training(less, 1e-3, 1)] == [150, 300]


@pytest.mark.parametrize(
    ("losses", "further"),
    [
        ({1e-3: 8.0, 2e-3: 7.0, 4e-3: 7.5}, []),
        ({1e-3: 8.0, 2e-3: 7.0}, [4e-3]),
        ({1e-3: 7.0, 2e-3: 8.0}, [5e-4]),
    ],
)
def test_the_search_goes_on_where_the_best_rate_lies_at_the_edge(losses, further):
    assert beyond(losses) == further


def test_the_table_gives_the_mean_of_the_seeds_and_leaves_out_what_is_missing(outcome):
    ends = [{"seed": seed, "steps": 50, "loss": loss, "masked_accuracy": 0.1} for seed, loss in ((0, 8.0), (1, 8.5))]
    shared = {"kind": "plain", "seconds_a_step": 2.0, "embedding_parameters": 1000}
    results = {
        "budgets_seconds": [100.0, 300.0],
        "equal_steps": 150,
        "plain_parameters": 1000,
        "points": [shared | {"name": "plain", "steps_of_budgets": [50, 150], "ends": ends}],
    }
    line = outcome.markdown(results).splitlines()[-1]
    assert line == ("| plain | 1,000 | 100.000% | 2.000 | 8.250 [8.000, 8.500] of 2, 10.0 % (50 steps) |  |  |")
