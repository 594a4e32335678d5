"""--dropout and --attention act in training alone: the exported configuration knows nothing of them."""

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch

from ksub_ds.common.errors import UserError
from ksub_ds.pretrain.builders import build_model
from ksub_ds.pretrain.recipe import Recipe, changed_keys, resolve, to_json
from ksub_ds.pretrain.sources import load_sources

from .conftest import Bench


@pytest.mark.parametrize("preset", ["tiny", "small_modernbert"])
def test_dropout_of_a_run(bench: Bench, preset: Any) -> None:
    recipe = Recipe(preset, bench.data, bench.folder / "dropout", bench.codes)
    sources = load_sources(recipe)
    rows = torch.from_numpy(sources.dataset.rows("train", sources.dataset.languages[0])[:2].astype("int64"))
    for share, same in ((None, False), (0.3, False), (0.0, True)):
        model = build_model(dataclasses.replace(recipe, dropout=share), sources).train()
        kept = [value for key, value in model.config.to_dict().items() if "dropout" in key and value is not None]
        assert len(kept) >= 2 and set(kept) == {0.1}
        with torch.no_grad():
            twice = [model(input_ids=rows, labels=rows).loss.item() for _ in range(2)]
            assert (twice[0] == twice[1]) == same
            if same:  # no dropout anywhere: as the model is used
                assert model.eval()(input_ids=rows, labels=rows).loss.item() == pytest.approx(twice[0], rel=1e-6)


def test_attention_of_a_run(bench: Bench) -> None:
    recipe = Recipe("tiny", bench.data, bench.folder / "attention", bench.codes)
    sources = load_sources(recipe)
    rows = torch.from_numpy(sources.dataset.rows("train", sources.dataset.languages[0])[:2].astype("int64"))
    models = [build_model(dataclasses.replace(recipe, attention=name), sources).eval() for name in ("sdpa", "eager")]
    assert [model.config._attn_implementation for model in models] == ["sdpa", "eager"]
    losses = [model(input_ids=rows, labels=rows).loss.item() for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not [key for key in models[1].config.to_dict() if "attn" in key]
    now = to_json(recipe)
    assert changed_keys(now, now | {"attention": "eager"}) == []
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(UserError, match=r"--attention flash_attention_2: .*FlashAttention"):
            build_model(dataclasses.replace(recipe, attention="flash_attention_2"), sources)


def test_values(bench: Bench) -> None:
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"--dropout .*: must lie in \[0, 1\)"):
            resolve(Recipe("tiny", bench.data, bench.folder, bench.codes, dropout=wrong), 1, False)


def test_a_run_older_than_a_setting_continues_with_its_default(bench: Bench) -> None:
    now = to_json(Recipe("tiny", bench.data, bench.folder, bench.codes))
    before = {key: value for key, value in now.items() if key not in ("dropout", "decoder_bias")}
    assert changed_keys(before, now) == []
    assert changed_keys(before, now | {"dropout": 0.0}) == ["dropout: None -> 0.0"]
