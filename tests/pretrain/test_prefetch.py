"""What the training is fed: labels as places and tokens, ids that the tokenizer has, copies made a step ahead."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.batches import TrainingBatches
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.pretrain.prefetch import BatchPrefetcher, DeviceCopies, model_inputs


@pytest.fixture
def batches(tiny_shards: Path) -> TrainingBatches:
    return TrainingBatches(ShardDataset.open(tiny_shards), 8, 0.7, 3, 0.15)


def labels_of(inputs: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """The (B, T) labels that the model's arguments say."""
    labels = np.full(shape, -100)
    counted = inputs["targets"] != -100
    labels.reshape(-1)[inputs["masked_positions"][counted]] = inputs["targets"][counted]
    return labels


def test_the_model_gets_the_labels_as_places(batches: TrainingBatches) -> None:
    with BatchPrefetcher(batches, 4, 2, 0, 1) as prefetcher:
        for step in (0, 1, 5):
            step_batches = prefetcher.take(step)
            inputs = step_batches.on_device()
            for batch, tensors in zip(step_batches.micro_batches, inputs, strict=True):
                assert "labels" not in tensors and len(tensors["targets"]) == (batch["labels"] >= 0).sum()
                assert tensors["masked_positions"].dtype == tensors["targets"].dtype == torch.int64
                np.testing.assert_array_equal(tensors["input_ids"], batch["input_ids"])
                np.testing.assert_array_equal(labels_of(tensors, batch["labels"].shape), batch["labels"])
            assert step_batches.predicted_in_last == len(inputs[-1]["targets"])
            assert step_batches.predicted_tokens == sum(len(tensors["targets"]) for tensors in inputs)


def test_a_gpu_gets_shapes_that_do_not_change(batches: TrainingBatches) -> None:
    shapes = set()
    for step in range(5):
        batch = batches.batch(step, 0, 4)
        inputs = model_inputs(batch, batches.rule, True)
        shapes.add(inputs["targets"].shape)
        np.testing.assert_array_equal(labels_of(inputs, batch["labels"].shape), batch["labels"])
    assert len(shapes) == 1


@pytest.mark.parametrize(("key", "wrong"), [("input_ids", -1), ("input_ids", 10**6), ("labels", 10**6), ("labels", -7)])
def test_ids_that_are_no_tokens(
    batches: TrainingBatches, monkeypatch: pytest.MonkeyPatch, key: str, wrong: int
) -> None:
    """A GPU would end the process with a message that names nothing."""
    made = TrainingBatches.batch

    def spoilt(self: TrainingBatches, *place: int) -> dict[str, np.ndarray]:
        batch = made(self, *place)
        batch[key][1, 2] = wrong
        return batch

    monkeypatch.setattr(TrainingBatches, "batch", spoilt)
    with BatchPrefetcher(batches, 4, 2, 0, 1) as prefetcher, pytest.raises(UserError, match=f"the token id {wrong} of"):
        prefetcher.take(0)


class Gpu:
    """A device's streams that note what is asked of them; the tensors stay on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[Any] = []
        self.current = "training"
        monkeypatch.setattr(torch, "get_device_module", lambda device: self)
        for name in ("pin_memory", "record_stream"):
            monkeypatch.setattr(torch.Tensor, name, self.noted(name))

    def noted(self, name: str) -> Any:
        def method(tensor: torch.Tensor, *stream: Any) -> torch.Tensor:
            self.calls.append((name, self.current))
            return tensor.clone()

        return method

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Any:
        self.current = "copies"
        yield
        self.current = "training"

    def current_stream(self) -> "Gpu":
        return self

    def record_event(self) -> str:
        self.calls.append(("record_event", self.current))
        return "copied"

    def wait_event(self, event: str) -> None:
        self.calls.append(("wait_event", self.current, event))


def test_copies_are_made_beside_the_training_which_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    copies = DeviceCopies([{"input_ids": np.arange(6).reshape(2, 3)}], torch.device("cpu"), gpu)
    assert gpu.calls == [("pin_memory", "copies"), ("record_event", "copies")]
    (tensors,) = copies.arrive()
    assert gpu.calls[2:] == [("wait_event", "training", "copied"), ("record_stream", "training")]
    assert tensors["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
