"""Micro-batches for this rank, made by a thread one optimizer step ahead of the training."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

Batch = dict[str, Any]  # numpy arrays: input_ids, labels (B, T) and, when rows are padded, attention_mask


@dataclass(frozen=True)
class StepBatches:
    """What one rank trains on in one optimizer step."""

    micro_batches: list[Batch]
    indices: list[int]  # of the micro-batches in the global batch: accumulation index * world + rank
    masked_tokens: int  # labels to predict
    tokens: int  # input tokens, padding not counted
    seconds_waited: float


class BatchFeed:
    """The global batch of a step is cut into micro-batches m = 0, 1, ...; rank r of W takes m = r, r + W, ...

    So micro-batch m holds the same rows whatever the number of ranks, and one rank that accumulates
    twice does what two ranks do once.
    """

    def __init__(self, batches: Any, micro_batch_size: int, accumulation: int, rank: int, world_size: int):
        self._batches = batches
        self._micro_batch_size = micro_batch_size
        self._indices = [index * world_size + rank for index in range(accumulation)]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def take(self, step: int) -> StepBatches:
        """The micro-batches of optimizer step `step` (from 0); starts on those of the step after it."""
        start = time.perf_counter()
        future = self._next[1] if self._next and self._next[0] == step else self._thread.submit(self._make, step)
        micro_batches = future.result()
        waited = time.perf_counter() - start
        self._next = (step + 1, self._thread.submit(self._make, step + 1))
        masked = sum(int((batch["labels"] >= 0).sum()) for batch in micro_batches)
        tokens = sum(_count_tokens(batch) for batch in micro_batches)
        return StepBatches(micro_batches, self._indices, masked, tokens, waited)

    def _make(self, step: int) -> list[Batch]:
        size = self._micro_batch_size
        return [self._batches.batch(step, index * size, (index + 1) * size) for index in self._indices]

    def __enter__(self) -> "BatchFeed":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _count_tokens(batch: Batch) -> int:
    return int(batch["attention_mask"].astype(bool).sum()) if "attention_mask" in batch else batch["input_ids"].size
