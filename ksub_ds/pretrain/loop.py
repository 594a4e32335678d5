"""The training loop: step, log, save, evaluate, stop. Read `train` first, then `train_step`.

    python -m ksub_ds.pretrain --preset tiny --codes codes.safetensors --data shards --out run

What makes a run repeatable: batch and masks are functions of (seed, step), dropout of (seed, step,
micro-batch), and the loss is the sum over all masked tokens of the optimizer step divided by their
global count. None of it depends on the number of ranks.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ksub_ds.common import distributed
from ksub_ds.common.logging import get_logger, read_lines
from ksub_ds.corpus.batches import HeldOutBatches
from ksub_ds.pretrain import checkpoint
from ksub_ds.pretrain.checkpoint import CheckpointWriter, TrainerState
from ksub_ds.pretrain.engine import (
    is_sharded,
    loss_factor,
    loss_scale,
    reduced_gradient_norm,
    set_learning_rate,
    update_was_skipped,
)
from ksub_ds.pretrain.heldout_eval import evaluate
from ksub_ds.pretrain.metrics import TrainingMetrics
from ksub_ds.pretrain.preemption import StopRequest
from ksub_ds.pretrain.prefetch import BatchPrefetcher, StepBatches, model_inputs, to_tensors
from ksub_ds.pretrain.recipe import Recipe
from ksub_ds.pretrain.run_folder import RunFolder
from ksub_ds.pretrain.schedule import dropout_seed

if TYPE_CHECKING:  # seconds of imports, and deepspeed must come after the process group
    from deepspeed import DeepSpeedEngine

    from ksub_ds.model.distillation import Teacher


@dataclass(frozen=True)
class Training:
    """All that the loop works on.

    Attributes:
        recipe: with no setting left open.
        folder: the run folder.
        engine: the model and its optimizer.
        prefetcher: gives the micro-batches of a step.
        held_out: batches to evaluate on; None where the shards have no held-out part.
        languages: those with a held-out part.
        metrics: writes metrics.jsonl and evaluation.jsonl.
        checkpoints: writes checkpoints.
        stop: watches for a request to stop.
        teacher: the model learns its distributions beside the labels; None without --distill-from.
    """

    recipe: Recipe
    folder: RunFolder
    engine: "DeepSpeedEngine"
    prefetcher: BatchPrefetcher
    held_out: HeldOutBatches | None
    languages: list[str]
    metrics: TrainingMetrics
    checkpoints: CheckpointWriter
    stop: StopRequest
    teacher: "Teacher | None" = None


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, the same on every rank; `loss` is in nats per masked token."""

    loss: float
    tokens: int
    gradient_norm: float | None
    learning_rate: float
    masked_accuracy: float | None
    stop_wanted: bool


def train(training: Training, state: TrainerState) -> tuple[TrainerState, str | None]:
    """Train from `state` to the last step of the recipe, or until a stop is asked for.

    Returns:
        The state at the end (it is saved), and the reason of an early stop.

    Raises:
        UserError: on every rank: loss or gradient not finite, disk full.
    """
    recipe = training.recipe
    saved_step = state.step
    if evaluation_is_missing(recipe, training.folder, state.step):
        _evaluate(training, state.step)

    while state.step < recipe.max_steps:
        batches = training.prefetcher.take(state.step)
        # ------------------------------------------------------------ one optimizer step
        result = train_step(training, batches, state.step + 1)
        state = dataclasses.replace(state, step=state.step + 1, tokens=state.tokens + result.tokens)
        # --------------------------------------------------------------------------------
        _log(training, state, result, batches.seconds_waited)

        last = result.stop_wanted or state.step == recipe.max_steps
        if last or state.step % recipe.save_every_steps == 0 or state.step == recipe.plan().decay_begins_after:
            training.checkpoints.save(state)
            saved_step = state.step
            training.metrics.restart_clock()
        if _evaluation_is_due(recipe, state.step) and (not result.stop_wanted or state.step == recipe.max_steps):
            _evaluate(training, state.step)
            training.metrics.restart_clock()
        if result.stop_wanted:
            break

    training.checkpoints.finish()
    assert saved_step == state.step
    return state, _stop_reason(training) if state.step < recipe.max_steps else None


def train_step(training: Training, batches: StepBatches, step: int) -> StepResult:
    """Make one optimizer step; nothing is updated if loss or gradient are not finite.

    Args:
        training: all that the loop works on.
        batches: this rank's micro-batches.
        step: number of the step, from 1.

    Raises:
        UserError: on every rank: loss or gradient not finite, disk full.
    """
    distributed.watchdog().step = step
    distributed.mark_progress(f"step {step}")
    masked, tokens = distributed.all_reduce_sum([batches.masked_tokens, batches.tokens])
    masked = max(masked, 1.0)
    loss_sum, last_batch = _accumulate_gradients(training, batches, step, masked)
    loss_sum, stop_wanted = _agree(training, step, loss_sum)
    accuracy = _masked_accuracy(training, last_batch) if step % training.recipe.log_every_steps == 0 else None
    rate, gradient_norm = _update(training, step)
    return StepResult(loss_sum / masked, int(tokens), gradient_norm, rate, accuracy, stop_wanted)


