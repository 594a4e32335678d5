"""The evaluation of one model on one benchmark, as a queue of jobs: what XNLI, GLUE and classification share.

A subclass says which splits it needs, which jobs there are, how a classifier is trained, and what the results hold.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_bytes, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate import result_tables
from ksub_ds.evaluate.data.rows import Columns, Rows, RowSource
from ksub_ds.evaluate.finetune.classifier import check_fit, describe, load_trained, open_encoder
from ksub_ds.evaluate.finetune.encoding import Encoded, encode
from ksub_ds.evaluate.finetune.loop import FineTuning, Validate
from ksub_ds.evaluate.finetune.ranks import RankTask, train_on_ranks
from ksub_ds.evaluate.finetune.train_classifier import ClassifierTraining, forget_state, train_classifier
from ksub_ds.evaluate.queue.queue import Job, Queue
from ksub_ds.evaluate.queue.worker import Plan
from ksub_ds.evaluate.settings import EvaluationSettings
from ksub_ds.pretrain.builders import set_attention

Settings = TypeVar("Settings", bound=EvaluationSettings)


@dataclass(frozen=True)
class FineTuneJob(Job):
    """Fine-tune one classifier.

    Attributes:
        task: "xnli", "classify", or a task of GLUE.
    """

    task: str
    learning_rate: float
    batch_size: int
    seed: int


def _file_name(part: str, split: str) -> str:
    """Name a split of a language or task, as plan.json does; a data set of one's own has one part, without a name."""
    return f"{part} {split}".strip()


