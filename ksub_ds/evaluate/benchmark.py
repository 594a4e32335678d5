"""The evaluation of one model on one benchmark, as a queue of jobs: what XNLI and GLUE share.

A subclass says which splits it needs, which jobs there are, how a classifier is trained, and what the results hold.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ksub_ds.common.files import sha256_bytes, write_json
from ksub_ds.evaluate import result_tables
from ksub_ds.evaluate.data.rows import Rows, Source
from ksub_ds.evaluate.finetune.classifier import check_fit, describe, open_encoder
from ksub_ds.evaluate.finetune.encoding import Encoded, encode
from ksub_ds.evaluate.finetune.loop import FineTuning
from ksub_ds.evaluate.finetune.ranks import RankTask, train_on_ranks
from ksub_ds.evaluate.finetune.train_classifier import ClassifierTraining, forget_state, train_classifier
from ksub_ds.evaluate.queue.queue import Job, Queue
from ksub_ds.evaluate.queue.worker import Plan
from ksub_ds.evaluate.settings import EvaluationSettings

Settings = TypeVar("Settings", bound=EvaluationSettings)


@dataclass(frozen=True)
class FineTuneJob(Job):
    """Fine-tune one classifier.

    Attributes:
        task: "xnli", or a task of GLUE.
    """

    task: str
    learning_rate: float
    batch_size: int
    seed: int


class BenchmarkPlan(Plan, Generic[Settings]):
    """The queue of one model's evaluation.

    Args:
        settings: checked.
        model: one of settings.model.
        folder: where its results go.

    Raises:
        UserError: data, model or tokenizer cannot be used; other settings are in the folder.
    """

    kind: ClassVar[str]  # as in `ksub evaluate KIND`

    def __init__(self, settings: Settings, model: str, folder: Path):
        assert settings.epochs is not None and settings.precision is not None, "settings.checked() fills them in"
        self.settings, self.model, self.folder = settings, model, folder
        self.epochs, self.precision = settings.epochs, settings.precision
        self.source = Source(settings.data)
        self.encoder = open_encoder(model, settings.tokenizer)
        check_fit(model, self.encoder, settings.max_length)
        splits = self.find_splits()
        self.about = describe(model)
        prints = [f"{part} {split} {self.source.fingerprint(part, split)}" for part, split in splits]
        self.data = {"path": settings.data, "fingerprint": sha256_bytes("\n".join(prints).encode())}
        self.values = self.setting_values()
        identity = {
            "kind": self.kind,
            "settings": self.values,
            "model": self.about["fingerprint"],
            "tokenizer": self.encoder.fingerprint,
            "data": self.data["fingerprint"],
        }
        self.identity = sha256_bytes(repr(identity).encode())
        self.queue = Queue.join(folder, self.make_jobs(), identity)
        self._encoded: dict[tuple[str, str], Encoded] = {}

    # ---------------------------------------------------------------- what a benchmark defines

    @abc.abstractmethod
    def find_splits(self) -> list[tuple[str, str]]:
        """Return (language or task, split) of all files that are used; what is missing is logged, or refused."""

    def setting_values(self) -> dict[str, Any]:
        """Return the settings as results.json shows them."""
        return self.settings.identity()

    @abc.abstractmethod
    def make_jobs(self) -> list[Job]:
        """Return all jobs, those that others wait for first."""

    @abc.abstractmethod
    def read(self, part: str, split: str, limit: int | None) -> Rows:
        """Read the first `limit` rows of a split of a language or task."""

    @abc.abstractmethod
    def training(self, job: FineTuneJob) -> ClassifierTraining:
        """Return what a fine-tuning job trains."""

    # ---------------------------------------------------------------- jobs

    def run(self, jobs: Sequence[Job], check_lease: Callable[[], None]) -> list[dict[str, Any]]:
        """Do fine-tuning jobs, which come one at a time."""
        return [self.finetune(self.finetune_job(job.name), check_lease) for job in jobs]

    def finetune_job(self, name: str) -> FineTuneJob:
        """Return the fine-tuning job of this name."""
        job = self.queue.jobs[name]
        assert isinstance(job, FineTuneJob), f"{name} trains nothing"
        return job

    def finetune(self, job: FineTuneJob, check_lease: Callable[[], None]) -> dict[str, Any]:
        """Fine-tune in this process, or in `ranks_per_job` processes of their own."""
        settings, work = self.settings, self.queue.work(job.name)
        if settings.ranks_per_job == 1:
            return train_classifier(self.training(job), check_lease)
        task = RankTask(self.kind, settings.as_json(), self.model, str(self.folder), job.name)
        return train_on_ranks(task, work, settings.ranks_per_job, check_lease)

    def forget(self, job: Job) -> None:
        """Remove the state of a fine-tuning whose result is published."""
        forget_state(self.queue.work(job.name))

    def encoded(self, part: str, split: str) -> Encoded:
        """Return a split of a language or task, tokenised."""
        if (part, split) not in self._encoded:
            settings = self.settings
            limit = settings.max_train_examples if split == "train" else settings.max_test_examples
            rows = self.read(part, split, limit)
            self._encoded[part, split] = encode(rows, self.encoder, settings.max_length, settings.cache)
        return self._encoded[part, split]

    def tuning(self, job: FineTuneJob, regression: bool = False) -> FineTuning:
        """Return how the classifier of a job is trained."""
        settings = self.settings
        return FineTuning(
            self.epochs,
            job.batch_size,
            job.learning_rate,
            job.seed,
            regression=regression,
            warmup_ratio=settings.warmup_ratio,
            weight_decay=settings.weight_decay,
            gradient_clipping=settings.gradient_clipping,
            precision=self.precision,
            save_every_steps=settings.save_every_steps,
        )

    # ---------------------------------------------------------------- results

    def origin(self) -> dict[str, Any]:
        """Return the part of results.json that says what was evaluated, and on what."""
        tokenizer = {"path": self.settings.tokenizer or self.model, "fingerprint": self.encoder.fingerprint}
        return {"model": self.about, "tokenizer": tokenizer, "data": self.data}

    def write_results(self, results: dict[str, Any], table: str) -> None:
        """Write table.md, then results.json: whoever sees the latter finds all files."""
        result_tables.write_text(self.folder / "table.md", table)
        write_json(self.folder / "results.json", results)

    def summary(self) -> str:
        """Return what the command prints at the end."""
        return (self.folder / "table.md").read_text(encoding="utf-8")
