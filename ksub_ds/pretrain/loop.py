"""The training loop: step, log, save, evaluate, stop. Read `train` first.

    python -m ksub_ds.pretrain --preset tiny --codes codes.safetensors --data shards --out run

What makes a run repeatable: batch and masks are functions of (seed, step), dropout of (seed, step,
micro-batch), and the loss is the sum over all masked tokens of the optimizer step divided by their
global count. None of it knows how many ranks there are.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from ksub_ds.common import distributed
from ksub_ds.common.logging import get_logger, read_lines
from ksub_ds.pretrain import checkpoint
from ksub_ds.pretrain.checkpoint import TrainerState
from ksub_ds.pretrain.engine import (
    is_sharded,
    loss_factor,
    loss_scale,
    reduced_gradient_norm,
    set_learning_rate,
    update_was_skipped,
)
from ksub_ds.pretrain.heldout_eval import evaluate, to_tensors
from ksub_ds.pretrain.metrics import Recorder
from ksub_ds.pretrain.preemption import StopRequest
from ksub_ds.pretrain.prefetch import BatchFeed, StepBatches
from ksub_ds.pretrain.recipe import Recipe, learning_rate
from ksub_ds.pretrain.run_folder import RunFolder
from ksub_ds.pretrain.saving import CheckpointWriter


@dataclass(frozen=True)
class Training:
    """All that the loop works on."""

    recipe: Recipe
    folder: RunFolder
    engine: Any
    feed: BatchFeed
    held_out: Any  # re-iterable of (language, batch); None: nothing to evaluate on
    languages: list[str]
    recorder: Recorder
    writer: CheckpointWriter
    stop: StopRequest
    teacher: Any = None  # a Teacher (model/distillation.py), whose distributions the model learns beside the labels


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, the same on every rank."""

    loss: float  # nats per masked token
    tokens: int
    gradient_norm: float | None
    learning_rate: float
    masked_accuracy: float | None
    stop_wanted: bool


def train(training: Training, state: TrainerState) -> tuple[TrainerState, str | None]:
    """Train from `state` to the last step of the recipe, or until a stop is asked for.

    Returns the state at the end (it is saved) and the reason of an early stop.

    Raises:
        UserError: on every rank: loss or gradient not finite, disk full.
    """
    recipe = training.recipe
    saved_step = state.step
    if evaluation_is_missing(recipe, training.folder, state.step):
        _evaluate(training, state.step)

    while state.step < recipe.max_steps:
        batches = training.feed.take(state.step)
        # ------------------------------------------------------------ one optimizer step
        result = train_step(training, batches, state.step)
        state = dataclasses.replace(state, step=state.step + 1, tokens=state.tokens + result.tokens)
        # --------------------------------------------------------------------------------
        _log(training, state, result, batches.seconds_waited)

        last = result.stop_wanted or state.step == recipe.max_steps
        if last or state.step % recipe.save_every_steps == 0:
            training.writer.save(state)
            saved_step = state.step
            training.recorder.restart_clock()
        if _evaluation_is_due(recipe, state.step) and (not result.stop_wanted or state.step == recipe.max_steps):
            _evaluate(training, state.step)
            training.recorder.restart_clock()
        if result.stop_wanted:
            break

    training.writer.finish()
    assert saved_step == state.step
    return state, _stop_reason(training) if state.step < recipe.max_steps else None


