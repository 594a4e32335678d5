"""Fine-tune one classifier: read `finetune` first. The same call again continues, bit for bit.

A batch has rows of about one length, so that next to nothing is padded; which rows share one stays random up to that.
The order of the batches is a function of (seed, epoch) and dropout of (seed, step, rank): another number of ranks
draws other dropout, as another seed would. Weights, moments and the scores of the epochs so far are saved together.
The epoch that scores best on validation is kept.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import Progress, get_logger
from ksub_ds.evaluate.finetune import state
from ksub_ds.evaluate.finetune.encoding import Encoded
from ksub_ds.evaluate.finetune.train_step import DeepSpeedStep, SingleProcessStep, TrainStep, make_classifier_module
from ksub_ds.pretrain.prefetch import to_tensors
from ksub_ds.pretrain.schedule import dropout_seed, learning_rate

if TYPE_CHECKING:
    from torch import Tensor

WINDOW_BATCHES = 64  # batches whose rows are sorted by length together
CHECK_STEPS = 20  # from one look at the losses to the next: a GPU does not pause for them in between
NEWS_SECONDS = 1.0  # how often rank 0 is heard of while it validates

Validate = Callable[[Any, Callable[[], None]], dict[str, Any]]


@dataclass(frozen=True)
class FineTuning:
    """How one classifier is trained."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    regression: bool = False
    warmup_ratio: float = 0.06
    weight_decay: float = 0.01
    gradient_clipping: float = 1.0
    precision: str = "fp32"
    save_every_steps: int = 500


@dataclass
class Outcome:
    """The result of a fine-tuning.

    Attributes:
        epochs: the validation scores after each epoch, as `validate` gave them, with "epoch" and "loss".
        best_epoch: the first with the highest "score"; its weights are in the model now.
    """

    epochs: list[dict[str, Any]]
    best_epoch: int


def finetune(
    model: Any,
    train: Encoded,
    settings: FineTuning,
    validate: Validate,
    work: Path,
    identity: str,
    check: Callable[[], None] = lambda: None,
    several_ranks: bool = False,
) -> Outcome:
    """Train a classifier and leave the best epoch's weights in it.

    Args:
        model: on its device; its initial weights are those of a fresh start.
        train: the rows to train on.
        settings: how to train.
        validate: (model, check) -> scores of an epoch; "score" is what the best one is chosen by. It calls check every
            few batches.
        work: folder for the state between two tries.
        identity: what the state must belong to (model and data).
        check: called every few steps; may raise to give up.
        several_ranks: this process is one rank of a group that trains together; all call this.

    Raises:
        UserError: a loss that is not finite, a batch that the ranks cannot share.
    """
    run = _Run(model, train, settings, work, identity, several_ranks)
    position = run.position
    with Progress(run.total_steps, "steps", f"fine-tuning {work.name}", done=position.step) as progress:
        while len(position.epochs) < settings.epochs:
            run.train_epoch(progress, check)
            scores = validate_on_main(validate, model) if several_ranks else validate(model, check)
            run.end_epoch(scores)
            check()
            run.keep_epoch()
    if run.writes:
        state.load_best(work, model)
    return Outcome(position.epochs, _best(position.epochs) + 1)


def validate_on_main(validate: Validate, model: Any) -> dict[str, Any]:
    """Have rank 0 validate, and return its scores on every rank; all ranks call this.

    The others hear from it every second: a collective that takes minutes counts as a rank that hangs.
    """
    heard = time.monotonic()

    def send_news() -> None:
        nonlocal heard
        if time.monotonic() - heard > NEWS_SECONDS:
            distributed.broadcast_object(None)
            heard = time.monotonic()

    distributed.mark_progress("validation")
    if distributed.is_main():
        return distributed.broadcast_object(validate(model, send_news))
    while (scores := distributed.broadcast_object(None)) is None:
        pass
    return scores


