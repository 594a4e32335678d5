"""The training loop: step, log, save, evaluate, stop. Read `train` first, then `train_step` and `finish_step`.

    python -m ksub_ds.pretrain --preset tiny --codes codes.safetensors --data shards --out run

What makes a run repeatable: batch and masks are functions of (seed, step), dropout of (seed, step,
micro-batch), and the loss is the sum over all predicted tokens of the optimizer step divided by their
global count. None of it depends on the number of ranks.

A step is launched, and its report is read later: on a GPU when the next step is under way, so that the device never
waits for the host. Whether loss and gradient are finite is therefore decided on the device (`GuardedUpdate`).
"""

import dataclasses
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ksub_ds.common import distributed
from ksub_ds.common.logging import get_logger, read_lines
from ksub_ds.corpus.batches import HeldOutBatches
from ksub_ds.corpus.tokenizers.loading import Tokenizer
from ksub_ds.pretrain import checkpoint
from ksub_ds.pretrain.checkpoint import CheckpointWriter, TrainerState
from ksub_ds.pretrain.engine import GuardedUpdate, LossScaleExhausted, loss_factor, loss_scale
from ksub_ds.pretrain.heldout_eval import accuracy_key, evaluate
from ksub_ds.pretrain.metrics import TrainingMetrics
from ksub_ds.pretrain.preemption import StopRequest
from ksub_ds.pretrain.prefetch import BatchPrefetcher, StepBatches
from ksub_ds.pretrain.recipe import Recipe
from ksub_ds.pretrain.run_folder import RunFolder
from ksub_ds.pretrain.schedule import dropout_seed

if TYPE_CHECKING:  # seconds of imports, and deepspeed must come after the process group
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

    from ksub_ds.model.distillation import Teacher


@dataclass(frozen=True)
class Training:
    """All that the loop works on.

    Attributes:
        recipe: with no setting left open.
        folder: the run folder.
        engine: the model and its optimizer.
        update: lets the optimizer update the weights, unless a number is not finite.
        prefetcher: gives the micro-batches of a step.
        held_out: batches to evaluate on; None where the shards have no held-out part.
        languages: those with a held-out part.
        tokenizer: of the data.
        metrics: writes metrics.jsonl and evaluation.jsonl.
        checkpoints: writes checkpoints.
        stop: watches for a request to stop.
        teacher: the model learns its distributions beside the labels; None without --distill-from.
    """

    recipe: Recipe
    folder: RunFolder
    engine: "DeepSpeedEngine"
    update: GuardedUpdate
    prefetcher: BatchPrefetcher
    held_out: HeldOutBatches | None
    languages: list[str]
    tokenizer: Tokenizer
    metrics: TrainingMetrics
    checkpoints: CheckpointWriter
    stop: StopRequest
    teacher: "Teacher | None" = None


@dataclass(frozen=True)
class StepInFlight:
    """An optimizer step that is launched; a GPU may still be at it.

    Attributes:
        step: number of the step, from 1.
        report: its numbers over all ranks, in the order of `StepReport`.
        local_loss: the sum of this rank's losses.
        learning_rate: of its update.
        data_wait: seconds that the training waited for its batches.
    """

    step: int
    report: distributed.NumbersToRead
    local_loss: "Tensor"
    learning_rate: float
    data_wait: float


class StepReport(NamedTuple):
    """What one optimizer step gave, summed over its micro-batches and all ranks.

    Attributes:
        loss: nats, over the predicted tokens: the masked ones, or of a causal model all.
        correct: in the last micro-batches, predicted tokens that were most probable; on steps that are logged in full.
        counted: predicted tokens of those micro-batches.
        stops: ranks that want to stop.
        problems: ranks that could not write a file.
        gradient_norm: before clipping; in fp16 infinite where DeepSpeed passed over the update.
        predicted: tokens to predict.
        tokens: input tokens, padding not counted.
    """

    loss: float
    correct: float
    counted: float
    stops: float
    problems: float
    gradient_norm: float
    predicted: float
    tokens: float


