"""A decoder that begins with the tokens' frequency: against counts by hand, and by the loss before the first step."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ksub_ds.common.errors import UserError
from ksub_ds.pretrain.builders import build_model
from ksub_ds.pretrain.recipe import Recipe, resolve
from ksub_ds.pretrain.sources import Sources, load_sources

from .conftest import Bench


def recipe(bench: Bench, alpha: float) -> Recipe:
    return Recipe("tiny", bench.data, bench.folder / "biased", bench.codes, decoder_bias="frequency", alpha=alpha)


def drawn_by_hand(sources: Sources, alpha: float) -> dict[int, float]:
    """The share of each ordinary token among those that training draws."""
    dataset, special = sources.dataset, set(sources.tokenizer.special_ids)
    sizes = {language: len(dataset.rows("train", language)) for language in dataset.languages}
    shares: Counter[int] = Counter()
    for language, size in sizes.items():
        counts = Counter(token for row in dataset.rows("train", language).tolist() for token in row)
        ordinary = {token: count for token, count in counts.items() if token not in special}
        weight = size**alpha / sum(each**alpha for each in sizes.values()) / sum(ordinary.values())
        for token, count in ordinary.items():
            shares[token] += weight * count
    return shares


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_model_begins_as_a_unigram_model(bench: Bench, alpha: float) -> None:
    sources = load_sources(recipe(bench, alpha))
    shares = drawn_by_hand(sources, alpha)
    model = build_model(recipe(bench, alpha), sources).eval()
    bias = model.decoder_bias.double().detach().numpy()
    tokens = np.array(sorted(shares))
    expected = np.log([shares[token] for token in tokens.tolist()])
    rows = sum(len(sources.dataset.rows("train", language)) for language in sources.dataset.languages)
    half = 0.5 / (rows * sources.dataset.sequence_length)  # added to each token, so that the unseen ones are finite
    np.testing.assert_allclose(
        bias[tokens], np.log(np.exp(expected) + half) - math.log(max(shares.values()) + half), atol=1e-5
    )
    assert np.isfinite(bias).all()
    assert bias[list(sources.tokenizer.special_ids)].max() < bias[tokens].min(), "special tokens are never predicted"

    probability = torch.softmax(torch.from_numpy(bias), 0)
    draw = torch.multinomial(probability, 8 * 32, replacement=True, generator=torch.Generator().manual_seed(0))
    labels = draw.reshape(8, 32)
    with torch.no_grad():
        loss = model(input_ids=torch.full_like(labels, sources.tokenizer.mask_id), labels=labels).loss
    assert loss.item() == pytest.approx(-probability[draw].log().mean().item(), abs=0.3)


def test_a_warm_start_has_its_own_bias(bench: Bench, tmp_path: Path) -> None:
    wrong = Recipe("tiny", bench.data, bench.folder / "biased", warm_start=tmp_path, decoder_bias="frequency")
    with pytest.raises(UserError, match="--decoder-bias frequency: --warm-start brings its own bias"):
        resolve(wrong, 1, False)
