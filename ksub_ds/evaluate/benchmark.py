"""The evaluation of one model on one benchmark, as a queue of jobs: what XNLI and GLUE share.

A subclass says which splits it needs, which jobs there are, how one is trained, and what the results hold.
"""

import abc
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ksub_ds.common.files import sha256_bytes, write_json
from ksub_ds.evaluate.data import tables
from ksub_ds.evaluate.data.rows import Rows, Source
from ksub_ds.evaluate.finetune.classifier import check_fit, describe, open_encoder
from ksub_ds.evaluate.finetune.encoding import Encoded, encode
from ksub_ds.evaluate.finetune.job import forget_state, train_on_ranks
from ksub_ds.evaluate.finetune.loop import FineTuning
from ksub_ds.evaluate.queue.queue import Job, Queue
from ksub_ds.evaluate.queue.worker import Plan


class EvaluationPlan(Plan):
    """The queue of one model's evaluation.

    Args:
        settings: checked.
        model: one of settings.model.
        folder: where its results go.

    Raises:
        UserError: data, model or tokenizer cannot be used; other settings are in the folder.
    """

    kind: ClassVar[str]  # "xnli" or "glue", as in `ksub evaluate` and plans.KINDS

    def __init__(self, settings: Any, model: str, folder: Path):
        self.settings, self.model, self.folder = settings, model, folder
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
        self.queue = Queue(folder, identity, self.make_jobs())
        self._encoded: dict[tuple[str, str], Encoded] = {}

    # ---------------------------------------------------------------- what a benchmark says of itself

    @abc.abstractmethod
    def find_splits(self) -> list[tuple[str, str]]:
        """(language or task, split) of all files that are used; what lacks is named, or refused."""

    def setting_values(self) -> dict[str, Any]:
        """The settings as results.json shows them."""
        values: dict[str, Any] = self.settings.identity()
        return values

    @abc.abstractmethod
    def make_jobs(self) -> list[Job]:
        """All jobs, those that others wait for first."""

    @abc.abstractmethod
    def read(self, part: str, split: str, limit: int | None) -> Rows:
        """The first `limit` rows of a split."""

    @abc.abstractmethod
    def train(self, job: Job, check: Callable[[], None], several_ranks: bool = False) -> dict[str, Any]:
        """Do a fine-tuning job in this process, which may be one of several ranks; returns its result."""

    # ---------------------------------------------------------------- what they share

    def encoded(self, part: str, split: str) -> Encoded:
        """A split of a language or task, tokenised."""
        if (part, split) not in self._encoded:
            settings = self.settings
            limit = settings.max_train_examples if split == "train" else settings.max_test_examples
            rows = self.read(part, split, limit)
            self._encoded[part, split] = encode(rows, self.encoder, settings.max_length, settings.cache)
        return self._encoded[part, split]

    def tuning(self, learning_rate: float, batch_size: int, seed: int, regression: bool = False) -> FineTuning:
        """How a classifier is trained, by these settings."""
        settings = self.settings
        return FineTuning(
            settings.epochs,
            batch_size,
            learning_rate,
            seed,
            regression=regression,
            warmup_ratio=settings.warmup_ratio,
            weight_decay=settings.weight_decay,
            gradient_clipping=settings.gradient_clipping,
            precision=settings.precision,
            save_every_steps=settings.save_every_steps,
        )

    def run(self, jobs: list[Job], still_ours: Callable[[], None]) -> list[dict[str, Any]]:
        """Do one fine-tuning, here or on ranks of its own."""
        (job,) = jobs
        ranks, work = self.settings.ranks_per_job, self.queue.work(job.name)
        if ranks > 1:
            settings = dataclasses.asdict(self.settings)
            settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
            task = {"plan": self.kind, "settings": settings, "model": self.model, "folder": str(self.folder)}
            result = train_on_ranks(task, job.name, work, ranks, still_ours)
        else:
            result = self.train(job, still_ours)
        return [result]

    def forget(self, job: Job) -> None:
        """As Plan."""
        forget_state(self.queue.work(job.name))

    def origin(self) -> dict[str, Any]:
        """The part of results.json that says what was evaluated, and on what."""
        tokenizer = {"path": self.settings.tokenizer or self.model, "fingerprint": self.encoder.fingerprint}
        return {"model": self.about, "tokenizer": tokenizer, "data": self.data}

    def write_results(self, results: dict[str, Any], table: str) -> None:
        """table.md, then results.json: whoever sees the latter finds all files."""
        tables.write_text(self.folder / "table.md", table)
        write_json(self.folder / "results.json", results)

    def summary(self) -> str:
        """What the command prints at the end."""
        return (self.folder / "table.md").read_text(encoding="utf-8")
