"""XNLI with the frontier's models: plain and the best coded one, pretrained for the same processor time.

    python experiments/frontier/xnli.py --frontier frontier-experiment --data xnli --out frontier-xnli

Of the frontier's longest budget, the plain models and those of the coded embedding with the least held-out loss, each
of all seeds that were pretrained, are fine-tuned on English pairs and tested on every language, then fine-tuned on the
pairs of all languages. The first seed's model is fine-tuned with every learning rate; what is best by the validation
that chooses the epoch, English or the mean of all languages, is the rate of that embedding in that setting. Logistic
regression on English words stands beside.

The same command continues where it was stopped. OUT has xnli.json and xnli.md, rewritten after every model.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))

from outcome import mean_loss

from experiments.equal_time.answers import right_answers
from experiments.equal_time.experiment import KSUB, Commands, pool_of
from experiments.xnli.baselines import logistic_regression
from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.files import atomic_path, read_json, write_json
from ksub_ds.evaluate.data.metrics import paired_test
from ksub_ds.evaluate.data.tasks import CROSS_LINGUAL, TRANSLATE_TRAIN_ALL

PLAIN = "plain"
SETTINGS = (CROSS_LINGUAL, TRANSLATE_TRAIN_ALL)


@dataclass(frozen=True)
class Pretrained:
    """One pretrained model: its embedding, its seed and its run folder."""

    embedding: str
    seed: int
    run: Path

    @property
    def name(self) -> str:
        """Name the model's folders."""
        return f"{self.embedding}-seed{self.seed}"


def pretrained_models(frontier: Path, seeds: int) -> list[Pretrained]:
    """List the plain models and the best coded ones at the end of the longest budget, seed by seed.

    Args:
        frontier: OUT of run.py.
        seeds: at most.

    Raises:
        UserError: no plain or no coded model is there.
    """
    path = frontier / "results.json"
    if not path.exists():
        raise UserError(f"--frontier: {path} is not there; give the --out of experiments/frontier/run.py")
    points = {point["name"]: point for point in read_json(path)["points"]}
    losses = {name: mean_loss(point, point["steps_of_budgets"][-1]) for name, point in points.items()}
    coded = {name: loss for name, loss in losses.items() if name != PLAIN and loss is not None}
    if losses.get(PLAIN) is None or not coded:
        raise UserError(f"{path}: needs a plain and a coded model of the longest budget; run run.py to its end")
    found = []
    for name in (PLAIN, min(coded, key=coded.__getitem__)):
        steps, rate = points[name]["steps_of_budgets"][-1], points[name]["learning_rate"]
        ready = [end["seed"] for end in points[name]["ends"] if end["steps"] == steps and end["seed"] < seeds]
        found += [Pretrained(name, seed, frontier / "runs" / f"{name}-lr{rate:g}-seed{seed}") for seed in ready]
    return sorted(found, key=lambda model: model.seed)


