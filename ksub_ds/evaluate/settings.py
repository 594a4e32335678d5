"""The settings of `ksub evaluate xnli`, `glue` and `classify`; defaults are the paper's Table 6 where it has one."""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.option_help import Section
from ksub_ds.evaluate.data.tasks import CROSS_LINGUAL, GLUE_TASKS, LANGUAGES, NLI_LABELS, TRANSLATE_TRAIN_ALL

XNLI_EPOCHS, GLUE_EPOCHS = {CROSS_LINGUAL: 10, TRANSLATE_TRAIN_ALL: 5}, 10
GlueTaskName = Literal["sst2", "mnli", "qnli", "qqp", "rte", "mrpc", "cola", "stsb"]
# What may differ between the workers of one evaluation: paths, and how the work is done. Of these, ranks_per_job and
# attention touch the scores, by rounding and by drawing other dropout as another seed would; the result of each
# fine-tuning names both.
FREE_KEYS = (
    *("model", "data", "out", "tokenizer", "cache"),
    *("save_every_steps", "ranks_per_job", "attention", "keep_models", "test_predictions"),
)
# Settings that earlier versions had not: without a value they are not written, so that old results stay the same.
LATER_KEYS = ("label_map", "freeze_embedding")


def positive_rate(name: str, value: float) -> None:
    """Refuse a learning rate that makes no sense.

    Args:
        name: the option, for the message.
        value: the rate.

    Raises:
        UserError: not between 0 and 1.
    """
    if not 0 < value < 1:
        raise UserError(f"{name} {value}: must be above 0 and below 1")


PLAN = "queue/plan.json"  # in a folder of results


