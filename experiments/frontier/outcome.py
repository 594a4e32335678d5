"""The results of the runs so far: results.json, table.md and frontier.png."""

from pathlib import Path
from typing import Any

from experiments.equal_time.written import write_files
from ksub_ds.common.files import atomic_path

# Okabe and Ito's colours, which people with any kind of colour vision can distinguish; markers help too.
STYLES = {
    "plain": ("#000000", "o"),
    "positional": ("#D55E00", "s"),
    "clustered": ("#0072B2", "D"),
    "dedicated": ("#009E73", "^"),
}
LABELS = {"dedicated": "clustered, some tokens with rows of their own"}


def write_outcome(out: Path, results: dict[str, Any]) -> str:
    """Write the three files; return the table.

    Args:
        out: the folder.
        results: what run.py's `collect` returns.
    """
    return write_files(out, results, markdown, plot, "frontier.png")


def mean_loss(point: dict[str, Any], steps: int) -> float | None:
    """Return the mean held-out loss of a point's seeds after so many steps; None if no run has come there."""
    losses = [end["loss"] for end in point["ends"] if end["steps"] == steps]
    return sum(losses) / len(losses) if losses else None


def cell(point: dict[str, Any], steps: int) -> str:
    """Format loss and accuracy of a point after so many steps: the mean over seeds, with their range and number."""
    ends = [end for end in point["ends"] if end["steps"] == steps]
    if not ends:
        return ""
    losses = [end["loss"] for end in ends]
    spread = f" [{min(losses):.3f}, {max(losses):.3f}] of {len(losses)}" if len(losses) > 1 else ""
    accuracy = sum(end["masked_accuracy"] for end in ends) / len(ends)
    return f"{sum(losses) / len(losses):.3f}{spread}, {100 * accuracy:.1f} %"


def markdown(results: dict[str, Any]) -> str:
    """Format the table: each embedding's loss and accuracy at every budget and at equal steps."""
    budgets, equal = results["budgets_seconds"], results["equal_steps"]
    columns = [f"{budget:,.0f} s" for budget in budgets] + ([f"{equal:,} steps"] if equal else [])
    lines = [
        "| embedding | parameters | of plain's | seconds a step | " + " | ".join(columns) + " |",
        "|---|---|---|---|" + "---|" * len(columns),
    ]
    for point in results["points"]:
        cells = [
            f"{cell(point, steps)} ({steps:,} steps)" if cell(point, steps) else ""
            for steps in point["steps_of_budgets"]
        ]
        cells += [cell(point, equal)] if equal else []
        share = point["embedding_parameters"] / results["plain_parameters"]
        lines.append(
            f"| {point['name']} | {point['embedding_parameters']:,} | {share:.3%} | {point['seconds_a_step']:.3f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def plot(path: Path, results: dict[str, Any]) -> None:
    """Plot held-out loss against embedding parameters: left at equal processor time, right at equal steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points, budgets, equal = results["points"], results["budgets_seconds"], results["equal_steps"]
    compared = equal and sum(mean_loss(point, equal) is not None for point in points) > 1
    panels = 2 if compared else 1
    figure, grid = plt.subplots(
        1, panels, figsize=(1 + 4 * panels, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    left, *right = grid[0]
    for number, budget in enumerate(budgets):
        last = number == len(budgets) - 1
        _draw(left, results, [point["steps_of_budgets"][number] for point in points], last)
        if not last:
            left.plot(
                [], [], color="#888888", marker="o", fillstyle="none", linestyle=":", label=f"{budget / 60:.3g} min"
            )
    left.set_title(f"equal processor time: {', '.join(f'{budget / 60:.3g}' for budget in budgets)} minutes")
    for axes in right:
        _draw(axes, results, [equal] * len(points), True)
        axes.set_title(f"equal steps: {equal:,}")
    for axes in (left, *right):
        axes.set_xscale("log")
        axes.set_xlabel("embedding parameters")
        axes.grid(alpha=0.3)
    left.set_ylabel("held-out loss, nats per masked token")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2 * panels, frameon=False, fontsize=8
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def _draw(axes: Any, results: dict[str, Any], steps: list[int], filled: bool) -> None:
    """Draw one line per kind of embedding through the points that have been trained to their number of steps."""
    for kind, (colour, marker) in STYLES.items():
        found = [
            (point["embedding_parameters"], loss)
            for point, each in zip(results["points"], steps, strict=True)
            if point["kind"] == kind and (loss := mean_loss(point, each)) is not None
        ]
        if found:
            label = LABELS.get(kind, kind) if filled else None
            style = {"fillstyle": "full" if filled else "none", "linestyle": "-" if filled else ":"}
            axes.plot(
                *zip(*sorted(found), strict=True), color=colour, marker=marker, markersize=6, label=label, **style
            )
