"""experiments/frontier/xnli.py: which models are fine-tuned, and how several seeds are compared."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.evaluate.data.metrics import paired_test

FRONTIER = Path(__file__).resolve().parents[2] / "experiments/frontier"
LANGUAGES = ("en", "sw")
SETTINGS = {"rates": [1e-4], "epochs": 2, "all_epochs": 1, "all_pairs": 100, "freeze_embedding": False}


@pytest.fixture
def xnli(monkeypatch):
    monkeypatch.syspath_prepend(FRONTIER)
    for name in ("outcome", "xnli"):
        spec = importlib.util.spec_from_file_location(name, FRONTIER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return sys.modules["xnli"]


def point(name, losses, steps=100, rate=1e-3):
    ends = [{"seed": seed, "steps": steps, "loss": loss} for seed, loss in enumerate(losses)]
    return {"name": name, "steps_of_budgets": [50, steps], "learning_rate": rate, "ends": ends}


def write_frontier(folder, *points):
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"points": points}))
    return folder


def test_plain_and_the_best_coded_models_of_the_longest_budget_seed_by_seed(xnli, tmp_path):
    unfinished = point("clustered-80", [5.0])
    unfinished["ends"][0]["steps"] = 50
    coded = point("clustered-64", [6.4, 6.2]), point("dedicated-64-8", [6.3, 6.1, 6.2], 90, 2e-3), unfinished
    frontier = write_frontier(tmp_path / "frontier", point("plain", [8.2, 8.1]), *coded)
    found = [(model.name, model.run.name) for model in xnli.pretrained_models(frontier, seeds=2)]
    assert found == [
        ("plain-seed0", "plain-lr0.001-seed0"),
        ("dedicated-64-8-seed0", "dedicated-64-8-lr0.002-seed0"),
        ("plain-seed1", "plain-lr0.001-seed1"),
        ("dedicated-64-8-seed1", "dedicated-64-8-lr0.002-seed1"),
    ]


def test_a_frontier_without_a_coded_model_is_refused(xnli, tmp_path):
    with pytest.raises(UserError, match=r"results.json is not there"):
        xnli.pretrained_models(tmp_path, seeds=1)
    with pytest.raises(UserError, match="needs a plain and a coded model of the longest budget"):
        xnli.pretrained_models(write_frontier(tmp_path / "frontier", point("plain", [8.2])), seeds=1)


def test_a_row_counts_once_over_languages_and_the_seeds_that_both_have(xnli, tmp_path):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, size=40)
    models = [xnli.Pretrained(name, seed, tmp_path) for seed in (0, 1) for name in ("plain", "coded")]
    work = xnli.FineTunings(Namespace(out=tmp_path, **SETTINGS), models)
    work.rates[xnli.CROSS_LINGUAL] = {"plain": 1e-4, "coded": 1e-4}
    right = {}
    for model in models[:3]:  # the coded model of the second seed has not been tested
        chance = 0.9 if model.embedding == "coded" else 0.5
        right[model.name] = {each: generator.random(40) < chance for each in LANGUAGES}
        answers = {
            each: "".join(map(str, np.where(is_right, labels, (labels + 1) % 3)))
            for each, is_right in right[model.name].items()
        }
        folder = work.folder(model, xnli.CROSS_LINGUAL, 1e-4)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")
        gold = dict.fromkeys(LANGUAGES, "".join(map(str, labels)))
        (folder / "predictions.json").write_text(
            json.dumps({"labels": gold, "predictions": {str(model.seed): answers}})
        )
    found = work.compare(xnli.CROSS_LINGUAL)
    assert [(model["embedding"], model["seed"]) for model in found["models"]] == [
        ("plain", 0),
        ("coded", 0),
        ("plain", 1),
    ]
    assert found["models"][1]["accuracy"]["sw"] == right["coded-seed0"]["sw"].mean()
    assert found["seeds"] == [0]
    by_row = {name: np.mean([right[name][each] for each in LANGUAGES], axis=0) for name in right}
    assert found["test"] == paired_test(by_row["coded-seed0"], by_row["plain-seed0"])
    table = xnli.markdown({"settings": {"cross-lingual": found}, "baselines": {"words": 0.52}})
    assert f"| coded | 0 | {100 * right['coded-seed0']['en'].mean():.1f} |" in table
    assert "over 1 seed, p = " in table
    assert "- words, English test: 52.0" in table


def test_fine_tunings_of_other_settings_are_not_mixed(xnli, tmp_path):
    xnli.FineTunings(Namespace(out=tmp_path, **SETTINGS), [])
    with pytest.raises(UserError, match=r"--epochs 3: .*settings.json has 2; give another --out"):
        xnli.FineTunings(Namespace(out=tmp_path, **SETTINGS | {"epochs": 3}), [])


def test_an_embedding_has_the_rate_that_its_first_model_validates_best_with(xnli, tmp_path, monkeypatch):
    best = {("plain", 1e-4): 0.4, ("plain", 2e-4): 0.5, ("coded", 1e-4): 0.6, ("coded", 2e-4): 0.45}
    models = [xnli.Pretrained(name, seed, tmp_path) for seed in (0, 1) for name in ("plain", "coded")]
    work = xnli.FineTunings(Namespace(out=tmp_path, **SETTINGS | {"rates": [1e-4, 2e-4]}), models)

    def finetune(model, setting, rate):
        assert model.seed == 0
        folder = work.folder(model, setting, rate)
        folder.mkdir(parents=True)
        epochs = [{"score": best[model.embedding, rate]}, {"score": 0.3}]
        (folder / "results.json").write_text(json.dumps({"finetuning": {"0": {"epochs": epochs}}}))
        return folder

    monkeypatch.setattr(work, "finetune", finetune)
    for embedding in ("plain", "coded"):
        work.choose_rate(embedding, xnli.CROSS_LINGUAL)
    assert work.rates == {"cross-lingual": {"plain": 2e-4, "coded": 1e-4}, "translate-train-all": {}}
    assert work.searches["cross-lingual"]["coded"] == {"0.0001": 0.6, "0.0002": 0.45}


@pytest.mark.parametrize("frozen", [False, True])
def test_an_embedding_is_frozen_when_asked(xnli, tmp_path, monkeypatch, frozen):
    model = xnli.Pretrained("plain", 0, tmp_path)
    options = SETTINGS | {"freeze_embedding": frozen}
    work = xnli.FineTunings(Namespace(out=tmp_path, data=tmp_path, **options), [model])
    words = []
    monkeypatch.setattr(work, "command", lambda made, *command: words.extend(command))
    work.finetune(model, xnli.CROSS_LINGUAL, 1e-4)
    assert ("--freeze-embedding" in words) == frozen
