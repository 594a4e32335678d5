"""Runs that the tests of this folder alone look at; runs.py has the others."""

import shutil
from typing import Any

import pytest

from .runs import MODERNBERT, STEPS, Bench, Outcome, state_bytes


@pytest.fixture(scope="session")
def continued(bench: Bench, one_rank: dict[str, Outcome]) -> dict[str, Outcome]:
    """Continuations on one rank: of a run whose newest checkpoints are damaged, in bf16, on other ZeRO stages."""
    hurt = bench.copy("reference", "damaged", STEPS) / "checkpoints"
    (hurt / "global_step20" / "optimizer.safetensors").write_bytes(state_bytes(bench.folder / "reference", 20)[1][:-1])
    flipped = bytearray(state_bytes(bench.folder / "reference", 15)[0])
    flipped[len(flipped) // 2] ^= 1
    (hurt / "global_step15" / "model.safetensors").write_bytes(flipped)
    shutil.copytree(hurt / "global_step10", hurt / ".global_step25.123.partial")
    shutil.copytree(hurt / "global_step10", hurt / "global_step30")  # renamed by hand: not what its manifest says
    bench.copy("bf16", "bf16-continued", 10)
    bench.copy("zero2", "zero2-to-zero0", 10)
    recipes: dict[str, dict[str, Any]] = {
        "damaged": {},
        "bf16-continued": {"precision": "bf16"},
        "zero2-to-zero0": {"deepspeed": "zero0"},
    }
    entries = [{"arguments": bench.arguments(name, **settings)} for name, settings in recipes.items()]
    return dict(zip(recipes, bench.run_all(1, entries), strict=True))


@pytest.fixture(scope="session")
def two_ranks(bench: Bench, one_rank: dict[str, Outcome]) -> dict[str, Outcome]:
    """Runs on two ranks: micro-batch 4 x 1 x 2 where one rank has 4 x 2 x 1."""
    bench.copy("reference", "one-then-two", 10)
    bench.copy("reference", "one-then-offload", 10)
    recipes: dict[str, dict[str, Any]] = {
        "two": {},
        "two-zero0": {"deepspeed": "zero0"},
        "two-zero2": {"deepspeed": "zero2"},
        "one-then-two": {},
        "two-bf16": {"precision": "bf16"},
        # last: DeepSpeed's stage 3 replaces torch's linear function for the rest of the process
        "two-zero3": {"deepspeed": "zero3"},
        "plain-zero3": {"deepspeed": "zero3", "codes": None, "max_steps": 3, "eval_every": 3},
        "modernbert-zero3": MODERNBERT | {"deepspeed": "zero3"},
        "two-offload": {"deepspeed": "zero3_offload"},
        "one-then-offload": {"deepspeed": "zero3_offload"},
    }
    entries = [{"arguments": bench.arguments(name, **settings)} for name, settings in recipes.items()]
    for name in ("two-zero3", "plain-zero3"):
        entries[list(recipes).index(name)]["shards"] = True
    entries[list(recipes).index("plain-zero3")]["arguments"].append("--plain")
    outcomes = bench.run_all(2, entries)
    bench.copy("two-bf16", "two-bf16-continued", 10)
    bench.copy("two", "nan", 10)
    last = {"two-bf16-continued": {"precision": "bf16"}, "nan": {}}
    entries = [{"arguments": bench.arguments(name, **settings)} for name, settings in last.items()]
    entries[1]["nan_on"] = [1, 4]
    return dict(zip([*recipes, *last], outcomes + bench.run_all(2, entries), strict=True))
