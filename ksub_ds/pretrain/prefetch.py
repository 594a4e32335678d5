"""Micro-batches for this rank, made and sent to its device by a thread one optimizer step ahead of the training."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.corpus.batches import Batch, TrainingBatches
from ksub_ds.corpus.masking import IGNORE, MaskingRule, masked_positions, padded_count

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class StepBatches:
    """What one rank trains on in one optimizer step.

    Attributes:
        micro_batches: arrays input_ids and labels (B, T), attention_mask where rows are padded, and position_ids where
            translations have positions of their own.
        indices: places of the micro-batches in the global batch: accumulation index * world + rank.
        copies: what of the micro-batches the model takes, on the device.
        seconds_waited: how long the training waited for them.
    """

    micro_batches: list[Batch]
    indices: list[int]
    copies: "DeviceCopies"
    seconds_waited: float

    @property
    def predicted_tokens(self) -> int:
        """Labels to predict."""
        return sum(map(_count_predicted, self.micro_batches))

    @property
    def predicted_in_last(self) -> int:
        """Labels to predict in the last micro-batch."""
        return _count_predicted(self.micro_batches[-1])

    @property
    def tokens(self) -> int:
        """Input tokens, padding not counted."""
        return sum(map(_count_tokens, self.micro_batches))

    def on_device(self) -> "list[dict[str, Tensor]]":
        """Return the model's arguments, for each micro-batch: labels as `model_inputs` gives them."""
        return self.copies.arrive()


class BatchPrefetcher:
    """Makes the micro-batches of the next step while this one trains.

    The global batch of a step is cut into micro-batches m = 0, 1, ...; rank r of W takes m = r, r + W, ... So
    micro-batch m holds the same rows whatever the number of ranks, and one rank that accumulates twice does what two
    ranks do once.

    Args:
        batches: of the run.
        micro_batch_size: rows of a micro-batch.
        accumulation: micro-batches of a rank and step.
        rank: r.
        world_size: W.
    """

    def __init__(self, batches: TrainingBatches, micro_batch_size: int, accumulation: int, rank: int, world_size: int):
        self._batches = batches
        self._micro_batch_size = micro_batch_size
        self._indices = [index * world_size + rank for index in range(accumulation)]
        self._device = distributed.device()
        self._stream: Any = None
        bind: Any = None
        if self._device.type != "cpu":
            import torch

            module = torch.get_device_module(self._device)
            self._stream, bind = module.Stream(), module.set_device
        # A thread begins on the first device, and would open a context there.
        self._thread = ThreadPoolExecutor(1, "batches", bind, (self._device,) if bind else ())
        self._next: tuple[int, Future[tuple[list[Batch], DeviceCopies]]] | None = None

    def take(self, steps_done: int) -> StepBatches:
        """Return the micro-batches of the step after `steps_done`, and begin to make those of the one after it.

        Raises:
            UserError: token ids that the tokenizer does not have.
        """
        start = time.perf_counter()
        ready = self._next is not None and self._next[0] == steps_done
        future = self._next[1] if ready else self._thread.submit(self._make, steps_done)
        micro_batches, copies = future.result()
        waited = time.perf_counter() - start
        self._next = (steps_done + 1, self._thread.submit(self._make, steps_done + 1))
        return StepBatches(micro_batches, self._indices, copies, waited)

    def _make(self, steps_done: int) -> "tuple[list[Batch], DeviceCopies]":
        size = self._micro_batch_size
        micro_batches = [self._batches.batch(steps_done, index * size, (index + 1) * size) for index in self._indices]
        for batch in micro_batches:
            _check_ids(batch, self._batches.rule.vocab_size)
        inputs = [model_inputs(batch, self._batches.rule, self._stream is not None) for batch in micro_batches]
        return micro_batches, DeviceCopies(inputs, self._device, self._stream)

    def __enter__(self) -> "BatchPrefetcher":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def model_inputs(batch: Batch, rule: MaskingRule, fixed_shapes: bool) -> Batch:
    """Return a batch as the model takes it.

    A masked model gets the places of the labels to predict, and what is there. A causal one, which predicts nearly
    everywhere, gets the labels; it needs no attention mask, as no token sees the padding after it.

    Args:
        batch: arrays input_ids and labels (B, T), and attention_mask where rows are padded.
        rule: by which the labels were made.
        fixed_shapes: fill the places up to a number that all batches have: a device that is a step behind takes no
            shapes that depend on the data.
    """
    if rule.mlm_probability is None:
        return {key: array for key, array in batch.items() if key != "attention_mask"}
    labels = batch["labels"]
    count = padded_count(labels.size, rule.mlm_probability) if fixed_shapes else None
    positions, targets = masked_positions(labels, count)
    rest = {key: array for key, array in batch.items() if key != "labels"}
    return {**rest, "masked_positions": positions, "targets": targets}


class DeviceCopies:
    """Batches on their way to a device: to a GPU from pinned memory, on a stream of their own beside the training's.

    Args:
        batches: numpy arrays by name.
        device: where they go.
        stream: of the device, to copy on; None for the CPU, where arrays are taken as they are.
    """

    def __init__(self, batches: list[Batch], device: "torch.device", stream: Any):
        import torch

        self._device = torch.get_device_module(device)
        self._tensors = [{key: torch.from_numpy(array) for key, array in batch.items()} for batch in batches]
        self._arrival: Any = None
        if stream is not None:
            with self._device.stream(stream):
                self._tensors = [
                    {key: tensor.pin_memory().to(device, non_blocking=True) for key, tensor in batch.items()}
                    for batch in self._tensors
                ]
                self._arrival = stream.record_event()

    def arrive(self) -> "list[dict[str, Tensor]]":
        """Return the tensors; what is queued on the current stream from now on waits for them, the host does not."""
        if self._arrival is not None:
            current = self._device.current_stream()
            current.wait_event(self._arrival)
            for batch in self._tensors:
                for tensor in batch.values():
                    tensor.record_stream(current)  # else their memory could be given away while it is read
        return self._tensors


def _check_ids(batch: Batch, vocab_size: int) -> None:
    """Check on the host what a GPU would answer with an error that ends the process.

    Raises:
        UserError: an id that is not a token's.
    """
    for ids in (batch["input_ids"], batch["labels"][batch["labels"] != IGNORE]):
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if wrong.size:
            raise UserError(f"--data: holds the token id {wrong[0]} of {vocab_size:,} tokens; make the shards anew")


def _count_predicted(batch: Batch) -> int:
    return int((batch["labels"] != IGNORE).sum())


def _count_tokens(batch: Batch) -> int:
    return int(batch["attention_mask"].astype(bool).sum()) if "attention_mask" in batch else batch["input_ids"].size


def to_tensors(batch: Batch, device: Any) -> "dict[str, Tensor]":
    """Return a batch of numpy arrays as tensors on a device; the host does not wait until they are there."""
    import torch

    tensors = {key: torch.from_numpy(array) for key, array in batch.items()}
    if torch.device(device).type == "cpu":
        return tensors
    return {key: tensor.pin_memory().to(device, non_blocking=True) for key, tensor in tensors.items()}