def folders_of(models: tuple[str, ...], out: Path) -> dict[str, Path]:
    """Return the results folder of each model: OUT, or OUT/<name> for several.

    Args:
        models: folders or names.
        out: given by --out.

    Raises:
        UserError: two models of one name; or one model's results are there and several are wanted, or the reverse.
    """
    names = [Path(model).name or model for model in models]
    of_one, of_several = out / PLAN, sorted(path.parents[1].name for path in out.glob(f"*/{PLAN}"))
    if len(models) == 1:
        if of_several and not of_one.exists():
            raise UserError(
                f"--out {out}: holds evaluations in folders ({', '.join(of_several)}), as of several models; give "
                f"--out {out / names[0]}"
            )
        return {models[0]: out}
    if of_one.exists():
        raise UserError(f"--out {out}: holds the evaluation of one model; for several give another folder")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--model: two of them are called {name!r}, and each needs a folder of its own")
    return {model: out / name for model, name in zip(models, names, strict=True)}


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What every evaluation takes."""

    model: tuple[str, ...]
    """Model folders (of `ksub export`, or any HuggingFace encoder), or names such as xlm-roberta-base. Several are
    evaluated side by side, each in a folder of --out that has its name."""
    data: str
    """Folder of the task's files, or the name of a data set on the hub."""
    out: Path
    """Folder for results, shared by all workers. The same command again, here or elsewhere, is one more worker."""
    tokenizer: str | None = None
    """Tokenizer folder, or SentencePiece .model. [the model's own]"""
    epochs: Annotated[int | None, Section("fine-tuning")] = None
    """Times the training set is seen; the epoch that is best on validation counts. [10]"""
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
    freeze_embedding: bool = False
    """Leave the tokens' embedding as it was pretrained. AdamW keeps no moments of it then, which of a large plain
    embedding take twice its own memory."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of the forward pass (weights stay fp32). [bf16 on a GPU, fp32 on a CPU]"""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """How attention is computed, by transformers' names; on a CPU in bf16 `eager` is the fastest for short rows.
    [transformers' choice]"""
    max_train_examples: Annotated[int | None, Section("amount and division of work")] = None
    """Take only so many rows of each training set. [all]"""
    max_test_examples: int | None = None
    """Score only so many rows of each validation and test set. [all]"""
    ranks_per_job: int = 1
    """Processes (GPUs) of this machine that share one fine-tuning, through DeepSpeed. Another number draws other
    dropout; the results name it."""
    save_every_steps: int = 500
    """Save the state of a fine-tuning every so many steps (and after each epoch)."""
    label_map: tuple[str, ...] = ()
    """How labels in the files are to be read, VALUE=CLASS: 0=contradiction 1=entailment 2=neutral, or oui=entailment.
    [names of the classes, in any case, or their numbers in the order of the published data]"""
    cache: Path | None = None
    """Folder for tokenised rows. [$KSUB_CACHE, else ksub_ds in the user's cache folder]"""

    def checked(self) -> Self:
        """Return these settings, with the precision filled in.

        Raises:
            UserError: an impossible value.
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
        good = bool(self.seeds) and all(0 <= seed < 2**63 for seed in self.seeds)
        if not good or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))}: give different numbers from 0 to 2^63 - 1")
        self._check_label_map()
        precision = self.precision or ("bf16" if distributed.has_gpu() else "fp32")
        return dataclasses.replace(self, precision=precision)

    def _check_label_map(self) -> None:
        """Refuse an entry that says nothing, or two that contradict each other.

        Raises:
            UserError: with the entry.
        """
        seen: set[str] = set()
        for entry in self.label_map:
            value, equals, name = entry.rpartition("=")
            if not equals or not value.strip() or not name:
                raise UserError(f"--label-map {entry}: must be VALUE=CLASS, for example 0=contradiction")
            names = self.class_names()
            if names and name not in names:
                raise UserError(f"--label-map {entry}: no class is called {name!r}; {', '.join(names)} are")
            if value in seen:
                raise UserError(f"--label-map {entry}: {value} is given twice")
            seen.add(value)

    def class_names(self) -> tuple[str, ...]:
        """Return the names that a label may have; none where only the data tells."""
        return ()

    def check_updates(self, learning_rate: float, batch_size: int) -> None:
        """Check the values of --learning-rate and --batch-size.

        Raises:
            UserError: one is not positive, or the ranks cannot share a batch.
        """
        positive_rate("--learning-rate", learning_rate)
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size}: must be at least 1")
        self.check_ranks(batch_size)

    def check_ranks(self, *batch_sizes: int) -> None:
        """Refuse more ranks than this machine has room for, or a batch that they cannot share.

        Raises:
            UserError: with both numbers.
        """
        if distributed.has_gpu():
            import torch

            places, what = torch.cuda.device_count(), "GPUs"
            most = places  # NCCL refuses two ranks on one
        else:
            places, what = len(os.sched_getaffinity(0)), "cores"
            most = max(2, places)  # two share one core well enough for a trial
        if self.ranks_per_job > most:
            raise UserError(f"--ranks-per-job {self.ranks_per_job}: this machine has {places} {what}")
        for size in batch_sizes:
            if size % max(1, self.ranks_per_job):
                raise UserError(f"--ranks-per-job {self.ranks_per_job}: does not divide the batch size {size}")

    def folders(self) -> dict[str, Path]:
        """Return the results folder of each model: OUT, or OUT/<name> for several.

        Raises:
            UserError: two models of one name.
        """
        return folders_of(self.model, self.out)

    def identity(self) -> dict[str, Any]:
        """Return all settings that touch the scores, as JSON values."""
        values = dataclasses.asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if key not in FREE_KEYS and not (key in LATER_KEYS and not value)
        }

    def as_json(self) -> dict[str, Any]:
        """Return all settings as JSON values."""
        values = dataclasses.asdict(self)
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the settings that `as_json` gave."""
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        for key in ("out", "cache"):
            given[key] = None if given[key] is None else Path(given[key])
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class XnliSettings(EvaluationSettings):
    """Fine-tune on XNLI and test 15 languages. The same command again continues, or helps as one more worker."""

    data: str
    """Folder of XNLI's files, or its name on the hub (facebook/xnli)."""
    epochs: Annotated[int | None, Section("fine-tuning")] = None
    """Times the training set is seen; the epoch that is best on validation counts. [cross-lingual: 10;
    translate-train-all: 5]"""
    setting: Annotated[Literal["cross-lingual", "translate-train-all"], Section("XNLI")]
    """Fine-tune on English only, or on the training sets of all languages at once."""
    select_on: Literal["en", "mean"] | None = None
    """Keep the epoch that is best on English validation, or on the mean of all languages with one.
    [cross-lingual: en; translate-train-all: mean]"""
    learning_rate: float = 2e-5
    """Highest learning rate."""
    batch_size: int = 32
    """Rows of one update, over all ranks."""
    languages: tuple[str, ...] = LANGUAGES
    """Train (translate-train-all) and test these only."""

    def class_names(self) -> tuple[str, ...]:
        """Return the names that a label may have."""
        return NLI_LABELS

    def checked(self) -> Self:
        """Return these settings, with precision, epochs and selection filled in and the languages in Table 4's order.

        Raises:
            UserError: an impossible value.
        """
        self.check_updates(self.learning_rate, self.batch_size)
        unknown = [language for language in self.languages if language not in LANGUAGES]
        if unknown or not self.languages:
            raise UserError(f"--languages {' '.join(unknown) or '(none)'}: XNLI's are {', '.join(LANGUAGES)}")
        ordered = tuple(language for language in LANGUAGES if language in self.languages)
        epochs = XNLI_EPOCHS[self.setting] if self.epochs is None else self.epochs
        select_on = self.select_on or ("en" if self.setting == CROSS_LINGUAL else "mean")
        return dataclasses.replace(super().checked(), epochs=epochs, languages=ordered, select_on=select_on)


