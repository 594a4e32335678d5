"""Checkpoints that do not depend on ranks: written on any number of processes and ZeRO stage, read on any other.

    checkpoints/global_step{N}/
        model.safetensors        fp32 master weights by parameter name (codes are in RUN/codes.safetensors)
        optimizer.safetensors    exp_avg.NAME and exp_avg_sq.NAME, AdamW's two moments
        trainer.json             step, Adam's step, tokens, loss scale, identity of codes and data
        manifest.json            size and sha256 of the three; without it the folder is not a checkpoint

DeepSpeed's own format divides the state over the ranks that wrote it. Here rank 0 gathers the fragments and writes
each parameter whole: at 26M parameters that is 300 MB. The training waits only for the copy; a thread of rank 0 writes
it. A checkpoint counts when its manifest and its name are there, so one that a kill cut short is passed over, and the
run continues from the one before it.
"""

import dataclasses
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import TEMPORARY_SUFFIX, atomic_folder, atomic_path, read_json, sha256_file, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.pretrain.engine_state import (
    MOMENTS,
    adam_step,
    collect_masters,
    full_shape,
    loss_scaler_state,
    make_adam_state,
    publish_masters,
    set_loss_scaler,
    set_master,
)

if TYPE_CHECKING:  # deepspeed must come after the process group
    from deepspeed import DeepSpeedEngine

FORMAT = "ksub-checkpoint-1"
WEIGHTS, MOMENTS_FILE, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json"
FILES = (WEIGHTS, MOMENTS_FILE, STATE)
FOLDER = "checkpoints"  # in the run folder
LATEST = "LATEST"  # beside it: name of the newest one
PREFIX = "global_step"


@dataclass(frozen=True)
class TrainerState:
    """The state of a training beside weights and moments. Data, masks and dropout follow from `step`.

    Attributes:
        step: optimizer steps done, those that fp16 skipped included.
        tokens: input tokens seen, padding not counted.
        adam_step: updates Adam has made.
        loss_scaler: fp16's loss scale and its counters; None in other precisions.
        codes_sha256: identity of the codes.
        data_fingerprint: identity of the shards.
        world_size: ranks that wrote it; for people.
        precision: of the run.
    """

    step: int = 0
    tokens: int = 0
    adam_step: int = 0
    loss_scaler: dict[str, float] | None = None
    codes_sha256: str = ""
    data_fingerprint: str = ""
    world_size: int = 1
    precision: str = "fp32"


# ---------------------------------------------------------------- names


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"{PREFIX}{step}"


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix(PREFIX))


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in RUN/checkpoints, newest first, whole or not."""
    found = [path for path in folder.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


# ---------------------------------------------------------------- finding and checking


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None: every file must have the size and sha256 of its manifest."""
    try:
        manifest = read_json(path / MANIFEST)
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


def newest_complete(folder: Path, quiet: bool = False, up_to: int | None = None) -> Path | None:
    """Return the newest whole checkpoint, or None.

    Args:
        folder: RUN/checkpoints.
        quiet: do not log a line for each damaged one that is passed over.
        up_to: look at the checkpoints up to this step only.
    """
    for path in checkpoints(folder):
        if up_to is not None and step_of(path) > up_to:
            continue
        problem = damage(path)
        if problem is None:
            return path
        if not quiet:
            get_logger().warning(f"checkpoint {path} is damaged and passed over: {problem}")
    return None


def name_latest(folder: Path, step: int) -> None:
    """Write RUN/LATEST. It is for people: `find_start` looks at the checkpoints, since the newest may be damaged."""
    with atomic_path(folder.parent / LATEST) as temporary:
        temporary.write_text(checkpoint_name(step) + "\n", encoding="utf-8")


def find_start(folder: Path) -> Path | None:
    """Return the checkpoint to continue from, None for a fresh start; also remove what a kill left half-written.

    Raises:
        UserError: there are checkpoints, but none is whole; or there are none, and LATEST names one.
    """
    for leftover in sorted(folder.glob(f".{PREFIX}*{TEMPORARY_SUFFIX}")) + sorted(folder.glob(f".{PREFIX}*.old")):
        get_logger().warning(f"checkpoint {leftover} was never finished: passed over and removed")
        shutil.rmtree(leftover, ignore_errors=True)
    found = newest_complete(folder)
    if found is None and checkpoints(folder):
        raise UserError(
            f"{folder}: no checkpoint there is whole; remove it and {LATEST} beside it to start from step 0"
        )
    latest = folder.parent / LATEST
    if found is None and latest.exists():
        raise UserError(
            f"{folder}: holds no checkpoint, but {latest} names one; bring it back, or remove {LATEST} to start from "
            "step 0"
        )
    return found


