"""Bad rows are told before anything is trained; a fine-tuning belongs to the files it was trained and chosen on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ksub_ds.cli import main
from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate import benchmark


@pytest.fixture
def data(tmp_path: Path, make_xnli_rows: Callable[[str, int, int], list[dict[str, Any]]]) -> Path:
    for language in ("en", "fr"):
        for split, count in (("train", 24), ("validation", 9), ("test", 12)):
            write(tmp_path / "data" / language / f"{split}.jsonl", make_xnli_rows(language, count, len(split)))
    return tmp_path / "data"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def change(path: Path, number: int, **values: Any) -> None:
    rows = read(path)
    rows[number] |= values
    write(path, rows)


def evaluate(model: Path, data: Path, out: Path, *more: object) -> int:
    fixed = ["--model", model, "--data", data, "--setting", "cross-lingual", "--out", out, "--epochs", 1]
    return main([str(part) for part in ["evaluate", "xnli", *fixed, "--languages", "en", "fr", *more]])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the jobs that were trained, in order."""
    names: list[str] = []
    real = benchmark.train_classifier

    def noting(training: Any, *arguments: Any) -> Any:
        names.append(training.work.name)
        return real(training, *arguments)

    monkeypatch.setattr(benchmark, "train_classifier", noting)
    return names


def test_bad_rows_are_told_before_training(
    tiny_model: Path, data: Path, tmp_path: Path, trained: list[str], capsys: Any
) -> None:
    out = tmp_path / "out"
    for path, values, message in (
        (data / "fr" / "test.jsonl", {"label": "perhaps"}, "test.jsonl: line 8: label 'perhaps' is not one of"),
        (data / "en" / "validation.jsonl", {"label": None}, "line 8: label null stands for an unlabelled row"),
        (data / "en" / "train.jsonl", {"premise": None}, "line 8: premise is null, not text"),
    ):
        before = path.read_bytes()
        change(path, 7, **values)
        assert evaluate(tiny_model, data, out) == 2
        assert message in capsys.readouterr().err and not out.exists() and not trained
        path.write_bytes(before)
    write(data / "fr" / "test.jsonl", [row | {"label": -1} for row in read(data / "fr" / "test.jsonl")])
    assert evaluate(tiny_model, data, out) == 2
    assert "fr/test.jsonl: no row has a label (label -1 or null)" in capsys.readouterr().err and not trained
    rows = [{"lable" if key == "label" else key: row[key] for key in row} for row in read(data / "fr" / "test.jsonl")]
    write(data / "fr" / "test.jsonl", rows)
    assert evaluate(tiny_model, data, out) == 2
    message = "fr/test.jsonl: no row has a label (no column 'label'; found "
    assert message in capsys.readouterr().err and not trained


def test_a_changed_test_set_keeps_the_trained_model(
    tiny_model: Path,
    data: Path,
    tmp_path: Path,
    trained: list[str],
    capsys: Any,
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    out, test = tmp_path / "out", data / "fr" / "test.jsonl"
    assert evaluate(tiny_model, data, out) == 0 and trained == ["finetune-seed0"]
    first = (out / "results.json").read_bytes()
    plan = json.loads((out / "queue" / "plan.json").read_text())
    at_first = test.read_bytes()
    change(test, 3, label=-1)
    assert evaluate(tiny_model, data, out) == 0 and trained == ["finetune-seed0"]
    assert "fr test: another file than at first; it is scored with the models trained before" in caplog.text
    assert "1 of 12 rows are unlabelled (label -1 or null): they are not scored" in caplog.text
    before, after = json.loads(first), json.loads((out / "results.json").read_text())
    assert after["test"]["en"] == before["test"]["en"] and after["data"] != before["data"]
    assert after["test"]["fr"]["count"] == 11 and after["test"]["fr"]["unlabelled"] == 1
    capsys.readouterr()
    assert main(["evaluate", "status", str(out)]) == 0
    assert "3 jobs: 3 done" in capsys.readouterr().out
    test.write_bytes(at_first)  # as it was: nothing is left to do
    assert evaluate(tiny_model, data, out) == 0 and (out / "results.json").read_bytes() == first
    assert json.loads((out / "queue" / "plan.json").read_text()) == plan
    change(data / "en" / "validation.jsonl", 0, label=1)
    assert evaluate(tiny_model, data, out) == 2  # the epoch was chosen on it
    told = f"error: --out {out}: {data}/en/validation.jsonl has changed since models were trained there; give the old"
    assert told in capsys.readouterr().err and trained == ["finetune-seed0"]


def test_an_evaluation_of_an_earlier_version_goes_on(
    tiny_model: Path, data: Path, tmp_path: Path, trained: list[str], capsys: Any
) -> None:
    out = tmp_path / "out"
    assert evaluate(tiny_model, data, out) == 0
    path, results = out / "queue" / "plan.json", (out / "results.json").read_bytes()
    plan = json.loads(path.read_text())
    earlier = {key: value for key, value in plan.items() if key not in ("training", "tests", "checked")}
    shutil.copytree(out, tmp_path / "other")
    for folder in (out, tmp_path / "other"):
        (folder / "queue" / "plan.json").write_text(json.dumps(earlier))
    (out / "results.json").unlink()
    assert evaluate(tiny_model, data, out) == 0 and trained == ["finetune-seed0"]
    assert (out / "results.json").read_bytes() == results and json.loads(path.read_text()) == plan
    change(data / "fr" / "test.jsonl", 3, label=2)  # which of its files the model was trained on, it did not say
    assert evaluate(tiny_model, data, tmp_path / "other") == 2
    assert "did not list which files its models were trained on; give a new --out" in capsys.readouterr().err
    assert evaluate(tiny_model, data, out) == 0 and trained == ["finetune-seed0"]


def test_other_label_orders_by_a_map(tiny_model: Path, data: Path, tmp_path: Path, trained: list[str]) -> None:
    """The same data, told otherwise, gives the same results."""
    assert evaluate(tiny_model, data, tmp_path / "out") == 0
    for path in data.glob("*/*.jsonl"):
        write(path, [row | {"label": ["b", "c", "a"][row["label"]]} for row in read(path)])
    named = ("--label-map", "a=contradiction", "b=entailment", "c=neutral")
    assert evaluate(tiny_model, data, tmp_path / "named", *named) == 0
    found = [json.loads((tmp_path / each / "results.json").read_text()) for each in ("out", "named")]
    assert found[0]["test"] == found[1]["test"] and found[0]["finetuning"] == found[1]["finetuning"]
    assert found[1]["settings"] == found[0]["settings"] | {"label_map": list(named[1:])}
