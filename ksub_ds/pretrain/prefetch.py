"""Micro-batches for this rank, made by a thread one optimizer step ahead of the training."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ksub_ds.corpus.batches import Batch, TrainingBatches
from ksub_ds.corpus.masking import masked_positions, padded_count


@dataclass(frozen=True)
class StepBatches:
    """What one rank trains on in one optimizer step.

    Attributes:
        micro_batches: arrays input_ids and labels (B, T), and attention_mask where rows are padded.
        indices: places of the micro-batches in the global batch: accumulation index * world + rank.
        masked_tokens: labels to predict.
        tokens: input tokens, padding not counted.
        seconds_waited: how long the training waited for them.
    """

    micro_batches: list[Batch]
    indices: list[int]
    masked_tokens: int
    tokens: int
    seconds_waited: float


class BatchPrefetcher:
    """Makes the micro-batches of the next step while this one trains.

    The global batch of a step is cut into micro-batches m = 0, 1, ...; rank r of W takes m = r, r + W, ... So
    micro-batch m holds the same rows whatever the number of ranks, and one rank that accumulates twice does what two
    ranks do once.
    """

    def __init__(self, batches: TrainingBatches, micro_batch_size: int, accumulation: int, rank: int, world_size: int):
        self._batches = batches
        self._micro_batch_size = micro_batch_size
        self._indices = [index * world_size + rank for index in range(accumulation)]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def take(self, steps_done: int) -> StepBatches:
        """Return the micro-batches of the step after `steps_done`, and begin to make those of the one after it."""
        start = time.perf_counter()
        ready = self._next is not None and self._next[0] == steps_done
        future = self._next[1] if ready else self._thread.submit(self._make, steps_done)
        micro_batches = future.result()
        waited = time.perf_counter() - start
        self._next = (steps_done + 1, self._thread.submit(self._make, steps_done + 1))
        masked = sum(int((batch["labels"] >= 0).sum()) for batch in micro_batches)
        tokens = sum(_count_tokens(batch) for batch in micro_batches)
        return StepBatches(micro_batches, self._indices, masked, tokens, waited)

    def _make(self, steps_done: int) -> list[Batch]:
        size = self._micro_batch_size
        return [self._batches.batch(steps_done, index * size, (index + 1) * size) for index in self._indices]

    def __enter__(self) -> "BatchPrefetcher":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def model_inputs(batch: Batch, padded_for: float | None) -> Batch:
    """Return a batch with its labels as the model takes them: the places of those to predict, and what is there.

    Args:
        batch: arrays input_ids and labels (B, T), and attention_mask where rows are padded.
        padded_for: share of the tokens that is masked, to fill up to a number that all batches have: a device that
            is a step behind takes no shapes that depend on the data. None for as many as there are.
    """
    labels = batch["labels"]
    count = None if padded_for is None else padded_count(labels.size, padded_for)
    positions, targets = masked_positions(labels, count)
    rest = {key: array for key, array in batch.items() if key != "labels"}
    return {**rest, "masked_positions": positions, "targets": targets}


def _count_tokens(batch: Batch) -> int:
    return int(batch["attention_mask"].astype(bool).sum()) if "attention_mask" in batch else batch["input_ids"].size


def to_tensors(batch: Batch, device: Any) -> dict[str, Any]:
    """Return a batch of numpy arrays as tensors on a device."""
    import torch

    return {key: torch.from_numpy(array).to(device, non_blocking=True) for key, array in batch.items()}
