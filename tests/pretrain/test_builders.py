"""The model of a recipe: --dropout and --attention act in training alone; the bias begins as the tokens' frequency."""

import dataclasses
import importlib.util
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ksub_ds.common.errors import UserError
from ksub_ds.pretrain.builders import build_model
from ksub_ds.pretrain.recipe import Recipe, changed_keys, resolve, to_json
from ksub_ds.pretrain.resolved_run import ResolvedRun, open_sources, resolve_settings

from .runs import Bench


def changed(run: ResolvedRun, **settings: Any) -> ResolvedRun:
    """The same run with other settings in its recipe."""
    return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **settings))


@pytest.mark.parametrize("preset", ["tiny", "small_modernbert"])
def test_dropout_of_a_run(bench: Bench, preset: Any) -> None:
    recipe = Recipe(preset, bench.data, bench.folder / "dropout", bench.codes)
    run = open_sources(resolve_settings(recipe))
    rows = torch.from_numpy(run.dataset.rows("train", run.dataset.languages[0])[:2].astype("int64"))
    for share, same in ((None, False), (0.3, False), (0.0, True)):
        model = build_model(changed(run, dropout=share)).train()
        kept = [value for key, value in model.config.to_dict().items() if "dropout" in key and value is not None]
        assert len(kept) >= 2 and set(kept) == {0.1}
        with torch.no_grad():
            twice = [model(input_ids=rows, labels=rows).loss.item() for _ in range(2)]
            assert (twice[0] == twice[1]) == same
            if same:  # no dropout anywhere: as the model is used
                assert model.eval()(input_ids=rows, labels=rows).loss.item() == pytest.approx(twice[0], rel=1e-6)


def test_attention_of_a_run(bench: Bench) -> None:
    recipe = Recipe("tiny", bench.data, bench.folder / "attention", bench.codes)
    run = open_sources(resolve_settings(recipe))
    rows = torch.from_numpy(run.dataset.rows("train", run.dataset.languages[0])[:2].astype("int64"))
    models = [build_model(changed(run, attention=name)).eval() for name in ("sdpa", "eager")]
    assert [model.config._attn_implementation for model in models] == ["sdpa", "eager"]
    losses = [model(input_ids=rows, labels=rows).loss.item() for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not [key for key in models[1].config.to_dict() if "attn" in key]
    now = to_json(recipe)
    assert changed_keys(now, now | {"attention": "eager"}) == []
    names = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    for name, module in (names | {"kernels-community/flash-attn3": "kernels"}).items():
        # The package is not there; or there is no GPU for it, or no connection to the Hub. Nothing else is taken.
        expected = "needs the module" if importlib.util.find_spec(module) is None else ""
        with pytest.raises(UserError, match=rf"^--attention {name}: {expected}.*; or leave it out$"):
            build_model(changed(run, attention=name))
    for name in ("flash", "kernels-community", "somebody/kernel", "paged|sdpa", "sdpa\n"):
        with pytest.raises(UserError, match="must be sdpa, eager, flash_attention_2, flash_attention_3 or a kernel"):
            resolve(dataclasses.replace(recipe, attention=name), 1, False)
    kernel = "kernels-community/flash-attn2@v1:flash_attn_varlen_func"
    assert resolve(dataclasses.replace(recipe, attention=kernel), 1, True).attention == kernel


def test_values(bench: Bench) -> None:
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"--dropout .*: must lie in \[0, 1\)"):
            resolve(Recipe("tiny", bench.data, bench.folder, bench.codes, dropout=wrong), 1, False)


def test_a_run_older_than_a_setting_continues_with_its_default(bench: Bench) -> None:
    now = to_json(Recipe("tiny", bench.data, bench.folder, bench.codes))
    before = {key: value for key, value in now.items() if key not in ("dropout", "decoder_bias")}
    assert changed_keys(before, now) == []
    assert changed_keys(before, now | {"dropout": 0.0}) == ["dropout: None -> 0.0"]


def biased(bench: Bench, alpha: float) -> ResolvedRun:
    recipe = Recipe("tiny", bench.data, bench.folder / "biased", bench.codes, decoder_bias="frequency", alpha=alpha)
    return open_sources(resolve_settings(recipe))


def drawn_by_hand(run: ResolvedRun, alpha: float) -> dict[int, float]:
    """The share of each ordinary token among those that training draws."""
    dataset, special = run.dataset, set(run.tokenizer.special_ids)
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
    run = biased(bench, alpha)
    shares = drawn_by_hand(run, alpha)
    model = build_model(run).eval()
    bias = model.decoder_bias.double().detach().numpy()
    tokens = np.array(sorted(shares))
    expected = np.log([shares[token] for token in tokens.tolist()])
    rows = sum(len(run.dataset.rows("train", language)) for language in run.dataset.languages)
    half = 0.5 / (rows * run.dataset.sequence_length)  # added to each token, so that the unseen ones are finite
    np.testing.assert_allclose(
        bias[tokens], np.log(np.exp(expected) + half) - math.log(max(shares.values()) + half), atol=1e-5
    )
    assert np.isfinite(bias).all()
    assert bias[list(run.tokenizer.special_ids)].max() < bias[tokens].min(), "special tokens are never predicted"

    probability = torch.softmax(torch.from_numpy(bias), 0)
    draw = torch.multinomial(probability, 8 * 32, replacement=True, generator=torch.Generator().manual_seed(0))
    labels = draw.reshape(8, 32)
    with torch.no_grad():
        loss = model(input_ids=torch.full_like(labels, run.tokenizer.mask_id), labels=labels).loss
    assert loss.item() == pytest.approx(-probability[draw].log().mean().item(), abs=0.3)


def test_a_warm_start_has_its_own_bias(bench: Bench, tmp_path: Path) -> None:
    wrong = Recipe("tiny", bench.data, bench.folder / "biased", warm_start=tmp_path, decoder_bias="frequency")
    with pytest.raises(UserError, match="--decoder-bias frequency: --warm-start brings its own bias"):
        resolve(wrong, 1, False)