class _Run:
    """A fine-tuning in progress: its module and optimizer, its state on disk, and how far it is."""

    def __init__(
        self, model: Any, train: Encoded, settings: FineTuning, work: Path, identity: str, several_ranks: bool
    ):
        self.model, self.train, self.settings, self.work = model, train, settings, work
        self.several_ranks = several_ranks
        self.steps_an_epoch = batches_per_epoch(len(train), settings.batch_size)
        self.total_steps = settings.epochs * self.steps_an_epoch
        module = make_classifier_module(model, settings.regression, settings.precision)
        self.train_step, self.rank, self.world_size = _build_step(module, settings, several_ranks)
        self.writes = self.rank == 0
        decisive = {key: value for key, value in asdict(settings).items() if key != "save_every_steps"}
        stamp = f"{identity}\0{json.dumps(decisive)}\0{len(train)}"
        self.stamp = hashlib.sha256(stamp.encode()).hexdigest()
        self.position = state.load_state(work, self.train_step, self.stamp)
        self._unread: list[Tensor] = []  # this rank's share of the losses since the last look

    def train_epoch(self, progress: Progress, check: Callable[[], None]) -> None:
        """Do the updates that are left of the current epoch; at its end it is saved before it is validated.

        Raises:
            UserError: the loss is not finite.
        """
        position, settings = self.position, self.settings
        epoch = len(position.epochs)
        first = position.step - epoch * self.steps_an_epoch
        self.model.train()
        for rows in training_batches(self.train.lengths(), settings.batch_size, settings.seed, epoch)[first:]:
            self._unread.append(self.update(rows))
            position.step += 1
            done = position.step % self.steps_an_epoch or self.steps_an_epoch
            save = position.step % settings.save_every_steps == 0 or done == self.steps_an_epoch
            if position.step % CHECK_STEPS == 0 or save:
                self.read_losses()
            if position.step % CHECK_STEPS == 0:
                check()
            read = done - len(self._unread)
            progress.advance(epoch=epoch + 1, loss=f"{position.loss_sum / read:.4f}" if read else "-")
            if self.writes and save:
                state.save_state(self.work, self.train_step, position, self.stamp)

    def read_losses(self) -> None:
        """Add the losses since the last look to the epoch's sum.

        Raises:
            UserError: one of them is not finite.
        """
        import torch

        losses = torch.stack(self._unread).tolist()
        losses = distributed.all_reduce_sum(losses) if self.several_ranks else losses
        self._unread.clear()
        for step, loss in enumerate(losses, start=self.position.step - len(losses) + 1):
            self.position.loss_sum += loss
            if not math.isfinite(self.position.loss_sum):
                raise UserError(f"{self.work.name}: the loss is not finite at step {step}; try a lower learning rate")

    def update(self, rows: np.ndarray) -> "Tensor":
        """Do one update by a batch and return this rank's share of its mean loss, a float64 number on the device."""
        import torch

        settings, device = self.settings, next(self.model.parameters()).device
        batch, labels_B, weight = _share(self.train, rows, self.rank, self.world_size, settings.regression)
        torch.manual_seed(dropout_seed("fine-tuning", settings.seed, self.position.step, self.rank))
        loss, _ = self.train_step.forward(**to_tensors({**batch, "labels_B": labels_B}, device))
        rate = _learning_rate(settings, self.position.step, self.total_steps)
        self.train_step.apply(loss * (weight / len(rows)), rate)
        return loss.detach().double() * weight / len(rows)

    def end_epoch(self, scores: dict[str, Any]) -> None:
        """Record the scores of the epoch that has ended."""
        position = self.position
        epoch = len(position.epochs) + 1
        position.epochs.append({"epoch": epoch, "loss": position.loss_sum / self.steps_an_epoch, **scores})
        position.loss_sum = 0.0
        get_logger().info(f"{self.work.name}: epoch {epoch}: validation {scores['score']:.4f}")

    def keep_epoch(self) -> None:
        """Save the state, and the weights if no epoch before was as good."""
        if not self.writes:
            return
        if _best(self.position.epochs) == len(self.position.epochs) - 1:
            state.save_best(self.work, self.model)
        state.save_state(self.work, self.train_step, self.position, self.stamp)


def training_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of one epoch: every row once.

    Rows are shuffled, sorted by length inside windows of many batches, cut, and the batches shuffled again.

    Args:
        lengths: (n,) tokens of each row.
        batch_size: rows of a batch.
        seed: of the order.
        epoch: from 0; each has an order of its own.

    Returns:
        Row numbers of each batch; all batches but one have `batch_size` rows.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches: list[np.ndarray] = []
    window = WINDOW_BATCHES * batch_size
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def batches_per_epoch(count: int, batch_size: int) -> int:
    """Return how many batches `training_batches` makes of `count` rows."""
    return -(-count // batch_size)


def _build_step(module: Any, settings: FineTuning, several_ranks: bool) -> tuple[TrainStep, int, int]:
    """Return the training step of this process, its rank and the number of ranks.

    Raises:
        UserError: the ranks cannot share a batch.
    """
    chosen = (module, settings.learning_rate, settings.weight_decay, settings.gradient_clipping)
    if not several_ranks:
        return SingleProcessStep(*chosen), 0, 1
    world_size = distributed.world_size()
    if settings.batch_size % world_size:
        raise UserError(f"--ranks-per-job {world_size}: does not divide the batch size {settings.batch_size}")
    return DeepSpeedStep(*chosen, settings.batch_size), distributed.rank(), world_size


def _share(
    train: Encoded, rows: np.ndarray, rank: int, world_size: int, regression: bool
) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    """Return this rank's rows of a batch, their labels and weight; a rank without any gets one row of weight 0."""
    own = rows[rank::world_size]
    weight = 1.0 if len(own) else 0.0
    own = own if len(own) else rows[:1]
    labels = train.labels[own].astype(np.float32 if regression else np.int64)
    return train.batch(own), labels, weight


def _learning_rate(settings: FineTuning, steps_done: int, total: int) -> float:
    """Linear warm-up over a part of the steps, then linearly down to 0 (Table 6)."""
    warmup = math.ceil(settings.warmup_ratio * total)
    return learning_rate(
        steps_done + 1, peak=settings.learning_rate, warmup_steps=warmup, max_steps=total, decay_from=warmup + 1
    )


def _best(epochs: list[dict[str, Any]]) -> int:
    """Return the index of the first epoch with the highest score."""
    return max(range(len(epochs)), key=lambda index: (epochs[index]["score"], -index))
