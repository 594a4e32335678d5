"""State of a fine-tuning between two tries: weights, moments and position in one file, the best epoch in another."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path
from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate.finetune.train_step import TrainStep


@dataclass
class Position:
    """How far a fine-tuning is.

    Attributes:
        step: updates done.
        loss_sum: over the steps of the current epoch.
        epochs: scores of those that have ended.
    """

    step: int = 0
    loss_sum: float = 0.0
    epochs: list[dict[str, Any]] = field(default_factory=list)


def save_state(work: Path, train_step: TrainStep, position: Position, stamp: str) -> None:
    """Write WORK/state.safetensors.

    Args:
        work: folder of this fine-tuning.
        train_step: module and optimizer.
        position: how far it is.
        stamp: names model, data and settings; `load_state` takes a state of the same stamp only.

    Raises:
        UserError: it cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in train_step.module.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach().contiguous()
        for key, value in train_step.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.detach().contiguous()
    about = {"stamp": stamp, "position": json.dumps(asdict(position))}
    with _explain_write_errors(work), atomic_path(work / "state.safetensors") as temporary:
        save_file(tensors, temporary, metadata=about)


def load_state(work: Path, train_step: TrainStep, stamp: str) -> Position:
    """Load a saved state into module and optimizer and return its position.

    A state of other data or settings, or a damaged one, is ignored: the fine-tuning begins anew.

    Args:
        work: folder of this fine-tuning.
        train_step: module and optimizer; changed.
        stamp: as in `save_state`.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    path = work / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as stream, torch.no_grad():
            about = stream.metadata() or {}
            if about.get("stamp") != stamp:
                get_logger().info(
                    f"{path}: is of another model, other data or settings, or of an earlier version; this fine-tuning "
                    "begins anew"
                )
                return Position()
            names = set(stream.keys())
            for name, parameter in train_step.module.named_parameters():
                parameter.copy_(stream.get_tensor(f"weight.{name}"))
                state = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}.{name}" in names:
                        value = stream.get_tensor(f"{key}.{name}")
                        state[key] = value if key == "step" and parameter.is_cpu else value.to(parameter.device)
                if state:
                    train_step.optimizer.state[parameter] = state
            return Position(**json.loads(about["position"]))
    except FileNotFoundError:
        return Position()
    except (OSError, SafetensorError) as error:
        get_logger().info(f"{path}: cannot be read ({error}); this fine-tuning begins anew")
        return Position()


def save_best(work: Path, model: Any) -> None:
    """Write WORK/best.safetensors."""
    from safetensors.torch import save_file

    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    with _explain_write_errors(work), atomic_path(work / "best.safetensors") as temporary:
        save_file(tensors, temporary)


def load_best(work: Path, model: Any) -> None:
    """Load the best epoch's weights into a model."""
    import torch
    from safetensors.torch import load_file

    stored = load_file(work / "best.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[name])


@contextlib.contextmanager
def _explain_write_errors(work: Path) -> Iterator[None]:
    """Report a failed write as the user's error: the disk is full.

    Yields:
        Nothing.

    Raises:
        UserError: the files cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{work}: cannot be written ({error}); free some space and run it again") from error
