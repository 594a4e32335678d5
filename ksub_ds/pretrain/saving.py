"""Writing checkpoints beside the training: rank 0 copies the state, a thread of its own brings it to the disk.

The training waits for the copy alone. A checkpoint counts when its manifest and its name are there, so one that a
kill cut short is passed over (checkpoint.py), and the run continues from the one before it.
"""

import dataclasses
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, atomic_path, sha256_file, write_json
from ksub_ds.pretrain.checkpoint import FILES, FORMAT, TrainerState, checkpoints, newest_complete, step_of
from ksub_ds.pretrain.engine_state import MOMENTS, adam_step, collect_masters, loss_scaler_state


class CheckpointWriter:
    """Saves the state of an engine in a folder, and keeps the last `keep_last` checkpoints there.

    Every rank has one and calls the same methods; the thread is rank 0's.
    """

    def __init__(self, engine: Any, folder: Path, keep_last: int):
        self._engine, self._folder, self._keep_last = engine, folder, keep_last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def save(self, state: TrainerState) -> None:
        """Take checkpoint `global_step{state.step}` and begin to write it.

        Raises:
            UserError: on every rank, when the one before could not be written.
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
        """Whether this rank's writing has come to an end, and not a good one; `finish` raises it."""
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
        """Write the checkpoint, point LATEST at it, then drop the oldest beyond `keep_last`."""
        from safetensors import SafetensorError

        target = self._folder / f"global_step{state.step}"
        try:
            _write(target, tensors, state)
            # LATEST is for people; `find_start` reads the checkpoints themselves, which may be damaged.
            with atomic_path(self._folder.parent / "LATEST") as temporary:
                temporary.write_text(target.name + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            good = newest_complete(self._folder, quiet=True)
            rest = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
            reason = str(error).removeprefix("Error while serializing: ")
            raise UserError(
                f"{target}: cannot be written ({reason}); free some space and run the same command again; {rest}"
            ) from error
        # Newer ones than this were found damaged and passed over: they must not take its place among those kept.
        for path in [path for path in checkpoints(self._folder) if step_of(path) <= state.step][self._keep_last :]:
            shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)  # the folder's lock goes after this; what went wrong is told already


def _write(target: Path, tensors: dict[str, Any], state: TrainerState) -> None:
    from safetensors.torch import save_file

    with atomic_folder(target) as temporary:
        moments = {key: tensor for key, tensor in tensors.items() if key.startswith(MOMENTS)}
        weights = {key: tensor for key, tensor in tensors.items() if key not in moments}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        save_file(moments, temporary / "optimizer.safetensors", metadata={"format": "pt"})
        write_json(temporary / "trainer.json", dataclasses.asdict(state))
        files = {name: _size_and_sha256(temporary / name) for name in FILES}
        write_json(temporary / "manifest.json", {"format": FORMAT, "step": state.step, "files": files})


def _size_and_sha256(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}
