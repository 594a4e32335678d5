"""GLUE, the paper's Tables 2 and 3: eight tasks, a grid of learning rates and batch sizes.

    ksub evaluate glue --model model --data glue --out results

One job a task, learning rate, batch size and seed. RTE, STS-B and MRPC start from the best checkpoint fine-tuned on
MNLI: its jobs come first, or `--mnli-checkpoint` names one. Scores are on validation, best epoch: the test labels
are not public. All cells are kept in results.json.
"""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate.benchmark import EvaluationPlan
from ksub_ds.evaluate.data import metrics, tables
from ksub_ds.evaluate.data.rows import Rows
from ksub_ds.evaluate.data.tasks import GLUE_TASKS, MNLI_MATCHED_ROWS
from ksub_ds.evaluate.finetune.classifier import fingerprint, load_trained
from ksub_ds.evaluate.finetune.job import TrainingJob, train_classifier
from ksub_ds.evaluate.finetune.scoring import predict
from ksub_ds.evaluate.queue.queue import Job


class GluePlan(EvaluationPlan):
    """The queue of one model's GLUE evaluation; arguments and errors as EvaluationPlan's."""

    kind = "glue"

    def find_splits(self) -> list[tuple[str, str]]:
        """As EvaluationPlan."""
        if self.settings.mnli_checkpoint is not None:
            load_trained(self.settings.mnli_checkpoint)  # what is wrong with it is told now, not after MNLI's grid
        self._find_tasks()
        return [(task, split) for task in self.tasks for split in ("train", *self._validation_splits(task))]

    def setting_values(self) -> dict[str, Any]:
        """As EvaluationPlan; a checkpoint counts by its content."""
        values = super().setting_values()
        if self.settings.mnli_checkpoint is not None:
            values["mnli_checkpoint"] = fingerprint(self.settings.mnli_checkpoint)
        return values

    def _find_tasks(self) -> None:
        """The tasks with data; the others are named here and in the results, or refused when asked for by name."""
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
        """What a task starts from, in words."""
        if not GLUE_TASKS[task].from_mnli:
            return "the pretrained model"
        if self.settings.mnli_checkpoint is not None:
            return f"the MNLI checkpoint {self.settings.mnli_checkpoint}"
        return "this evaluation's best MNLI checkpoint" if "mnli" in self.tasks else "the pretrained model"

    def make_jobs(self) -> list[Job]:
        """As EvaluationPlan."""
        cells: dict[str, list[str]] = {}
        jobs = []
        for task in sorted(self.tasks, key=lambda name: name != "mnli"):  # what others wait for comes first
            for rate in self.settings.learning_rates:
                for size in self.settings.batch_sizes:
                    for seed in self.settings.seeds:
                        name = f"{task}-lr{rate:g}-bs{size}-seed{seed}"
                        waits = self._start(task) == "this evaluation's best MNLI checkpoint"
                        needs = tuple(cells["mnli"]) if waits else ()
                        about = {"task": task, "learning_rate": rate, "batch_size": size, "seed": seed}
                        jobs.append(Job(name, needs, name, about))
                        cells.setdefault(task, []).append(name)
        self.cells = cells
        return jobs

    # ---------------------------------------------------------------- data

    def read(self, part: str, split: str, limit: int | None) -> Rows:
        """As EvaluationPlan. MNLI's development sets are "matched" and "mismatched"."""
        columns = GLUE_TASKS[part].columns
        if split not in ("matched", "mismatched"):
            return self.source.read(part, split, columns, limit)
        if f"validation_{split}" in self._validation_splits(part):
            return self.source.read(part, f"validation_{split}", columns, limit)
        both = self.source.read(part, "validation", columns)
        matched, others = both.part(0, MNLI_MATCHED_ROWS), both.part(MNLI_MATCHED_ROWS, len(both))
        return (matched if split == "matched" else others).part(0, limit or len(both))

    def _parts(self, task: str) -> list[str]:
        """The validation sets of a task, the one that selects first."""
        if task != "mnli":
            return ["validation"]
        splits = self._validation_splits(task)
        if splits == ["validation"]:
            both = len(self.source.read(task, "validation", GLUE_TASKS[task].columns)) > MNLI_MATCHED_ROWS
            return ["matched", "mismatched"] if both else ["matched"]
        return [split.removeprefix("validation_") for split in splits]

    # ---------------------------------------------------------------- work

    def train(self, job: Job, check: Callable[[], None], several_ranks: bool = False) -> dict[str, Any]:
        """One cell: fine-tune, and score validation after each epoch."""
        about, task = job.settings, job.settings["task"]
        parts, body = self._parts(task), self._body(task)
        regression = GLUE_TASKS[task].regression
        training = TrainingJob(
            self.model,
            body,
            GLUE_TASKS[task].num_labels,
            self.encoded(task, "train"),
            lambda model: self._validate(model, task, parts),
            self.queue.work(job.name),
            f"{self.identity} {job.name} {'' if body is None else self._mnli_cell()}",
            self.encoder,
            self.tuning(about["learning_rate"], about["batch_size"], about["seed"], regression),
            keep_model=self.settings.keep_models or task == "mnli",
            attention=self.settings.attention,
        )
        return train_classifier(training, check, several_ranks)

    def _body(self, task: str) -> str | None:
        """The MNLI checkpoint a task starts from, if it does."""
        if not GLUE_TASKS[task].from_mnli:
            return None
        if self.settings.mnli_checkpoint is not None:
            return self.settings.mnli_checkpoint
        if "mnli" not in self.tasks:
            return None
        return str(self.queue.work(self._mnli_cell()) / "model")

    def _mnli_cell(self) -> str:
        """This evaluation's best cell of MNLI; empty with --mnli-checkpoint, which the identity holds."""
        if self.settings.mnli_checkpoint is not None:
            return ""
        best: str = _best_cell([self._cell(name) for name in self.cells["mnli"]])["cell"]
        return best

    def _validate(self, model: Any, task: str, parts: list[str]) -> dict[str, Any]:
        """The task's scores on its (first) validation set; `mismatched` accuracy beside MNLI's."""
        scores: dict[str, Any] = {}
        for part in parts:
            encoded = self.encoded(task, part)
            logits = predict(model, encoded, self.settings.precision)
            if part == "mismatched" and scores:
                classes = logits.argmax(axis=1)
                scores["mismatched"] = float((classes == encoded.labels).mean())
            else:
                scores |= score(task, logits, encoded.labels)
                scores["answers"] = answers(task, logits)
        return {"score": scores[GLUE_TASKS[task].metrics[0]], **scores}

    # ---------------------------------------------------------------- results

    def _cell(self, name: str) -> dict[str, Any]:
        """A finished cell: its place in the grid, and the scores of its best epoch."""
        result, about = self.queue.result(name), self.queue.jobs[name].settings
        epochs = [{key: value for key, value in epoch.items() if key != "answers"} for epoch in result["epochs"]]
        place = {key: about[key] for key in ("learning_rate", "batch_size", "seed")}
        best = epochs[result["best_epoch"] - 1]
        return {"cell": name, **place, "best_epoch": result["best_epoch"], **best, "epochs": epochs}

    def _predictions(self, best: dict[str, str]) -> dict[str, Any]:
        """The labels of each task's first validation set, and the answers of its best cell, for paired tests."""
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
            cells = [self._cell(name) for name in self.cells[task]]
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
        self.write_results(results, tables.glue_table([results], "markdown"))


def score(task: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The scores of a task from a model's outputs, (n, outputs), and the labels, (n,)."""
    if GLUE_TASKS[task].regression:
        return metrics.regression(logits[:, 0].astype(np.float64), labels)
    return metrics.classification(logits.argmax(axis=1), labels.astype(np.int64), GLUE_TASKS[task].metrics)


def _best_cell(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The first with the highest score."""
    return max(cells, key=lambda cell: cell["score"])


def answers(task: str, logits: np.ndarray) -> str | list[float]:
    """A model's answers: a digit a row, or six digits of each number for regression."""
    if GLUE_TASKS[task].regression:
        return [float(f"{value:.6g}") for value in logits[:, 0].tolist()]
    return "".join(map(str, logits.argmax(axis=1).tolist()))
