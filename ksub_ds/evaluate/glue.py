"""GLUE, the paper's Tables 2 and 3: eight tasks, a grid of learning rates and batch sizes.

    ksub evaluate glue --model model --data glue --out results

One job a task, learning rate, batch size and seed. RTE, STS-B and MRPC start from the best checkpoint fine-tuned on
MNLI: its jobs come first, or `--mnli-checkpoint` names one. Scores are on validation, best epoch: the test labels
are not public. All cells are kept in results.json.
"""

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_bytes, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate import metrics, tables
from ksub_ds.evaluate.classifier import check_fit, describe, fingerprint, open_encoder
from ksub_ds.evaluate.drain import Plan
from ksub_ds.evaluate.encoding import Encoded, encode
from ksub_ds.evaluate.finetune import FineTuning
from ksub_ds.evaluate.queue import Job, Queue
from ksub_ds.evaluate.rows import Rows, Source
from ksub_ds.evaluate.scoring import predict
from ksub_ds.evaluate.settings import EvaluationSettings, positive_rate
from ksub_ds.evaluate.tasks import GLUE_TASKS, MNLI_MATCHED_ROWS
from ksub_ds.evaluate.training import TrainingJob, forget_state, train_classifier, train_on_ranks

TaskName = Literal["sst2", "mnli", "qnli", "qqp", "rte", "mrpc", "cola", "stsb"]


@dataclass(frozen=True, kw_only=True)
class GlueSettings(EvaluationSettings):
    """Fine-tune on GLUE's tasks over a grid. The same command again continues, or helps as one more worker."""

    tasks: tuple[TaskName, ...] | None = None
    """These only. [all that have data; the others are named]"""
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 3e-5)
    """One side of the grid."""
    batch_sizes: tuple[int, ...] = (16, 32)
    """The other side."""
    mnli_checkpoint: str | None = None
    """Fine-tuned folder that RTE, STS-B and MRPC start from. [the best of this evaluation's own MNLI]"""
    keep_models: bool = False
    """Keep the best epoch of every cell as a model folder, not only MNLI's."""

    def checked(self) -> "GlueSettings":
        """As EvaluationSettings, with Table 6's 10 epochs."""
        for rate in self.learning_rates:
            positive_rate("--learning-rates", rate)
        if not self.learning_rates or not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError("--learning-rates and --batch-sizes: give at least one of each, batch sizes from 1 on")
        if self.tasks is not None and not self.tasks:
            raise UserError(f"--tasks: give some of {' '.join(GLUE_TASKS)}")
        tasks = None if self.tasks is None else tuple(task for task in GLUE_TASKS if task in self.tasks)
        rates, sizes = tuple(sorted(set(self.learning_rates))), tuple(sorted(set(self.batch_sizes)))
        epochs = 10 if self.epochs is None else self.epochs
        return dataclasses.replace(
            super().checked(), epochs=epochs, tasks=tasks, learning_rates=rates, batch_sizes=sizes
        )


