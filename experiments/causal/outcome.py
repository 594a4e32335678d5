"""The results of the runs so far: results.json, table.md and causal.png."""

from pathlib import Path
from typing import Any

from experiments.equal_time.written import write_files
from ksub_ds.common.files import atomic_path

# Okabe and Ito's colours, which people with any kind of colour vision can distinguish; markers help too.
STYLES = {"plain": ("#000000", "o"), "positional": ("#D55E00", "s"), "clustered": ("#0072B2", "D")}


def write_outcome(out: Path, results: dict[str, Any]) -> str:
    """Write the three files; return the table.

    Args:
        out: the folder.
        results: what run.py's `report` puts together.
    """
    return write_files(out, results, markdown, plot, "causal.png")


def scores_at(point: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Return the scores of a point's seeds after so many steps."""
    return [end for end in point["ends"] if end["steps"] == steps]


def mean(ends: list[dict[str, Any]], key: str) -> float:
    """Return the mean of a score over seeds."""
    return sum(end[key] for end in ends) / len(ends)


def markdown(results: dict[str, Any]) -> str:
    """Format the table: bits per byte, nats a token and steps of each embedding at every budget."""
    budgets = [f"{budget / 60:.3g} min" for budget in results["budgets_seconds"]]
    lines = [
        "| embedding | parameters | learning rate | seconds a step | " + " | ".join(budgets) + " |",
        "|---|---|---|---|" + "---|" * len(budgets),
    ]
    for point in results["points"]:
        cells = [cell(scores_at(point, steps), steps) for steps in point["steps_of_budgets"]]
        first = (
            f"{point['name']} | {point['embedding_parameters']:,} | {point['learning_rate']:g} | "
            f"{point['seconds_a_step']:.3f}"
        )
        lines.append(f"| {first} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(ends: list[dict[str, Any]], steps: int) -> str:
    """Format bits per byte, with their range over seeds, nats a token, and steps; empty where no run has come there."""
    if not ends:
        return ""
    bits = [end["bits_per_byte"] for end in ends]
    spread = f" [{min(bits):.3f}, {max(bits):.3f}] of {len(bits)}" if len(bits) > 1 else ""
    return f"**{mean(ends, 'bits_per_byte'):.3f}**{spread}, {mean(ends, 'loss'):.2f} nats ({steps:,} steps)"


def plot(path: Path, results: dict[str, Any]) -> None:
    """Plot bits per byte: left against processor minutes, right by language at the longest budget that all reached."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.2), gridspec_kw={"width_ratios": [2, 3]}, layout="constrained"
    )
    for point in results["points"]:
        _draw_minutes(left, results["budgets_seconds"], point)
    reached = [
        number
        for number in range(len(results["budgets_seconds"]))
        if all(scores_at(point, point["steps_of_budgets"][number]) for point in results["points"])
    ]
    left.set_xlabel("processor minutes, one thread")
    left.set_ylabel("bits per byte of held-out text")
    left.set_title("all languages together")
    if reached:
        _draw_languages(right, results["points"], reached[-1])
        right.set_title(f"by language, after {results['budgets_seconds'][reached[-1]] / 60:.3g} minutes")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def _draw_minutes(axes: Any, budgets: list[float], point: dict[str, Any]) -> None:
    found = [
        (budget / 60, mean(ends, "bits_per_byte"))
        for budget, steps in zip(budgets, point["steps_of_budgets"], strict=True)
        if (ends := scores_at(point, steps))
    ]
    colour, marker = STYLES[point["kind"]]
    label = f"{point['kind']}, {point['embedding_parameters']:,} parameters"
    minutes, bits = zip(*found, strict=True) if found else ((), ())
    axes.plot(minutes, bits, color=colour, marker=marker, label=label)


def _draw_languages(axes: Any, points: list[dict[str, Any]], budget: int) -> None:
    first = scores_at(points[0], points[0]["steps_of_budgets"][budget])[0]["languages"]
    names = sorted(first, key=lambda name: first[name]["bits_per_byte"])
    for point in points:
        ends = scores_at(point, point["steps_of_budgets"][budget])
        bits = [mean([end["languages"][name] for end in ends], "bits_per_byte") for name in names]
        colour, marker = STYLES[point["kind"]]
        axes.plot(names, bits, color=colour, marker=marker, linestyle="none")
