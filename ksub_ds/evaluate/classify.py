"""A data set of one's own: texts, or pairs of texts, and the name of a class.

    ksub evaluate classify --model model --data reviews --columns text --label stars --out results

The folder holds train, validation and, if there is one, test. One fine-tuning a seed, then its test. Scores are
accuracy, which chooses the epoch, and the mean F1 of the classes that occur. A test set without labels is answered,
not scored.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import write_json
from ksub_ds.evaluate import result_tables
from ksub_ds.evaluate.benchmark import BenchmarkPlan, FineTuneJob
from ksub_ds.evaluate.data import metrics
from ksub_ds.evaluate.data.row_files import seen_in
from ksub_ds.evaluate.data.rows import Columns, Rows
from ksub_ds.evaluate.finetune.encoding import Encoded
from ksub_ds.evaluate.finetune.scoring import predict
from ksub_ds.evaluate.finetune.train_classifier import ClassifierTraining
from ksub_ds.evaluate.queue.queue import Job
from ksub_ds.evaluate.settings import ClassifySettings

METRICS = ("accuracy", "macro_f1")
PART = ""  # the folder itself: it is not divided into languages or tasks


@dataclass(frozen=True)
class DataSetTestJob(Job):
    """Answer the test set with the classifier of one seed."""

    seed: int


class ClassifyPlan(BenchmarkPlan[ClassifySettings]):
    """The queue of one model's evaluation on a data set; arguments and errors as BenchmarkPlan's."""

    kind = "classify"

    def find_splits(self) -> list[tuple[str, str]]:
        """Return the splits that are there, and find out what the classes are.

        Raises:
            UserError: no training or validation set, or no classes in the label's column.
        """
        settings = self.settings
        assert self.source.folder is not None, "settings.checked() refuses others"
        for split in ("train", "validation"):
            if not self.source.has(PART, split):
                raise UserError(
                    f"--data {settings.data}: has no {split} set ({split}.jsonl, .csv, .tsv or .parquet); "
                    f"{seen_in(self.source.folder)}"
                )
        self.splits = ["train", "validation", *(["test"] if self.source.has(PART, "test") else [])]
        classes, self.ordered = settings.classes, True
        if not classes:
            classes, self.ordered = self.source.classes(PART, "train", settings.label)
        given = dict(entry.rsplit("=", 1) for entry in settings.label_map)
        numbers = [name for name in classes if name.isdecimal() and name not in (*given, *given.values())]
        if numbers and any(name.isdecimal() for name in given):
            raise UserError(f"--label-map: does not say what {numbers[0]} stands for, as it does of other numbers")
        self.classes = tuple(dict.fromkeys(given.get(name, name) for name in classes))
        unknown = [name for name in given.values() if name not in self.classes]
        if unknown:
            raise UserError(f"--label-map: no class is called {unknown[0]!r}; {', '.join(self.classes[:10])} are")
        return [(PART, split) for split in self.splits]

    def columns(self, part: str) -> Columns:
        """Return what a row holds."""
        first, *second = self.settings.columns
        second_text = second[0] if second else None
        columns = Columns(first, second_text, self.classes, (), self.settings.label, ordered=self.ordered)
        return columns.mapped(self.settings.label_map)

    def accept_unlabelled(self, rows: Rows) -> None:
        """Accept a test set without labels: it is answered."""

    def make_jobs(self) -> list[Job]:
        """Return a fine-tuning for each seed, and its test."""
        jobs: list[Job] = []
        for seed in self.settings.seeds:
            name, rate, size = _training_name(seed), self.settings.learning_rate, self.settings.batch_size
            jobs.append(FineTuneJob(name, (), name, self.kind, rate, size, seed))
            if "test" in self.splits:
                jobs.append(DataSetTestJob(self._test_name(seed), (name,), self._test_name(seed), seed))
        return jobs

    def _answers(self, seed: int, count: int) -> np.ndarray:
        """Return what a seed answered to each of the `count` test rows, as numbers of classes.

        Raises:
            UserError: the file of the answers is damaged.
        """
        name = self._test_name(seed)
        answers = self.queue.result(name, "answers")["answers"]
        numbers = range(len(self.classes))
        if not (isinstance(answers, list) and len(answers) == count and all(each in numbers for each in answers)):
            raise self.queue.damaged(name)
        return np.array(answers, dtype=np.int64)

    def _test_name(self, seed: int) -> str:
        return f"test-seed{seed}{self.test_suffix((PART, 'test'))}"

    # ---------------------------------------------------------------- work

    def run(self, jobs: Sequence[Job], check_lease: Callable[[], None]) -> list[dict[str, Any]]:
        """Do a fine-tuning, or a test."""
        if not isinstance(jobs[0], DataSetTestJob):
            return super().run(jobs, check_lease)
        encoded = self.encoded(PART, "test")
        model = self.trained(_training_name(jobs[0].seed))
        answers = predict(model, encoded, self.precision, check_lease, "testing").argmax(axis=1)
        return [{"answers": answers.tolist()}]

    def training(self, job: FineTuneJob) -> ClassifierTraining:
        """Return what a fine-tuning trains: its model is left in WORK/model."""
        train = self.encoded(PART, "train")
        training = self.classifier_training(job, len(self.classes), train, self._validate)
        return dataclasses.replace(training, classes=self.classes)

    def _validate(self, model: Any, check: Callable[[], None]) -> dict[str, Any]:
        encoded = self.encoded(PART, "validation")
        scores = _score(predict(model, encoded, self.precision, check).argmax(axis=1), encoded)
        return {"score": scores["accuracy"], **scores}

    # ---------------------------------------------------------------- results

    def finish(self) -> None:
        """Write results.json, predictions.json and table.md."""
        seeds = self.settings.seeds
        fine = {seed: self.queue.result(_training_name(seed), "epochs", "best_epoch") for seed in seeds}
        best = [each["epochs"][each["best_epoch"] - 1] for each in fine.values()]
        scores = {"validation": {name: float(np.mean([each[name] for each in best])) for name in METRICS}}
        counts: dict[str, Any] = {"validation": {"count": best[0]["count"]}}
        if "test" in self.splits:
            encoded = self.encoded(PART, "test")
            answers = {seed: self._answers(seed, len(encoded.labels)) for seed in seeds}
            labelled = ~np.isnan(encoded.labels)
            counts["test"] = {"count": int(labelled.sum()), "unlabelled": int((~labelled).sum()), "cut": encoded.cut}
            if labelled.any():
                by_seed = [_score(each, encoded) for each in answers.values()]
                scores["test"] = {name: float(np.mean([each[name] for each in by_seed])) for name in METRICS}
                right = np.mean([each[labelled] == encoded.labels[labelled] for each in answers.values()], axis=0)
                counts["test"]["interval"] = list(metrics.bootstrap_intervals({"test": right})["test"])
                if len(seeds) > 1:
                    counts["test"]["deviation"] = float(np.std([each["accuracy"] for each in by_seed], ddof=1))
            names = np.array([*self.classes, None], dtype=object)
            gold = np.where(labelled, encoded.labels, len(self.classes)).astype(np.int64)
            predictions = {str(seed): names[each].tolist() for seed, each in answers.items()}
            write_json(self.folder / "predictions.json", {"labels": names[gold].tolist(), "predictions": predictions})
        results = {
            "task": self.kind,
            "setting": self.kind,
            "classes": list(self.classes),
            "scores": {split: scores[split] | counts[split] for split in scores},
            "rows": counts,
            **self.origin(),
            "settings": self.values,
            "seeds": [str(seed) for seed in seeds],
            "finetuning": {str(seed): each for seed, each in fine.items()},
        }
        self.write_results(results, result_tables.classify_table([results], "markdown"))


def _training_name(seed: int) -> str:
    return f"finetune-seed{seed}"


def _score(answers: np.ndarray, encoded: Encoded) -> dict[str, Any]:
    """Return the scores of the rows that have a label."""
    labelled = ~np.isnan(encoded.labels)
    return metrics.classification(answers[labelled], encoded.labels[labelled].astype(np.int64), METRICS)
