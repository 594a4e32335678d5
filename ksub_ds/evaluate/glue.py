"""GLUE, the paper's Tables 2 and 3: eight tasks, a grid of learning rates and batch sizes.

    ksub evaluate glue --model model --data glue --out results

One job a task, learning rate, batch size and seed. RTE, STS-B and MRPC start from the best checkpoint fine-tuned on
MNLI: its jobs come first, or `--mnli-checkpoint` names one. Scores are on validation, best epoch: the test labels
are not public. All cells are kept in results.json. `--test-predictions` writes the files that the benchmark's server
takes.
"""

import dataclasses
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate import result_tables
from ksub_ds.evaluate.benchmark import BenchmarkPlan, FineTuneJob
from ksub_ds.evaluate.data import metrics
from ksub_ds.evaluate.data.rows import Columns, Rows
from ksub_ds.evaluate.data.tasks import GLUE_TASKS, MNLI_MATCHED_ROWS
from ksub_ds.evaluate.finetune.classifier import fingerprint, load_trained
from ksub_ds.evaluate.finetune.scoring import predict
from ksub_ds.evaluate.finetune.train_classifier import ClassifierTraining
from ksub_ds.evaluate.queue.queue import Job
from ksub_ds.evaluate.settings import GlueSettings

# What gluebenchmark.com takes, for each task: test set -> file. The diagnostic set AX is answered by MNLI's model.
SUBMISSION: dict[str, dict[tuple[str, str], str]] = {
    **{task: {(task, "test"): f"{result_tables.GLUE_NAMES[task]}.tsv"} for task in GLUE_TASKS if task != "mnli"},
    "mnli": {("mnli", "test_matched"): "MNLI-m.tsv", ("mnli", "test_mismatched"): "MNLI-mm.tsv"}
    | {("ax", "test"): "AX.tsv"},
}
SUBMISSION_FILES = (*(name for files in SUBMISSION.values() for name in files.values()), "WNLI.tsv")
NAMED_ANSWERS = ("mnli", "qnli", "rte")  # the server wants the names of their classes; of the others the numbers
MOST_SIMILAR = 5.0  # STS-B's scale begins at 0


@dataclass(frozen=True)
class TestPredictionJob(Job):
    """Answer the test sets of a task with its best cell."""

    task: str


