"""What `ksub evaluate` scored, a plain transformers loop over the same weights scores too: every row's answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from ksub_ds.cli import main

WORDS = ["the", "small", "old", "house", "river", "stone", "bird", "walks", "sings", "falls", "under", "over", "near"]
LENGTH = 24  # shorter than the longest pairs: truncation is part of what must agree


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_xnli_rows: Callable[..., list[dict[str, Any]]]) -> Path:
    """XNLI in two languages, and a task of each sort: one sentence, two sentences, two sentences with a number."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(draw.choice(WORDS, draw.integers(1, 16)))

    for split, count in (("train", 16), ("validation", 60), ("test", 60)):
        for seed, language in enumerate(("en", "sw")):
            write(folder / "xnli" / language / f"{split}.jsonl", make_xnli_rows(language, count, seed))
        pairs = [{"sentence1": sentence(), "sentence2": sentence()} for _ in range(count)]
        write(folder / "glue/cola" / f"{split}.jsonl", [{"sentence": sentence(), "label": i % 2} for i in range(count)])
        write(folder / "glue/rte" / f"{split}.jsonl", [pair | {"label": i % 2} for i, pair in enumerate(pairs)])
        write(folder / "glue/stsb" / f"{split}.jsonl", [pair | {"label": i % 26 / 5} for i, pair in enumerate(pairs)])
    return folder


def bert(folder: Path) -> Path:
    """An encoder that is not ours, with token types, a pooler and a pattern of its own."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "to", "##day", "slowly"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["ours", "bert"])
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights so large that its answers differ from row to row, though it has learnt nothing."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("model") / request.param
    if request.param == "bert":
        bert(folder)
    else:
        import shutil

        shutil.copytree(tiny_model, folder)
    path, generator = folder / "model.safetensors", torch.Generator().manual_seed(1)
    weights = load_file(path)
    for name in sorted(weights):
        if weights[name].is_floating_point() and weights[name].ndim > 1:
            weights[name] = torch.randn(weights[name].shape, generator=generator) * 0.4
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"initializer_range": 0.4}))  # of the head
    return folder


def plain_logits(trained: Path, path: Path) -> np.ndarray:
    """(rows, outputs): transformers' classes alone, one row at a time, each padded to the full length."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classifier = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    logits = []
    for row in map(json.loads, path.read_text().splitlines()):
        texts = [row[name] for name in ("premise", "hypothesis", "sentence", "sentence1", "sentence2") if name in row]
        inputs = tokenizer(*texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            logits.append(classifier(**inputs).logits[0].numpy())
    return np.stack(logits)


def gold(path: Path) -> np.ndarray:
    return np.array([json.loads(line)["label"] for line in path.read_text().splitlines()])


def run(*words: object) -> None:
    more = ("--epochs", 1, "--max-length", LENGTH)
    assert main([str(word) for word in ("evaluate", *words, *more)]) == 0


def differ(answers: np.ndarray) -> bool:
    """Whether the rarest class has a few rows: a model with one answer proves nothing."""
    return bool(np.unique(answers, return_counts=True)[1].min() > 2 and len(np.unique(answers)) > 1)


def test_xnli(model: Path, data: Path, tmp_path: Path) -> None:
    run("xnli", "--model", model, "--data", data / "xnli", "--setting", "cross-lingual", "--out", tmp_path / "out")
    results, kept = (json.loads((tmp_path / "out" / name).read_text()) for name in ("results.json", "predictions.json"))
    for language in ("en", "sw"):
        path = data / "xnli" / language / "test.jsonl"
        theirs = plain_logits(tmp_path / "out/work/finetune-seed0/model", path).argmax(axis=1)
        assert differ(theirs)
        assert kept["predictions"]["0"][language] == "".join(map(str, theirs))
        assert results["test"][language]["correct"] == (theirs == gold(path)).sum()


def test_glue(model: Path, data: Path, tmp_path: Path) -> None:
    tasks, grid = ("cola", "rte", "stsb"), ("--learning-rates", 1e-5, "--batch-sizes", 16, "--keep-models")
    out = tmp_path / "out"
    run("glue", "--model", model, "--data", data / "glue", "--out", out, "--tasks", *tasks, *grid)
    results, kept = (json.loads((out / name).read_text()) for name in ("results.json", "predictions.json"))
    for task in tasks:
        path, best = data / "glue" / task / "validation.jsonl", results["test"][task]["best"]
        logits, labels = plain_logits(out / "work" / best["cell"] / "model", path), gold(path)
        if task == "stsb":
            assert np.ptp(logits) > 0.05
            np.testing.assert_allclose(kept["predictions"][task], logits[:, 0], rtol=1e-4, atol=1e-5)
            assert best["pearson"] == pytest.approx(stats.pearsonr(logits[:, 0], labels)[0], abs=1e-5)
            continue
        theirs = logits.argmax(axis=1)
        assert differ(theirs)
        assert kept["predictions"][task] == "".join(map(str, theirs))
        assert best["correct"] == (theirs == labels).sum()