@dataclass(frozen=True, kw_only=True)
class GlueSettings(EvaluationSettings):
    """Fine-tune on GLUE's tasks over a grid. The same command again continues, or helps as one more worker."""

    data: str
    """Folder of the tasks' files, or GLUE's name on the hub (nyu-mll/glue)."""
    tasks: Annotated[tuple[GlueTaskName, ...] | None, Section("GLUE")] = None
    """These only. [all that have data; the others are named]"""
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 3e-5)
    """One side of the grid."""
    batch_sizes: tuple[int, ...] = (16, 32)
    """The other side."""
    mnli_checkpoint: str | None = None
    """Fine-tuned folder that RTE, STS-B and MRPC start from. [the best of this evaluation's own MNLI]"""
    keep_models: bool = False
    """Keep the best epoch of every cell as a model folder, not only MNLI's."""
    test_predictions: bool = False
    """Answer the test sets, too, in the files that gluebenchmark.com takes: OUT/submission/*.tsv."""

    def class_names(self) -> tuple[str, ...]:
        """Return the names that a label may have in any task."""
        return tuple(dict.fromkeys(name for task in GLUE_TASKS.values() for name in task.columns.labels))

    def checked(self) -> Self:
        """Return these settings, with the precision and Table 6's 10 epochs filled in, and tasks and grid in order.

        Raises:
            UserError: an impossible value.
        """
        for rate in self.learning_rates:
            positive_rate("--learning-rates", rate)
        if not self.learning_rates or not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError("--learning-rates and --batch-sizes: give at least one of each, batch sizes from 1 on")
        self.check_ranks(*self.batch_sizes)
        if self.test_predictions and self.max_test_examples is not None:
            raise UserError("--test-predictions: the server wants every row; leave out --max-test-examples")
        if self.tasks is not None and not self.tasks:
            raise UserError(f"--tasks: give some of {' '.join(GLUE_TASKS)}")
        tasks = None if self.tasks is None else tuple(task for task in GLUE_TASKS if task in self.tasks)
        rates, sizes = tuple(sorted(set(self.learning_rates))), tuple(sorted(set(self.batch_sizes)))
        epochs = GLUE_EPOCHS if self.epochs is None else self.epochs
        return dataclasses.replace(
            super().checked(), epochs=epochs, tasks=tasks, learning_rates=rates, batch_sizes=sizes
        )


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(EvaluationSettings):
    """Fine-tune on a data set of your own: files train, validation and test (if there is one) in one folder.

    They are .jsonl, .csv, .tsv or .parquet, compressed or not. The same command again continues, or helps as one more
    worker.
    """

    data: str
    """Folder of the files train, validation and, if there is one, test."""
    label_map: tuple[str, ...] = ()
    """How labels in the files are to be read, VALUE=CLASS: 0=bad 1=good. [names of the classes, in any case, or their
    numbers]"""
    columns: Annotated[tuple[str, ...], Section("data set")]
    """The column of the text, or the two columns of a pair."""
    label: str = "label"
    """The column of the class."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, in the order of their numbers. [those that the training file holds]"""
    learning_rate: float = 2e-5
    """Highest learning rate."""
    batch_size: int = 32
    """Rows of one update, over all ranks."""

    def class_names(self) -> tuple[str, ...]:
        """Return the names that a label may have; none where the training file tells."""
        return self.classes or ()

    def checked(self) -> Self:
        """Return these settings, with precision and epochs (Table 6's 10) filled in.

        Raises:
            UserError: an impossible value.
        """
        self.check_updates(self.learning_rate, self.batch_size)
        columns = " ".join(self.columns)
        if not 1 <= len(self.columns) <= 2 or len({*self.columns, self.label}) <= len(self.columns):
            raise UserError(f"--columns {columns}: give one column of text or two, and the class by --label")
        if self.classes is not None and not 2 <= len(set(self.classes)) == len(self.classes):
            raise UserError(f"--classes {' '.join(self.classes)}: give two different names or more")
        if not Path(self.data).is_dir():
            raise UserError(f"--data {self.data}: is not a folder; give that of the files train and validation")
        epochs = GLUE_EPOCHS if self.epochs is None else self.epochs
        return dataclasses.replace(super().checked(), epochs=epochs)
