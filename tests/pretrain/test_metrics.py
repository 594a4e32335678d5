"""What a line of metrics.jsonl and the progress say of the devices."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ksub_ds.common.logging import get_logger
from ksub_ds.pretrain.metrics import TrainingMetrics, Work
from ksub_ds.pretrain.run_folder import RunFolder

from .runs import metrics as lines_of


@pytest.mark.parametrize("peak", [2 * 989.4e12, None])
def test_use_of_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peak: float | None) -> None:
    monitor: Any = SimpleNamespace(write_events=lambda _: None)
    told: list[dict[str, Any]] = []
    with TrainingMetrics(RunFolder(tmp_path), monitor, 0, 2, Work(176.4e6, peak)) as written:
        monkeypatch.setattr(written._progress, "advance", lambda _, **info: told.append(info))
        for step in (1, 2):
            written.step(step, 2.0, 131_072, data_wait_seconds=1e9 if step == 2 else 0.0)
    for line in lines_of(tmp_path):
        rate = line["tokens_per_second"] * 176.4e6
        assert line["model_tflops"] == pytest.approx(rate / 1e12, rel=1e-3)
        assert ("mfu" in line) == (peak is not None) and "peak_memory_gb" not in line, "this is a CPU"
        if peak is not None:
            assert line["mfu"] == pytest.approx(rate / peak, rel=1e-2, abs=1e-4)
    assert [set(info) - {"loss", "tokens/s"} for info in told] == [
        {"MFU"} if peak else set(),
        {"MFU", "waits for data"} if peak else {"waits for data"},
    ]


def test_an_evaluation_of_nothing_is_no_loss_of_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    monitor: Any = SimpleNamespace(write_events=lambda _: None)
    with TrainingMetrics(RunFolder(tmp_path), monitor, 0, 2, Work(1.0, None)) as written:
        written.evaluation(1, {"loss": 0.0, "masked_accuracy": 0.0, "languages": {}})
    assert "held out at step 1: not one token to predict; raise --eval-sequences or --mlm-probability" in caplog.text
    assert "loss 0.0000" not in caplog.text