def read_trainer_state(path: Path) -> TrainerState:
    """Read the trainer.json of a checkpoint.

    Raises:
        UserError: it is missing or damaged.
    """
    values = read_json(path / STATE)
    try:
        state = TrainerState(**values)
    except TypeError as error:
        raise UserError(f"{path / STATE}: not a trainer state of this version ({error})") from error
    for name in ("step", "tokens", "adam_step"):
        if not isinstance(getattr(state, name), int):
            raise UserError(f"{path / STATE}: {name} is not a number; the file is damaged")
    return state


def read_matching_state(path: Path, now: TrainerState) -> TrainerState:
    """Read the trainer.json of a checkpoint and check that it belongs to the codes and data of `now`.

    Raises:
        UserError: other codes or other data, or as `read_trainer_state`.
    """
    state = read_trainer_state(path)
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


# ---------------------------------------------------------------- loading


def load(engine: "DeepSpeedEngine", path: Path, state: TrainerState) -> None:
    """Put a checkpoint into the engine: master weights, moments, Adam's step, loss scale, model weights.

    Every rank calls this; rank 0 reads the files and broadcasts them.

    Args:
        engine: of the same model; changed.
        path: folder of the checkpoint.
        state: of the trainer, read from it.

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


def _open_tensors(engine: "DeepSpeedEngine", path: Path, with_moments: bool) -> Callable[[str], Any]:
    """Open both files, check names and shapes against the model, and return a function from key to tensor.

    Raises:
        UserError: another model's checkpoint, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        streams = [safe_open(path / WEIGHTS, framework="pt")]
        if with_moments:
            streams.append(safe_open(path / MOMENTS_FILE, framework="pt"))
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged ({error}); remove it to go on from the checkpoint before it") from error
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


# ---------------------------------------------------------------- writing


class CheckpointWriter:
    """Saves the state of an engine in a folder, and keeps the last `keep_last` checkpoints there.

    Every rank has one and calls the same methods; the thread is rank 0's.

    Args:
        engine: the engine.
        folder: RUN/checkpoints.
        keep_last: number of checkpoints to keep.
        keep_step: a step whose checkpoint is kept besides, however old; None for none.
    """

    def __init__(self, engine: "DeepSpeedEngine", folder: Path, keep_last: int, keep_step: int | None = None):
        self._engine, self._folder, self._keep_last, self._keep_step = engine, folder, keep_last, keep_step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def save(self, state: TrainerState) -> None:
        """Copy the state of the engine and begin to write it as `global_step{state.step}`.

        Raises:
            UserError: on every rank, when the previous checkpoint could not be written.
        """
        distributed.mark_progress(f"saving step {state.step}")
        self.finish()
        state = dataclasses.replace(
            state, adam_step=adam_step(self._engine), loss_scaler=loss_scaler_state(self._engine)
        )
        tensors = collect_masters(self._engine)
        if distributed.is_main():
            self._pending = self._thread.submit(self._write_or_explain, tensors, state)

    def has_failed(self) -> bool:
        """Return whether writing on this rank has failed; `finish` raises the error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk. A collective.

        Raises:
            UserError: on every rank, when the disk is full or refuses; the earlier checkpoints are untouched.
        """
        distributed.on_main(self._wait)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write_or_explain(self, tensors: dict[str, Any], state: TrainerState) -> None:
        """Write the checkpoint, point LATEST to it, then remove the oldest beyond `keep_last`.

        Raises:
            UserError: the disk is full or refuses.
        """
        from safetensors import SafetensorError

        target = self._folder / checkpoint_name(state.step)
        try:
            _write(target, tensors, state)
            name_latest(self._folder, state.step)
        except (OSError, SafetensorError) as error:
            good = newest_complete(self._folder, quiet=True)
            rest = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
            reason = str(error).removeprefix("Error while serializing: ")
            raise UserError(
                f"{target}: cannot be written ({reason}); free some space and run the same command again; {rest}"
            ) from error
        # Newer checkpoints than this one were damaged and passed over: they must not count among those kept.
        for path in [path for path in checkpoints(self._folder) if step_of(path) <= state.step][self._keep_last :]:
            if step_of(path) != self._keep_step:
                shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)  # before the run folder is unlocked; `finish` has raised the errors


def _write(target: Path, tensors: dict[str, Any], state: TrainerState) -> None:
    """Write the files of a checkpoint, the manifest last, and give the folder its name."""
    from safetensors.torch import save_file

    with atomic_folder(target) as temporary:
        moments = {key: tensor for key, tensor in tensors.items() if key.startswith(MOMENTS)}
        weights = {key: tensor for key, tensor in tensors.items() if key not in moments}
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        save_file(moments, temporary / MOMENTS_FILE, metadata={"format": "pt"})
        write_json(temporary / STATE, dataclasses.asdict(state))
        files = {name: _size_and_sha256(temporary / name) for name in FILES}
        write_json(temporary / MANIFEST, {"format": FORMAT, "step": state.step, "files": files})


def _size_and_sha256(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}
