"""Small models to look at, with random weights: what they show does not matter here, that it is shown does."""

import itertools
import shutil
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
    from ksub_ds.corpus.tokenizer import load_tokenizer

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
