"""Joining results: Table 4's order, differences from paper and baseline, the paired test, escaping."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.evaluate.data.tasks import LANGUAGES
from ksub_ds.evaluate.report import load, report
from ksub_ds.evaluate.xnli import join

ROWS = 400


def result(folder: Path, kind: str, right: float, seed: int, setting: str = "cross-lingual") -> Path:
    """Results of a made-up model that has about this part of the rows right."""
    generator, gold = np.random.default_rng(seed), np.random.default_rng(99).integers(0, 3, ROWS)
    hits = {language: generator.random(ROWS) < right for language in LANGUAGES}
    answers = {each: "".join(map(str, np.where(hit, gold, (gold + 1) % 3))) for each, hit in hits.items()}
    folder.mkdir(parents=True)
    joined = join({each: [hit] for each, hit in hits.items()}, (0,))
    missing: dict[str, list[str]] = {"train": ["bg"], "validation": [], "test": []}
    rest = {
        "model": {"path": str(folder), "kind": kind},
        "data": {"missing": missing},
        "settings": {"epochs": 5, "max_train_examples": None, "max_test_examples": None},
        "selection": "best epoch on English validation",
    }
    (folder / "results.json").write_text(json.dumps({"task": "xnli", "setting": setting, **joined, **rest}))
    labels = {each: "".join(map(str, gold)) for each in LANGUAGES}
    (folder / "predictions.json").write_text(json.dumps({"labels": labels, "predictions": {"0": answers}}))
    return folder


def cells(text: str, first: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_differences_and_paired_test(tmp_path: Path) -> None:
    plain, coded = result(tmp_path / "plain", "plain", 0.60, 1), result(tmp_path / "coded", "clustered", 0.55, 2)
    text = report([plain, coded])
    ours, theirs = load(plain)[0], load(coded)[0]
    assert cells(text, "model") == [*LANGUAGES, "avg"]
    assert cells(text, "paper, clustered")[:2] == ["72.9", "55.4"] and cells(text, "paper, plain")[-1] == "50.7"
    gap = cells(text, "coded (clustered) - plain (plain)")
    assert gap[0] == f"{100 * (theirs['test']['en']['accuracy'] - ours['test']['en']['accuracy']):+.1f}"
    assert gap[-2] == f"{100 * (theirs['average'] - ours['average']):+.1f}" and float(gap[-1]) < 0.001
    assert cells(text, "plain (plain) - paper, plain")[-2] == f"{100 * ours['average'] - 50.7:+.1f}"
    assert "no train set for bg" in text
    assert report([plain, coded, tmp_path / "plain" / ".", plain / "results.json"]) == text, "named twice, shown once"
    again = shutil.copytree(plain, tmp_path / "again")
    assert report([plain, coded, again]) == text, "done twice with the same outcome, shown once"
    # the other way round, by name; other rows are not compared
    assert "plain (plain) - coded (clustered)" in report([plain, coded], baseline=coded)
    assert report([plain, coded], baseline=again / "results.json") == text
    stored = json.loads((coded / "predictions.json").read_text())
    stored["labels"]["en"] = "0" * ROWS
    (coded / "predictions.json").write_text(json.dumps(stored))
    assert "other test rows" in report([plain, coded])
    for damage in ([], {"labels": stored["labels"], "predictions": {}}, stored | {"predictions": {"0": {"en": "1"}}}):
        (coded / "predictions.json").write_text(json.dumps(damage))
        with pytest.raises(UserError, match=r"coded/predictions\.json: is damaged"):
            report([plain, coded])
    short = stored | {"predictions": {"0": dict.fromkeys(LANGUAGES, "1")}}  # numpy would compare it with every label
    (coded / "predictions.json").write_text(json.dumps(short))
    with pytest.raises(UserError, match="not an answer to each label"):
        report([plain, coded])


def test_results_of_one_model_are_told_apart(tmp_path: Path) -> None:
    folders = [result(tmp_path / name, "plain", 0.6, seed) for seed, name in enumerate(("a", "b", "c", "d"))]
    settings = [{"learning_rate": 1e-4}, {"learning_rate": 2e-4}, {"learning_rate": 2e-4, "freeze_embedding": True}]
    for folder, more in zip(folders, [*settings, settings[1]], strict=True):
        found = json.loads((folder / "results.json").read_text())
        found |= {"model": {"path": "models/m", "kind": "plain"}, "settings": found["settings"] | more}
        (folder / "results.json").write_text(json.dumps(found))
    text = report(folders[:3])
    assert "| m (plain, learning rate 0.0001, freeze embedding –) " in text
    assert "| m (plain, learning rate 0.0002, freeze embedding True) " in text
    assert f"| m (plain, {folders[1]}) " in report([folders[1], folders[3]])


def test_both_settings_make_two_tables(tmp_path: Path) -> None:
    one = result(tmp_path / "one", "plain", 0.6, 1)
    two = result(tmp_path / "two", "plain", 0.6, 1, "translate-train-all")
    text = report([one, two], "csv")
    assert text.count("# XNLI, cross-lingual (Table 4)") == text.count("# XNLI, translate-train-all (Table 4)") == 1


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "open" / "queue").mkdir(parents=True)
    (tmp_path / "open" / "queue" / "plan.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    (tmp_path / "bad.json").write_text('{"setting": 1}')
    result(tmp_path / "good", "plain", 0.6, 1)
    good = json.loads((tmp_path / "good" / "results.json").read_text())
    without = {key: value for key, value in good.items() if key != "average_interval"}
    for name, value in (
        ("halved", good | {"test": {"en": {}}}),
        ("short", without),
        ("other", good | {"setting": "zero-shot"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    for path, message in (
        (tmp_path / "open", "is not finished"),
        (tmp_path / "run", "is a pretraining run; add --html FILE"),
        *((tmp_path / f"{name}.json", r"is not a results\.json") for name in ("bad", "halved", "short", "other")),
        (tmp_path / "nothing", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            report([path])
