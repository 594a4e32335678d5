"""Fine-tuning: continues to the last bit, keeps the best epoch, takes any encoder, refuses what is not a model."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from ksub_ds.common.distributed import free_port
from ksub_ds.common.errors import UserError
from ksub_ds.evaluate.data.rows import RowSource
from ksub_ds.evaluate.data.tasks import XNLI_COLUMNS
from ksub_ds.evaluate.finetune import loop
from ksub_ds.evaluate.finetune.classifier import load_classifier
from ksub_ds.evaluate.finetune.encoding import Encoded, encode, load_encoder
from ksub_ds.evaluate.finetune.loop import FineTuning, _learning_rate, finetune, training_batches
from ksub_ds.evaluate.finetune.scoring import predict
from ksub_ds.evaluate.queue.leases import LeaseLost


def encoded(model: Path, data: Path, split: str, language: str = "en") -> Encoded:
    return encode(RowSource(str(data)).read(language, split, XNLI_COLUMNS), load_encoder(str(model)), 32)


def accuracy(data: Encoded) -> Any:
    def validate(model: Any, check: Any) -> dict[str, Any]:
        return {"score": float((predict(model, data, check=check).argmax(axis=1) == data.labels).mean())}

    return validate


def test_a_continued_run_has_the_same_bits(tiny_model: Path, tiny_xnli: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of an epoch, after one, and between saves: weights, losses and scores are equal."""
    train, validation = (encoded(tiny_model, tiny_xnli, split) for split in ("train", "validation"))
    settings = FineTuning(3, 16, 1e-3, seed=1, save_every_steps=3)

    def attempt(work: Path, stop_after: int | None) -> Any:
        model = load_classifier(str(tiny_model), 3, settings.seed)
        model.config.hidden_dropout_prob = 0.1
        calls = 0

        def validate(scored: Any, _: Any) -> dict[str, Any]:
            return accuracy(validation)(scored, lambda: None)

        def check() -> None:
            nonlocal calls
            calls += 1
            if stop_after is not None and calls >= stop_after:
                raise LeaseLost(work.name)

        return model, finetune(model, train, settings, validate, work, "same", check)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CHECK_STEPS", 1)
        whole_model, whole = attempt(tmp_path / "whole", None)
        for calls in (5, 4, 2, 7):  # after 5 steps; 3 saved ... each try goes on from the last save
            with pytest.raises(LeaseLost):
                attempt(tmp_path / "parts", calls)
        model, parts = attempt(tmp_path / "parts", None)
    assert parts == whole and len(whole.epochs) == 3
    for name, value in whole_model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_validation_that_is_cut_short_is_all_that_is_done_again(
    tiny_model: Path, tiny_xnli: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, update, steps = encoded(tiny_model, tiny_xnli, "train"), loop._Run.update, []
    monkeypatch.setattr(loop._Run, "update", lambda run, rows: steps.append(1) or update(run, rows))

    def attempt(work: str, cut: bool) -> Any:
        def validate(_: Any, check: Any) -> dict[str, Any]:
            check()
            return {"score": 0.5}

        def check() -> None:
            if cut and len(steps) == 8:  # the second epoch's
                raise LeaseLost(work)

        model = load_classifier(str(tiny_model), 3, 0)
        return finetune(model, train, FineTuning(2, 32, 1e-3, seed=0), validate, tmp_path / work, "x", check)

    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    whole = attempt("whole", cut=False)
    steps.clear()
    with pytest.raises(LeaseLost):
        attempt("parts", cut=True)
    assert attempt("parts", cut=False) == whole and len(steps) == 8


SLOW_VALIDATION = """
import time
from ksub_ds.common import distributed
from ksub_ds.evaluate.finetune.loop import validate_on_main

def validate(model, check):
    for _ in range(30):
        time.sleep(0.2)
        check()
    return {"score": 0.5}

distributed.init_distributed()
distributed.watchdog().timeout = 3
assert validate_on_main(validate, None) == {"score": 0.5}
distributed.shutdown()
"""


def test_ranks_that_wait_for_a_long_validation_do_not_count_as_hanging() -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_VALIDATION],
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


def test_state_of_something_else_is_not_continued(tiny_model: Path, tiny_xnli: Path, tmp_path: Path) -> None:
    train = encoded(tiny_model, tiny_xnli, "train")
    outcomes = []
    for identity in ("one", "two", "two"):
        model = load_classifier(str(tiny_model), 3, 0)
        settings = FineTuning(1, 32, 1e-3, seed=0)
        seen: list[int] = []

        def validate(_: Any, __: Any, seen: list[int] = seen) -> dict[str, Any]:
            seen.append(1)
            return {"score": 0.0}

        finetune(model, train, settings, validate, tmp_path, identity)
        outcomes.append(len(seen))
    assert outcomes == [1, 1, 0]  # trained, trained anew, found done


