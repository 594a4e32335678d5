"""The recipe: presets as Table 5, defaults, arithmetic, refusals."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksub_ds.common.errors import UserError
from ksub_ds.pretrain.recipe import (
    Recipe,
    changed_keys,
    divide_batch,
    from_json,
    parse_recipe,
    read_recipe,
    resolve,
    to_json,
)
from ksub_ds.pretrain.run_folder import RunFolder


def recipe(preset: Any = "tiny", **settings: Any) -> Recipe:
    given = {"data": Path("shards"), "out": Path("run"), "codes": Path("codes.safetensors")} | settings
    return Recipe(preset=preset, **given)


@pytest.mark.parametrize(("preset", "batch"), [("roberta_medium", 128), ("xlmr_medium", 256)])
def test_presets_are_table_5(preset: str, batch: int) -> None:
    found = resolve(recipe(preset), 1, on_gpu=True)
    assert (found.max_steps, found.warmup_steps, found.peak_lr) == (250_000, 24_000, 2e-4)
    assert (found.global_batch_size, found.weight_decay, found.mlm_probability) == (batch, 0.01, 0.15)
    assert (found.adam_beta1, found.adam_beta2, found.adam_epsilon, found.gradient_clipping) == (0.9, 0.98, 1e-6, 0.0)
    assert (found.alpha, found.precision) == (1.0, "bf16")


def test_schedule_scales() -> None:
    found = resolve(recipe("xlmr_medium", max_steps=1000), 1, on_gpu=False)
    assert (found.warmup_steps, found.precision) == (96, "fp32")


def test_a_continuation_keeps_the_micro_batch_where_it_can() -> None:
    """Dropout is drawn by micro-batch: another size is another run."""
    for micro, ranks, expected in ((None, 1, 2), (None, 16, 2), (None, 32, 1), (4, 1, 4)):
        found = resolve(recipe(global_batch_size=32, micro_batch_size=micro), ranks, False, previous_micro_batch_size=2)
        assert found.micro_batch_size == expected
    assert resolve(recipe(global_batch_size=32), 1, False, previous_micro_batch_size=5).micro_batch_size == 8


@given(st.integers(1, 64), st.integers(1, 512), st.booleans())
def test_default_micro_batch_always_divides(world_size: int, per_rank: int, on_gpu: bool) -> None:
    found = resolve(recipe(global_batch_size=world_size * per_rank), world_size, on_gpu)
    sizes = divide_batch(found, world_size)
    assert (sizes.micro, sizes.world) == (found.micro_batch_size, world_size)
    assert sizes.micro * sizes.accumulation * sizes.world == sizes.total == found.global_batch_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"global_batch_size": 30, "micro_batch_size": 8},
            "30 is not a multiple of --micro-batch-size 8 x 2 ranks = 16",
        ),
        ({"global_batch_size": 7}, "7 is not a multiple"),
        ({"codes": None}, "--codes FILE .* or --plain"),
        ({"plain": True}, "--codes FILE .* or --plain"),
        ({"precision": "fp16"}, "CPU cannot train in fp16"),
        ({"warmup_steps": 2000}, "--warmup-steps 2000"),
        ({"max_steps": 0}, "--max-steps 0"),
        ({"peak_lr": float("nan")}, "--peak-lr nan"),
        ({"mlm_probability": 1.0}, "--mlm-probability"),
        ({"alpha": 1.5}, "--alpha"),
        ({"eval_every_steps": -1}, "--eval-every -1"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**63}, "--seed 9223372036854775808: must be less than"),
        ({"global_batch_size": 10**11}, "--global-batch-size 100000000000: must be less than 2"),
        ({"max_steps": 2**31}, "--max-steps 2147483648: must be less than 2"),
        *(
            ({key: float("inf")}, f"--{key.replace('_', '-')} inf: must be")
            for key in ("peak_lr", "weight_decay", "adam_epsilon", "gradient_clipping", "max_hours")
        ),
        ({"alpha": float("inf")}, "--alpha inf"),
        ({"weight_decay": float("nan")}, "--weight-decay nan"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(recipe(**settings), 2, on_gpu=False)
    assert "\n" not in str(caught.value)


def test_json_round_trip_and_changes() -> None:
    old = resolve(recipe(), 1, on_gpu=False)
    values = json.loads(json.dumps(to_json(old) | {"codes_sha256": "aa"}))
    assert from_json(values, Path("recipe.json")) == old
    free = dataclasses.replace(old, max_hours=1.0, keep_last=9, micro_batch_size=1, deepspeed="zero2", out=Path("x"))
    assert changed_keys(values, to_json(free) | {"codes_sha256": "aa"}) == []
    other = to_json(dataclasses.replace(old, seed=1, max_steps=7)) | {"codes_sha256": "bb"}
    assert changed_keys(values, other) == ["max_steps: 1000 -> 7", "seed: 0 -> 1", "codes_sha256: aa -> bb"]


def test_a_teacher_is_known_by_its_content() -> None:
    """Earlier versions wrote its name alone."""
    one, moved = (to_json(resolve(recipe(distill_from=name), 1, on_gpu=False)) for name in ("m", "elsewhere/m"))
    aa, bb = {"distill_from_sha256": "aa"}, {"distill_from_sha256": "bb"}
    assert changed_keys(one | aa, moved | aa) == [] == changed_keys(one, one | aa)
    assert changed_keys(one | aa, one | bb) == ["distill_from_sha256: aa -> bb"]
    assert changed_keys(one, moved | aa) == ["distill_from: m -> elsewhere/m"] == changed_keys(one | aa, moved)


def test_a_recipe_that_no_run_can_have_is_not_extended(tmp_path: Path) -> None:
    whole = to_json(resolve(recipe(out=tmp_path), 1, on_gpu=False))
    (tmp_path / "recipe.json").write_text(json.dumps(whole | {"peak_lr": math.nan}))
    with pytest.raises(UserError, match=r"recipe.json: --peak-lr nan: must be greater than 0; the file is damaged,"):
        parse_recipe(["--out", str(tmp_path), "--extend", "--max-steps", "2000"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("[]", "is not a JSON object"),
        ('"tiny"', "is not a JSON object"),
        (
            {"preset": None},
            "preset cannot be None; it must be one of roberta_medium, xlmr_medium, small, small_modernbert, tiny,",
        ),
        ({"preset": "huge"}, "preset cannot be 'huge'; it must be one of"),
        ({"preset": ["tiny"]}, "preset cannot be"),
        ({"data": 3}, "data cannot be 3"),
        ({"seed": "one"}, "seed cannot be 'one'"),
        ({"precision": "fp8"}, "precision cannot be 'fp8'"),
        ("{}", "lacks the key 'preset'"),
    ],
)
def test_damaged_recipe_file(tmp_path: Path, changes: str | dict[str, Any], message: str) -> None:
    path = tmp_path / "recipe.json"
    whole = to_json(resolve(recipe(), 1, on_gpu=False))
    path.write_text(changes if isinstance(changes, str) else json.dumps(whole | changes))
    with pytest.raises(UserError, match=message) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):  # what a continuation says
        RunFolder(tmp_path).claim(whole, None, None)
    (tmp_path / "recipe.json").write_text(json.dumps(whole | {"peak_lr": 1}))
    assert read_recipe(path)[0].peak_lr == 1
