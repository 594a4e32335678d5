"""Score each new checkpoint of a running pretraining from the outside.

    ksub evaluate watch --run run --data xnli --out curve           follows the run to its last step
    ksub evaluate watch --run run --data xnli --once --out curve    scores what is there and ends

The run is only read: a checkpoint's files are linked (or copied) to OUT before anything else, so that the run may
prune it meanwhile, and count only when all have the size and sha256 of their manifest; a half-written one is waited
for. OUT/curve.jsonl gets one line a checkpoint; OUT/xnli/global_step{N} holds the evaluation behind it. A run that went
back and trained a step anew (`ksub pretrain --extend` under wsd) has it scored anew: a line holds the sha256 of its
checkpoint's manifest.
"""

import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, read_json, sha256_file, write_json
from ksub_ds.common.lock import try_lock
from ksub_ds.common.logging import MetricsWriter, get_logger, read_lines
from ksub_ds.evaluate.data.rows import RowSource
from ksub_ds.evaluate.finetune.classifier import fingerprint
from ksub_ds.evaluate.queue.queue import Queue, check_is_free
from ksub_ds.evaluate.queue.worker import run_worker
from ksub_ds.evaluate.registry import make_plans
from ksub_ds.evaluate.settings import XnliSettings, positive_rate
from ksub_ds.model.sequence_length import limit_tokenizer

NICENESS = 10