class FineTunings(Commands):
    """The fine-tunings of all models, each done once, and what they answered."""

    def __init__(self, options: argparse.Namespace, models: list[Pretrained]):
        super().__init__(options.out)
        self.options, self.models = options, models
        self.keep_settings(options, ("rates", "epochs", "all_epochs", "all_pairs", "freeze_embedding"))
        self.rates: dict[str, dict[str, float]] = {setting: {} for setting in SETTINGS}
        self.searches: dict[str, dict[str, dict[str, float]]] = {setting: {} for setting in SETTINGS}

    def folder(self, model: Pretrained, setting: str, rate: float) -> Path:
        """Return the folder of a model's fine-tuning."""
        return self.out / setting / f"{model.name}-lr{rate:g}"

    def finetune(self, model: Pretrained, setting: str, rate: float) -> Path:
        """Export a model, fine-tune and test it; return the folder."""
        exported, folder = self.out / "models" / model.name, self.folder(model, setting, rate)
        self.command(exported, *KSUB, "export", model.run, "--out", exported)
        source = ("--model", exported, "--data", self.options.data, "--setting", setting, "--out", folder)
        tuning = ("--learning-rate", rate, "--seeds", model.seed, "--precision", "fp32", "--attention", "sdpa")
        frozen = ("--freeze-embedding",) if self.options.freeze_embedding else ()
        length: tuple[Any, ...] = ("--epochs", self.options.epochs)
        if setting == TRANSLATE_TRAIN_ALL:
            length = ("--epochs", self.options.all_epochs, "--max-train-examples", self.options.all_pairs)
        self.command(folder / "results.json", *KSUB, "evaluate", "xnli", *source, *tuning, *frozen, *length)
        return folder

    def choose_rate(self, embedding: str, setting: str) -> None:
        """Choose an embedding's learning rate in a setting, where there is more than one, by its first model."""
        first = next(model for model in self.models if model.embedding == embedding)
        scores = {}
        for rate in self.options.rates if len(self.options.rates) > 1 else ():
            (tuned,) = read_json(self.finetune(first, setting, rate) / "results.json")["finetuning"].values()
            scores[rate] = max(epoch["score"] for epoch in tuned["epochs"])
        self.rates[setting][embedding] = max(scores, key=scores.__getitem__, default=self.options.rates[0])
        self.searches[setting][embedding] = {f"{rate:g}": score for rate, score in scores.items()}

    def finish(self, model: Pretrained, setting: str) -> None:
        """Fine-tune and test a model with the rate of its embedding, and write the outcome."""
        self.finetune(model, setting, self.rates[setting][model.embedding])
        with self.lock:
            self.outcome()

    def outcome(self) -> None:
        """Write xnli.json and xnli.md of what has been tested so far."""
        settings = {setting: self.compare(setting) for setting in SETTINGS}
        results = {
            "finetuning": self.settings,
            "rates": self.rates,
            "searches": self.searches,
            "settings": {setting: found for setting, found in settings.items() if found["models"]},
            "baselines": read_json(self.out / "baselines.json"),
            "processor_hours": self.processor_hours(),
        }
        write_json(self.out / "xnli.json", results)
        with atomic_path(self.out / "xnli.md") as temporary:
            temporary.write_text(markdown(results), encoding="utf-8")
        print(markdown(results), flush=True)

    def compare(self, setting: str) -> dict[str, Any]:
        """Return the accuracies of a setting, and the paired test over the seeds that both embeddings have.

        A row counts once, with its mean over languages, which are translations of each other, and over seeds.
        """
        folders = {
            (model.embedding, model.seed): self.folder(model, setting, self.rates[setting][model.embedding])
            for model in self.models
            if model.embedding in self.rates[setting]
        }
        right = {
            key: right_answers(read_json(folder / "predictions.json"))
            for key, folder in folders.items()
            if (folder / "results.json").exists()
        }
        by_row = {key: np.mean(list(found.values()), axis=0) for key, found in right.items()}
        models = [
            {"embedding": embedding, "seed": seed, "average": float(by_row[embedding, seed].mean())}
            | {"accuracy": {language: float(each.mean()) for language, each in found.items()}}
            for (embedding, seed), found in right.items()
        ]
        coded = next(model.embedding for model in self.models if model.embedding != PLAIN)
        seeds = [seed for embedding, seed in by_row if embedding == coded and (PLAIN, seed) in by_row]
        ours, theirs = ([by_row[embedding, seed] for seed in seeds] for embedding in (coded, PLAIN))
        test = paired_test(np.mean(ours, axis=0), np.mean(theirs, axis=0)) if seeds else None
        return {"models": models, "seeds": seeds, "test": test}


def markdown(results: dict[str, Any]) -> str:
    """Format a table for each setting: accuracy in every language and the mean, then the difference and its p."""
    parts = []
    for setting, found in results["settings"].items():
        languages = list(found["models"][0]["accuracy"])
        parts.append(f"{setting}\n\n| pretrained with | seed | {' | '.join(languages)} | mean |")
        parts.append("|---" * (len(languages) + 3) + "|")
        for model in found["models"]:
            cells = [f"{100 * model['accuracy'][language]:.1f}" for language in languages]
            average = f"{100 * model['average']:.2f}"
            parts.append(f"| {model['embedding']} | {model['seed']} | {' | '.join(cells)} | {average} |")
        if found["test"]:
            difference, p = 100 * found["test"]["difference"], found["test"]["p"]
            told = f"{len(found['seeds'])} seed{'s' if len(found['seeds']) > 1 else ''}"
            parts.append(f"\nCoded minus plain: {difference:+.2f} points over {told}, p = {p:.4f}.\n")
    for name, accuracy in results["baselines"].items():
        parts.append(f"- {name}, English test: {100 * accuracy:.1f}")
    return "\n".join(parts) + "\n"


def run(options: argparse.Namespace) -> None:
    """Fine-tune what is missing."""
    models = pretrained_models(options.frontier, options.seeds)
    work = FineTunings(options, models)
    if not (options.out / "baselines.json").exists():
        write_json(options.out / "baselines.json", logistic_regression(str(options.data)))
    with pool_of(options.parallel) as pool:
        for setting in options.settings:
            list(pool.map(partial(work.choose_rate, setting=setting), dict.fromkeys(each.embedding for each in models)))
            list(pool.map(partial(work.finish, setting=setting), models))


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description="XNLI with plain and coded models of equal pretraining time.")
    add = parser.add_argument
    add("--frontier", type=Path, required=True, help="the --out folder of experiments/frontier/run.py")
    add("--data", type=Path, required=True, help="folder of XNLI's files")
    add("--out", type=Path, required=True, help="folder for everything")
    add("--seeds", type=int, default=3, help="of the pretrained models, at most [3]")
    add("--rates", type=float, nargs="+", default=[2e-4, 4e-4], help="of fine-tuning, to choose from [2e-4 4e-4]")
    add("--epochs", type=int, default=3, help="over the English pairs [3]")
    add("--all-epochs", type=int, default=1, help="over the pairs of all languages [1]")
    add("--all-pairs", type=int, default=15_001, help="of each language then, at most [15001]")
    add("--settings", nargs="+", default=SETTINGS, choices=SETTINGS, help="[both]")
    add("--freeze-embedding", action="store_true", help="leave the tokens' embedding as it was pretrained")
    add("--parallel", type=int, default=1, help="models at a time, of one thread each [1]")
    run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(run_main(main))
