"""The README's picture: time and memory of the loss, forward and backward, against the size of the vocabulary.

    python benchmarks/loss_picture.py            5 to 11 minutes on one quiet core; needs 12 GB of memory
    python benchmarks/loss_picture.py --draw     only draw what benchmarks/results/loss_sweep.json holds

512 rows, d = 512, float32, one thread. Every point is measured in a fresh process: first the memory of one call beyond
weights and codes (peak resident set), then the best time of the next calls. The references are the dense tied decoder
with F.cross_entropy, and F.linear_cross_entropy with the chunk that benchmarks/loss.py found best. Clustered codes
have the shape of XLM-R's, M x M leaves with an eighth of the code space in use. Writes loss_sweep.json and
docs/images/loss.svg, which follows the reader's light or dark theme.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
import tyro
from loss import OURS, step_of
from loss import Options as LossOptions

ROOT = Path(__file__).resolve().parents[1]
SIZES = (10_000, 30_000, 100_000, 250_002, 1_000_000)
LEAST_CALLS, LEAST_SECONDS, MOST_SECONDS = 3, 0.5, 8.0  # of the timing of a point

# variant: (what the picture calls it, colour on light paper, on dark paper, dashes)
VARIANTS = {
    "dense": ("dense, F.cross_entropy", "#24292f", "#c9d1d9", "-"),
    "linear_cross_entropy chunk 256": ("F.linear_cross_entropy", "#6e7781", "#8b949e", ":"),
    "128 x 128 leaves + bias": ("clustered codes + bias", "#bc4c00", "#f0883e", "--"),
    "128 x 128 leaves": ("clustered codes", "#bc4c00", "#f0883e", "-"),
    "positional + bias": ("positional codes + bias", "#0969da", "#58a6ff", "--"),
    "positional": ("positional codes", "#0969da", "#58a6ff", "-"),
}
PAPER, INK, GRID = ("#ffffff", "#0d1117"), ("#1f2328", "#e6edf3"), ("#d1d9e0", "#30363d")  # light, dark


@dataclass
class Options:
    sizes: tuple[int, ...] = SIZES
    """Numbers of tokens."""
    json: Path = ROOT / "benchmarks/results/loss_sweep.json"
    """The numbers."""
    out: Path = ROOT / "docs/images/loss.svg"
    """The picture."""
    draw: bool = False
    """Only draw what the JSON file holds."""
    point: tuple[str, int] | None = None
    """(internal) measure one variant at one size in this process."""


def measure_point(variant: str, tokens: int) -> dict[str, float]:
    """Extra memory of a call, then the best time of the calls after it."""
    step = step_of(variant, LossOptions(tokens=tokens))
    if variant in OURS:
        step()  # builds the index of the codes, which is the model's and not the call's
    memory = measuring.peak_memory(step)
    best, spent, calls = float("inf"), 0.0, 0
    while spent < LEAST_SECONDS or (calls < LEAST_CALLS and spent < MOST_SECONDS):
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
        best, spent, calls = min(best, seconds), spent + seconds, calls + 1
    return {"milliseconds": best * 1e3, "extra_megabytes": memory / 1e6}


def measure(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """All points, one process each."""
    points = []
    for tokens in sizes:
        for variant in VARIANTS:
            found = measuring.in_fresh_process(__file__, "--point", variant, str(tokens))
            points.append({"variant": variant, "tokens": tokens, **found})
            print(f"{tokens:>9,}  {variant:<31} {found['milliseconds']:>9,.1f} ms {found['extra_megabytes']:>8,.1f} MB")
    return points


def draw(points: list[dict[str, Any]], out: Path) -> None:
    """Two panels on logarithmic axes, every line named at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    pyplot.rcParams |= {"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "ksub_ds", "axes.linewidth": 0.8}
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), facecolor=PAPER[0])
    figure.subplots_adjust(left=0.055, right=0.795, top=0.85, bottom=0.12, wspace=0.16)
    sizes = sorted({point["tokens"] for point in points})
    titles = ("time, forward + backward", "memory beyond weights")
    for panel, key, title, unit in zip(panels, ("milliseconds", "extra_megabytes"), titles, (1e3, 1e3), strict=True):
        panel.set_facecolor(PAPER[0])
        for variant, (_, colour, _, dashes) in VARIANTS.items():
            line = sorted((point["tokens"], point[key]) for point in points if point["variant"] == variant)
            width = 2.4 if "codes" in VARIANTS[variant][0] else 1.8
            panel.plot(*zip(*line, strict=True), dashes, color=colour, linewidth=width, marker="o", markersize=4)
        panel.set(xscale="log", yscale="log")
        panel.set_title(title, loc="left", color=INK[0], fontsize=11, fontweight="bold", pad=10)
        panel.set_xticks(sizes, [f"{size // 1000}k" if size < 10**6 else f"{size // 10**6}M" for size in sizes])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_minor_locator(NullLocator())
        small, large = ("ms", "s") if key == "milliseconds" else ("MB", "GB")
        panel.yaxis.set_major_formatter(
            FuncFormatter(
                lambda value, _, small=small, large=large, unit=unit: (
                    f"{value / unit:g} {large}" if value >= unit else f"{value:g} {small}"
                )
            )
        )
        panel.tick_params(colors=INK[0], length=0)
        panel.grid(color=GRID[0], linewidth=0.6)
        panel.spines[:].set_visible(False)
        panel.set_xlabel("tokens in the vocabulary", color=INK[0])
    name_lines(panels[1], points)
    figure.text(0.012, 0.955, "The loss of 512 masked positions, d = 512, one CPU core", color=INK[0], fontsize=12)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, facecolor=PAPER[0], metadata={"Date": None} if out.suffix == ".svg" else None, dpi=110)
    pyplot.close(figure)
    if out.suffix == ".svg":
        out.write_text(follow_theme(out.read_text(encoding="utf-8")), encoding="utf-8")


