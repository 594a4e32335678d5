"""The results of all configurations as a JSON file, a Markdown table and a plot."""

from pathlib import Path
from typing import Any

from ksub_ds.common.files import atomic_path, write_json

# Okabe and Ito's colours, which people with any kind of colour vision can distinguish; markers and dashes help too.
STYLES = (
    ("#000000", "o", "-"),
    ("#D55E00", "s", "-"),
    ("#E69F00", "^", "-"),
    ("#56B4E9", "v", "-"),
    ("#0072B2", "D", "-"),
    ("#000000", "o", "--"),
    ("#0072B2", "D", "--"),
    ("#0072B2", "D", ":"),
    ("#009E73", "P", ":"),
    ("#009E73", "P", "-"),
)


def write_outcome(out: Path, results: list[dict[str, Any]]) -> str:
    """Write results.json, table.md and loss.png; return the table.

    Args:
        results: one per configuration and seed, in the order of the configurations.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["name"], []).append(result)
    write_json(out / "results.json", [{k: v for k, v in result.items() if k != "training_loss"} for result in results])
    table = markdown(groups)
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    plot(out / "loss.png", groups)
    return table


def markdown(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Format the table: the mean over seeds, with the range when there are several."""
    lines = [
        "| configuration | embedding parameters | held-out loss | accuracy | best loss | seeds | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in groups.items():
        last = [result["held_out"][-1] for result in results]
        best = [min(point["loss"] for point in result["held_out"]) for result in results]
        seconds = sum(result["seconds"] for result in results) / len(results)
        lines.append(
            f"| {name} | {results[0]['parameters']['embedding']:,} | {spread([p['loss'] for p in last], 3)} "
            f"| {spread([100 * p['accuracy'] for p in last], 2)} % | {spread(best, 3)} | {len(results)} "
            f"| {seconds:.0f} |"
        )
    first = next(iter(groups.values()))[0]
    lines += [
        "",
        f"{first['settings']['steps']:,} steps, {first['tokens_seen']:,} tokens, {first['held_out'][-1]['count']:,} "
        "masked tokens of held-out text. Loss in nats per masked token; [least, greatest] over seeds.",
    ]
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Format the mean, with the range of several values."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def plot(path: Path, groups: dict[str, list[dict[str, Any]]]) -> None:
    """Plot held-out loss against steps, one line per configuration (mean over seeds, range shaded)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for (name, results), (colour, marker, dashes) in zip(groups.items(), STYLES, strict=False):
        steps = [point["step"] for point in results[0]["held_out"]]
        curves = [[point["loss"] for point in result["held_out"]] for result in results]
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        axes.plot(steps, mean, color=colour, marker=marker, linestyle=dashes, markersize=5, label=name)
        if len(curves) > 1:
            low, high = ([function(values) for values in zip(*curves, strict=True)] for function in (min, max))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("held-out loss, nats per masked token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
