"""Steps that are launched before the report of the last one is read, as on a GPU: the same run, and no NaN gets in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from .runs import Bench, Outcome, losses, metrics, state_bytes

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
TIMES = ("tokens_per_second", "step_seconds", "eta_seconds", "data_wait_seconds", "model_tflops", "mfu")
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
SHORT = {"max_steps": 6, "save_every_steps": 3, "eval_every": 0, "gradient_clipping": 1.0}
BAD = 4  # the step with a NaN, after a checkpoint; when its report is read, the one after it is launched


def entry(bench: Bench, name: str, settings: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"arguments": bench.arguments(name, **SHORT | (settings or {}))} | more


def refused(bench: Bench, name: str, key: str, rank: int, call: int, **settings: Any) -> dict[str, Any]:
    return entry(bench, name, settings, lag=1, masters=True, reads=True, **{key: [rank, call]})


@pytest.fixture(scope="module")
def runs(bench: Bench) -> dict[str, Outcome]:
    """On one rank (two forward passes a step): a run without and with a lag, a stop, a NaN at every stage."""
    seen = {"eval_every": 4, "log_every_steps": 2, "eval_sequences": 2}
    entries = {"lag-0": entry(bench, "lag-0", seen, lag=0), "lag-1": entry(bench, "lag-1", seen, lag=1)}
    entries |= {f"stop-{lag}": entry(bench, f"stop-{lag}", lag=lag, stop_at=4) for lag in (0, 1)}
    for stage in STAGES:
        entries[f"bad-{stage}"] = refused(bench, f"bad-{stage}", "gradient_nan_on", 0, 2 * BAD, deepspeed=stage)
    entries["exhausted"] = entry(bench, "exhausted", scale_exhausted_on=BAD)
    return dict(zip(entries, bench.run_all(1, list(entries.values())), strict=True))


@pytest.fixture(scope="module")
def runs_on_two(bench: Bench) -> dict[str, Outcome]:
    """On two ranks, of which one alone meets the NaN (one forward pass a step and rank)."""
    entries = {
        f"{key}-{stage}": refused(bench, f"{key}-{stage}", key, 1, BAD, deepspeed=stage)
        for stage in ("zero1", "zero3")
        for key in ("nan_on", "gradient_nan_on")
    }
    return dict(zip(entries, bench.run_all(2, list(entries.values())), strict=True))


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(run)]


def test_a_lag_changes_nothing(bench: Bench, runs: dict[str, Outcome]) -> None:
    assert runs["lag-0"] == runs["lag-1"] == [0]
    one, other = bench.folder / "lag-0", bench.folder / "lag-1"
    assert without_times(one) == without_times(other) and len(losses(one)) == SHORT["max_steps"]
    assert ["masked_accuracy" in line for line in metrics(other)] == [False, True] * 3
    for step in (3, 6):
        assert state_bytes(one, step) == state_bytes(other, step)
    assert (one / "evaluation.jsonl").read_text() == (other / "evaluation.jsonl").read_text()


def test_a_stop_takes_effect_at_most_one_step_later(bench: Bench, runs: dict[str, Outcome]) -> None:
    for lag in (0, 1):
        run = bench.folder / f"stop-{lag}"
        assert runs[f"stop-{lag}"] == [0]
        assert len(losses(run)) == 4 + lag and (run / "LATEST").read_text() == f"global_step{4 + lag}\n"
        state = json.loads((run / "checkpoints" / f"global_step{4 + lag}" / "trainer.json").read_text())
        assert state["adam_step"] == 4 + lag and state["tokens"] == metrics(run)[-1]["tokens"]
    assert losses(bench.folder / "stop-1") == losses(bench.folder / "lag-0")[:5]


def check_refusal(bench: Bench, outcome: Outcome, name: str, what: str) -> None:
    """The error names the step, and weights and moments are those of the checkpoint of the step before, to the bit."""
    run = bench.folder / name
    assert len(set(outcome)) == 1 and isinstance(outcome[0], str), outcome
    assert outcome[0].startswith(f"step {BAD}: {what}; stopped before the update; the last good checkpoint is {run}")
    assert len(losses(run)) == BAD - 1
    saved = run / "checkpoints" / f"global_step{BAD - 1}"
    expected = load_file(saved / "model.safetensors") | load_file(saved / "optimizer.safetensors")
    found = load_file(run / "masters.safetensors")
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert np.isfinite(value).all(), key
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


@pytest.mark.parametrize("stage", STAGES)
def test_no_nan_reaches_the_weights(bench: Bench, runs: dict[str, Outcome], stage: str) -> None:
    """Of a gradient whose loss is finite; the step after it is launched already, and its numbers are good."""
    check_refusal(bench, runs[f"bad-{stage}"], f"bad-{stage}", "the gradient is not finite")


def test_a_loss_scale_that_cannot_be_halved_ends_the_run_in_one_line(bench: Bench, runs: dict[str, Outcome]) -> None:
    (line,) = runs["exhausted"]
    assert str(line).startswith(
        f"step {BAD}: the gradient, at fp16's smallest loss scale, is not finite; stopped before"
    )
    assert "Try a lower --peak-lr" in str(line)


@pytest.mark.parametrize("stage", STAGES)
def test_what_the_host_reads_of_an_update(bench: Bench, runs: dict[str, Outcome], stage: str) -> None:
    """Nothing, but where DeepSpeed insists: stage 3 looks at its own norm, offload computes on the host anyway."""
    reads = json.loads((bench.folder / f"bad-{stage}" / "reads.json").read_text())
    assert len(reads) == 2 * (BAD + 1)  # norm and update, of the step in flight too
    assert any(reads) == (stage in ("zero3", "zero3_offload")), reads


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_nan_on_one_rank_alone(bench: Bench, runs_on_two: dict[str, Outcome], stage: str) -> None:
    name = f"nan_on-{stage}"
    check_refusal(bench, runs_on_two[name], name, "the loss is not finite on rank 1")
    name = f"gradient_nan_on-{stage}"
    check_refusal(bench, runs_on_two[name], name, "the gradient is not finite")
