"""A data set of one's own: forms and columns as they are, classes found or given, unlabelled tests answered."""

import csv
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ksub_ds.cli import main
from ksub_ds.evaluate.finetune.train_step import SingleProcessStep

CLASSES = ("bad", "good", "so so")


def rows(count: int) -> list[dict[str, Any]]:
    """The class shows in the last word."""
    ends = ("but", "today", "slowly")
    return [
        {"id": i, "review": f"the bird {'sings ' * (i % 4)}{ends[i % 3]}", "about": "a house", "y": CLASSES[i % 3]}
        for i in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "reviews"
    folder.mkdir()
    for name, count in (("train.csv.xz", 60), ("dev.csv", 15)):
        with (lzma.open if name.endswith(".xz") else open)(folder / name, "wt", newline="") as stream:
            writer = csv.DictWriter(stream, ["id", "review", "about", "y"])
            writer.writeheader()
            writer.writerows(rows(count))
    labelled = [row | {"y": None} if row["id"] == 4 else row for row in rows(12)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    return folder


def classify(model: Path, data: Path, out: Path, *more: object) -> int:
    fixed = ["--model", model, "--data", data, "--out", out, "--label", "y", "--batch-size", 8, "--max-length", 16]
    return main([str(part) for part in ["evaluate", "classify", *fixed, "--learning-rate", 2e-3, *more]])


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_from_files_to_tables(tiny_model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    run = ("--columns", "review", "about", "--epochs", 1, "--seeds", 0, 1)
    out.mkdir()
    (out / "log.txt").touch()  # as of a shell that sends the output there
    assert classify(tiny_model, data, out, *run) == 0
    found = results(out)
    assert found["classes"] == list(CLASSES) and set(found["scores"]) == {"validation", "test"}
    assert found["rows"]["test"] == found["rows"]["test"] | {"count": 11, "unlabelled": 1}
    answers = json.loads((out / "predictions.json").read_text())
    assert answers["labels"] == [None if i == 4 else CLASSES[i % 3] for i in range(12)]
    right = [
        sum(a == b for a, b in zip(run, answers["labels"], strict=True)) / 11 for run in answers["predictions"].values()
    ]
    assert found["scores"]["test"]["accuracy"] == pytest.approx(sum(right) / 2)
    config = json.loads((out / "work" / "finetune-seed0" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "so so"}
    told = capsys.readouterr().out
    assert "### reviews, 3 classes" in told and "1 test rows have no label" in told
    # without labels it is answered; the model trained before stays
    unlabelled = [{key: row[key] for key in ("review", "about")} for row in rows(12)]
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unlabelled))
    state = (out / "queue" / "done" / "finetune-seed0.json").stat().st_mtime_ns
    assert classify(tiny_model, data, out, *run) == 0
    assert (out / "queue" / "done" / "finetune-seed0.json").stat().st_mtime_ns == state
    assert set(results(out)["scores"]) == {"validation"}
    later = json.loads((out / "predictions.json").read_text())
    assert later["predictions"] == answers["predictions"] and later["labels"] == [None] * 12
    assert main(["report", str(out), "--format", "csv"]) == 0
    assert "# reviews, 3 classes" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_embedding_can_stay_as_it_was(tiny_model: Path, data: Path, tmp_path: Path, ranks: int) -> None:
    run = ("--columns", "review", "--epochs", 1, "--ranks-per-job", ranks, "--freeze-embedding")
    assert classify(tiny_model, data, tmp_path / "out", *run) == 0
    assert results(tmp_path / "out")["settings"]["freeze_embedding"] is True
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(tmp_path / "out" / "work" / "finetune-seed0" / "model" / "model.safetensors")
    changed = {name for name, value in after.items() if name in before and not torch.equal(value, before[name])}
    assert changed == {name for name in set(before) & set(after) if "word_embeddings" not in name}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("test-seed0", '{"answers": [1, 2]}'),
        ("test-seed0", '{"answers": ["a"]}'),
        ("finetune-seed0", '{"x": 1}'),
        ("finetune-seed0", '{"epochs"'),
    ],
)
def test_a_damaged_result_of_a_job_is_named(tiny_model, data, tmp_path, capsys, name, content):
    run = ("--columns", "review", "--epochs", 1)
    assert classify(tiny_model, data, tmp_path / "out", *run) == 0
    (path,) = (tmp_path / "out" / "queue" / "done").glob(f"{name}*.json")
    path.write_text(content)
    capsys.readouterr()
    assert classify(tiny_model, data, tmp_path / "out", *run) == 2
    assert f"{path}: is damaged; remove it, and the same command does that job again" in capsys.readouterr().err
    path.unlink()
    assert classify(tiny_model, data, tmp_path / "out", *run) == 0


