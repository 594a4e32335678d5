"""Settings that XNLI and GLUE share; Table 6 of the paper where it says something."""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError

# What may differ between the workers of one evaluation: it does not touch the scores.
FREE_KEYS = ("model", "data", "out", "tokenizer", "save_every_steps", "ranks_per_job", "cache", "keep_models")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What every evaluation takes."""

    model: tuple[str, ...]
    """Model folders (of `ksub export`, or any HuggingFace encoder), or names such as xlm-roberta-base. Several are
    evaluated side by side, each in a folder of --out that has its name."""
    data: str
    """Folder of the task's files, or the name of a data set on the hub (facebook/xnli, nyu-mll/glue)."""
    out: Path
    """Folder for results, shared by all workers. The same command again, here or elsewhere, is one more worker."""
    tokenizer: str | None = None
    """Tokenizer folder, or SentencePiece .model. [the model's own]"""
    epochs: int | None = None
    """Times the training set is seen; the epoch that is best on validation counts."""
    seeds: tuple[int, ...] = (0,)
    """One fine-tuning each: of the new head, the order of the rows and dropout."""
    max_length: int = 128
    """Tokens of a row, special ones included; the longer sentence is cut first."""
    warmup_ratio: float = 0.06
    """Part of the steps with a rising learning rate; it falls linearly after that."""
    weight_decay: float = 0.01
    """AdamW's, on matrices only."""
    gradient_clipping: float = 1.0
    """Largest gradient norm; 0 clips nothing."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of the forward pass (weights stay fp32). [bf16 on a GPU, fp32 on a CPU]"""
    max_train_examples: int | None = None
    """Take only so many training rows (of each language). [all]"""
    max_test_examples: int | None = None
    """Score only so many rows of validation and test (of each language). [all]"""
    ranks_per_job: int = 1
    """Processes (GPUs) of this machine that share one fine-tuning, through DeepSpeed."""
    save_every_steps: int = 500
    """Save the state of a fine-tuning every so many steps (and after each epoch)."""
    cache: Path | None = None
    """Folder for tokenised rows. [$KSUB_CACHE, else ksub_ds in the user's cache folder]"""

    def checked(self) -> Any:
        """These settings, with the precision filled in.

        Raises:
            UserError: a value that cannot be.
        """
        positive = ("epochs", "max_length", "ranks_per_job", "save_every_steps", "max_train_examples")
        for name in (*positive, "max_test_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.max_length < 8:
            raise UserError(f"--max-length {self.max_length}: must be at least 8")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"--warmup-ratio {self.warmup_ratio}: must be from 0 to below 1")
        for name in ("gradient_clipping", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:  # NaN is refused as well
                raise UserError(f"--{name.replace('_', '-')} {value}: must be a number from 0 on")
        if not self.model:
            raise UserError("--model: give at least one model")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))}: give different numbers from 0 on")
        self._check_ranks()
        precision = self.precision or ("bf16" if distributed.has_gpu() else "fp32")
        return dataclasses.replace(self, precision=precision)

    def _check_ranks(self) -> None:
        if distributed.has_gpu():
            import torch

            most, what = torch.cuda.device_count(), "GPUs"
        else:
            most, what = len(os.sched_getaffinity(0)), "cores"
        if self.ranks_per_job > max(2, most):  # two share one core well enough for a trial
            raise UserError(f"--ranks-per-job {self.ranks_per_job}: this machine has {most} {what}")

    def folders(self) -> dict[str, Path]:
        """The results folder of each model: OUT, or OUT/<name> for several.

        Raises:
            UserError: two models of one name.
        """
        if len(self.model) == 1:
            return {self.model[0]: self.out}
        names = [Path(model).name or model for model in self.model]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"--model: two of them are called {name!r}, and each needs a folder of its own")
        return {model: self.out / name for model, name in zip(self.model, names, strict=True)}

    def identity(self) -> dict[str, Any]:
        """All settings that touch the scores, as JSON values."""
        values = dataclasses.asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if key not in FREE_KEYS
        }


def positive_rate(name: str, value: float) -> None:
    """Refuse a learning rate that cannot be.

    Raises:
        UserError: not between 0 and 1.
    """
    if not 0 < value < 1:
        raise UserError(f"{name} {value}: must be above 0 and below 1")