def train(training: Training, state: TrainerState, lag: int | None = None) -> tuple[TrainerState, str | None]:
    """Train from `state` to the last step of the recipe, or until a stop is asked for.

    Args:
        training: all that the loop works on.
        state: where to start.
        lag: steps that are launched before the report of an earlier one is read, so that a GPU never waits for the
            host. A stop takes effect so many steps later; nothing else depends on it. [1 on a GPU, except in fp16,
            where DeepSpeed waits; else 0]

    Returns:
        The state at the end (it is saved), and the reason of an early stop.

    Raises:
        UserError: on every rank: loss or gradient not finite, disk full.
    """
    recipe = training.recipe
    if lag is None:
        lag = int(distributed.has_gpu() and recipe.precision != "fp16")
    saved_step = launched = state.step
    in_flight: deque[StepInFlight] = deque()
    if evaluation_is_missing(recipe, training.folder, state.step):
        _evaluate(training, state.step)
    training.metrics.restart_clock()

    while state.step < recipe.max_steps:
        batches = training.prefetcher.take(launched)
        launched += 1
        # ------------------------------------------------------------ one optimizer step
        in_flight.append(train_step(training, batches, launched))
        # --------------------------------------------------------------------------------
        saves, evaluates = _save_is_due(recipe, launched), _evaluation_is_due(recipe, launched)
        stop_wanted = False
        while len(in_flight) > (0 if saves or evaluates or stop_wanted else lag):
            report = finish_step(training, state, in_flight.popleft())
            state = dataclasses.replace(state, step=state.step + 1, tokens=state.tokens + int(report.tokens))
            stop_wanted = stop_wanted or report.stops > 0

        if saves or stop_wanted:
            training.checkpoints.save(state)
            saved_step = state.step
            training.metrics.restart_clock()
        if evaluates and (not stop_wanted or state.step == recipe.max_steps):
            _evaluate(training, state.step)
            training.metrics.restart_clock()
        if stop_wanted:
            break

    training.checkpoints.finish()
    assert saved_step == state.step
    return state, _stop_reason(training) if state.step < recipe.max_steps else None


def train_step(training: Training, batches: StepBatches, step: int) -> StepInFlight:
    """Launch one optimizer step; on the device, nothing is updated if loss or gradient are not finite.

    Nothing here waits for a GPU.

    Args:
        training: all that the loop works on.
        batches: this rank's micro-batches.
        step: number of the step, from 1.

    Raises:
        UserError: on every rank: in fp16 no loss scale is small enough for the gradient.
    """
    import torch

    distributed.watchdog().step = step
    distributed.mark_progress(f"step {step}")
    sizes = distributed.sum_over_ranks(distributed.to_device([batches.predicted_tokens, batches.tokens]))
    loss, correct, counted = _accumulate_gradients(training, batches, step, sizes[0])

    wants_stop = training.stop.reason() is not None
    has_problem = training.metrics.problem is not None or training.checkpoints.has_failed()
    flags = distributed.to_device([counted, float(wants_stop), float(has_problem)])
    squared_norm = training.update.squared_gradient_norm()
    sums = distributed.sum_over_ranks(torch.cat([torch.stack([loss, correct]), flags, squared_norm.unsqueeze(0)]))

    distributed.mark_progress(f"the update of step {step}")
    rate = training.recipe.plan().rate(step)
    try:
        norm = training.update.launch(loss=sums[0], squared_norm=sums[-1], rate=rate)
    except LossScaleExhausted:
        _refuse(training, step, "the gradient, at fp16's smallest loss scale,")
    report = distributed.NumbersToRead(torch.cat([sums[:-1], norm.unsqueeze(0), sizes]))
    return StepInFlight(step, report, loss, rate, batches.seconds_waited)


