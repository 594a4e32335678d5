"""Checkpoints that know nothing of ranks: written on any number of processes and ZeRO stage, read on any other.

    checkpoints/global_step{N}/
        model.safetensors        fp32 master weights by parameter name (codes are in RUN/codes.safetensors)
        optimizer.safetensors    exp_avg.NAME and exp_avg_sq.NAME, AdamW's two moments
        trainer.json             step, Adam's step, tokens, loss scale, identity of codes and data
        manifest.json            size and sha256 of the three; without it the folder is not a checkpoint

DeepSpeed's own format divides the state over the ranks that wrote it. Here rank 0 gathers the fragments and
writes each parameter whole (saving.py): at 26M parameters that is 300 MB. This file finds and reads them.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import TEMPORARY_SUFFIX, read_json, sha256_file
from ksub_ds.common.logging import get_logger
from ksub_ds.pretrain.engine_state import (
    MOMENTS,
    full_shape,
    make_adam_state,
    publish_masters,
    set_loss_scaler,
    set_master,
)

FORMAT = "ksub-checkpoint-1"
FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json")


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands: everything beside weights and moments. Data, masks and dropout follow from `step`."""

    step: int = 0  # optimizer steps done, those that fp16 skipped included
    tokens: int = 0  # input tokens seen, padding not counted
    adam_step: int = 0
    loss_scaler: dict[str, float] | None = None
    codes_sha256: str = ""
    data_fingerprint: str = ""
    world_size: int = 1
    precision: str = "fp32"


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, good or not."""
    found = [path for path in folder.glob("global_step*") if re.fullmatch(r"global_step\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("global_step"))


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file must have the size and sha256 of its manifest."""
    try:
        manifest = read_json(path / "manifest.json")
        files = {name: manifest["files"][name] for name in FILES}
        if manifest["format"] != FORMAT or manifest["step"] != step_of(path):
            return "manifest.json is of another checkpoint"
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes, not {expected['size']}"
            if sha256_file(path / name) != expected["sha256"]:
                return f"{name} does not match its sha256"
    except UserError:
        return "manifest.json is missing or damaged"
    except OSError as error:
        return f"{Path(error.filename).name} is missing ({error.strerror})"
    except (KeyError, TypeError):
        return "manifest.json is damaged"
    return None


def newest_complete(folder: Path, quiet: bool = False) -> Path | None:
    """The newest checkpoint that is whole; each damaged one is named in one log line and passed over."""
    for path in checkpoints(folder):
        problem = fault(path)
        if problem is None:
            return path
        if not quiet:
            get_logger().warning(f"checkpoint {path} is damaged and passed over: {problem}")
    return None


def find_start(folder: Path) -> Path | None:
    """The checkpoint to continue from, None for a fresh start; also clears what a kill left half-written.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    for leftover in sorted(folder.glob(f".global_step*{TEMPORARY_SUFFIX}")) + sorted(folder.glob(".global_step*.old")):
        get_logger().warning(f"checkpoint {leftover} was never finished: passed over and removed")
        shutil.rmtree(leftover, ignore_errors=True)
    found = newest_complete(folder)
    if found is None and checkpoints(folder):
        raise UserError(f"{folder}: no checkpoint there is whole; remove the folder to start from step 0")
    return found


def read_trainer_state(path: Path, now: TrainerState) -> TrainerState:
    """Read trainer.json and check that the checkpoint belongs to the codes and data of `now`.

    Raises:
        UserError: other codes or other data.
    """
    values = read_json(path / "trainer.json")
    try:
        state = TrainerState(**values)
    except TypeError as error:
        raise UserError(f"{path / 'trainer.json'}: not a trainer state of this version ({error})") from error
    for what, theirs, ours in (
        ("codes", state.codes_sha256, now.codes_sha256),
        ("data", state.data_fingerprint, now.data_fingerprint),
    ):
        if theirs != ours:
            raise UserError(
                f"{path}: was trained with other {what} ({theirs[:12]}..., now {ours[:12]}...); "
                f"give the run's own {what}, or start a new --out"
            )
    return state


def load(engine: Any, path: Path, state: TrainerState) -> None:
    """Put a checkpoint into the engine: master weights, moments, Adam's step, loss scale, model weights.

    Every rank calls this; rank 0 reads the files, the others are told.

    Raises:
        UserError: a parameter is missing or has another shape (a checkpoint of another model).
    """
    import torch

    reader = distributed.on_main(lambda: _open_tensors(engine, path, with_moments=state.adam_step > 0))
    if state.adam_step:
        make_adam_state(engine, state.adam_step)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            for key in ("weight", *MOMENTS) if state.adam_step else ("weight",):
                value = torch.empty(full_shape(parameter), dtype=torch.float32, device=distributed.device())
                if reader is not None:
                    value.copy_(reader(name if key == "weight" else f"{key}.{name}"))
                distributed.broadcast_tensor(value)
                set_master(engine, parameter, key, value)
        publish_masters(engine)
    if state.loss_scaler and engine.fp16_enabled():
        set_loss_scaler(engine, state.loss_scaler)
    engine.global_steps = state.step


def _open_tensors(engine: Any, path: Path, with_moments: bool) -> Callable[[str], Any]:
    """Open both files; returns key -> tensor. Checks names and shapes against the model."""
    from safetensors import safe_open

    streams = [safe_open(path / "model.safetensors", framework="pt")]
    if with_moments:
        streams.append(safe_open(path / "optimizer.safetensors", framework="pt"))
    home = {key: stream for stream in streams for key in stream.keys()}  # noqa: SIM118 - not a dict
    shapes = {name: list(full_shape(parameter)) for name, parameter in engine.module.named_parameters()}
    stored = {key: streams[0].get_slice(key).get_shape() for key, stream in home.items() if stream is streams[0]}
    wrong = sorted(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{path}: {name} has shape {stored.get(name)}, the model {shapes.get(name)}; another model's checkpoint"
        )
    return lambda key: home[key].get_tensor(key)
