"""The outcome of the experiment: results.json, a table, and the picture of the frontier."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from ksub_ds.common.files import atomic_path, write_json


def write_outcome(out: Path, points: list[dict[str, Any]], minutes: float) -> None:
    """Write results.json, table.md and frontier.png.

    Args:
        out: folder.
        points: measured so far; the first is the original.
        minutes: of distillation, or 0.
    """
    results = {
        "points": points,
        "minutes": minutes,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, no GPU, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(out / "results.json", results)
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(table(points), encoding="utf-8")
    _picture(out / "frontier.png", points)


def table(points: list[dict[str, Any]]) -> str:
    """Format the points as a Markdown table, the smallest embeddings last."""
    distilled = any("after" in point for point in points)
    more = " distilled: Spearman | found first |" if distilled else ""
    lines = [
        f"| method | bytes | 1/ | Spearman | of the original's | found first |{more}",
        "|---|---|---|---|---|---|" + ("---|---|" if distilled else ""),
    ]
    best = points[0]["before"]["spearman"]
    for point in sorted(points, key=lambda point: -point["bytes"]):
        before, after = point["before"], point.get("after")
        line = (
            f"| {point['method']} | {point['bytes']:,} | {point['ratio']:.1f} | {before['spearman']:.2f} | "
            f"{100 * before['spearman'] / best:.1f} % | {before['found_first']:.1f} % |"
        )
        if distilled:
            line += f" {after['spearman']:.2f} | {after['found_first']:.1f} % |" if after else " | |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _picture(path: Path, points: list[dict[str, Any]]) -> None:
    """Draw the score against the ratio, a line for each method; dashed after distillation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    axes.axhline(points[0]["before"]["spearman"], color="grey", linewidth=1, linestyle=":")
    axes.annotate("original", (1, points[0]["before"]["spearman"]), xytext=(2, 3), textcoords="offset points")
    for method in dict.fromkeys(point["method"] for point in points[1:]):
        rows = sorted((point for point in points if point["method"] == method), key=lambda point: point["ratio"])
        ratios = [row["ratio"] for row in rows]
        wide = 2.5 if method == "ours" else 1.2
        drawn = axes.plot(ratios, [row["before"]["spearman"] for row in rows], "o-", label=method, linewidth=wide)
        after = [(row["ratio"], row["after"]["spearman"]) for row in rows if "after" in row]
        if after:
            axes.plot(*zip(*after, strict=True), "o--", color=drawn[0].get_color(), markersize=4, linewidth=wide)
    axes.set_xscale("log")
    ticks = [1, 2, 4, 8, 16, 30, 60]
    axes.set_xticks(ticks, [f"1/{tick}" if tick > 1 else "1" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bytes of the embedding, codes and all, as a part of the original's")
    axes.set_ylabel("STS-B dev, Spearman x 100")
    axes.set_title(
        "all-MiniLM-L6-v2 with a small embedding" + (" (dashed: distilled)" if "after" in points[-1] else "")
    )
    if len(points) > 1:
        axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
