"""Fine-tuning one classifier: read `finetune` first. The same call again continues, to the last bit.

The order of the batches is a function of (seed, epoch) and dropout of (seed, step, rank); weights, moments and the
scores of the epochs so far are saved together. The epoch that scores best on validation is kept.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path
from ksub_ds.common.logging import Progress, get_logger
from ksub_ds.evaluate.batching import batches_per_epoch, training_batches
from ksub_ds.evaluate.encoding import Encoded
from ksub_ds.evaluate.scoring import to_device
from ksub_ds.evaluate.updates import RankUpdates, SingleUpdates, Updates, make_classifier_module

CLAIM_CHECK_STEPS = 20


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
    """What a fine-tuning gave.

    Attributes:
        epochs: the validation scores after each epoch, as `validate` gave them, with "epoch" and "loss".
        best_epoch: the first with the highest "score"; its weights are in the model now.
    """

    epochs: list[dict[str, Any]]
    best_epoch: int


@dataclass
class _Position:
    """How far a fine-tuning is."""

    step: int = 0
    loss_sum: float = 0.0  # of the epoch that runs
    epochs: list[dict[str, Any]] | None = None


def finetune(
    model: Any,
    train: Encoded,
    settings: FineTuning,
    validate: Callable[[Any], dict[str, Any]],
    work: Path,
    identity: str,
    check: Callable[[], None] = lambda: None,
    several_ranks: bool = False,
) -> Outcome:
    """Train a classifier and leave the best epoch's weights in it.

    Args:
        model: on its device; its initial weights are those of a fresh start.
        validate: model -> scores of an epoch; "score" is what the best one is chosen by.
        work: folder for the state between two tries.
        identity: what the state must belong to (model and data).
        check: called every few steps; may raise to give up.
        several_ranks: this process is one rank of a group that trains together; all call this.

    Raises:
        UserError: a loss that is not finite, a batch that the ranks cannot share.
    """
    import torch

    total = settings.epochs * batches_per_epoch(len(train), settings.batch_size)
    module = make_classifier_module(model, settings.regression, settings.precision)
    updates, rank, world_size = _updates(module, settings, several_ranks)
    device = next(model.parameters()).device
    stamp = hashlib.sha256(f"{identity}\0{json.dumps(asdict(settings))}\0{len(train)}".encode()).hexdigest()
    position = _load_state(work, updates, stamp)
    epochs = position.epochs = position.epochs or []
    steps_an_epoch = total // settings.epochs
    lengths = train.lengths()
    writes = rank == 0

    with Progress(total, "steps", f"fine-tuning {work.name}", done=position.step) as progress:
        while position.step < total:
            epoch, first = divmod(position.step, steps_an_epoch)
            model.train()
            for rows in training_batches(lengths, settings.batch_size, settings.seed, epoch)[first:]:
                # ------------------------------------------------------------ one update
                batch, labels_B, weight = _share(train, rows, rank, world_size, settings.regression)
                torch.manual_seed(_dropout_seed(settings.seed, position.step, rank))
                inputs = to_device(batch, device)
                loss, _ = updates.forward(labels_B=torch.from_numpy(labels_B).to(device), **inputs)
                updates.apply(loss * (weight / len(rows)), _learning_rate(settings, position.step, total))
                # ------------------------------------------------------------------------
                position.step += 1
                value = loss.item() * weight / len(rows)
                position.loss_sum += distributed.all_reduce_sum([value])[0] if several_ranks else value
                if not math.isfinite(position.loss_sum):
                    raise UserError(
                        f"{work.name}: the loss is not finite at step {position.step}; try a lower learning rate"
                    )
                if position.step % CLAIM_CHECK_STEPS == 0:
                    check()
                done = position.step % steps_an_epoch or steps_an_epoch
                progress.advance(epoch=epoch + 1, loss=f"{position.loss_sum / done:.4f}")
                if writes and position.step % settings.save_every_steps == 0 and done != steps_an_epoch:
                    _save_state(work, updates, position, stamp)
            scores = validate(model) if writes or not several_ranks else {}
            scores = distributed.broadcast_object(scores) if several_ranks else scores
            epochs.append({"epoch": epoch + 1, "loss": position.loss_sum / steps_an_epoch, **scores})
            position.loss_sum = 0.0
            get_logger().info(f"{work.name}: epoch {epoch + 1}: validation {scores['score']:.4f}")
            check()
            if writes:
                if _best(epochs) == epoch:
                    _save_best(work, model)
                _save_state(work, updates, position, stamp)
    if writes:
        _load_best(work, model)
    return Outcome(epochs, _best(epochs) + 1)


def _updates(module: Any, settings: FineTuning, several_ranks: bool) -> tuple[Updates, int, int]:
    chosen = (module, settings.learning_rate, settings.weight_decay, settings.gradient_clipping)
    if not several_ranks:
        return SingleUpdates(*chosen), 0, 1
    world_size = distributed.world_size()
    if settings.batch_size % world_size:
        raise UserError(f"--ranks-per-job {world_size}: does not divide the batch size {settings.batch_size}")
    return RankUpdates(*chosen, settings.batch_size), distributed.rank(), world_size


def _share(
    train: Encoded, rows: np.ndarray, rank: int, world_size: int, regression: bool
) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    """This rank's rows of a batch; a rank without any computes on one row that counts nothing."""
    own = rows[rank::world_size]
    weight = 1.0 if len(own) else 0.0
    own = own if len(own) else rows[:1]
    labels = train.labels[own].astype(np.float32 if regression else np.int64)
    return train.batch(own), labels, weight


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.blake2b(f"fine-tuning/{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _learning_rate(settings: FineTuning, steps_done: int, total: int) -> float:
    """Linear warm-up over a part of the steps, then linearly down to 0 (Table 6)."""
    warmup = math.ceil(settings.warmup_ratio * total)
    if steps_done < warmup:
        return settings.learning_rate * (steps_done + 1) / warmup
    return settings.learning_rate * (total - steps_done) / max(1, total - warmup)


def _best(epochs: list[dict[str, Any]]) -> int:
    """Index of the first epoch with the highest score."""
    return max(range(len(epochs)), key=lambda index: (epochs[index]["score"], -index))


# ---------------------------------------------------------------- state between two tries


def _save_state(work: Path, updates: Updates, position: _Position, stamp: str) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in updates.module.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach().contiguous()
        for key, value in updates.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.detach().contiguous()
    about = {"stamp": stamp, "position": json.dumps(asdict(position))}
    with _explained(work), atomic_path(work / "state.safetensors") as temporary:
        save_file(tensors, temporary, metadata=about)


def _load_state(work: Path, updates: Updates, stamp: str) -> _Position:
    """Put a saved state into module and optimizer. A state of something else, or a damaged one, is passed over."""
    import torch
    from safetensors import SafetensorError, safe_open

    path = work / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as stream, torch.no_grad():
            about = stream.metadata() or {}
            if about.get("stamp") != stamp:
                return _Position()
            names = set(stream.keys())
            for name, parameter in updates.module.named_parameters():
                parameter.copy_(stream.get_tensor(f"weight.{name}"))
                state = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}.{name}" in names:
                        value = stream.get_tensor(f"{key}.{name}")
                        state[key] = value if key == "step" and parameter.is_cpu else value.to(parameter.device)
                if state:
                    updates.optimizer.state[parameter] = state
            return _Position(**json.loads(about["position"]))
    except (OSError, SafetensorError):
        return _Position()


def _save_best(work: Path, model: Any) -> None:
    from safetensors.torch import save_file

    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    with _explained(work), atomic_path(work / "best.safetensors") as temporary:
        save_file(tensors, temporary)


def _load_best(work: Path, model: Any) -> None:
    import torch
    from safetensors.torch import load_file

    stored = load_file(work / "best.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[name])


def _explained(work: Path) -> Any:
    """A full disk is the user's to mend."""
    import contextlib
    from collections.abc import Iterator

    from safetensors import SafetensorError

    @contextlib.contextmanager
    def explained() -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{work}: cannot be written ({error}); free some space, the same command goes on"
            ) from error

    return explained()
