"""The outcome of the demo's run: the checks it must pass, the loss curve and the numbers."""

import json
import statistics
from pathlib import Path
from typing import Any

from ksub_ds.codes import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path
from ksub_ds.common.logging import read_lines

NATS_TO_FALL = 1.0
Lines = list[dict[str, Any]]
BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 60) -> str:
    """Draw the values as a line of bars, averaged down to at most `width` of them."""
    size = -(-len(values) // width)
    means = [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low or 1.0)
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def draw_loss(path: Path, metrics: Lines, evaluations: Lines, stopped_at: int) -> None:
    """Plot training and held-out loss against the step, with the interruption marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for lines, style, label in ((metrics, "-", "training"), (evaluations, "o-", "held out")):
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], style, label=label)
    axes.axvline(stopped_at, color="grey", linestyle=":", label="stopped and resumed")
    axes.set(xlabel="optimizer step", ylabel="loss of a masked token (nats)", title="demo: tiny, K = 3")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


def check_and_report(out: Path, max_steps: int, stopped_at: int) -> None:
    """Check the run, draw loss.png, print the summary.

    Raises:
        UserError: a step is missing or stands twice, or the held-out loss fell by less than NATS_TO_FALL.
    """
    metrics = read_lines(out / "run" / "metrics.jsonl")
    evaluations = read_lines(out / "run" / "evaluation.jsonl")
    if [line["step"] for line in metrics] != list(range(1, max_steps + 1)):
        raise UserError(f"{out}/run/metrics.jsonl: must have each of the steps 1 to {max_steps} exactly once")
    draw_loss(out / "loss.png", metrics, evaluations, stopped_at)

    table = CodeTable.load(out / "codes.safetensors")
    width = json.loads((out / "model" / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    plain, small = table.num_tokens * width, table.num_parameters(width)
    speed = statistics.median(line["tokens_per_second"] for line in metrics)
    first, last = evaluations[0], evaluations[-1]
    fall = first["loss"] - last["loss"]
    print(f"  training loss     {sparkline([line['loss'] for line in metrics])}  {metrics[-1]['loss']:.2f}")
    print(f"  held-out loss     {first['loss']:.2f} -> {last['loss']:.2f} nats (fell by {fall:.2f})")
    print(f"  masked accuracy   {first['masked_accuracy']:.1%} -> {last['masked_accuracy']:.1%}")
    print(f"  embedding         {plain:,} -> {small:,} parameters (N = {table.num_tokens:,}, d = {width})")
    print(f"  speed             {speed:,.0f} tokens/s")
    if fall < NATS_TO_FALL:
        raise UserError(f"held-out loss fell by only {fall:.2f} nats, not {NATS_TO_FALL}; see {out}/loss.png")