def test_best_epoch_is_kept(tiny_model: Path, tiny_xnli: Path, tmp_path: Path) -> None:
    train, scores = encoded(tiny_model, tiny_xnli, "train"), [0.2, 0.7, 0.7]
    kept: list[dict[str, Any]] = []

    def validate(model: Any, _: Any) -> dict[str, Any]:
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"score": scores[len(kept) - 1]}

    model = load_classifier(str(tiny_model), 3, 0)
    outcome = finetune(model, train, FineTuning(3, 32, 1e-3, seed=0), validate, tmp_path, "x")
    assert outcome.best_epoch == 2 and [epoch["score"] for epoch in outcome.epochs] == scores
    assert all(torch.equal(value, kept[1][name]) for name, value in model.state_dict().items())


def test_the_schedule_is_table_6s() -> None:
    settings = FineTuning(1, 32, 2e-5, seed=0)
    rates = [_learning_rate(settings, step, 1_000) for step in range(1_000)]
    assert max(rates) == rates[59] == pytest.approx(2e-5) and rates[0] == pytest.approx(2e-5 / 60)
    assert np.allclose(np.diff(rates[60:]), -2e-5 / 940) and rates[-1] == pytest.approx(2e-5 / 940)


def test_how_often_it_is_saved_does_not_matter(
    tiny_model: Path, tiny_xnli: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Interrupted, and continued with another --save-every-steps: it goes on where it was."""
    train = encoded(tiny_model, tiny_xnli, "train")

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    def attempt(save_every: int, check: Any, work: Path) -> dict[str, Any]:
        model = load_classifier(str(tiny_model), 3, 0)
        settings = FineTuning(1, 4, 1e-3, seed=0, save_every_steps=save_every)
        finetune(model, train, settings, lambda *_: {"score": 0.0}, work, "x", check)
        return model.state_dict()

    whole = attempt(500, lambda: None, tmp_path / "whole")
    with pytest.raises(Stop):
        attempt(10, stop, tmp_path / "parts")  # at the first look, after 20 steps
    before = (tmp_path / "parts" / "state.safetensors").stat().st_mtime_ns
    parts = attempt(500, lambda: None, tmp_path / "parts")
    assert (tmp_path / "parts" / "state.safetensors").stat().st_mtime_ns > before
    assert "begins anew" not in caplog.text
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_how_often_the_losses_are_read_does_not_matter(
    tiny_model: Path, tiny_xnli: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sums to the last bit; and the step whose loss is not finite is named, however late it is seen."""
    train = encoded(tiny_model, tiny_xnli, "train")
    outcomes, update = [], loop._Run.update
    for every in (1, 7):
        monkeypatch.setattr(loop, "CHECK_STEPS", every)
        model = load_classifier(str(tiny_model), 3, 0)
        settings = FineTuning(2, 4, 1e-3, seed=0)
        outcomes.append(finetune(model, train, settings, lambda *_: {"score": 0.0}, tmp_path / str(every), "x"))

        with monkeypatch.context() as patch:
            patch.setattr(loop._Run, "update", lambda run, rows: update(run, rows) / (run.position.step != 3))
            with pytest.raises(UserError, match="not finite at step 4; try a lower"):
                finetune(model, train, settings, lambda *_: {"score": 0.0}, tmp_path / f"{every} broken", "x")
    assert outcomes[0] == outcomes[1]


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.integers(1, 700), st.integers(1, 40), st.integers(0, 3))
def test_every_row_once_an_epoch(count: int, size: int, epoch: int) -> None:
    lengths = np.random.default_rng(count).integers(4, 128, count)
    batches = training_batches(lengths, size, seed=0, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1) and len(batches) == -(-count // size)
    again = training_batches(lengths, size, seed=0, epoch=epoch)
    assert all((one == other).all() for one, other in zip(batches, again, strict=True))


def test_little_is_padded_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).gamma(4, 12, 15_000).clip(6, 128).astype(int)  # about XNLI's
    batches = training_batches(lengths, 32, seed=0, epoch=0)
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert padded / lengths.sum() < 1.06
    other = training_batches(lengths, 32, seed=0, epoch=1)
    assert any((one != two).any() for one, two in zip(batches, other, strict=False) if len(one) == len(two))
