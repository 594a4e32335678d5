"""XNLI, the paper's Table 4: fine-tune on English or on all languages, test 15.

    ksub evaluate xnli --model model --data xnli --setting cross-lingual --out results

Jobs: one fine-tuning a seed; then one test a language and seed, which one worker does together for as many languages
as are its share. The settings are Table 6's.
"""

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
from ksub_ds.evaluate.data.rows import Columns
from ksub_ds.evaluate.data.tasks import CROSS_LINGUAL, LANGUAGES, NLI_LABELS, XNLI_COLUMNS
from ksub_ds.evaluate.finetune.scoring import predict
from ksub_ds.evaluate.finetune.train_classifier import ClassifierTraining
from ksub_ds.evaluate.queue.queue import Job
from ksub_ds.evaluate.settings import XnliSettings


@dataclass(frozen=True)
class LanguageTestJob(Job):
    """Test the classifier of one seed on one language."""

    seed: int
    language: str


class XnliPlan(BenchmarkPlan[XnliSettings]):
    """The queue of one model's XNLI evaluation; arguments and errors as BenchmarkPlan's."""

    kind = "xnli"

    def find_splits(self) -> list[tuple[str, str]]:
        """Return (language, split) of all files; languages that lack one are logged, and named in the results.

        Raises:
            UserError: no language has a training, validation or test set.
        """
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
        others = self._other_folders()
        for split, languages in self.missing.items():
            if languages:
                get_logger().warning(
                    f"{self.settings.data}: no {split} set for {' '.join(languages)}: left out{others}"
                )
        for split, found in self.found.items():
            if not found:
                raise UserError(
                    f"--data {self.settings.data}: holds no {split} set"
                    + (" for en" if used[split] == english else "")
                    + f"; XNLI needs <lang>/{split}.jsonl[.gz] or .parquet{others}"
                )
        return [(language, split) for split, languages in self.found.items() for language in languages]

    def _other_folders(self) -> str:
        """Say which folders of the data have names that are none of XNLI's languages."""
        inside = self.source.folder.iterdir() if self.source.folder is not None else ()
        names = sorted(path.name for path in inside if path.is_dir() and path.name not in LANGUAGES)
        shown = [name for name in names if not name.startswith(".")][:6]
        return f"; not read, because no language is called so: {', '.join(shown)}" if shown else ""

    def make_jobs(self) -> list[Job]:
        """Return a fine-tuning for each seed, and after it a test for each language."""
        rate, size = self.settings.learning_rate, self.settings.batch_size
        jobs: list[Job] = []
        for seed in self.settings.seeds:
            name = _training_name(seed)
            jobs.append(FineTuneJob(name, (), name, self.kind, rate, size, seed))
            for language in self.found["test"]:
                test = self._test_name(seed, language)
                jobs.append(LanguageTestJob(test, (name,), f"test-seed{seed}", seed, language))
        return jobs

    def columns(self, part: str) -> Columns:
        """Return what a row of a language holds."""
        return XNLI_COLUMNS.mapped(self.settings.label_map)

    def _test_name(self, seed: int, language: str) -> str:
        return f"test-seed{seed}-{language}{self.test_suffix((language, 'test'))}"

    # ---------------------------------------------------------------- work

    def run(self, jobs: Sequence[Job], check_lease: Callable[[], None]) -> list[dict[str, Any]]:
        """Do a fine-tuning, or the tests of some languages in one pass."""
        tests = [job for job in jobs if isinstance(job, LanguageTestJob)]
        return self._test(tests, check_lease) if tests else super().run(jobs, check_lease)

    def training(self, job: FineTuneJob) -> ClassifierTraining:
        """Return what a fine-tuning trains: its model is left in WORK/model."""
        first, *others = [self.encoded(language, "train") for language in self.found["train"]]
        return self.classifier_training(job, len(NLI_LABELS), first.joined(others), self._validate)

    def _validate(self, model: Any, check: Callable[[], None]) -> dict[str, Any]:
        """Return the accuracy on validation; `score` is its mean over the languages selected on."""
        scores = {}
        for language, (predictions, labels) in self._predict(
            model, self.found["validation"], "validation", check, "validation"
        ).items():
            scores[language] = float((predictions == labels).mean())
        return {"score": float(np.mean(list(scores.values()))), "validation": scores}

    def _predict(
        self, model: Any, languages: list[str], split: str, check: Callable[[], None], what: str
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return language -> (predicted classes, labels) of the rows with a label, all languages in one pass."""
        first, *others = [self.encoded(language, split) for language in languages]
        every = first.joined(others)
        classes = predict(model, every, self.precision, check, what).argmax(axis=1)
        cuts = np.cumsum([len(self.encoded(language, split)) for language in languages])[:-1]
        found = {}
        for language, answers, labels in zip(
            languages, np.split(classes, cuts), np.split(every.labels, cuts), strict=True
        ):
            labelled = ~np.isnan(labels)
            found[language] = answers[labelled], labels[labelled].astype(np.int64)
        return found

    def _test(self, jobs: list[LanguageTestJob], check_lease: Callable[[], None]) -> list[dict[str, Any]]:
        seed = jobs[0].seed  # of all of them: they are of one group
        languages = [job.language for job in jobs]
        what = f"testing {' '.join(languages)}"
        results = []
        for language, (predictions, labels) in self._predict(
            self.trained(_training_name(seed)), languages, "test", check_lease, what
        ).items():
            encoded = self.encoded(language, "test")
            unscored = {"unlabelled": len(encoded) - len(labels), "cut": encoded.cut}
            answers = {"predictions": _digits(predictions), "labels": _digits(labels)}
            results.append(answers | {name: count for name, count in unscored.items() if count})
        return results

    # ---------------------------------------------------------------- results

    def origin(self) -> dict[str, Any]:
        """Return what was evaluated, and on what; with the languages."""
        origin = super().origin()
        languages = {"train_languages": self.found["train"], "test_languages": self.found["test"]}
        return origin | {"data": {**origin["data"], **languages, "missing": self.missing}}

    def finish(self) -> None:
        """Write results.json, predictions.json and table.md."""
        seeds = self.settings.seeds
        tests = {
            (seed, language): self.queue.result(self._test_name(seed, language))
            for seed in seeds
            for language in self.found["test"]
        }
        right = {language: [_right(tests[seed, language]) for seed in seeds] for language in self.found["test"]}
        result = join(right, seeds)
        for language, scores in result["test"].items():
            first = tests[seeds[0], language]
            scores |= {name: first[name] for name in ("unlabelled", "cut") if name in first}
        fine = {seed: self.queue.result(_training_name(seed)) for seed in seeds}
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
        self.write_results(results, result_tables.xnli_table([results], "markdown"))


def _training_name(seed: int) -> str:
    return f"finetune-seed{seed}"


def join(right: dict[str, list[np.ndarray]], seeds: tuple[int, ...]) -> dict[str, Any]:
    """Return the `test`, `average` and `seeds` of results.json.

    Args:
        right: for each language and seed, (n,) whether a row was right.
        seeds: in the order of `right`.

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
    """Write class numbers below 10 as a string, one digit a row."""
    return "".join(map(str, classes.tolist()))


def _right(test: dict[str, Any]) -> np.ndarray:
    pairs = zip(test["predictions"], test["labels"], strict=True)
    return np.array([predicted == label for predicted, label in pairs])
