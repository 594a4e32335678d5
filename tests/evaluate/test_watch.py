"""Watching a run: each checkpoint once, half-written ones waited for, the run left as it is."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from ksub_ds.cli import main
from ksub_ds.common.files import sha256_file
from ksub_ds.evaluate import watch as module
from ksub_ds.evaluate.watch import Curve


@pytest.fixture(scope="module")
def short_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a tiny plain model."""
    run = tmp_path_factory.mktemp("watched") / "run"
    words = ["pretrain", "--preset", "tiny", "--plain", "--data", tiny_shards, "--out", run, "--max-steps", 2]
    more = ["--global-batch-size", 4, "--save-every-steps", 1, "--eval-every", 0]
    assert main([str(word) for word in words + more]) == 0
    return run


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return Path(shutil.copytree(short_run, tmp_path / "run"))


@pytest.fixture(autouse=True)
def polite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own process keeps its priority."""
    monkeypatch.setattr(module, "NICENESS", 0)


def call(run: Path, out: Path, *more: object) -> int:
    return main([str(word) for word in ["evaluate", "watch", "--run", run, "--out", out, "--once", *more]])


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "curve.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_every_checkpoint_once_and_the_run_untouched(run: Path, tiny_xnli: Path, tmp_path: Path) -> None:
    before, out = contents(run), tmp_path / "curve"
    few = ("--data", tiny_xnli, "--max-train-examples", 16, "--max-test-examples", 9)
    assert call(run, out, *few) == 0
    lines = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert set(lines[0]["languages"]) == {"el", "en", "tr"} and 0 <= lines[0]["masked_accuracy"] <= 1
    assert set(lines[1]["xnli"]["accuracy"]) == {"en", "fr", "sw"}
    assert call(run, out, *few) == 0 and steps(out) == [1, 2]
    assert contents(run) == before and not (out / "checkpoint").exists()


def test_steps_that_were_trained_anew_are_scored_anew(run: Path, tiny_xnli: Path, tmp_path: Path) -> None:
    """As after --extend under wsd, which goes back; lines of earlier versions, which name no manifest, stay."""
    few = ("--data", tiny_xnli, "--max-train-examples", 16, "--max-test-examples", 9, "--eval-sequences", 2)
    out = tmp_path / "curve"

    def losses() -> list[tuple[int, float]]:
        lines = (json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"]) for line in lines]

    def train_anew(step: int) -> None:
        path = run / "checkpoints" / f"global_step{step}"
        weights = load_file(path / "model.safetensors")
        save_file({name: 2 * value for name, value in weights.items()}, path / "model.safetensors")
        manifest = json.loads((path / "manifest.json").read_text())
        size, digest = (path / "model.safetensors").stat().st_size, sha256_file(path / "model.safetensors")
        manifest["files"]["model.safetensors"] = {"size": size, "sha256": digest}
        (path / "manifest.json").write_text(json.dumps(manifest))

    assert call(run, out, *few) == 0
    (one, first), (two, second) = losses()
    train_anew(2)
    assert call(run, out, *few) == 0
    assert losses()[0] == (one, first) and losses()[1][0] == two and losses()[1][1] != second
    train_anew(1)
    shutil.rmtree(run / "checkpoints" / "global_step2")
    assert call(run, out, *few) == 0
    ((step, loss),) = losses()  # what came after it was of the old way
    assert step == one and loss != first
    (out / "curve.jsonl").write_text(json.dumps({"step": 1, "loss": 5.0, "masked_accuracy": 0.5}) + "\n")
    assert call(run, out, *few) == 0 and losses() == [(1, 5.0)]


def test_a_half_written_checkpoint_is_waited_for(run: Path, tmp_path: Path) -> None:
    """Its last file comes while we wait; scored before that it would be in the curve too early."""
    newest, out = run / "checkpoints" / "global_step2", tmp_path / "curve"
    weights = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert call(run, out, "--patience-seconds", 0) == 0
    assert steps(out) == [1]
    seen: list[Any] = []

    def complete() -> None:
        time.sleep(2)
        seen.append(steps(out))
        (newest / "model.safetensors").write_bytes(weights)

    writer = threading.Thread(target=complete)
    writer.start()
    assert call(run, out, "--patience-seconds", 60, "--poll-seconds", 0.1) == 0
    writer.join()
    assert seen == [[1]] and steps(out) == [1, 2]


def test_mistakes(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert call(tmp_path, tmp_path / "a") == 2 and "no recipe.json there" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert call(run, tmp_path / "b", "--patience-seconds", 0) == 2
    assert "holds no whole checkpoint yet" in capsys.readouterr().err
    recipe = (run / "recipe.json").read_bytes()
    assert call(run, run) == 2
    assert f"--out {run}: holds " in capsys.readouterr().err and (run / "recipe.json").read_bytes() == recipe
    with Curve(tmp_path / "c"):
        assert call(run, tmp_path / "c") == 2
    assert "another `ksub evaluate watch` is at work there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--eval-sequences", -1),
        ("--poll-seconds", "nan"),
        ("--patience-seconds", "nan"),
        ("--learning-rate", "nan"),
        ("--setting", "both"),
        ("--data", "nowhere"),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_scored(
    run: Path, tmp_path: Path, capsys: Any, option: str, value: object
) -> None:
    assert call(run, tmp_path / "curve", option, value) == 2
    assert f"error: {option} {value}: " in capsys.readouterr().err and not (tmp_path / "curve").exists()


def test_a_curve_of_other_settings_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "curve"
    assert call(run, out, "--eval-sequences", 1) == 0
    before = (out / "curve.jsonl").read_bytes()
    assert call(run, out, "--eval-sequences", 2) == 2
    assert "holds a curve with other settings (eval_sequences: 1 -> 2)" in capsys.readouterr().err
    assert (out / "curve.jsonl").read_bytes() == before