def is_test(split: str) -> bool:
    """Return whether a split plays no part in training and choosing a model."""
    return split.split("_")[0] == "test"


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
        self.source = RowSource(settings.data)
        self.encoder = open_encoder(model, settings.tokenizer)
        check_fit(model, self.encoder, settings.max_length)
        splits = self.find_splits()
        self.about = describe(model)
        self.prints = {each: self.source.fingerprint(*each) for each in [*splits, *self.find_unscored()]}
        self.data = {"path": settings.data, "fingerprint": self._joint_fingerprint(splits)}
        self.values = self.setting_values()
        trained_on = [each for each in splits if not is_test(each[1])]
        self._encoded: dict[tuple[str, str], Encoded] = {}
        self._trained: tuple[str, Any] | None = None
        identity = {
            "kind": self.kind,
            "settings": self.values,
            "model": self.about["fingerprint"],
            "tokenizer": self.encoder.fingerprint,
        }
        # what a fine-tuning depends on: a test set that changes leaves the trained models as they are
        self.identity = sha256_bytes(repr(identity | {"data": self._joint_fingerprint(trained_on)}).encode())
        self._first_tests: dict[str, str] = {}
        self.queue = self._join(identity, {_file_name(*each): self.prints[each][:16] for each in trained_on})

    def _join(self, identity: dict[str, Any], training: dict[str, str]) -> Queue:
        """Begin the queue, or join that of the folder, once all files that it does not know are checked.

        Raises:
            UserError: a bad row, or the folder holds another evaluation.
        """
        recorded = Queue.recorded(self.folder)
        if all(recorded.get(key) == value for key, value in identity.items()):
            self._refuse_other_training(recorded.get("training"), training)
        tests = {_file_name(*each): value for each, value in self.prints.items() if is_test(each[1])}
        before = recorded.get("tests")
        self._first_tests = tests | (before if isinstance(before, dict) else {})
        files = self._joint_fingerprint(list(self.prints))
        notes = {"data": self.data["fingerprint"], "tests": self._first_tests, "checked": files}
        if recorded and "training" not in recorded:  # an earlier version's, which told the files only all together
            alike = all(recorded.get(key) == value for key, value in identity.items())
            if alike and recorded.get("data") != self.data["fingerprint"]:
                raise UserError(
                    f"--out {self.folder}: a file of --data {self.settings.data} has changed since, and the earlier "
                    "version that made this folder did not list which files its models were trained on; give a new "
                    "--out"
                )
            identity = identity | {"data": notes.pop("data")}
            notes["training"] = training
        else:
            identity = identity | {"training": training}
        if recorded.get("checked") != files:
            self.check_rows()
        queue = Queue.join(self.folder, self.make_jobs(), identity, notes)
        changed = [name for name, value in tests.items() if self._first_tests[name] != value]
        if changed:
            get_logger().info(
                f"{self.folder}: {', '.join(changed)}: another file than at first; it is scored with the models "
                "trained before"
            )
        return queue

    def _refuse_other_training(self, before: Any, now: dict[str, str]) -> None:
        """Refuse other files than those that the models of this folder were trained on.

        Raises:
            UserError: some have changed, each named.
        """
        known = before if isinstance(before, dict) else {}
        changed = [
            self.source.name(*each)
            for each in self.prints
            if (name := _file_name(*each)) in known and name in now and known[name] != now[name]
        ]
        if changed:
            have, files = ("has", "file") if len(changed) == 1 else ("have", "files")
            raise UserError(
                f"--out {self.folder}: {', '.join(changed)} {have} changed since models were trained there; give the "
                f"old {files}, or a new --out"
            )

    def _joint_fingerprint(self, splits: list[tuple[str, str]]) -> str:
        lines = [f"{part} {split} {self.prints[part, split]}" for part, split in splits]
        return sha256_bytes("\n".join(lines).encode())

    def test_suffix(self, *tests: tuple[str, str]) -> str:
        """Return what the name of a job on test sets ends in: nothing, unless a file has changed since the first."""
        now = {_file_name(*each): self.prints[each] for each in tests}
        if all(self._first_tests[name] == value for name, value in now.items()):
            return ""
        return f"-{sha256_bytes(' '.join(now.values()).encode())[:8]}"

    def check_rows(self) -> None:
        """Read every row that will be used: what is wrong with one is told before anything is trained.

        Raises:
            UserError: a bad row, or a test set without a label where there must be one.
        """
        for part, split in self.prints:
            limit = self.settings.max_train_examples if split == "train" else self.settings.max_test_examples
            rows = self.read(part, split, limit)
            labelled = rows.labelled()
            if labelled == len(rows):
                continue
            if not labelled:
                self.accept_unlabelled(rows)
            get_logger().info(
                f"{rows.name}: {len(rows) - labelled:,} of {len(rows):,} rows are unlabelled ({rows.without}): "
                "they are not scored"
            )

    def accept_unlabelled(self, rows: Rows) -> None:
        """Refuse a test set without any label, where nothing could be said of it.

        Raises:
            UserError: always, unless a benchmark writes predictions.
        """
        raise UserError(f"{rows.name}: no row has a label ({rows.without}); there is nothing to score")

    # ---------------------------------------------------------------- what a benchmark defines

    @abc.abstractmethod
    def find_splits(self) -> list[tuple[str, str]]:
        """Return (language or task, split) of all files that give scores; what is missing is logged, or refused."""

    def find_unscored(self) -> list[tuple[str, str]]:
        """Return (language or task, split) of test sets that are only predicted."""
        return []

    @abc.abstractmethod
    def columns(self, part: str) -> Columns:
        """Return what a row of a language or task holds."""

    def setting_values(self) -> dict[str, Any]:
        """Return the settings as results.json shows them."""
        return self.settings.identity()

    @abc.abstractmethod
    def make_jobs(self) -> list[Job]:
        """Return all jobs, those that others wait for first."""

    def read(self, part: str, split: str, limit: int | None) -> Rows:
        """Read rows of a split; those of a test set may be unlabelled.

        Args:
            part: language or task.
            split: of its rows.
            limit: the first so many; None for all.

        Raises:
            UserError: as `RowSource.read`.
        """
        return self.source.read(part, split, self.columns(part), limit, unlabelled=is_test(split))

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

    def trained(self, name: str) -> Any:
        """Return the model that a fine-tuning job has left, on this worker's device; the last one is kept in memory.

        Raises:
            UserError: it left none.
        """
        if self._trained is None or self._trained[0] != name:
            model = load_trained(self.queue.work(name) / "model").to(distributed.device())
            set_attention(model, self.settings.attention)
            self._trained = name, model
        return self._trained[1]

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

    def classifier_training(
        self,
        job: FineTuneJob,
        num_labels: int,
        train: Encoded,
        validate: Validate,
        regression: bool = False,
    ) -> ClassifierTraining:
        """Return what a job trains, from the pretrained model; its own is left in WORK/model.

        Args:
            job: the fine-tuning.
            num_labels: outputs.
            train: the rows.
            validate: (model, check) -> scores of an epoch, with "score"; it calls check every few batches.
            regression: one output that is a number.
        """
        return ClassifierTraining(
            self.model,
            None,
            num_labels,
            train,
            validate,
            self.queue.work(job.name),
            self.identity,
            self.encoder,
            self._tuning(job, regression),
            keep_model=True,
            attention=self.settings.attention,
            freeze_embedding=self.settings.freeze_embedding,
        )

    def _tuning(self, job: FineTuneJob, regression: bool) -> FineTuning:
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
