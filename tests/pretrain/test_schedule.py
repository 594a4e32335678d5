"""The learning rate of pretraining and of fine-tuning, and the seeds of dropout."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksub_ds.pretrain.schedule import TrainingPlan, dropout_seed, learning_rate


def pretraining(step: int, peak: float, warmup: int, last: int) -> float:
    return learning_rate(step, peak=peak, warmup_steps=warmup, max_steps=last, decay_from=warmup)


def fine_tuning(step: int, peak: float, warmup: int, last: int) -> float:
    return learning_rate(step, peak=peak, warmup_steps=warmup, max_steps=last, decay_from=warmup + 1)


def test_pretraining_peaks_at_the_end_of_the_warm_up_and_wastes_no_step() -> None:
    rates = [pretraining(step, 2e-4, 96, 1000) for step in range(1, 1001)]
    assert max(rates) == rates[95] == 2e-4
    assert rates[96] < 2e-4 and min(rates) > 0
    assert rates[:96] == sorted(rates[:96]) and rates[95:] == sorted(rates[95:], reverse=True)
    assert pretraining(1, 1e-3, 0, 1000) < 1e-3


@given(st.floats(1e-6, 1), st.integers(0, 50), st.integers(1, 500))
def test_fine_tuning_decays_as_transformers_schedule(peak: float, warmup: int, more: int) -> None:
    """transformers counts steps from 0 and its first one trains at 0; ours at the second one's rate."""
    total = warmup + more
    for done in range(total):
        by_hand = peak * (done + 1) / warmup if done < warmup else peak * (total - done) / max(1, total - warmup)
        assert fine_tuning(done + 1, peak, warmup, total) == by_hand
    assert fine_tuning(warmup + 1, peak, warmup, total) == pytest.approx(peak)


@given(st.integers(1, 60), st.integers(0, 60))
def test_no_rate_is_zero_or_above_the_peak(last: int, warmup: int) -> None:
    for schedule in (pretraining, fine_tuning):
        rates = [schedule(step, 1.0, min(warmup, last), last) for step in range(1, last + 1)]
        assert all(0 < rate <= 1 and math.isfinite(rate) for rate in rates)


@given(st.integers(0, 40), st.integers(1, 60), st.sampled_from(["linear", "cosine", "wsd"]), st.integers(0, 60))
def test_every_plan_warms_up_alike_and_comes_down_above_zero(warmup: int, more: int, schedule: Any, decay: int) -> None:
    last = warmup + more
    plan = TrainingPlan(schedule, 2e-3, warmup, last, min(decay, more) if schedule == "wsd" else 0)
    rates = [plan.rate(step) for step in range(1, last + 1)]
    assert rates[:warmup] == [pretraining(step, 2e-3, warmup, last) for step in range(1, warmup + 1)]
    down = rates[max(warmup - 1, 0) :]
    assert down == sorted(down, reverse=True) and all(0 < rate <= 2e-3 for rate in rates)
    steady = rates[warmup : plan.steady_until]
    assert steady == [2e-3] * len(steady)
    if schedule == "linear":
        assert rates == [pretraining(step, 2e-3, warmup, last) for step in range(1, last + 1)]


def test_the_forms_of_the_schedules() -> None:
    cosine = TrainingPlan("cosine", 1.0, 10, 109)
    assert cosine.rate(10) == 1 and cosine.rate(60) == pytest.approx(0.5)
    wsd = TrainingPlan("wsd", 1.0, 10, 109, 15)
    assert wsd.decay_begins_after == 94 and wsd.rate(94) == 1 and wsd.rate(98) == 0.5 and wsd.rate(103) == 0.25
    assert TrainingPlan("wsd", 1.0, 10, 109).decay_begins_after is None


@given(st.integers(0, 20), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_a_steady_plan_can_be_extended(warmup: int, steady: int, decay: int, more: int, new_decay: int) -> None:
    """Up to the step that both call steady the rates are those of the longer plan from the start."""
    old = TrainingPlan("wsd", 1e-3, warmup, warmup + steady + decay, decay)
    new = TrainingPlan("wsd", 1e-3, warmup, warmup + steady + more + new_decay, new_decay)
    alike = min(old.steady_until, new.steady_until)
    assert [old.rate(step) for step in range(1, alike + 1)] == [new.rate(step) for step in range(1, alike + 1)]


def test_dropout_seeds_differ_everywhere() -> None:
    purposes = ("dropout", "fine-tuning")
    seeds = {
        dropout_seed(purpose, seed, step, part)
        for purpose in purposes
        for seed in range(5)
        for step in range(50)
        for part in range(20)
    }
    assert len(seeds) == 2 * 5 * 50 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