class Curve:
    """The folder of a curve: one watcher at a time, one set of settings, a line a checkpoint.

    OUT/curve.jsonl is locked as long as this is open (`with`); OUT/watch.json says how its points are scored.

    Raises:
        UserError: OUT cannot be written, or another watcher is at work there.
    """

    def __init__(self, out: Path):
        self._out = out
        if not (out / "watch.json").exists():
            check_is_free(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error
        try:
            held = try_lock(self._lock)
        except OSError as error:
            os.close(self._lock)
            raise UserError(
                f"--out {out}: its file system cannot lock files ({error.strerror}); choose another folder"
            ) from error
        if not held:
            os.close(self._lock)
            raise UserError(f"--out {out}: another `ksub evaluate watch` is at work there")
        self._open(before_step=2**62)

    def _open(self, before_step: int) -> None:
        """Read the lines of the steps before this one, and drop the others, with a last one that a kill cut short."""
        path = self._out / "curve.jsonl"
        self._writer = MetricsWriter(path, resume_step=before_step - 1)
        self.lines = read_lines(path)

    def __enter__(self) -> "Curve":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def agree(self, settings: dict[str, Any]) -> None:
        """Keep how the points are scored; points scored otherwise, or of another run, could not be compared.

        Raises:
            UserError: the curve has other settings; the first of them is named.
        """
        path = self._out / "watch.json"
        before = read_json(path) if self.lines and path.exists() else settings
        for key, value in settings.items():
            if not isinstance(before, dict) or before.get(key) != value:
                old = before.get(key) if isinstance(before, dict) else before
                raise UserError(
                    f"--out {self._out}: holds a curve with other settings ({key}: {old} -> {value}); "
                    "give the old ones, or a new --out"
                )
        write_json(path, settings)

    @property
    def steps(self) -> set[int]:
        """The steps that are scored."""
        return {line["step"] for line in self.lines}

    def manifest_of(self, step: int) -> str | None:
        """Return the sha256 of the manifest of the checkpoint that was scored; None where the line has none."""
        return next((line.get("manifest") for line in self.lines if line["step"] == step), None)

    def drop_from(self, step: int) -> None:
        """Drop the lines of this step and those after it: the run went back and trained them anew."""
        self._writer.close()
        self._open(before_step=step)
        get_logger().info(f"step {step:,} is another one than was scored: the run has trained it anew")

    def append(self, line: dict[str, Any]) -> None:
        """Add a line; a kill can cut short only this one."""
        self._writer.write(**line)
        self.lines.append(line)
        get_logger().info(describe(line))

    def table(self) -> str:
        """Return all lines in words, by step."""
        return "\n".join(describe(line) for line in sorted(self.lines, key=lambda line: line["step"]))


def describe(line: dict[str, Any]) -> str:
    """Describe a point of the curve in one line of text."""
    from ksub_ds.pretrain.heldout_eval import accuracy_key_of

    text = f"step {line['step']:,}"
    if "loss" in line:
        key = accuracy_key_of(line)
        text += f": {key.replace('_', ' ')} {100 * line[key]:.1f} %, held-out loss {line['loss']:.3f}"
    if "bits_per_byte" in line:
        text += f", {line['bits_per_byte']:.3f} bits per byte"
    if "xnli" in line:
        text += f", XNLI average {100 * line['xnli']['average']:.1f} %"
    return text


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """Score the checkpoints of a pretraining run as they appear: held-out scores, and XNLI by a short fine-tune."""

    run: Path
    """Run folder of `ksub pretrain`; nothing in it is touched."""
    out: Path
    """Folder for the curve."""
    data: str | None = None
    """XNLI's folder or name on the hub. [none: held-out scores alone]"""
    once: bool = False
    """Score the checkpoints that are there, then end."""
    setting: str = "cross-lingual"
    """cross-lingual or translate-train-all."""
    epochs: int = 1
    """Of the short fine-tune."""
    max_train_examples: int = 2_000
    """Training rows (of each language)."""
    max_test_examples: int = 500
    """Validation and test rows of each language."""
    learning_rate: float = 5e-5
    """Of the short fine-tune: higher than Table 6's, because it is short."""
    eval_sequences: int = 32
    """Held-out sequences per language."""
    poll_seconds: float = 30.0
    """Look for new checkpoints every so many seconds."""
    patience_seconds: float = 60.0
    """With --once: wait so long for a checkpoint that is half written."""
    use_gpu: bool = False
    """Compute on the first GPU that CUDA_VISIBLE_DEVICES leaves; by default on the CPU: the run needs the GPUs."""


def watch(settings: WatchSettings) -> None:
    """Score checkpoints until the run's last step is scored (or once).

    Raises:
        UserError: no run folder, data that cannot be used, another watcher in OUT.
    """
    from ksub_ds.pretrain.open_run import open_run

    run = open_run(settings.run)
    max_steps = run.recipe.max_steps
    if run.recipe.is_causal and settings.data is not None:
        raise UserError(f"--data {settings.data}: {settings.run} trains a causal model, which XNLI is not for")
    _check(settings)
    if not settings.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.nice(NICENESS)  # the run goes first
    with Curve(settings.out) as curve:
        curve.agree(_scored_by(settings))
        end_of_patience = time.monotonic() + settings.patience_seconds
        while True:
            waiting = _score_new(settings, run, curve)
            if settings.once and (not waiting or time.monotonic() > end_of_patience):
                if waiting:
                    get_logger().warning(f"{', '.join(waiting)}: still half written; the next call scores them")
                break
            if not settings.once and max_steps in curve.steps:
                break
            time.sleep(min(settings.poll_seconds, 1.0) if settings.once else settings.poll_seconds)
        if not curve.steps:
            raise UserError(f"{run.folder.checkpoints}: holds no whole checkpoint yet")
        print(curve.table())


def _check(settings: WatchSettings) -> None:
    """Refuse values that would fail only after a checkpoint was scored, or spoil its line of the curve.

    Raises:
        UserError: an impossible value.
    """
    for name in ("epochs", "max_train_examples", "max_test_examples", "eval_sequences"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be at least 1")
    if settings.setting not in ("cross-lingual", "translate-train-all"):
        raise UserError(f"--setting {settings.setting}: must be cross-lingual or translate-train-all")
    positive_rate("--learning-rate", settings.learning_rate)
    if not 0 < settings.poll_seconds < math.inf:
        raise UserError(f"--poll-seconds {settings.poll_seconds}: must be a number above 0")
    if not 0 <= settings.patience_seconds < math.inf:
        raise UserError(f"--patience-seconds {settings.patience_seconds}: must be a number from 0 on")
    if settings.data is not None:
        RowSource(settings.data)


def _scored_by(settings: WatchSettings) -> dict[str, Any]:
    """Return what all points of one curve must have in common."""
    keys = ("setting", "epochs", "max_train_examples", "max_test_examples", "learning_rate", "eval_sequences")
    identity = {"run": str(settings.run.resolve()), "with --data": settings.data is not None}
    return identity | {key: getattr(settings, key) for key in keys}


def _score_new(settings: WatchSettings, run: Any, curve: Curve) -> list[str]:
    """Score every whole checkpoint that is not in the curve; return the names of those that are not whole yet."""
    from ksub_ds.pretrain import checkpoint

    waiting = []
    for path in reversed(checkpoint.checkpoints(run.folder.checkpoints)):
        step = checkpoint.step_of(path)
        if step in curve.steps and not _trained_anew(path, curve.manifest_of(step)):
            continue
        copy = _take(path, settings.out / "checkpoint")
        if copy is None:
            if path.exists():  # else the run has pruned it
                waiting.append(path.name)
            continue
        if step in curve.steps:
            curve.drop_from(step)
        try:
            line = _score(settings, run, copy)
            curve.append(line | {"manifest": sha256_file(copy / checkpoint.MANIFEST)})
        finally:
            shutil.rmtree(settings.out / "checkpoint", ignore_errors=True)
    return waiting


def _trained_anew(path: Path, scored: str | None) -> bool:
    """Return whether a checkpoint is not the one that was scored; False where that cannot be known.

    Args:
        path: its folder.
        scored: sha256 of the manifest of the one that was; None in lines of an earlier version.
    """
    from ksub_ds.pretrain import checkpoint

    try:
        return scored is not None and sha256_file(path / checkpoint.MANIFEST) != scored
    except OSError:  # pruned meanwhile, or damaged
        return False


def _take(path: Path, into: Path) -> Path | None:
    """Copy a checkpoint to where the run cannot delete it; return None when it is not whole."""
    from ksub_ds.pretrain import checkpoint

    shutil.rmtree(into, ignore_errors=True)
    copy = into / path.name
    copy.mkdir(parents=True)
    try:
        for source in path.iterdir():
            try:
                os.link(source, copy / source.name)
            except OSError:  # another file system
                shutil.copyfile(source, copy / source.name)
    except FileNotFoundError:
        return None
    return copy if checkpoint.damage(copy) is None else None


def _score(settings: WatchSettings, run: Any, path: Path) -> dict[str, Any]:
    from ksub_ds.common import distributed
    from ksub_ds.pretrain.open_run import RunCheckpoint

    get_logger().info(f"scoring {path.name}")
    checkpoint = RunCheckpoint(run, path)
    model: Any = checkpoint.load_model()
    scores = _held_out_scores(settings, run, model.to(distributed.device()))
    line: dict[str, Any] = {"step": checkpoint.step, **scores}
    if settings.data is not None:
        exported = settings.out / "model"
        with atomic_folder(exported) as temporary:
            model.to("cpu").save_pretrained(temporary)
            run.tokenizer.save(temporary)
            limit_tokenizer(temporary, model.config)
        line["xnli"] = _xnli(settings, exported, settings.out / "xnli" / path.name)
    return line


def _held_out_scores(settings: WatchSettings, run: Any, model: Any) -> dict[str, Any]:
    """Return loss and accuracy on the run's held-out rows, per language; nothing where the shards are gone."""
    from ksub_ds.corpus.batches import HeldOutBatches
    from ksub_ds.corpus.shards.dataset import ShardDataset
    from ksub_ds.pretrain.heldout_eval import evaluate

    recipe = run.recipe
    try:
        dataset = ShardDataset.open(recipe.data, verify=False)
    except UserError as error:
        get_logger().warning(f"no held-out scores: {error}")
        return {}
    held_out = HeldOutBatches(dataset, settings.eval_sequences, recipe.masked_share, 8)
    if not len(held_out):
        return {}
    return evaluate(model, held_out, dataset.languages, run.tokenizer)


def _xnli(settings: WatchSettings, model: Path, out: Path) -> dict[str, Any]:
    assert settings.data is not None
    now = fingerprint(str(model))
    if Queue.recorded(out).get("model", now) != now:  # of a checkpoint that was trained anew
        shutil.rmtree(out)
    plans = make_plans(
        XnliSettings(
            model=(str(model),),
            data=settings.data,
            out=out,
            setting=settings.setting,  # type: ignore[arg-type]  # one of the two, by _check
            epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            max_train_examples=settings.max_train_examples,
            max_test_examples=settings.max_test_examples,
        )
    )
    run_worker(plans)
    shutil.rmtree(out / "work", ignore_errors=True)  # a model per checkpoint would fill the disk
    results = read_json(out / "results.json")
    accuracy = {language: scores["accuracy"] for language, scores in results["test"].items()}
    return {"average": results["average"], "accuracy": accuracy}
