"""XNLI, the paper's Table 4: fine-tune on English or on all languages, test 15.

    ksub evaluate xnli --model model --data xnli --setting cross-lingual --out results

Jobs: one fine-tuning a seed; then one test a language and seed, which one worker does together for as many languages
as are its share. The settings are Table 6's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate.benchmark import EvaluationPlan
from ksub_ds.evaluate.data import metrics, tables
from ksub_ds.evaluate.data.rows import Rows
from ksub_ds.evaluate.data.tasks import CROSS_LINGUAL, NLI_LABELS, XNLI_COLUMNS
from ksub_ds.evaluate.finetune.classifier import load_trained
from ksub_ds.evaluate.finetune.job import TrainingJob, train_classifier
from ksub_ds.evaluate.finetune.scoring import predict
from ksub_ds.evaluate.queue.queue import Job
from ksub_ds.pretrain.builders import set_attention


class XnliPlan(EvaluationPlan):
    """The queue of one model's XNLI evaluation; arguments and errors as EvaluationPlan's."""

    kind = "xnli"
    _trained: tuple[int, Any] | None = None  # (seed, model) of the last tests

    def find_splits(self) -> list[tuple[str, str]]:
        """As EvaluationPlan; languages that lack files are named here and in the results."""
        wanted, english = self.settings.languages, ("en",)
        used = {
            "train": english if self.settings.setting == CROSS_LINGUAL else wanted,
            "validation": english if self.settings.select_on == "en" else wanted,
            "test": wanted,
        }
        has = self.source.has
        self.found = {split: [each for each in languages if has(each, split)] for split, languages in used.items()}
        self.missing = {
            split: [each for each in languages if each not in self.found[split]] for split, languages in used.items()
        }
        for split, languages in self.missing.items():
            if languages:
                get_logger().warning(f"{self.settings.data}: no {split} set for {' '.join(languages)}: left out")
        for split, found in self.found.items():
            if not found:
                raise UserError(
                    f"--data {self.settings.data}: holds no {split} set"
                    + (" for en" if used[split] == english else "")
                    + f"; XNLI needs <lang>/{split}.jsonl[.gz] or .parquet"
                )
        return [(language, split) for split, languages in self.found.items() for language in languages]

    def make_jobs(self) -> list[Job]:
        """As EvaluationPlan."""
        jobs = []
        for seed in self.settings.seeds:
            trained = Job(f"finetune-seed{seed}", (), f"finetune-seed{seed}", {"kind": "finetune", "seed": seed})
            jobs.append(trained)
            for language in self.found["test"]:
                about = {"kind": "test", "seed": seed, "language": language}
                jobs.append(Job(f"test-seed{seed}-{language}", (trained.name,), f"test-seed{seed}", about))
        return jobs

    def read(self, part: str, split: str, limit: int | None) -> Rows:
        """As EvaluationPlan."""
        return self.source.read(part, split, XNLI_COLUMNS, limit)

    # ---------------------------------------------------------------- work

    def run(self, jobs: list[Job], still_ours: Callable[[], None]) -> list[dict[str, Any]]:
        """Do one fine-tuning, or the tests of some languages in one pass."""
        if jobs[0].settings["kind"] == "test":
            return self._test(jobs, still_ours)
        return super().run(jobs, still_ours)

    def train(self, job: Job, check: Callable[[], None], several_ranks: bool = False) -> dict[str, Any]:
        """One fine-tuning; its model is left in WORK/model."""
        settings = self.settings
        first, *others = [self.encoded(language, "train") for language in self.found["train"]]
        training = TrainingJob(
            self.model,
            None,
            len(NLI_LABELS),
            first.joined(others),
            self._validate,
            self.queue.work(job.name),
            self.identity,
            self.encoder,
            self.tuning(settings.learning_rate, settings.batch_size, job.settings["seed"]),
            keep_model=True,
            attention=settings.attention,
        )
        return train_classifier(training, check, several_ranks)

    def _validate(self, model: Any) -> dict[str, Any]:
        """Accuracy on validation; `score` is their mean over the languages selected on."""
        scores = {}
        for language, (predictions, labels) in self._predict(
            model, self.found["validation"], "validation", what="validation"
        ).items():
            scores[language] = float((predictions == labels).mean())
        return {"score": float(np.mean(list(scores.values()))), "validation": scores}

    def _predict(
        self, model: Any, languages: list[str], split: str, check: Callable[[], None] = lambda: None, what: str = ""
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """language -> (predicted classes, labels), all languages in one pass."""
        first, *others = [self.encoded(language, split) for language in languages]
        every = first.joined(others)
        classes = predict(model, every, self.settings.precision, check, what).argmax(axis=1)
        cuts = np.cumsum([len(self.encoded(language, split)) for language in languages])[:-1]
        parts = zip(np.split(classes, cuts), np.split(every.labels.astype(np.int64), cuts), strict=True)
        return dict(zip(languages, parts, strict=True))

    def _test(self, jobs: list[Job], still_ours: Callable[[], None]) -> list[dict[str, Any]]:
        seed = jobs[0].settings["seed"]
        if self._trained is None or self._trained[0] != seed:
            folder = self.queue.work(f"finetune-seed{seed}") / "model"
            model = load_trained(folder).to(distributed.device())
            set_attention(model, self.settings.attention)
            self._trained = seed, model
        languages = [job.settings["language"] for job in jobs]
        what = f"testing {' '.join(languages)}"
        results = []
        for predictions, labels in self._predict(self._trained[1], languages, "test", still_ours, what).values():
            results.append({"predictions": _digits(predictions), "labels": _digits(labels)})
        return results

    # ---------------------------------------------------------------- results

    def origin(self) -> dict[str, Any]:
        """As EvaluationPlan, with the languages."""
        origin = super().origin()
        languages = {"train_languages": self.found["train"], "test_languages": self.found["test"]}
        return origin | {"data": {**origin["data"], **languages, "missing": self.missing}}

    def finish(self) -> None:
        """Write results.json, predictions.json and table.md."""
        seeds = self.settings.seeds
        tests = {
            (seed, language): self.queue.result(f"test-seed{seed}-{language}")
            for seed in seeds
            for language in self.found["test"]
        }
        right = {language: [_right(tests[seed, language]) for seed in seeds] for language in self.found["test"]}
        result = join(right, seeds)
        fine = {seed: self.queue.result(f"finetune-seed{seed}") for seed in seeds}
        results = {
            "task": "xnli",
            "setting": self.settings.setting,
            **result,
            **self.origin(),
            "settings": self.values,
            "selection": f"best epoch on {'English' if self.settings.select_on == 'en' else 'mean'} validation",
            "finetuning": {str(seed): fine[seed] for seed in seeds},
        }
        predictions = {
            "labels": {language: tests[seeds[0], language]["labels"] for language in self.found["test"]},
            "predictions": {
                str(seed): {language: tests[seed, language]["predictions"] for language in self.found["test"]}
                for seed in seeds
            },
        }
        write_json(self.folder / "predictions.json", predictions)
        self.write_results(results, tables.xnli_table([results], "markdown"))


def join(right: dict[str, list[np.ndarray]], seeds: tuple[int, ...]) -> dict[str, Any]:
    """The `test`, `average` and `seeds` of results.json.

    Args:
        right: for each language and seed, (n,) whether a row was right.

    Returns:
        Accuracies are means over the seeds, counts their sums, so accuracy = correct / count.
    """
    intervals = metrics.bootstrap_intervals({language: np.mean(each, axis=0) for language, each in right.items()})
    test: dict[str, Any] = {}
    by_seed: dict[str, Any] = {}
    for language, each in right.items():
        correct, count = int(sum(part.sum() for part in each)), sum(len(part) for part in each)
        test[language] = {
            "accuracy": correct / count,
            "correct": correct,
            "count": count,
            "interval": list(intervals[language]),
        }
    for index, seed in enumerate(seeds):
        scores = {language: float(each[index].mean()) for language, each in right.items()}
        by_seed[str(seed)] = {"average": float(np.mean(list(scores.values()))), "accuracy": scores}
    averages = [row["average"] for row in by_seed.values()]
    return {
        "test": test,
        "average": float(np.mean([row["accuracy"] for row in test.values()])),
        "average_interval": list(intervals["average"]),
        "average_deviation": float(np.std(averages, ddof=1)) if len(averages) > 1 else None,
        "seeds": by_seed,
    }


def _digits(classes: np.ndarray) -> str:
    """Class numbers below 10 as a string, one digit a row."""
    return "".join(map(str, classes.tolist()))


def _right(test: dict[str, Any]) -> np.ndarray:
    pairs = zip(test["predictions"], test["labels"], strict=True)
    return np.array([predicted == label for predicted, label in pairs])
