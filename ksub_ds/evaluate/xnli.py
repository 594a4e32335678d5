"""XNLI, the paper's Table 4: fine-tune on English or on all languages, test 15.

    ksub evaluate xnli --model model --data xnli --setting cross-lingual --out results

Jobs: one fine-tuning a seed; then one test a language and seed, which one worker does together for as many languages
as are its share. The settings are Table 6's.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_bytes, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate import metrics, tables
from ksub_ds.evaluate.classifier import check_fit, describe, load_trained, open_encoder
from ksub_ds.evaluate.drain import Plan
from ksub_ds.evaluate.encoding import Encoded, encode
from ksub_ds.evaluate.finetune import FineTuning
from ksub_ds.evaluate.queue import Job, Queue
from ksub_ds.evaluate.rows import Source
from ksub_ds.evaluate.scoring import predict
from ksub_ds.evaluate.settings import EvaluationSettings, positive_rate
from ksub_ds.evaluate.tasks import CROSS_LINGUAL, LANGUAGES, NLI_LABELS, XNLI_COLUMNS
from ksub_ds.evaluate.training import TrainingJob, forget_state, train_classifier, train_on_ranks

DEFAULT_EPOCHS = {"cross-lingual": 10, "translate-train-all": 5}


@dataclass(frozen=True, kw_only=True)
class XnliSettings(EvaluationSettings):
    """Fine-tune on XNLI and test 15 languages. The same command again continues, or helps as one more worker."""

    setting: Literal["cross-lingual", "translate-train-all"]
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

    def checked(self) -> "XnliSettings":
        """As EvaluationSettings, with the epochs of the setting."""
        positive_rate("--learning-rate", self.learning_rate)
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 1")
        unknown = [language for language in self.languages if language not in LANGUAGES]
        if unknown or not self.languages:
            raise UserError(f"--languages {' '.join(unknown) or '(none)'}: XNLI's are {', '.join(LANGUAGES)}")
        ordered = tuple(language for language in LANGUAGES if language in self.languages)
        epochs = DEFAULT_EPOCHS[self.setting] if self.epochs is None else self.epochs
        select_on = self.select_on or ("en" if self.setting == CROSS_LINGUAL else "mean")
        return dataclasses.replace(super().checked(), epochs=epochs, languages=ordered, select_on=select_on)


class XnliPlan(Plan):
    """The queue of one model's XNLI evaluation.

    Args:
        settings: checked.
        model: one of settings.model.
        folder: where its results go.

    Raises:
        UserError: data, model or tokenizer cannot be used; other settings are in the folder.
    """

    def __init__(self, settings: XnliSettings, model: str, folder: Path):
        self.settings, self.model, self.folder = settings, model, folder
        self.source = Source(settings.data)
        self.encoder = open_encoder(model, settings.tokenizer)
        check_fit(model, self.encoder, settings.max_length)
        self._find_languages()
        self.about = describe(model)
        self.data = {
            "path": settings.data,
            "fingerprint": sha256_bytes("\n".join(self._fingerprints()).encode()),
            "train_languages": self.train_languages,
            "test_languages": self.test_languages,
            "missing": self.missing,
        }
        identity = {
            "kind": "xnli",
            "settings": settings.identity(),
            "model": self.about["fingerprint"],
            "tokenizer": self.encoder.fingerprint,
            "data": self.data["fingerprint"],
        }
        self.identity = sha256_bytes(repr(identity).encode())
        self.queue = Queue(folder, identity, self._jobs())
        self._encoded: dict[tuple[str, str], Encoded] = {}
        self._trained: tuple[int, Any] | None = None

    def _find_languages(self) -> None:
        """Which languages can be trained on and tested; those that lack files are named here and in the results."""
        wanted = self.settings.languages
        trained = ("en",) if self.settings.setting == CROSS_LINGUAL else wanted
        self.train_languages = [language for language in trained if self.source.has(language, "train")]
        tested = [language for language in wanted if self.source.has(language, "test")]
        self.test_languages = tested
        validated = ("en",) if self.settings.select_on == "en" else wanted
        self.validation_languages = [language for language in validated if self.source.has(language, "validation")]
        self.missing = {
            "train": [language for language in trained if language not in self.train_languages],
            "validation": [language for language in validated if language not in self.validation_languages],
            "test": [language for language in wanted if language not in tested],
        }
        for split, languages in self.missing.items():
            if languages:
                get_logger().warning(f"{self.settings.data}: no {split} set for {' '.join(languages)}: left out")
        for split, found in (
            ("train", self.train_languages),
            ("validation", self.validation_languages),
            ("test", tested),
        ):
            if not found:
                raise UserError(
                    f"--data {self.settings.data}: holds no {split} set"
                    + (" for en" if split != "test" and len(self.missing[split]) == 1 else "")
                    + f"; XNLI needs <lang>/{split}.jsonl[.gz] or .parquet"
                )

    def _fingerprints(self) -> list[str]:
        parts = (
            [(language, "train") for language in self.train_languages]
            + [(language, "validation") for language in self.validation_languages]
            + [(language, "test") for language in self.test_languages]
        )
        return [f"{language} {split} {self.source.fingerprint(language, split)}" for language, split in parts]

    def _jobs(self) -> list[Job]:
        jobs = []
        for seed in self.settings.seeds:
            trained = Job(f"finetune-seed{seed}", (), f"finetune-seed{seed}", {"kind": "finetune", "seed": seed})
            jobs.append(trained)
            for language in self.test_languages:
                about = {"kind": "test", "seed": seed, "language": language}
                jobs.append(Job(f"test-seed{seed}-{language}", (trained.name,), f"test-seed{seed}", about))
        return jobs

    def encoded(self, language: str, split: str) -> Encoded:
        """A split of a language, tokenised."""
        if (language, split) not in self._encoded:
            settings = self.settings
            limit = settings.max_train_examples if split == "train" else settings.max_test_examples
            rows = self.source.read(language, split, XNLI_COLUMNS, limit)
            self._encoded[language, split] = encode(rows, self.encoder, settings.max_length, settings.cache)
        return self._encoded[language, split]

    # ---------------------------------------------------------------- work

    def run(self, jobs: list[Job], still_ours: Callable[[], None]) -> list[dict[str, Any]]:
        """Do one fine-tuning, or the tests of some languages in one pass."""
        if jobs[0].settings["kind"] == "test":
            return self._test(jobs, still_ours)
        (job,) = jobs
        ranks, work = self.settings.ranks_per_job, self.queue.work(job.name)
        if ranks > 1:
            task = {"plan": "xnli", "settings": _json(self.settings), "model": self.model, "folder": str(self.folder)}
            result = train_on_ranks(task, job.name, work, ranks, still_ours)
        else:
            result = self.train(job, still_ours)
        still_ours()
        forget_state(work)
        return [result]

    def train(self, job: Job, check: Callable[[], None], several_ranks: bool = False) -> dict[str, Any]:
        """One fine-tuning; its model is left in WORK/model."""
        settings = self.settings
        first, *others = [self.encoded(language, "train") for language in self.train_languages]
        tuning = FineTuning(
            settings.epochs or 1,
            settings.batch_size,
            settings.learning_rate,
            job.settings["seed"],
            warmup_ratio=settings.warmup_ratio,
            weight_decay=settings.weight_decay,
            gradient_clipping=settings.gradient_clipping,
            precision=settings.precision or "fp32",
            save_every_steps=settings.save_every_steps,
        )
        work = self.queue.work(job.name)
        labels, train = len(NLI_LABELS), first.joined(others)
        training = TrainingJob(
            self.model, None, labels, train, self._validate, work, self.identity, self.encoder, tuning, True
        )
        return train_classifier(training, check, several_ranks)

    def _validate(self, model: Any) -> dict[str, Any]:
        """Accuracy on validation; `score` is their mean over the languages selected on."""
        scores = {}
        for language, (predictions, labels) in self._predict(
            model, self.validation_languages, "validation", what="validation"
        ).items():
            scores[language] = float((predictions == labels).mean())
        return {"score": float(np.mean(list(scores.values()))), "validation": scores}

    def _predict(
        self, model: Any, languages: list[str], split: str, check: Callable[[], None] = lambda: None, what: str = ""
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """language -> (predicted classes, labels), all languages in one pass."""
        first, *others = [self.encoded(language, split) for language in languages]
        every = first.joined(others)
        classes = predict(model, every, self.settings.precision or "fp32", check, what).argmax(axis=1)
        cuts = np.cumsum([len(self.encoded(language, split)) for language in languages])[:-1]
        parts = zip(np.split(classes, cuts), np.split(every.labels.astype(np.int64), cuts), strict=True)
        return dict(zip(languages, parts, strict=True))

    def _test(self, jobs: list[Job], still_ours: Callable[[], None]) -> list[dict[str, Any]]:
        seed = jobs[0].settings["seed"]
        if self._trained is None or self._trained[0] != seed:
            folder = self.queue.work(f"finetune-seed{seed}") / "model"
            self._trained = seed, load_trained(folder).to(distributed.device())
        languages = [job.settings["language"] for job in jobs]
        what = f"testing {' '.join(languages)}"
        results = []
        for predictions, labels in self._predict(self._trained[1], languages, "test", still_ours, what).values():
            results.append({"predictions": _digits(predictions), "labels": _digits(labels)})
        return results

    # ---------------------------------------------------------------- results

    def finish(self) -> None:
        """Write results.json, predictions.json and table.md."""
        seeds = self.settings.seeds
        tests = {
            (seed, language): self.queue.result(f"test-seed{seed}-{language}")
            for seed in seeds
            for language in self.test_languages
        }
        right = {language: [_right(tests[seed, language]) for seed in seeds] for language in self.test_languages}
        result = join(right, seeds)
        fine = {seed: self.queue.result(f"finetune-seed{seed}") for seed in seeds}
        results = {
            "task": "xnli",
            "setting": self.settings.setting,
            **result,
            "model": self.about,
            "tokenizer": {"path": self.settings.tokenizer or self.model, "fingerprint": self.encoder.fingerprint},
            "data": self.data,
            "settings": self.settings.identity(),
            "selection": f"best epoch on {'English' if self.settings.select_on == 'en' else 'mean'} validation",
            "finetuning": {str(seed): fine[seed] for seed in seeds},
        }
        predictions = {
            "labels": {language: tests[seeds[0], language]["labels"] for language in self.test_languages},
            "predictions": {
                str(seed): {language: tests[seed, language]["predictions"] for language in self.test_languages}
                for seed in seeds
            },
        }
        write_json(self.folder / "predictions.json", predictions)
        tables.write_text(self.folder / "table.md", tables.xnli_table([results], "markdown"))
        write_json(self.folder / "results.json", results)

    def summary(self) -> str:
        """What the command prints at the end."""
        return (self.folder / "table.md").read_text(encoding="utf-8")


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


def _json(settings: XnliSettings) -> dict[str, Any]:
    values = dataclasses.asdict(settings)
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