def name_lines(panel: Any, points: list[dict[str, Any]]) -> None:
    """Each line's name beside its end in the last panel, moved apart where they would touch."""
    last = max(point["tokens"] for point in points)
    ends = {point["variant"]: point["extra_megabytes"] for point in points if point["tokens"] == last}
    heights = {
        variant: panel.transAxes.inverted().transform(panel.transData.transform((last, value)))[1]
        for variant, value in ends.items()
    }
    below = -1.0
    for variant in sorted(heights, key=heights.__getitem__):
        below = max(heights[variant], below + 0.075)
        name, colour, _, dashes = VARIANTS[variant]
        panel.plot(
            [1.025, 1.085], [below] * 2, dashes, color=colour, linewidth=2.2, transform=panel.transAxes, clip_on=False
        )
        panel.text(1.1, below, name, color=colour, va="center", transform=panel.transAxes)


def follow_theme(svg: str) -> str:
    """The same picture, with the dark colours for a reader whose system is dark."""
    pairs = dict([PAPER, INK, GRID, *((light, dark) for _, light, dark, _ in VARIANTS.values())])
    rules = "".join(
        f'[style*="{kind}: {light}"] {{ {kind}: {dark} !important }}\n'
        for light, dark in pairs.items()
        for kind in ("fill", "stroke")
    )
    head, tail = svg.split("<defs>", 1)
    return f"{head}<style>\n@media (prefers-color-scheme: dark) {{\n{rules}}}\n</style>\n<defs>{tail}"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    if options.point:
        print(json.dumps(measure_point(*options.point)))
        return
    if not options.draw:
        print(measuring.machine(), file=sys.stderr)
        measuring.save(options.json, {"rows": 512, "width": 512, "points": measure(options.sizes)})
    draw(json.loads(options.json.read_text(encoding="utf-8"))["points"], options.out)
    print(f"drawn: {options.out}")


if __name__ == "__main__":
    main()
