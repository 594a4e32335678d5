"""The run folder: its files, its lock, and whether a start continues the run that lies there, or extends it.

    RUN/recipe.json          the resolved recipe and the identity of codes and data; written first
        command.txt          every command that started or continued the run
        codes.safetensors    copy of the codes (the plain model's too)
        warm_start/          copy of the model that a warm start began with
        tokenizer/           copy of the tokenizer
        metrics.jsonl        one line per optimizer step     evaluation.jsonl   one per evaluation
        train.log            what the terminal showed        tensorboard/
        checkpoints/global_step{N}/                          (checkpoint.py)
        ends/step{N}/        a run folder too: the run as it was at step N, where an extension left its course
        LATEST               name of the newest checkpoint, for people: a continuation looks for itself
        STOP                 touch it, and the run saves and ends at the next step (`echo requeue > STOP`: with code 75)
        failure.json         why the last start ended before its time, if it did; not of one that was refused

All methods that write run on rank 0 only (`distributed.on_main`).
"""

import contextlib
import dataclasses
import itertools
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import USER_ERROR
from ksub_ds.common.files import TEMPORARY_SUFFIX, atomic_folder, atomic_path, read_json, write_json
from ksub_ds.common.lock import try_lock
from ksub_ds.common.logging import read_lines
from ksub_ds.common.watchdog import Failure
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.pretrain import checkpoint
from ksub_ds.pretrain.recipe import PLAN_KEYS, changed_keys, from_json, read_recipe
from ksub_ds.pretrain.schedule import TrainingPlan

