"""experiments/codes at a very small size: it runs, goes on where it stopped, and refuses to mix settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("plain", "clustered-matched-aligned")


def run(out, shards, *more):
    options = [
        "--data",
        shards,
        "--out",
        out,
        "--num-tokens",
        100,
        "--table-size",
        6,
        "--parallel",
        1,
        "--batch-size",
        2,
    ]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, ROOT / "experiments/codes/run.py", *map(str, [*options, *more])],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(out.parent / "matplotlib")},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def test_two_configurations_then_nothing_left_to_do(tiny_shards, tmp_path):
    out = tmp_path / "experiment"
    done = run(out, tiny_shards, "--steps", 3, "--only", *NAMES)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        assert f"| {name} |" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert [result["name"] for result in results] == list(NAMES)
    assert [result["parameters"]["embedding"] for result in results] == [100 * 192, 18 * 64]
    assert all(3 < point["loss"] < 7 for result in results for point in result["held_out"])
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    before = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    again = run(out, tiny_shards, "--steps", 3, "--only", *NAMES)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()} == before

    other = run(out, tiny_shards, "--steps", 4, "--only", *NAMES)
    assert other.returncode == 2 and "was trained with other settings" in other.stderr


def test_codes_of_the_model_s_own_states(tiny_shards, tmp_path):
    """The models that go on start from what the first one knows, not from nothing."""
    out = tmp_path / "experiment"
    done = run(out, tiny_shards, "--steps", 5, "--refine", "--decoder-bias", "frequency")
    assert done.returncode == 0, done.stderr
    found = {result["name"]: result for result in json.loads((out / "results.json").read_text())}
    first, kept, moved, fresh = found.values()
    assert list(found) == [NAMES[1], f"{NAMES[1]}, going on", "states, going on", "states"]
    assert kept["held_out"][0] == {**first["held_out"][-1], "step": 0}
    assert 0 < moved["fit_error"] < 1
    assert abs(moved["held_out"][0]["loss"] - kept["held_out"][0]["loss"]) < 0.2
    assert kept["held_out"][0]["loss"] != moved["held_out"][0]["loss"] != fresh["held_out"][0]["loss"]