def train_step(training: Training, batches: StepBatches, steps_done: int) -> StepResult:
    """Forward and backward of this rank's micro-batches, one update. Nothing is updated if the loss is not finite."""
    import torch

    recipe, engine, step = training.recipe, training.engine, steps_done + 1
    distributed.watchdog().step = step
    distributed.mark_progress(f"step {step}")
    device = distributed.device()
    masked, tokens = distributed.all_reduce_sum([batches.masked_tokens, batches.tokens])
    masked = max(masked, 1.0)

    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in zip(batches.indices, batches.micro_batches, strict=True):
        tensors = to_tensors(batch, device)
        torch.manual_seed(dropout_seed(recipe.seed, step, index))
        engine.set_gradient_accumulation_boundary(index == batches.indices[-1])
        loss = engine(**tensors, **_taught(training, tensors), loss_reduction="sum").loss
        engine.backward(loss * loss_factor(engine) / masked, scale_wrt_gas=False)
        loss_sum += loss.detach()

    local_loss = distributed.to_number(loss_sum)
    stop_wanted = training.stop.reason() is not None
    total_loss, stops, problems = distributed.all_reduce_sum(
        [local_loss, float(stop_wanted), float(training.recorder.problem is not None or training.writer.has_failed())]
    )
    if problems:
        distributed.raise_on_all_ranks(training.recorder.check)
        training.writer.finish()
    if not math.isfinite(total_loss):
        _refuse(training, step, "the loss", _ranks_where(not math.isfinite(local_loss)))
    accuracy = masked_accuracy(engine, tensors) if step % recipe.log_every_steps == 0 else None

    distributed.mark_progress(f"the update of step {step}")
    gradient_norm = reduced_gradient_norm(engine)
    if gradient_norm is not None and not math.isfinite(gradient_norm):
        _refuse(training, step, "the gradient", [])
    lr = learning_rate(recipe, step)
    set_learning_rate(engine, lr)
    engine.step()
    if gradient_norm is None:
        gradient_norm = float(engine.get_global_grad_norm())
    if update_was_skipped(engine) and recipe.precision != "fp16":  # in fp16 the loss scale is halved, no more
        _refuse(training, step, "the gradient", [])
    gradient_norm = gradient_norm if math.isfinite(gradient_norm) else None
    return StepResult(total_loss / masked, int(tokens), gradient_norm, lr, accuracy, stops > 0)


def _taught(training: Training, tensors: dict[str, Any]) -> dict[str, Any]:
    """What the teacher, if there is one, adds to the arguments of the model."""
    if training.teacher is None:
        return {}
    return {"soft_targets": training.teacher.targets(**tensors), "soft_weight": training.recipe.distill_weight}


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of one micro-batch's dropout: a function of the run's seed, the step and the micro-batch's place."""
    digest = hashlib.blake2b(f"dropout/{seed}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def masked_accuracy(engine: Any, tensors: dict[str, Any]) -> float | None:
    """Part of rank 0's last micro-batch's masked tokens that the model predicts, before it learns from them."""
    if not distributed.is_main() and not is_sharded(engine):
        return None
    model = engine.module
    model.eval()
    _, correct, count = model.score_masked(**tensors)
    model.train()
    return float(correct) / max(float(count), 1.0)


def _log(training: Training, state: TrainerState, result: StepResult, data_wait: float) -> None:
    training.recorder.step(
        state.step,
        result.loss,
        result.tokens,
        lr=result.learning_rate,
        grad_norm=result.gradient_norm,
        masked_accuracy=result.masked_accuracy,
        loss_scale=loss_scale(training.engine),
        tokens=state.tokens,
        data_wait_seconds=round(data_wait, 5),
    )


def _evaluation_is_due(recipe: Recipe, step: int) -> bool:
    every = recipe.eval_every_steps
    return 0 < every <= recipe.max_steps and (step % every == 0 or step == recipe.max_steps)


def evaluation_is_missing(recipe: Recipe, folder: RunFolder, step: int) -> bool:
    """At step 0, and where a run was ended between a save and its evaluation. A collective."""
    due = _evaluation_is_due(recipe, step)
    return distributed.broadcast_object(due and all(line["step"] != step for line in read_lines(folder.evaluation)))


def _evaluate(training: Training, step: int) -> None:
    if training.held_out is not None:
        distributed.mark_progress(f"the evaluation after step {step}")
        scores = evaluate(training.engine.module, training.held_out, training.languages)
        training.recorder.evaluation(step, scores)


def _ranks_where(condition: bool) -> list[int]:
    return [rank for rank, holds in enumerate(distributed.gather_objects(condition)) if holds]


def _refuse(training: Training, step: int, what: str, ranks: list[int]) -> NoReturn:
    """Every rank raises the same line; the update of this step was not made."""
    training.writer.finish()
    where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
    latest = distributed.broadcast_object(
        checkpoint.newest_complete(training.folder.checkpoints, quiet=True) if distributed.is_main() else None
    )
    good = f"the last good checkpoint is {latest}" if latest else "there is no checkpoint yet"
    distributed.raise_agreed(
        f"step {step}: {what} is not finite{where}; stopped before the update; {good}. "
        "Try a lower --peak-lr, a --gradient-clipping of 1.0 or --precision fp32 in a new --out"
    )


def _stop_reason(training: Training) -> str:
    reasons = [reason for reason in distributed.gather_objects(training.stop.reason()) if reason]
    reason = reasons[0] if reasons else "asked to"
    get_logger().info(f"stopping: {reason}")
    return reason
