"""Small models to look at, with random weights: what they show does not matter here, that it is shown does."""

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def all_pairs(types: np.ndarray, states: np.ndarray) -> tuple[float | None, float | None]:
    """S_inter and S_intra by all pairs of states, each type weighing the same."""
    norms = np.linalg.norm(states, axis=1, keepdims=True)
    units = states / np.where(norms == 0, 1, norms)
    cosines = units @ units.T
    groups = [np.flatnonzero(types == token) for token in np.unique(types)]
    intra = [
        np.mean([cosines[i, j] for i, j in itertools.permutations(group, 2)]) for group in groups if len(group) > 1
    ]
    inter = [cosines[np.ix_(first, second)].mean() for first, second in itertools.permutations(groups, 2)]
    return (np.mean(inter) if inter else None), (np.mean(intra) if intra else None)


@pytest.fixture(scope="session")
def brute_force() -> Callable[..., tuple[float | None, float | None]]:
    """The function `all_pairs`."""
    return all_pairs


@pytest.fixture(scope="session")
def sub_model(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported sub-embedding model (K = 3) with its tokenizer."""
    import torch

    from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, positional_codes
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer)
    torch.manual_seed(0)
    config = KSubRobertaConfig.tiny(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64)
    folder = tmp_path_factory.mktemp("models") / "sub"
    KSubRobertaForMaskedLM(config, positional_codes(tokenizer.vocab_size, 3)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def plain_model(tiny_bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain HuggingFace BERT with a byte-level BPE tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "plain"
    shutil.copytree(tiny_bpe, folder)
    size = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=size, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chromium_program() -> str:
    """The path of Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    return program


@pytest.fixture(scope="session")
def chromium(chromium_program: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a headless Chromium on a page: `chromium(path, "--dump-dom", width=390)`; its console goes to stderr."""

    def run(page: Path, *options: str, width: int = 1200) -> subprocess.CompletedProcess[str]:
        # without the last three it looks for updates, and a closed network refuses it a hundred times
        fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")
        quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
        with tempfile.TemporaryDirectory() as profile:
            command = [chromium_program, *fixed, *quiet, f"--user-data-dir={profile}", f"--window-size={width},1600"]
            command += ["--enable-logging=stderr", "--virtual-time-budget=2000", *options, page.resolve().as_uri()]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)

    return run
