"""The recipe: presets as Table 5, defaults, arithmetic, refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksub_ds.common.errors import UserError
from ksub_ds.pretrain.engine import AUTO, compose_config, read_mechanics, size_buckets
from ksub_ds.pretrain.recipe import (
    Recipe,
    accumulation_steps,
    changed_keys,
    find_deepspeed_config,
    from_json,
    learning_rate,
    read_recipe,
    resolve,
    to_json,
)
from ksub_ds.pretrain.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


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


def test_schedule_scales_and_wastes_no_step() -> None:
    found = resolve(recipe("xlmr_medium", max_steps=1000), 1, on_gpu=False)
    assert (found.warmup_steps, found.precision) == (96, "fp32")
    rates = [learning_rate(found, step) for step in range(1, 1001)]
    assert max(rates) == rates[95] == 2e-4
    assert min(rates) > 0
    assert rates[:96] == sorted(rates[:96]) and rates[95:] == sorted(rates[95:], reverse=True)
    assert learning_rate(resolve(recipe(warmup_steps=0), 1, False), 1) < 1e-3


@given(st.integers(1, 64), st.integers(1, 512), st.booleans())
def test_default_micro_batch_always_divides(world_size: int, per_rank: int, on_gpu: bool) -> None:
    found = resolve(recipe(global_batch_size=world_size * per_rank), world_size, on_gpu)
    accumulation = accumulation_steps(found, world_size)
    assert found.micro_batch_size * accumulation * world_size == found.global_batch_size


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("[]", "is not a JSON object"),
        ('"tiny"', "is not a JSON object"),
        (
            {"preset": None},
            "preset cannot be None; it must be one of roberta_medium, xlmr_medium, small, small_modernbert, tiny",
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


def test_a_run_folder_without_a_run_is_not_left(tmp_path: Path) -> None:
    """The lock goes with the folders that it made; a second one who waited for it takes a new file."""
    (tmp_path / "mine").mkdir()
    folder = RunFolder(tmp_path / "mine" / "new" / "run")
    folder.lock()
    second = RunFolder(folder.path)
    with pytest.raises(UserError, match="in use by process"):
        second.lock()
    folder.unlock()
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"] and not list((tmp_path / "mine").iterdir())
    second.lock()
    (folder.path / "logs").mkdir()  # not the lock's
    second.unlock()
    assert [path.name for path in folder.path.iterdir()] == ["logs"]
    folder.lock()
    folder.recipe.write_text("{}")
    folder.unlock()
    assert {path.name for path in folder.path.iterdir()} == {".lock", "logs", "recipe.json"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_shipped_configs_compose(path: Path, precision: str) -> None:
    assert find_deepspeed_config(path.stem) == path
    mechanics = size_buckets(read_mechanics(path), 26_000_000)
    assert AUTO not in mechanics["zero_optimization"].values()
    arguments = {"micro_batch_size": 4, "accumulation": 2, "world_size": 3, "gradient_clipping": 1.0}
    if path.stem == "zero0" and precision != "fp32":
        with pytest.raises(UserError, match="--deepspeed zero1, or --precision fp32"):
            compose_config(mechanics, precision=precision, **arguments)
    else:
        assert compose_config(mechanics, precision=precision, **arguments)["train_batch_size"] == 24


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("zero0", 26_000_000, {}),
        ("zero1", 400_001, {"reduce_bucket_size": 400_008, "allgather_bucket_size": 400_008}),
        ("zero2", 26_000_000, {"reduce_bucket_size": 5_200_000, "allgather_bucket_size": 26_000_000}),
        ("zero1", 154_000_000, {"reduce_bucket_size": 30_800_000, "allgather_bucket_size": 100_000_000}),
        ("zero1", 2_000_000_000, {"reduce_bucket_size": 100_000_000, "allgather_bucket_size": 100_000_000}),
        ("zero3", 26_000_000, {"reduce_bucket_size": 20_000_000, "stage3_prefetch_bucket_size": 5_200_000}),
        ("zero3_offload", 400_000, {"reduce_bucket_size": 400_000, "stage3_prefetch_bucket_size": 400_000}),
    ],
)
def test_buckets_follow_the_model(name: str, parameters: int, expected: dict[str, int]) -> None:
    mechanics = read_mechanics(find_deepspeed_config(name))
    before = json.dumps(mechanics)
    found = size_buckets(mechanics, parameters)["zero_optimization"]
    assert {key: value for key, value in found.items() if key.endswith("bucket_size")} == expected
    assert json.dumps(mechanics) == before
    given = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}
    assert size_buckets(given, parameters) == given


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto"}}', "threshold is .auto."),
        ('{"zero_optimization": {"stage": 1, "stage3_prefetch_bucket_size": "auto"}}', "at stage 1 only reduce_bucket"),
        ('{"train_batch_size": 8}', "'train_batch_size' belongs to the recipe"),
        ('{"bf16": {"enabled": true}}', "'bf16' belongs to the recipe .--precision."),
        ('{"zero_optimisation": {}}', "unknown key 'zero_optimisation'; did you mean 'zero_optimization'"),
        ('{"zero_optimization": {"stage": 4}}', "must be 0, 1, 2 or 3"),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
            "offload_param needs stage 3, not 2",
        ),
        ('{"zero_optimization": {"stage": 0, "offload_optimizer": {}}}', "offload_optimizer needs stage 1 or 2 or 3"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "no NVMe"),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}', "ratio must be 1.0"),
        ('{"zero_optimization": 1}', "zero_optimization is 1, not a JSON object"),
        ('{"tensorboard": true}', "tensorboard is True, not a JSON object"),
        ('{"zero_optimization": {"stage": 2, "compute_grad_norm": false}}', "compute_grad_norm must be true"),
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_config_files_with_another_owner(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_mechanics(path)


def test_missing_config_is_named() -> None:
    with pytest.raises(UserError, match=r"zero9.*there: zero0, zero1, zero2, zero3, zero3_offload"):
        find_deepspeed_config("zero9")
