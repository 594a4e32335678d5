"""DeepSpeed's configuration: the shipped files, sizes of buckets, and files that name what the recipe owns."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.pretrain.engine import (
    AUTO,
    check_precision,
    compose_config,
    find_deepspeed_config,
    read_mechanics,
    size_buckets,
)

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_shipped_configs_compose(path: Path, precision: str) -> None:
    assert find_deepspeed_config(path.stem) == path
    mechanics = size_buckets(read_mechanics(path), 26_000_000)
    assert AUTO not in mechanics["zero_optimization"].values()
    arguments = {"micro_batch_size": 4, "accumulation": 2, "world_size": 3, "gradient_clipping": 1.0}
    if path.stem == "zero0" and precision == "fp16":
        with pytest.raises(UserError, match="--deepspeed zero1, or --precision bf16"):
            check_precision(mechanics, precision)
    else:
        check_precision(mechanics, precision)
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


def started(tmp_path: Path, config: dict[str, object], site: Path | None = None) -> str:
    """The last line of a run with a ds_configs file, and other packages before those installed."""
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": 1}} | config))
    command = [*(sys.executable, "-m", "ksub_ds.pretrain", "--preset", "tiny", "--plain", "--data", "d", "--out", "o")]
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*([str(site)] if site else []), root]), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, "--deepspeed", "mine.json"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def test_monitors_without_their_packages(tmp_path: Path) -> None:
    """Told before anything is opened or built; a monitor that is off is not asked for."""
    on, off = {"wandb": {"enabled": True}}, {"wandb": {"enabled": False}, "tensorboard": {"enabled": False}}
    site = tmp_path / "site"
    (site / "wandb").mkdir(parents=True)  # too new for this protobuf, as generated code says it
    line = "from google.protobuf import runtime_version_of_tomorrow"
    (site / "wandb" / "__init__.py").write_text(line)
    broken = started(tmp_path, on, site)
    assert broken.startswith("error: mine.json: wandb: the package wandb cannot be imported with protobuf "), broken
    assert "runtime_version_of_tomorrow" in broken and "pip install --upgrade protobuf wandb; or write" in broken
    assert started(tmp_path, off, site).startswith("error: d: is not a folder")
    shutil.rmtree(site / "wandb")
    missing = started(tmp_path, on)
    assert missing.startswith("error: mine.json: wandb needs the package wandb: pip install wandb; or write"), missing