PLANS = "plans"  # key of recipe.json, once a run was extended: from which step on it trained under which plan


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
        self.checkpoints = self.path / checkpoint.FOLDER
        self.ends = self.path / "ends"
        self.stop = self.path / "STOP"
        self.failure = self.path / "failure.json"
        self._lock: int | None = None
        self._made: list[Path] = []  # by `lock`: the file, then folders from the inside out

    def lock(self) -> None:
        """Make the folder and lock it until `unlock` or the end of the process, however it ends.

        Raises:
            UserError: another run holds it, it cannot be written, or a file of a run is a folder there.
        """
        self._check_kinds()
        while (descriptor := self._open_lock()) is None:
            pass  # another start, which was refused, has just removed the file
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock = descriptor

    def _check_kinds(self) -> None:
        """Refuse a folder in the place of a file, and a file in that of a folder.

        Raises:
            UserError: it is named.
        """
        files = (self.recipe, self.command, self.codes, self.metrics, self.evaluation, self.log, self.failure)
        folders = (self.tokenizer, self.warm_start, self.tensorboard, self.checkpoints, self.ends)
        for path in (*files, *folders):
            if path.exists() and path.is_dir() != (path in folders):
                raise UserError(
                    f"{path}: is not a {'folder' if path in folders else 'file'}, as in a run; move it away"
                )

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

        Where no step was trained yet, as after a mistake in an option, another recipe takes the folder over.

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
            if self._is_trained():
                self._refuse_changes(before, identity | {PLANS: before.get(PLANS)})
                identity = identity | {key: before[key] for key in (PLANS,) if key in before}
        elif foreign := sorted(
            entry.name for entry in self.path.iterdir() if entry.name not in (".lock", "STOP", "logs")
        ):
            raise UserError(
                f"--out {self.path}: holds {foreign[0]!r} but no recipe.json: not a run folder; choose another"
            )
        self.failure.unlink(missing_ok=True)
        write_json(self.recipe, identity)
        self.clear_stop_file()  # one that an earlier start left is not meant for this one
        old = self.command.read_text(encoding="utf-8", errors="replace") if self.command.exists() else ""
        with atomic_path(self.command) as temporary:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}\n"
            temporary.write_text(old + line, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8
        if not _holds(self.codes, lambda path: CodeTable.load(path).sha256 == table.sha256):
            table.save(self.codes)
        if not _holds(self.tokenizer, lambda path: load_tokenizer(path).fingerprint == tokenizer.fingerprint):
            with atomic_folder(self.tokenizer) as temporary:
                tokenizer.save(temporary)

    def _is_trained(self) -> bool:
        """Return whether a step of the run here was trained, or a checkpoint lies here."""
        return bool(read_lines(self.metrics)) or self.checkpoints.exists()

    def _refuse_changes(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Refuse to go on under another recipe.

        Raises:
            UserError: there are changes that are not allowed, each named.
        """
        changes = changed_keys(before, after)
        if changes:
            keys = {change.partition(":")[0] for change in changes}
            plan_only = not keys.isdisjoint(PLAN_KEYS) and keys <= {*PLAN_KEYS, "warmup_steps"}
            goes_on = plan_only and after["max_steps"] > before["max_steps"]
            others = ", --extend to go on to another last step," if goes_on else ","
            raise UserError(
                f"{self.recipe}: this run has another recipe ({'; '.join(changes)}); "
                f"give the old values{others} or a new --out"
            )

    def extend(self, identity: dict[str, Any]) -> str | None:
        """Give the run here the plan of another recipe, and have it continue where both plans have trained the same.

        A kill at any point leaves a run that the same command extends, once.

        Args:
            identity: as in `claim`; only the plan may differ from the run's.

        Returns:
            What has changed, in a line; None where the run has this plan already.

        Raises:
            UserError: another recipe, a damaged one, or a plan that does not go on from what is trained.
        """
        recipe, before = read_recipe(self.recipe)
        old, new = recipe.plan(), from_json(identity, self.recipe).plan()
        rest = {key: value for key, value in before.items() if key not in PLAN_KEYS}
        planned = {key: identity[key] for key in PLAN_KEYS if key in identity}
        self._refuse_changes(rest | planned, identity | {PLANS: before.get(PLANS)})
        if new == old:
            return None
        history = before.get(PLANS, [{"from_step": 0} | old.changeable()])
        if not (isinstance(history, list) and history and all(map(_is_plan, history))):
            raise UserError(
                f"{self.recipe}: {PLANS} {str(history)[:80]}: is not the history of a run; restore the file"
            )
        if any(each == each | new.changeable() for each in history):
            raise UserError(
                f"--extend: {self.recipe} had this plan once and was extended since, to {old.max_steps:,} steps; "
                f"give --max-steps {old.max_steps} to continue, or another plan"
            )
        newest = checkpoint.find_start(self.checkpoints)
        done = checkpoint.step_of(newest) if newest else 0
        start = self._go_back(old, new, done, history[-1]["from_step"])
        told = [f"extended: {old.max_steps:,} -> {new.max_steps:,} steps; goes on from step {start:,}"]
        if newest is not None and done > min(old.steady_until, new.steady_until):
            if start < done:
                told.append("the rate came down from there on")
            else:
                told.append(
                    f"the learning rate goes from {old.rate(done):.3g} to {new.rate(done + 1):.3g} in one step: not "
                    f"what a run of {new.max_steps:,} steps would have trained (only --schedule wsd goes on like that)"
                )
            told.append(f"the run as it was at step {done:,} lies in {self._set_aside(newest)}")
        self._drop_checkpoints_after(start)
        history = [*history, {"from_step": start} | new.changeable()]
        write_json(self.recipe, rest | planned | {PLANS: history})
        return "; ".join(told)

    def _go_back(self, old: TrainingPlan, new: TrainingPlan, done: int, planned_from: int) -> int:
        """Return the step to go on from: under wsd the last one that both plans train alike, else the last one done.

        Args:
            old: the plan of the run.
            new: the one to come.
            done: the step of the newest checkpoint.
            planned_from: the step from which on the run trained under `old`.

        Raises:
            UserError: there is no such step, or the new plan ends or comes down before it.
        """
        start = done
        if old.schedule == new.schedule == "wsd" and done > old.steady_until:
            steady = checkpoint.newest_complete(self.checkpoints, quiet=True, up_to=old.steady_until)
            start = checkpoint.step_of(steady) if steady else -1
            if start < planned_from:
                raise UserError(
                    f"--extend: the rate of this run came down after step {old.steady_until:,}, and {self.checkpoints} "
                    f"holds no whole checkpoint before; give --schedule linear to go on from step {done:,} all the same"
                )
        if new.max_steps <= start:
            raise UserError(f"--extend --max-steps {new.max_steps}: {start:,} steps are done; give more")
        if new.schedule == "wsd" and new.steady_until < start:
            raise UserError(
                f"--extend --decay-steps {new.decay_steps}: the decay to step {new.max_steps:,} would begin after step "
                f"{new.steady_until:,}, but {start:,} are done; give --decay-steps "
                f"{new.max_steps - start} or --max-steps {start + new.decay_steps}"
            )
        return start

    def _drop_checkpoints_after(self, start: int) -> None:
        """Remove checkpoints that are not the run's any more. The newest goes last: a kill leaves it to be found."""
        later = [path for path in checkpoint.checkpoints(self.checkpoints) if checkpoint.step_of(path) > start]
        for path in reversed(later):
            shutil.rmtree(path)
        if later:
            checkpoint.name_latest(self.checkpoints, start)

    def _set_aside(self, newest: Path) -> Path:
        """Keep the run as it is, with its newest checkpoint, as a run folder of its own; return it."""
        for number in itertools.count(1):
            target = self.ends / (f"step{checkpoint.step_of(newest)}" + (f"-{number}" if number > 1 else ""))
            there = target / checkpoint.FOLDER / newest.name / checkpoint.MANIFEST
            if not target.exists():
                break
            if there.exists() and there.read_bytes() == (newest / checkpoint.MANIFEST).read_bytes():
                return target
        for leftover in self.ends.glob(f".*{TEMPORARY_SUFFIX}"):  # of a start that was killed here
            shutil.rmtree(leftover)
        with atomic_folder(target) as temporary:
            for path in (self.recipe, self.command, self.codes, self.metrics, self.evaluation, self.log):
                if path.exists():
                    shutil.copyfile(path, temporary / path.name)
            for path in (self.tokenizer, self.warm_start, newest):
                if path.exists():
                    place = temporary / path.relative_to(self.path)
                    shutil.copytree(path, place, copy_function=_link_or_copy)
        return target

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

    def record_early_failure(self, failure: Failure) -> None:
        """Record the failure of a start that did not come to `claim`; one that is refused leaves the run as it was."""
        if failure.exit_code == USER_ERROR:
            return
        with contextlib.suppress(OSError, UserError):
            if self.failure.exists() and read_json(self.failure) != dataclasses.asdict(failure):
                self.failure.unlink()  # an earlier start's
        self.record_failure(failure)

    def clear_stop_file(self) -> None:
        """Remove the STOP file: it has been obeyed, or is left from an earlier start."""
        with contextlib.suppress(OSError):
            self.stop.unlink(missing_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    """Give a file that is never changed a second name, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _holds(path: Path, is_same: Callable[[Path], bool]) -> bool:
    """Return whether a copy in the run is there, whole, and of the same content."""
    try:
        return path.exists() and is_same(path)
    except UserError:
        return False


def _is_plan(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), int) for key in ("from_step", "max_steps"))