class GluePlan(BenchmarkPlan[GlueSettings]):
    """The queue of one model's GLUE evaluation; arguments and errors as BenchmarkPlan's."""

    kind = "glue"

    def find_splits(self) -> list[tuple[str, str]]:
        """Return (task, split) of all files that are used.

        Raises:
            UserError: a task that was asked for has no data, or no task has; --mnli-checkpoint cannot be used.
        """
        if self.settings.mnli_checkpoint is not None:
            load_trained(
                self.settings.mnli_checkpoint, "--mnli-checkpoint"
            )  # an error is reported now, not after MNLI's grid
        self._find_tasks()
        return [(task, split) for task in self.tasks for split in ("train", *self._validation_splits(task))]

    def setting_values(self) -> dict[str, Any]:
        """Return the settings as results.json shows them; a checkpoint counts by its content."""
        values = super().setting_values()
        if self.settings.mnli_checkpoint is not None:
            values["mnli_checkpoint"] = fingerprint(self.settings.mnli_checkpoint)
        return values

    def _find_tasks(self) -> None:
        """Find the tasks with data; log the others, or refuse them when they were asked for by name.

        Raises:
            UserError: a task that was asked for has no data, or no task has.
        """
        self.missing: dict[str, str] = {}
        for task in self.settings.tasks or GLUE_TASKS:
            lacking = [] if self.source.has(task, "train") else ["train"]
            lacking += [] if self._validation_splits(task) else ["validation"]
            if lacking:
                self.missing[task] = f"no {' and no '.join(lacking)} set in {self.settings.data}"
        if self.settings.tasks and self.missing:
            task, reason = next(iter(self.missing.items()))
            raise UserError(f"--tasks {task}: {reason}")
        for task, reason in self.missing.items():
            get_logger().warning(f"{task}: {reason}: left out")
        self.tasks = [task for task in self.settings.tasks or GLUE_TASKS if task not in self.missing]
        if not self.tasks:
            raise UserError(
                f"--data {self.settings.data}: holds no task of GLUE; name the folders {' '.join(GLUE_TASKS)}"
            )
        dependent = [task for task in self.tasks if GLUE_TASKS[task].from_mnli]
        if dependent and self._start(dependent[0]) == "the pretrained model":
            get_logger().warning(
                f"{' '.join(dependent)}: start from the pretrained model, not from MNLI as the paper's; "
                "add mnli to --tasks or give --mnli-checkpoint"
            )

    def _validation_splits(self, task: str) -> list[str]:
        names = ("validation_matched", "validation_mismatched") if task == "mnli" else ()
        return [name for name in names if self.source.has(task, name)] or [
            name for name in ("validation",) if self.source.has(task, name)
        ]

    def _start(self, task: str) -> str:
        """Return what a task starts from, in words."""
        if not GLUE_TASKS[task].from_mnli:
            return "the pretrained model"
        if self.settings.mnli_checkpoint is not None:
            return f"the MNLI checkpoint {self.settings.mnli_checkpoint}"
        return "this evaluation's best MNLI checkpoint" if "mnli" in self.tasks else "the pretrained model"

    def make_jobs(self) -> list[Job]:
        """Return the grid of each task, MNLI's first."""
        cells: dict[str, list[FineTuneJob]] = {}
        for task in sorted(self.tasks, key=lambda name: name != "mnli"):  # what others wait for comes first
            for rate in self.settings.learning_rates:
                for size in self.settings.batch_sizes:
                    for seed in self.settings.seeds:
                        name = f"{task}-lr{rate:g}-bs{size}-seed{seed}"
                        waits = self._start(task) == "this evaluation's best MNLI checkpoint"
                        needs = tuple(cell.name for cell in cells["mnli"]) if waits else ()
                        cells.setdefault(task, []).append(FineTuneJob(name, needs, name, task, rate, size, seed))
        self.cells = cells
        self.test_jobs: list[TestPredictionJob] = []
        for task, tests in self.submitted.items():
            name = f"predict-{task}{self.test_suffix(*tests)}"
            self.test_jobs.append(TestPredictionJob(name, tuple(cell.name for cell in cells[task]), name, task))
        return [*(cell for grid in cells.values() for cell in grid), *self.test_jobs]

    def run(self, jobs: Sequence[Job], check_lease: Callable[[], None]) -> list[dict[str, Any]]:
        """Do a fine-tuning, or answer the test sets of a task."""
        if isinstance(jobs[0], TestPredictionJob):
            return [self._answer_tests(jobs[0], check_lease)]
        return super().run(jobs, check_lease)

    # ---------------------------------------------------------------- test sets, which only the server can score

    def find_unscored(self) -> list[tuple[str, str]]:
        """Return the test sets that are answered for the server; those that are not there are logged.

        Raises:
            UserError: none is there.
        """
        self.submitted: dict[str, list[tuple[str, str]]] = {}
        if not self.settings.test_predictions:
            return []
        for task in self.tasks:
            tests = [each for each in SUBMISSION[task] if self.source.has(*each)]
            lacking = [" ".join(each) for each in SUBMISSION[task] if each not in tests]
            if lacking:
                get_logger().warning(f"{self.settings.data}: no {', '.join(lacking)} set: not among the predictions")
            if tests:
                self.submitted[task] = tests
        if not self.submitted:
            raise UserError(f"--test-predictions: {self.settings.data} holds no test set of {' '.join(self.tasks)}")
        return [each for tests in self.submitted.values() for each in tests]

    def accept_unlabelled(self, rows: Rows) -> None:
        """Accept a test set without labels: its answers are for the server."""

    def _answer_tests(self, job: TestPredictionJob, check_lease: Callable[[], None]) -> dict[str, Any]:
        """Return the answers of a task's best cell to its test sets, by the file that the server wants.

        Raises:
            UserError: the cell's model was not kept.
        """
        best = _best_cell([self._cell(cell) for cell in self.cells[job.task]])["cell"]
        if not (self.queue.work(best) / "model").is_dir():
            raise UserError(
                f"--test-predictions: {self.queue.work(best)} holds no model, because it was trained without this "
                "option; give a new --out"
            )
        found = {}
        for part, split in self.submitted[job.task]:
            logits = predict(self.trained(best), self.encoded(part, split), self.precision, check_lease)
            found[SUBMISSION[job.task][part, split]] = answers(job.task, logits)
        return {"cell": best, "answers": found}

    def forget(self, job: Job) -> None:
        """Remove the state of a published job, and the models that were kept only to answer the test set."""
        super().forget(job)
        if isinstance(job, TestPredictionJob) and job.task != "mnli" and not self.settings.keep_models:
            for cell in self.cells[job.task]:
                if cell.name != self.queue.result(job.name)["cell"]:
                    shutil.rmtree(self.queue.work(cell.name) / "model", ignore_errors=True)

    def _write_submission(self) -> None:
        """Write the files that gluebenchmark.com takes: a line for each row, in the order of the test set."""
        for job in self.test_jobs:
            for name, given in self.queue.result(job.name)["answers"].items():
                lines = [f"{row}\t{server_answer(job.task, each)}" for row, each in enumerate(given)]
                text = "\n".join(["index\tprediction", *lines, ""])
                result_tables.write_text(self.folder / "submission" / name, text)
        if self.test_jobs:
            there = {name for job in self.test_jobs for name in self.queue.result(job.name)["answers"]}
            lacking = [name for name in SUBMISSION_FILES if name not in there]
            get_logger().info(
                f"{self.folder / 'submission'}: {len(there)} files for gluebenchmark.com"
                + (f"; it also asks for {' '.join(lacking)}" if lacking else "")
            )

    # ---------------------------------------------------------------- data

    def columns(self, part: str) -> Columns:
        """Return what a row of a task holds."""
        return GLUE_TASKS["mnli" if part == "ax" else part].columns.mapped(self.settings.label_map)

    def read(self, part: str, split: str, limit: int | None) -> Rows:
        """Read rows of a split of a task.

        Args:
            part: the task.
            split: of its rows; MNLI's development sets are "matched" and "mismatched".
            limit: the first so many; None for all.

        Raises:
            UserError: as `RowSource.read`.
        """
        if split not in ("matched", "mismatched"):
            whole = (part, split) == ("mnli", "validation")  # two sets, of which each has so many rows
            return super().read(part, split, None if whole else limit)
        if f"validation_{split}" in self._validation_splits(part):
            return super().read(part, f"validation_{split}", limit)
        both = super().read(part, "validation", None)
        matched, others = both.part(0, MNLI_MATCHED_ROWS), both.part(MNLI_MATCHED_ROWS, len(both))
        return (matched if split == "matched" else others).part(0, limit or len(both))

    def _parts(self, task: str) -> list[str]:
        """Return the validation sets of a task, the one that selects first."""
        if task != "mnli":
            return ["validation"]
        splits = self._validation_splits(task)
        if splits == ["validation"]:
            both = len(super().read(task, "validation", None)) > MNLI_MATCHED_ROWS
            return ["matched", "mismatched"] if both else ["matched"]
        return [split.removeprefix("validation_") for split in splits]

    # ---------------------------------------------------------------- work

    def training(self, job: FineTuneJob) -> ClassifierTraining:
        """Return what a cell of the grid trains; validation is scored after each epoch."""
        task = job.task
        parts, body = self._parts(task), self._body(task)
        about, train = GLUE_TASKS[task], self.encoded(task, "train")
        training = self.classifier_training(
            job,
            about.num_labels,
            train,
            lambda model, check: self._validate(model, task, parts, check),
            about.regression,
        )
        return dataclasses.replace(
            training,
            body=body,
            identity=f"{self.identity} {job.name} {'' if body is None else self._mnli_cell()}",
            keep_model=self.settings.keep_models or task == "mnli" or task in self.submitted,
        )

    def _body(self, task: str) -> str | None:
        """Return the MNLI checkpoint a task starts from; None when it starts from the pretrained model."""
        if not GLUE_TASKS[task].from_mnli:
            return None
        if self.settings.mnli_checkpoint is not None:
            return self.settings.mnli_checkpoint
        if "mnli" not in self.tasks:
            return None
        return str(self.queue.work(self._mnli_cell()) / "model")

    def _mnli_cell(self) -> str:
        """Name this evaluation's best cell of MNLI; nothing with --mnli-checkpoint, which the identity holds."""
        if self.settings.mnli_checkpoint is not None:
            return ""
        best: str = _best_cell([self._cell(job) for job in self.cells["mnli"]])["cell"]
        return best

    def _validate(self, model: Any, task: str, parts: list[str], check: Callable[[], None]) -> dict[str, Any]:
        """Return the task's scores on its (first) validation set; `mismatched` accuracy beside MNLI's."""
        scores: dict[str, Any] = {}
        for part in parts:
            encoded = self.encoded(task, part)
            logits = predict(model, encoded, self.precision, check)
            if part == "mismatched" and scores:
                classes = logits.argmax(axis=1)
                scores["mismatched"] = float((classes == encoded.labels).mean())
            else:
                scores |= score(task, logits, encoded.labels)
                scores["answers"] = answers(task, logits)
        return {"score": scores[GLUE_TASKS[task].metrics[0]], **scores}

    # ---------------------------------------------------------------- results

    def _cell(self, job: FineTuneJob) -> dict[str, Any]:
        """Return a finished cell: its place in the grid, and the scores of its best epoch."""
        result = self.queue.result(job.name)
        epochs = [{key: value for key, value in epoch.items() if key != "answers"} for epoch in result["epochs"]]
        place = {"learning_rate": job.learning_rate, "batch_size": job.batch_size, "seed": job.seed}
        best = epochs[result["best_epoch"] - 1]
        return {"cell": job.name, **place, "best_epoch": result["best_epoch"], **best, "epochs": epochs}

    def _predictions(self, best: dict[str, str]) -> dict[str, Any]:
        """Return the labels of each task's first validation set and its best cell's answers, for paired tests."""
        labels, predictions = {}, {}
        for task, cell in best.items():
            result = self.queue.result(cell)
            gold = self.encoded(task, self._parts(task)[0]).labels
            classes = not GLUE_TASKS[task].regression
            labels[task] = "".join(map(str, gold.astype(int).tolist())) if classes else gold.tolist()
            predictions[task] = result["epochs"][result["best_epoch"] - 1]["answers"]
        return {"labels": labels, "predictions": predictions}

    def finish(self) -> None:
        """Write results.json, predictions.json and table.md."""
        test: dict[str, Any] = {}
        for task in self.tasks:
            cells = [self._cell(job) for job in self.cells[task]]
            names = [*GLUE_TASKS[task].metrics, *(["mismatched"] if "mismatched" in cells[0] else [])]
            median = {name: statistics.median(cell[name] for cell in cells) for name in names}
            best = {key: value for key, value in _best_cell(cells).items() if key != "epochs"}
            test[task] = {"best": best, "median": median, "starts_from": self._start(task), "cells": cells}
        results = {
            "task": "glue",
            "setting": "glue",
            "split": "validation",
            "test": test,
            "average": float(np.mean([scores["best"]["score"] for scores in test.values()])),
            **self.origin(),
            "missing": self.missing,
            "settings": self.values,
        }
        predictions = self._predictions({task: scores["best"]["cell"] for task, scores in test.items()})
        write_json(self.folder / "predictions.json", predictions)
        self._write_submission()
        self.write_results(results, result_tables.glue_table([results], "markdown"))


def score(task: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the scores of a task from a model's outputs.

    Args:
        task: of GLUE.
        logits: (n, outputs).
        labels: (n,).
    """
    if GLUE_TASKS[task].regression:
        return metrics.regression(logits[:, 0].astype(np.float64), labels)
    return metrics.classification(logits.argmax(axis=1), labels.astype(np.int64), GLUE_TASKS[task].metrics)


def server_answer(task: str, answer: str | float) -> str:
    """Return an answer, a digit or a real number, as gluebenchmark.com wants it."""
    if GLUE_TASKS[task].regression:
        return f"{min(max(float(answer), 0.0), MOST_SIMILAR):.3f}"
    return GLUE_TASKS[task].columns.labels[int(answer)] if task in NAMED_ANSWERS else str(answer)


def _best_cell(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first with the highest score."""
    return max(cells, key=lambda cell: cell["score"])


def answers(task: str, logits: np.ndarray) -> str | list[float]:
    """Return a model's answers: a digit a row, or the numbers of a regression."""
    if GLUE_TASKS[task].regression:
        return [float(f"{value:.9g}") for value in logits[:, 0].tolist()]  # all that float32 has
    return "".join(map(str, logits.argmax(axis=1).tolist()))
