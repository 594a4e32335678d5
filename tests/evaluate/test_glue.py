"""GLUE: the grid, MNLI before those that start from it, both MNLI sets, regression, missing tasks."""

import json
from pathlib import Path
from typing import Any

import pytest

from ksub_ds.cli import main
from ksub_ds.evaluate import benchmark, glue


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tiny_glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNLI with both development sets in one file, RTE, STS-B, CoLA; QNLI without a training set."""
    folder = tmp_path_factory.mktemp("glue")
    words = ["the", "small", "old", "house", "river", "stone", "bird", "walks"]
    for split, count in (("train", 24), ("validation", 12)):
        text = [" ".join(words[i % 5 : i % 5 + 3]) for i in range(count)]
        pairs = [{"sentence1": text[i], "sentence2": text[-i], "label": i % 2, "idx": i} for i in range(count)]
        write(folder / "rte" / f"{split}.jsonl", pairs)
        write(folder / "stsb" / f"{split}.jsonl", [pair | {"label": i % 6 * 0.9} for i, pair in enumerate(pairs)])
        write(folder / "cola" / f"{split}.jsonl", [{"sentence": text[i], "label": 1 - i % 2} for i in range(count)])
        nli = [{"premise": text[i], "hypothesis": text[-i], "label": i % 3} for i in range(count)]
        write(folder / "mnli" / f"{split}.jsonl", nli)
    write(folder / "qnli" / "validation.jsonl", [{"question": "a", "sentence": "b", "label": 0}])
    return folder


def evaluate(model: Path, data: Path, out: Path, *more: object) -> int:
    fixed = ["--model", model, "--data", data, "--out", out, "--epochs", 1, "--max-length", 16]
    return main([str(part) for part in ["evaluate", "glue", *fixed, *more]])


def test_grid_and_dependency(
    tiny_model: Path, tiny_glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(glue, "MNLI_MATCHED_ROWS", 7)
    bodies = []
    real = benchmark.train_classifier

    def noting(training: Any, *arguments: Any) -> Any:
        bodies.append((training.work.name, training.num_labels, training.settings.regression, training.body))
        return real(training, *arguments)

    monkeypatch.setattr(benchmark, "train_classifier", noting)
    out = tmp_path / "out"
    grid = ("--learning-rates", 1e-4, 1e-3, "--batch-sizes", 8, "--tasks", "stsb", "rte", "cola", "mnli")
    assert evaluate(tiny_model, tiny_glue, out, *grid) == 0
    found = json.loads((out / "results.json").read_text())
    assert list(found["test"]) == ["mnli", "rte", "cola", "stsb"]
    for task in found["test"].values():
        scores = [cell["score"] for cell in task["cells"]]
        assert len(scores) == 2 and task["best"]["score"] == max(scores)
    mnli = found["test"]["mnli"]
    assert mnli["best"]["count"] == 7 and "mismatched" in mnli["best"] and "mismatched" in mnli["median"]
    best = str(out / "work" / mnli["best"]["cell"] / "model")
    assert [body for name, _, _, body in bodies if name.startswith(("rte", "stsb"))] == [best] * 4
    assert {body for name, _, _, body in bodies if name.startswith(("mnli", "cola"))} == {None}
    assert {(name[:4], labels, regression) for name, labels, regression, _ in bodies} == {
        ("mnli", 3, False),
        ("rte-", 2, False),
        ("cola", 2, False),
        ("stsb", 1, True),
    }
    assert set(found["test"]["stsb"]["median"]) == {"pearson", "spearman"}
    assert not (out / "work" / "rte-lr0.001-bs8-seed0" / "model").exists()
    assert "start from this evaluation's best MNLI checkpoint" in capsys.readouterr().out
    # the same tasks from a checkpoint that is given
    other = tmp_path / "other"
    one = ("--learning-rates", 1e-4, "--batch-sizes", 8, "--tasks", "rte", "--mnli-checkpoint", best)
    assert evaluate(tiny_model, tiny_glue, other, *one) == 0
    assert bodies[-1][3] == best
    assert main(["report", str(out), str(other), "--format", "csv"]) == 0
    told = capsys.readouterr().out
    assert "# GLUE: differences" in told
    stored = json.loads((out / "predictions.json").read_text())
    assert set(stored["labels"]) == set(stored["predictions"]) == set(found["test"])
    for task in ("mnli", "rte", "cola"):  # what is kept is what was scored
        hits = [a == b for a, b in zip(stored["labels"][task], stored["predictions"][task], strict=True)]
        assert sum(hits) / len(hits) == pytest.approx(found["test"][task]["best"]["accuracy"])
    assert "answers" not in json.dumps(found)


def test_missing_tasks_are_named(tiny_model: Path, tiny_glue: Path, tmp_path: Path, capsys: Any) -> None:
    cells = ("--learning-rates", 1e-4, "--batch-sizes", 8)
    assert evaluate(tiny_model, tiny_glue, tmp_path / "a", "--tasks", "qnli", *cells) == 2
    assert "--tasks qnli: no train set" in capsys.readouterr().err
    unlabelled = tmp_path / "data"
    write(unlabelled / "cola" / "train.jsonl", [{"sentence": "a", "label": 1}])
    write(unlabelled / "cola" / "validation.jsonl", [{"sentence": "a", "label": -1}])
    assert evaluate(tiny_model, unlabelled, tmp_path / "b", *cells) == 2
    assert "validation.jsonl: line 1: label -1" in capsys.readouterr().err


def test_a_wrong_mnli_checkpoint_is_told_at_once(
    tiny_model: Path, tiny_glue: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "empty").mkdir()
    for number, (checkpoint, message) in enumerate(
        (
            (tmp_path / "empty", "empty: transformers cannot open this model"),
            (tmp_path / "nowhere", "nowhere: is not a model folder"),
            (tiny_model, "has no trained classification head"),
        )
    ):
        out = tmp_path / f"out{number}"
        assert evaluate(tiny_model, tiny_glue, out, "--tasks", "mnli", "rte", "--mnli-checkpoint", checkpoint) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert message in told[-1] and not (out / "queue").exists()


def test_test_sets_are_answered_for_the_server(tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    data, out, words = tmp_path / "data", tmp_path / "out", ["the house", "a bird", "old river"]
    pairs = {"mnli": ("premise", "hypothesis"), "ax": ("premise", "hypothesis"), "rte": ("sentence1", "sentence2")}
    pairs |= {"stsb": ("sentence1", "sentence2"), "cola": ("sentence",), "mrpc": ("sentence1", "sentence2")}
    counts = {"test": 7, "test_matched": 5, "test_mismatched": 6}
    for task, columns in pairs.items():
        if task == "ax":
            splits = {"test"}
        else:
            splits = {"train", "validation", *({"test_matched", "test_mismatched"} if task == "mnli" else {"test"})}
        for split in splits - ({"test"} if task == "mrpc" else set()):
            rows = [dict.fromkeys(columns, words[i % 3]) for i in range(counts.get(split, 8))]
            label = -1 if split.startswith("test") else 0
            write(
                data / task / f"{split}.jsonl",
                [row | {"label": label + (label == 0) * (i % 2)} for i, row in enumerate(rows)],
            )
    grid = ("--learning-rates", 1e-4, 1e-3, "--batch-sizes", 8)
    one = ("--learning-rates", 1e-4, "--batch-sizes", 8, "--tasks", "cola")
    assert evaluate(tiny_model, data, out, *one) == 0
    assert not (out / "submission").exists() and not list(out.glob("work/cola*/model"))
    capsys.readouterr()
    assert evaluate(tiny_model, data, out, *one, "--test-predictions") == 2  # the models were not kept
    assert "was trained without this option; give a new --out" in capsys.readouterr().err
    out = tmp_path / "new"
    assert evaluate(tiny_model, data, out, *grid, "--test-predictions") == 0
    expected = {"CoLA": 7, "RTE": 7, "STS-B": 7, "MNLI-m": 5, "MNLI-mm": 6, "AX": 7}  # MRPC has no test set
    assert {path.name for path in (out / "submission").iterdir()} == {f"{name}.tsv" for name in expected}
    names = {"entailment", "neutral", "contradiction"}
    allowed = {
        "CoLA": {"0", "1"},
        "RTE": {"entailment", "not_entailment"},
        "MNLI-m": names,
        "MNLI-mm": names,
        "AX": names,
    }
    for name, count in expected.items():
        first, *lines = (out / "submission" / f"{name}.tsv").read_text().splitlines()
        index, values = zip(*(line.split("\t") for line in lines), strict=True)
        assert first == "index\tprediction" and list(index) == [str(i) for i in range(count)]
        assert all(0 <= float(value) <= 5 for value in values) if name == "STS-B" else set(values) <= allowed[name]
    assert len(list(out.glob("work/cola*/model"))) == 1  # the best cell's
    assert glue.server_answer("stsb", 7.2) == "5.000" and glue.server_answer("stsb", -0.1) == "0.000"
    assert glue.server_answer("qnli", "1") == "not_entailment" and glue.server_answer("qqp", "1") == "1"
    assert evaluate(tiny_model, data, tmp_path / "x", *grid, "--test-predictions", "--max-test-examples", 5) == 2
    assert "the server wants every row" in capsys.readouterr().err