class GluePlan(Plan):
    """The queue of one model's GLUE evaluation.

    Args:
        settings: checked.
        model: one of settings.model.
        folder: where its results go.

    Raises:
        UserError: data, model or tokenizer cannot be used; other settings are in the folder.
    """

    def __init__(self, settings: GlueSettings, model: str, folder: Path):
        self.settings, self.model, self.folder = settings, model, folder
        self.source = Source(settings.data)
        self.encoder = open_encoder(model, settings.tokenizer)
        check_fit(model, self.encoder, settings.max_length)
        self._find_tasks()
        self.about = describe(model)
        splits = [(task, split) for task in self.tasks for split in ("train", *self._validation_splits(task))]
        prints = [f"{task} {split} {self.source.fingerprint(task, split)}" for task, split in splits]
        self.data = {"path": settings.data, "fingerprint": sha256_bytes("\n".join(prints).encode())}
        values = settings.identity()
        if settings.mnli_checkpoint is not None:
            values["mnli_checkpoint"] = fingerprint(settings.mnli_checkpoint)
        self.values = values
        identity = {
            "kind": "glue",
            "settings": values,
            "model": self.about["fingerprint"],
            "tokenizer": self.encoder.fingerprint,
            "data": self.data["fingerprint"],
        }
        self.identity = sha256_bytes(repr(identity).encode())
        self.queue = Queue(folder, identity, self._jobs())
        self._encoded: dict[tuple[str, str], Encoded] = {}

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

    def _jobs(self) -> list[Job]:
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

    def encoded(self, task: str, split: str) -> Encoded:
        """A split of a task, tokenised. MNLI's development sets are "matched" and "mismatched"."""
        if (task, split) not in self._encoded:
            settings = self.settings
            rows = self._rows(task, split)
            limit = settings.max_train_examples if split == "train" else settings.max_test_examples
            rows = rows if limit is None else rows.part(0, limit)
            self._encoded[task, split] = encode(rows, self.encoder, settings.max_length, settings.cache)
        return self._encoded[task, split]

    def _rows(self, task: str, split: str) -> Rows:
        columns = GLUE_TASKS[task].columns
        if task != "mnli" or split == "train":
            return self.source.read(task, split, columns)
        if f"validation_{split}" in self._validation_splits(task):
            return self.source.read(task, f"validation_{split}", columns)
        both = self.source.read(task, "validation", columns)
        if split == "matched":
            return both.part(0, MNLI_MATCHED_ROWS)
        return both.part(MNLI_MATCHED_ROWS, len(both))

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

    def run(self, jobs: list[Job], still_ours: Callable[[], None]) -> list[dict[str, Any]]:
        """Do one cell of the grid."""
        (job,) = jobs
        ranks, work = self.settings.ranks_per_job, self.queue.work(job.name)
        if ranks > 1:
            settings = dataclasses.asdict(self.settings)
            settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
            task = {"plan": "glue", "settings": settings, "model": self.model, "folder": str(self.folder)}
            result = train_on_ranks(task, job.name, work, ranks, still_ours)
        else:
            result = self.train(job, still_ours)
        still_ours()
        forget_state(work)
        return [result]

    def train(self, job: Job, check: Callable[[], None], several_ranks: bool = False) -> dict[str, Any]:
        """One cell: fine-tune, and score validation after each epoch."""
        about, settings = job.settings, self.settings
        task = about["task"]
        parts, body = self._parts(task), self._body(task)
        tuning = FineTuning(
            settings.epochs or 1,
            about["batch_size"],
            about["learning_rate"],
            about["seed"],
            regression=GLUE_TASKS[task].regression,
            warmup_ratio=settings.warmup_ratio,
            weight_decay=settings.weight_decay,
            gradient_clipping=settings.gradient_clipping,
            precision=settings.precision or "fp32",
            save_every_steps=settings.save_every_steps,
        )
        training = TrainingJob(
            self.model,
            body,
            GLUE_TASKS[task].num_labels,
            self.encoded(task, "train"),
            lambda model: self._validate(model, task, parts),
            self.queue.work(job.name),
            f"{self.identity} {job.name} {body}",
            self.encoder,
            tuning,
            keep_model=settings.keep_models or task == "mnli",
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
        best = self._best_cell("mnli", [self._cell(name) for name in self.cells["mnli"]])
        return str(self.queue.work(best["cell"]) / "model")

    def _validate(self, model: Any, task: str, parts: list[str]) -> dict[str, Any]:
        """The task's scores on its (first) validation set; `mismatched` accuracy beside MNLI's."""
        scores: dict[str, Any] = {}
        for part in parts:
            encoded = self.encoded(task, part)
            logits = predict(model, encoded, self.settings.precision or "fp32")
            if part == "mismatched" and scores:
                classes = logits.argmax(axis=1)
                scores["mismatched"] = float((classes == encoded.labels).mean())
            else:
                scores |= score(task, logits, encoded.labels)
        return {"score": scores[GLUE_TASKS[task].metrics[0]], **scores}

    # ---------------------------------------------------------------- results

    def _cell(self, name: str) -> dict[str, Any]:
        """A finished cell: its place in the grid, and the scores of its best epoch."""
        result, about = self.queue.result(name), self.queue.jobs[name].settings
        best = result["epochs"][result["best_epoch"] - 1]
        place = {key: about[key] for key in ("learning_rate", "batch_size", "seed")}
        return {"cell": name, **place, "best_epoch": result["best_epoch"], **best, "epochs": result["epochs"]}

    @staticmethod
    def _best_cell(task: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
        """The first with the highest score."""
        return max(cells, key=lambda cell: cell["score"])

    def finish(self) -> None:
        """Write results.json and table.md."""
        test: dict[str, Any] = {}
        for task in self.tasks:
            cells = [self._cell(name) for name in self.cells[task]]
            names = [*GLUE_TASKS[task].metrics, *(["mismatched"] if "mismatched" in cells[0] else [])]
            median = {name: statistics.median(cell[name] for cell in cells) for name in names}
            best = {key: value for key, value in self._best_cell(task, cells).items() if key != "epochs"}
            test[task] = {"best": best, "median": median, "starts_from": self._start(task), "cells": cells}
        results = {
            "task": "glue",
            "setting": "glue",
            "split": "validation",
            "test": test,
            "average": float(np.mean([scores["best"]["score"] for scores in test.values()])),
            "model": self.about,
            "tokenizer": {"path": self.settings.tokenizer or self.model, "fingerprint": self.encoder.fingerprint},
            "data": self.data,
            "missing": self.missing,
            "settings": self.values,
        }
        tables.write_text(self.folder / "table.md", tables.glue_table([results], "markdown"))
        write_json(self.folder / "results.json", results)

    def summary(self) -> str:
        """What the command prints at the end."""
        return (self.folder / "table.md").read_text(encoding="utf-8")


def score(task: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The scores of a task from a model's outputs, (n, outputs), and the labels, (n,)."""
    if GLUE_TASKS[task].regression:
        return metrics.regression(logits[:, 0].astype(np.float64), labels)
    return metrics.classification(logits.argmax(axis=1), labels.astype(np.int64), GLUE_TASKS[task].metrics)
