"""The outcome of the experiment: results.json, a table, and the picture of the frontier."""

import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ksub_ds.common.files import atomic_path, write_json


def write_outcome(out: Path, model: str, points: list[dict[str, Any]]) -> None:
    """Write results.json, table.md and frontier.png.

    Args:
        out: folder.
        model: its name.
        points: measured so far; the first is the original.
    """
    for point in points:
        point["ratio"] = points[0]["bytes"] / point["bytes"]
    results = {
        "model": model,
        "points": points,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, no GPU, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(out / "results.json", results)
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(table(points), encoding="utf-8")
    _picture(out / "frontier.png", model, points)


def mean(seeds: dict[str, dict[str, Any]], measure: str) -> float:
    """Return the mean of a measure over seeds, all of which have it."""
    return statistics.fmean(seed[measure] for seed in seeds.values())


def _with_spread(seeds: dict[str, dict[str, Any]], measure: str, digits: int = 2) -> str:
    """Format the mean over seeds, and where there are several, their standard deviation; empty without any.

    Seeds of a folder that is older than the measure lack it.
    """
    values = [seed[measure] for seed in seeds.values() if measure in seed]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def table(points: list[dict[str, Any]]) -> str:
    """Format the points as a Markdown table, the smallest embeddings last."""
    steps = sorted({each for point in points for each in point["after"]}, key=int)
    more = "".join(f" distilled {each} steps | found first |" for each in steps)
    lines = [
        f"| method | bytes | 1/ | Spearman | of the original's | found first | cosine |{more}",
        "|---" * (7 + 2 * len(steps)) + "|",
    ]
    best = mean(points[0]["before"], "spearman")
    for point in sorted(points, key=lambda point: -point["bytes"]):
        before = point["before"]
        line = (
            f"| {point['method']} | {point['bytes']:,} | {point['ratio']:.1f} | {_with_spread(before, 'spearman')} | "
            f"{100 * mean(before, 'spearman') / best:.1f} % | {mean(before, 'found_first'):.1f} % | "
            f"{_with_spread(before, 'cosine', 4)} |"
        )
        for each in steps:
            after = point["after"].get(each)
            line += f" {_with_spread(after, 'spearman')} | {mean(after, 'found_first'):.1f} % |" if after else " | |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _picture(path: Path, model: str, points: list[dict[str, Any]]) -> None:
    """Draw the score against the ratio, a line for each method; dashed after distillation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    original = mean(points[0]["before"], "spearman")
    axes.axhline(original, color="grey", linewidth=1, linestyle=":")
    axes.annotate("original", (1, original), xytext=(2, 3), textcoords="offset points")
    longest = max((each for point in points for each in point["after"]), key=int, default=None)
    for method in dict.fromkeys(point["method"] for point in points[1:]):
        rows = sorted((point for point in points if point["method"] == method), key=lambda point: point["ratio"])
        wide = 2.5 if method == "ours" else 1.2
        ratios, scores = [row["ratio"] for row in rows], [mean(row["before"], "spearman") for row in rows]
        colour = axes.plot(ratios, scores, "o-", label=method, linewidth=wide)[0].get_color()
        for row in rows:
            if row["after"]:
                most = row["after"][max(row["after"], key=int)]
                scored = [mean(row["before"], "spearman"), mean(most, "spearman")]
                axes.plot([row["ratio"]] * 2, scored, "^:", color=colour, markersize=6, markevery=[1])
    axes.set_xscale("log")
    ticks = [1, 2, 4, 8, 16, 30, 60]
    axes.set_xticks(ticks, [f"1/{tick}" if tick > 1 else "1" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bytes of the embedding, codes and all, as a part of the original's")
    axes.set_ylabel("STS-B, Spearman x 100")
    axes.set_title(
        f"{model} with a small embedding" + (f" (triangles: distilled for up to {longest} steps)" * bool(longest))
    )
    if len(points) > 1:
        axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
