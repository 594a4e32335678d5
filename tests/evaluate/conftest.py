"""A tiny model folder and tiny XNLI and GLUE data, made of the words the tiny tokenizer knows."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def xnli_rows(language: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs whose label shows in the hypothesis: its last word."""
    draw = random.Random(f"{language}{seed}")
    words = ["the", "small", "old", "house", "river", "stone", "bird", "walks", "sings", "falls"]
    rows = []
    for number in range(count):
        label = number % 3
        premise = " ".join(draw.choices(words, k=draw.randint(2, 14)))
        hypothesis = " ".join([*draw.choices(words, k=draw.randint(1, 5)), ("today", "slowly", "but")[label]])
        rows.append({"premise": premise, "hypothesis": hypothesis, "label": label})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as .jsonl or .jsonl.gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture(scope="session")
def make_xnli_rows() -> Callable[[str, int, int], list[dict[str, Any]]]:
    """The function `xnli_rows`."""
    return xnli_rows


@pytest.fixture(scope="session")
def tiny_xnli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English and French whole, Swahili without a training set."""
    folder = tmp_path_factory.mktemp("xnli")
    for language in ("en", "fr", "sw"):
        for split, count, seed in (("train", 120, 1), ("validation", 30, 2), ("test", 60, 3)):
            if (language, split) != ("sw", "train"):
                write_rows(folder / language / f"{split}.jsonl.gz", xnli_rows(language, count, seed))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with untrained weights, and its tokenizer."""
    import torch

    from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, positional_codes
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer)
    torch.manual_seed(0)
    config = KSubRobertaConfig.tiny(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    KSubRobertaForMaskedLM(config, positional_codes(tokenizer.vocab_size, 3)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the user's cache."""
    monkeypatch.setenv("KSUB_CACHE", str(tmp_path / "cache"))