def test_minus_one_may_be_a_class(tiny_model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    for name, count in (("train.jsonl", 30), ("validation.jsonl", 6), ("test.jsonl", 6)):
        lines = [{"review": row["review"], "y": row["id"] % 3 - 1} for row in rows(count)]
        (data / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = ("--columns", "review", "--epochs", 1)
    assert classify(tiny_model, data, tmp_path / "out", *run) == 2
    message = "remove it, or say which class it is (--label-map=-1=CLASS, or --classes) (10 of 30 rows are such)"
    assert message in capsys.readouterr().err
    assert classify(tiny_model, data, tmp_path / "out", *run, "--classes", -1, 0, 1) == 0
    assert results(tmp_path / "out")["classes"] == ["-1", "0", "1"]
    assert results(tmp_path / "out")["rows"]["test"]["count"] == 6


def test_reports_compare_models(tiny_model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(tiny_model, tmp_path / "other")
    run = ("--columns", "review", "--epochs", 1, "--classes", *CLASSES)
    assert classify(tiny_model, data, tmp_path / "a", *run) == 0
    assert classify(tmp_path / "other", data, tmp_path / "b", *run) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--baseline", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "reviews: differences" in told and "other (positional) - tiny (positional) | +0.0          | 1.0000" in told
    stored = json.loads((tmp_path / "b" / "predictions.json").read_text())
    (tmp_path / "b" / "predictions.json").write_text(json.dumps(stored | {"predictions": {}}))
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--baseline", str(tmp_path / "a")]) == 2
    assert "predictions.json: is damaged" in capsys.readouterr().err


def test_what_is_wrong_is_one_line(tiny_model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"

    def told(*more: object, where: Path = data) -> str:
        assert classify(tiny_model, where, out, *more) == 2 and not (out / "queue").exists()
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    assert "has no column 'text'; every row needs text, y; found id, review, about, y" in told("--columns", "text")
    assert "--columns y: give one column of text or two" in told("--columns", "y")
    assert "--classes a a: give two different names" in told("--columns", "review", "--classes", "a", "a")
    assert "is not one of bad, good" in told("--columns", "review", "--classes", "bad", "good")
    assert "--label-map good: must be VALUE=CLASS" in told("--columns", "review", "--label-map", "good")
    assert "is not a folder" in told("--columns", "review", where=tmp_path / "nowhere")
    mapped = told("--columns", "review", "--label", "id", "--label-map", "0=no")
    assert "--label-map: does not say what 1 stands for, as it does of other numbers" in mapped
    out.mkdir()
    (out / "results.json").write_text("mine")
    assert f"--out {out}: holds results.json, and no evaluation" in told("--columns", "review")
    assert (out / "results.json").read_text() == "mine"
    shutil.rmtree(out)
    for folder, held in ((tiny_model, "config.json"), (data, "dev.csv")):
        assert classify(tiny_model, data, folder, "--columns", "review") == 2 and not (folder / "queue").exists()
        assert f"--out {folder}: holds {held}, and no evaluation" in capsys.readouterr().err
    (data / "test.jsonl").write_text('{"review": "a bird", "y": 0}\n')
    numbers = told("--columns", "review")
    assert "label 0 is a number, and the training set has names (bad, good, so so); say which is which by" in numbers
    (data / "dev.csv").rename(data / "heldout.csv")
    assert "has no validation set (validation.jsonl, .csv, .tsv or .parquet); found heldout.csv, test.jsonl" in told(
        "--columns", "review"
    )


def test_the_end_of_memory_is_one_line(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """By the error that CUDA's allocator raises, in the second step."""
    real, steps = SingleProcessStep.apply, []

    def too_much(self: SingleProcessStep, loss: Any, learning_rate: float) -> None:
        steps.append(1)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
        real(self, loss, learning_rate)

    monkeypatch.setattr(SingleProcessStep, "apply", too_much)
    assert classify(tiny_model, data, tmp_path / "out", "--columns", "review") == 2
    told = capsys.readouterr().err
    assert "error: out of memory on cpu: fine-tuning with a batch size of 8; try a smaller one" in told
    assert "Traceback" not in told
