"""The run folder: its files, its lock, and the check whether a start continues the run that lies there.

    RUN/recipe.json          the resolved recipe and the identity of codes and data; written first
        command.txt          every command that started or continued the run
        codes.safetensors    copy of the codes (the plain model's too)
        warm_start/          copy of the model that a warm start began with
        tokenizer/           copy of the tokenizer
        metrics.jsonl        one line per optimizer step     evaluation.jsonl   one per evaluation
        train.log            what the terminal showed        tensorboard/
        checkpoints/global_step{N}/                          (checkpoint.py)
        LATEST               name of the newest checkpoint, for people: a continuation looks for itself
        STOP                 touch it, and the run saves and ends at the next step (`echo requeue > STOP`: with code 75)
        failure.json         why the last start ended before its time, if it did

All methods that write run on rank 0 only (`distributed.on_main`).
"""

import contextlib
import dataclasses
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, atomic_path, read_json, write_json
from ksub_ds.common.lock import try_lock
from ksub_ds.common.watchdog import Failure
from ksub_ds.pretrain.recipe import changed_keys, read_recipe


class RunFolder:
    """Paths and the lock of one run."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.json"
        self.command = self.path / "command.txt"
        self.codes = self.path / "codes.safetensors"
        self.tokenizer = self.path / "tokenizer"
        self.warm_start = self.path / "warm_start"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluation = self.path / "evaluation.jsonl"
        self.log = self.path / "train.log"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.stop = self.path / "STOP"
        self.failure = self.path / "failure.json"
        self._lock: int | None = None
        self._made: list[Path] = []  # by `lock`: the file, then folders from the inside out

    def lock(self) -> None:
        """Make the folder and lock it until `unlock` or the end of the process, however it ends.

        Raises:
            UserError: another run holds it, or it cannot be written.
        """
        while (descriptor := self._open_lock()) is None:
            pass  # another start, which was refused, has just removed the file
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock = descriptor
        self.failure.unlink(missing_ok=True)

    def _open_lock(self) -> int | None:
        """Lock RUN/.lock and return its descriptor; None when the file has been replaced meanwhile.

        Raises:
            UserError: as `lock`.
        """
        path = self.path / ".lock"
        try:
            folders = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._made = [] if path.exists() else [path, *folders]
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"--out {self.path}: cannot be written ({error.strerror}); choose another folder"
            ) from error
        try:
            held = try_lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"--out {self.path}: its file system cannot lock files ({error.strerror}); choose another folder"
            ) from error
        if not held:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(
                f"--out {self.path}: in use by {holder}; wait for it, stop it (touch {self.stop}), "
                "or choose another folder"
            )
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)
        return None

    def unlock(self) -> None:
        """Release the folder. If there is no run in it yet, remove all that `lock` made."""
        if self._lock is not None:
            if not self.recipe.exists():
                with contextlib.suppress(OSError):  # not empty: somebody else's
                    for path in self._made:
                        path.rmdir() if path.is_dir() else path.unlink()
            os.close(self._lock)
            self._lock = None

    def claim(self, identity: dict[str, Any], table: Any, tokenizer: Any) -> None:
        """Start or continue the run here: write recipe.json and copies of codes and tokenizer.

        Args:
            identity: the resolved recipe as JSON values, with the fingerprints of codes and data.
            table: the codes, copied so that the run folder alone can be exported.
            tokenizer: copied too.

        Raises:
            UserError: the folder holds a run of another recipe (each changed key is named), a damaged recipe, or
                files that are not a run's.
        """
        if self.recipe.exists():
            _, before = read_recipe(self.recipe)
            changes = changed_keys(before, identity)
            if changes:
                raise UserError(
                    f"{self.recipe}: this run has another recipe ({'; '.join(changes)}); "
                    "give the old values, or a new --out"
                )
        elif foreign := sorted(
            entry.name for entry in self.path.iterdir() if entry.name not in (".lock", "STOP", "logs")
        ):
            raise UserError(
                f"--out {self.path}: holds {foreign[0]!r} but no recipe.json: not a run folder; choose another"
            )
        write_json(self.recipe, identity)
        self.clear_stop_file()  # one that an earlier start left is not meant for this one
        old = self.command.read_text(encoding="utf-8") if self.command.exists() else ""
        with atomic_path(self.command) as temporary:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}\n"
            temporary.write_text(old + line, encoding="utf-8")
        if not self.codes.exists():
            table.save(self.codes)
        if not self.tokenizer.exists():
            with atomic_folder(self.tokenizer) as temporary:
                tokenizer.save(temporary)

    def micro_batch_size(self) -> int | None:
        """Return the micro-batch size of the run that lies here; None without one."""
        try:
            value = read_json(self.recipe).get("micro_batch_size")
        except (UserError, AttributeError):  # nothing there, or damaged: `claim` will say so
            return None
        return value if isinstance(value, int) and value > 0 else None

    def record_failure(self, failure: Failure) -> None:
        """Write failure.json and the last line of train.log; errors here are ignored, so as not to hide the failure."""
        with contextlib.suppress(OSError, UserError):
            if self.recipe.exists() and not self.failure.exists():
                write_json(self.failure, dataclasses.asdict(failure))
                with open(self.log, "a", encoding="utf-8") as stream:
                    stream.write(f"{failure.time} {failure.line()}\n")

    def clear_stop_file(self) -> None:
        """Remove the STOP file: it has been obeyed, or is left from an earlier start."""
        with contextlib.suppress(OSError):
            self.stop.unlink(missing_ok=True)