def _accumulate_gradients(
    training: Training, batches: StepBatches, step: int, masked: float
) -> tuple[float, dict[str, Any]]:
    """Run forward and backward over this rank's micro-batches.

    Args:
        training: all that the loop works on.
        batches: this rank's micro-batches.
        step: number of the step, from 1.
        masked: labels to predict in the whole step, over all ranks: the loss is divided by their number.

    Returns:
        The sum of this rank's losses, and its last micro-batch.
    """
    import torch

    engine, device = training.engine, distributed.device()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in zip(batches.indices, batches.micro_batches, strict=True):
        tensors = to_tensors(model_inputs(batch, None), device)
        torch.manual_seed(dropout_seed("dropout", training.recipe.seed, step, index))
        engine.set_gradient_accumulation_boundary(index == batches.indices[-1])
        loss = engine(**tensors, **_soft_targets(training, tensors), loss_reduction="sum").loss
        engine.backward(loss * loss_factor(engine) / masked, scale_wrt_gas=False)
        loss_sum += loss.detach()
    return distributed.to_number(loss_sum), tensors


def _soft_targets(training: Training, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return what the teacher, if there is one, adds to the arguments of the model."""
    if training.teacher is None:
        return {}
    return {"soft_targets": training.teacher.targets(**tensors), "soft_weight": training.recipe.distill_weight}


def _agree(training: Training, step: int, local_loss: float) -> tuple[float, bool]:
    """Sum the loss over the ranks, and learn whether one of them wants to stop or has met a problem.

    Returns:
        The loss of the whole step, summed over its masked tokens, and whether to stop after this step.

    Raises:
        UserError: on every rank: a file could not be written, or the loss is not finite.
    """
    wants_stop = training.stop.reason() is not None
    has_problem = training.metrics.problem is not None or training.checkpoints.has_failed()
    loss, stops, problems = distributed.all_reduce_sum([local_loss, float(wants_stop), float(has_problem)])
    if problems:
        distributed.raise_on_all_ranks(training.metrics.check)
        training.checkpoints.finish()
    if not math.isfinite(loss):
        ranks = [rank for rank, each in enumerate(distributed.gather_objects(local_loss)) if not math.isfinite(each)]
        _refuse(training, step, "the loss", ranks)
    return loss, stops > 0


def _masked_accuracy(training: Training, batch: dict[str, Any]) -> float | None:
    """Return the share of masked tokens of a batch of rank 0 that the model predicts, before it learns from them."""
    if not distributed.is_main() and not is_sharded(training.engine):
        return None
    model = training.engine.module
    model.eval()
    _, correct, count = model.score_masked(**batch).tolist()
    model.train()
    return correct / max(count, 1.0)


def _update(training: Training, step: int) -> tuple[float, float | None]:
    """Let the optimizer update the weights.

    Returns:
        The learning rate, and the norm of the gradient; None where fp16 skipped the update.

    Raises:
        UserError: on every rank: the gradient is not finite.
    """
    recipe, engine = training.recipe, training.engine
    distributed.mark_progress(f"the update of step {step}")
    norm = reduced_gradient_norm(engine)
    if norm is not None and not math.isfinite(norm):
        _refuse(training, step, "the gradient")
    rate = recipe.plan().rate(step)
    set_learning_rate(engine, rate)
    engine.step()
    if norm is None:
        norm = float(engine.get_global_grad_norm())
    if update_was_skipped(engine) and recipe.precision != "fp16":  # in fp16 it only halves the loss scale
        _refuse(training, step, "the gradient")
    return rate, norm if math.isfinite(norm) else None


def _refuse(training: Training, step: int, what: str, ranks: list[int] | None = None) -> NoReturn:
    """Raise the same UserError on every rank: a number is not finite, and this step was not made."""
    training.checkpoints.finish()
    where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
    latest = distributed.broadcast_object(
        checkpoint.newest_complete(training.folder.checkpoints, quiet=True) if distributed.is_main() else None
    )
    good = f"the last good checkpoint is {latest}" if latest else "there is no checkpoint yet"
    distributed.raise_agreed(
        f"step {step}: {what} is not finite{where}; stopped before the update; {good}. "
        "Try a lower --peak-lr, a --gradient-clipping of 1.0 or --precision fp32 in a new --out"
    )


def _log(training: Training, state: TrainerState, result: StepResult, data_wait: float) -> None:
    training.metrics.step(
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
    """Return whether a due evaluation is not in evaluation.jsonl. A collective.

    So it is at step 0, and where a run was ended between a save and its evaluation.
    """
    due = _evaluation_is_due(recipe, step)
    return distributed.broadcast_object(due and all(line["step"] != step for line in read_lines(folder.evaluation)))


def _evaluate(training: Training, step: int) -> None:
    if training.held_out is not None:
        distributed.mark_progress(f"the evaluation after step {step}")
        scores = evaluate(training.engine.module, training.held_out, training.languages)
        training.metrics.evaluation(step, scores)


def _stop_reason(training: Training) -> str:
    reasons = [reason for reason in distributed.gather_objects(training.stop.reason()) if reason]
    reason = reasons[0] if reasons else "asked to"
    get_logger().info(f"stopping: {reason}")
    return reason