def _accumulate_gradients(
    training: Training, batches: StepBatches, step: int, predicted: "Tensor"
) -> tuple["Tensor", "Tensor", int]:
    """Run forward and backward over this rank's micro-batches.

    Args:
        training: all that the loop works on.
        batches: this rank's micro-batches.
        step: number of the step, from 1.
        predicted: labels to predict in the whole step, over all ranks: the loss is divided by their number.

    Returns:
        The sum of this rank's losses; and of the last micro-batch, on steps that are logged in full, how many labels
        were the most probable token, and of how many.
    """
    import torch

    engine = training.engine
    predicted = predicted.clamp(min=1).float()
    loss_sum = torch.zeros((), dtype=torch.float64, device=distributed.device())
    correct, counted = loss_sum, 0
    for index, inputs in zip(batches.indices, batches.on_device(), strict=True):
        last = index == batches.indices[-1]
        counts = last and step % training.recipe.log_every_steps == 0
        torch.manual_seed(dropout_seed("dropout", training.recipe.seed, step, index))
        engine.set_gradient_accumulation_boundary(last)
        output = engine(**inputs, **_soft_targets(training, inputs), loss_reduction="sum", output_correct=counts)
        engine.backward(output.loss * loss_factor(engine) / predicted, scale_wrt_gas=False)
        loss_sum = loss_sum + output.loss.detach()
        if counts:
            correct, counted = output["correct"].double(), batches.predicted_in_last
    return loss_sum, correct, counted


def _soft_targets(training: Training, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return what the teacher, if there is one, adds to the arguments of the model."""
    if training.teacher is None:
        return {}
    inputs = {key: value for key, value in inputs.items() if key != "position_ids"}  # it counts them in its own way
    return {"soft_targets": training.teacher.targets(**inputs), "soft_weight": training.recipe.distill_weight}


def finish_step(training: Training, state: TrainerState, flight: StepInFlight) -> StepReport:
    """Read the report of a step that was launched, and log it.

    Args:
        training: all that the loop works on.
        state: before the step.
        flight: the step.

    Raises:
        UserError: on every rank: a file could not be written, loss or gradient are not finite.
    """
    report = StepReport(*flight.report.read())
    if report.problems:
        distributed.raise_on_all_ranks(training.metrics.check)
        training.checkpoints.finish()
    if not math.isfinite(report.loss):
        finite = distributed.gather_objects(math.isfinite(flight.local_loss))
        _refuse(training, flight.step, "the loss", [rank for rank, each in enumerate(finite) if not each])
    skipped = not math.isfinite(report.gradient_norm)
    if skipped and training.recipe.precision != "fp16":  # in fp16 it only halves the loss scale
        _refuse(training, flight.step, "the gradient")
    training.metrics.step(
        flight.step,
        report.loss / max(report.predicted, 1.0),
        int(report.tokens),
        lr=flight.learning_rate,
        grad_norm=None if skipped else report.gradient_norm,
        **{accuracy_key(training.recipe.is_causal): report.correct / report.counted if report.counted else None},
        loss_scale=loss_scale(training.engine),
        tokens=state.tokens + int(report.tokens),
        data_wait_seconds=round(flight.data_wait, 5),
    )
    return report


def _refuse(training: Training, step: int, what: str, ranks: list[int] | None = None) -> NoReturn:
    """Raise the same UserError on every rank: a number is not finite, and no update was made from this step on."""
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


def _save_is_due(recipe: Recipe, step: int) -> bool:
    last, peak_ends = recipe.max_steps, recipe.plan().decay_begins_after
    return step % recipe.save_every_steps == 0 or step in (last, peak_ends)


def _evaluation_is_due(recipe: Recipe, step: int) -> bool:
    every = recipe.eval_every_steps
    return 0 < every <= recipe.max_steps and (step % every == 0 or step == recipe.max_steps)


def evaluation_is_missing(recipe: Recipe, folder: RunFolder, step: int) -> bool:
    """Return whether a due evaluation is not in evaluation.jsonl. A collective.

    So it is at step 0, and where a run was ended between a save and its evaluation.

    Args:
        recipe: of the run.
        folder: of the run.
        step: the last one that is done.
    """
    due = _evaluation_is_due(recipe, step)
    return distributed.broadcast_object(due and all(line["step"] != step for line in read_lines(folder.evaluation)))


def _evaluate(training: Training, step: int) -> None:
    if training.held_out is not None:
        distributed.mark_progress(f"the evaluation after step {step}")
        scores = evaluate(training.engine.module, training.held_out, training.languages, training.tokenizer)
        training.metrics.evaluation(step, scores)


def _stop_reason(training: Training) -> str:
    reasons = [reason for reason in distributed.gather_objects(training.stop.reason()) if reason]
    reason = reasons[0] if reasons else "asked to"
    get_logger().info(f"stopping: {reason}")
    return reason
