"""The results of the models so far: results.json, table.md and tlm.png."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.equal_time.answers import right_answers
from experiments.equal_time.written import write_files
from experiments.tlm.material import ENGLISH
from ksub_ds.common.files import atomic_path
from ksub_ds.evaluate.data.metrics import paired_test

NAMES = {"sentences": "sentences", "pairs": "sentences and pairs"}
COLOURS = {"sentences": "#000000", "pairs": "#0072B2"}


def write_outcome(out: Path, settings: dict[str, Any], models: Sequence[dict[str, Any]], hours: float) -> str:
    """Write the three files; return the table.

    Args:
        out: the folder.
        settings: of the experiment.
        models: those of run.py that have been tested.
        hours: of a processor, so far.
    """
    results = summary(settings, models) | {"processor_hours": hours}
    return write_files(out, results, markdown, plot, "tlm.png")


def summary(settings: dict[str, Any], models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the accuracies of all models, and the tests of the seeds that have both.

    Args:
        settings: of the experiment.
        models: {"arm", "seed", "labels", "predictions", ...}: predictions.json of `ksub evaluate xnli`, one seed each.

    Returns:
        {"settings", "models", "comparison"}. A test counts a row once, with the mean over the other languages, which
        are translations of each other, and over seeds, as `ksub report` does.
    """
    right = {(model["arm"], model["seed"]): right_answers(model) for model in models}
    rows = []
    for model in models:
        found = right[model["arm"], model["seed"]]
        accuracy = {language: float(each.mean()) for language, each in found.items()}
        transfer = float(others(found).mean())
        about = {key: model[key] for key in ("arm", "seed", "pretraining", "finetuning")}
        rows.append(about | {"accuracy": accuracy, "transfer": transfer})
    seeds = [seed for arm, seed in right if arm == "pairs" and ("sentences", seed) in right]
    comparison: dict[str, Any] = {"seeds": seeds}
    if seeds:
        by_seed = {arm: [others(right[arm, seed]) for seed in seeds] for arm in NAMES}
        comparison["each_seed"] = [
            paired_test(*both) for both in zip(by_seed["pairs"], by_seed["sentences"], strict=True)
        ]
        comparison["transfer"] = paired_test(np.mean(by_seed["pairs"], axis=0), np.mean(by_seed["sentences"], axis=0))
        comparison["languages"] = {
            language: paired_test(
                *(np.mean([right[arm, seed][language] for seed in seeds], axis=0) for arm in ("pairs", "sentences"))
            )
            for language in right["pairs", seeds[0]]
        }
    return {"settings": settings, "models": rows, "comparison": comparison}


def others(right: dict[str, NDArray[np.bool_]]) -> NDArray[np.float64]:
    """Return the share of the languages but English in which each row was answered right: (n,)."""
    return np.mean([each for language, each in right.items() if language != ENGLISH], axis=0)


def markdown(results: dict[str, Any]) -> str:
    """Format the table: accuracy of each model in English and the other languages, then the differences."""
    others_ = results["settings"]["languages"]
    lines = [
        f"| pretrained on | seed | {ENGLISH} | {' | '.join(others_)} | mean without {ENGLISH} | p |",
        "|---" * (len(others_) + 5) + "|",
    ]
    for model in results["models"]:
        cells = [f"{100 * model['accuracy'][each]:.1f}" for each in (ENGLISH, *others_)]
        lines.append(
            f"| {NAMES[model['arm']]} | {model['seed']} | {' | '.join(cells)} | {100 * model['transfer']:.1f} | |"
        )
    comparison = results["comparison"]
    for seed, test in zip(comparison["seeds"], comparison.get("each_seed", ()), strict=True):
        lines.append(
            f"| difference | {seed} |{' |' * (len(others_) + 1)} {100 * test['difference']:+.1f} | {test['p']:.4f} |"
        )
    if comparison["seeds"]:
        cells = [f"{100 * comparison['languages'][each]['difference']:+.1f}" for each in (ENGLISH, *others_)]
        test = comparison["transfer"]
        lines.append(
            f"| **difference** | all | {' | '.join(cells)} | **{100 * test['difference']:+.1f}** | {test['p']:.4f} |"
        )
    return "\n".join(lines)


def plot(path: Path, results: dict[str, Any]) -> None:
    """Plot the accuracy of every model, language by language."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    languages = [ENGLISH, *results["settings"]["languages"]]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for shift, (arm, name) in zip((-0.1, 0.1), NAMES.items(), strict=True):
        models = [model for model in results["models"] if model["arm"] == arm]
        places = [number + shift for number in range(len(languages)) for _ in models]
        values = [100 * model["accuracy"][language] for language in languages for model in models]
        axes.scatter(places, values, color=COLOURS[arm], label=name, s=18)
    axes.axhline(100 / 3, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(languages)), languages)
    axes.set_ylabel("XNLI test accuracy, %; dotted: guessing")
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
