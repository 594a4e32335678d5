"""The parts of a run's report that it measured while it trained, as HTML: learning and speed."""

import math
import statistics
from typing import Any

from ksub_ds.analysis.page import Line, chart, facts, number, paragraph, section, table, text, thinned
from ksub_ds.analysis.run_files import RunFiles, finite, values


def learning(run: RunFiles) -> str:
    """Loss and masked accuracy over steps and tokens, then per language."""
    if not run.metrics:
        return section("Learning", paragraph("No step has been recorded yet.", "note"))
    tokens = _token_ticks(run)
    training = thinned(_points(run.metrics, "loss"), "training")
    held_out = Line("held out", _points(run.evaluations, "loss"), dots=True)
    accuracy = [
        thinned(_points(run.metrics, "masked_accuracy"), "training, one batch"),
        Line("held out", _points(run.evaluations, "masked_accuracy"), dots=True),
    ]
    last = max(run.metrics[-1]["step"], *(line["step"] for line in run.evaluations), 1)
    charts = [
        chart("Loss, nats a masked token", [training, held_out], "step", tokens, x_limits=(0, last)),
        chart("Masked accuracy", accuracy, "step", tokens, percent=True, x_limits=(0, last)),
    ]
    band = paragraph("Lines are means where steps are many; the pale band is their range.", "soft")
    return section(
        "Learning", f'<div class="charts">{"".join(charts)}</div>', band if training.band else "", _languages(run)
    )


def _languages(run: RunFiles) -> str:
    """Per language: a small chart each on one scale, and first and last numbers."""
    if not run.evaluations:
        return paragraph("No evaluation on held-out text has been recorded.", "note")
    names = sorted({name for line in run.evaluations for name in line["languages"]})
    histories = {name: _history(run.evaluations, name) for name in names}
    losses = [loss for history in histories.values() for _, loss, _ in history]
    if not losses:
        return ""
    room = 0.05 * (max(losses) - min(losses)) or 1.0
    limits = (max(0.0, min(losses) - room), max(losses) + room)
    reach = (float(run.evaluations[0]["step"]), float(max(run.evaluations[-1]["step"], 1)))
    small = [
        chart(
            f"{text(name)}: {number(history[-1][1], 2)}",
            [Line(name, [(step, loss) for step, loss, _ in history], dots=True)],
            "step",
            small=True,
            limits=limits,
            x_limits=reach,
        )
        for name, history in histories.items()
        if history
    ]
    first, last = run.evaluations[0], run.evaluations[-1]
    counts = {name: finite(row.get("count")) or 0 for name, row in last["languages"].items() if isinstance(row, dict)}
    rows = [
        [
            f"{text(name)} <small>{number(counts.get(name))}</small>",
            _change(history[0][1], history[-1][1], 3),
            _change(history[0][2], history[-1][2], 1, percent=True),
        ]
        for name, history in histories.items()
        if history
    ]
    rows.append(
        [
            f"<b>all</b> <small>{number(sum(counts.values()))}</small>",
            _change(finite(first.get("loss")), finite(last.get("loss")), 3),
            _change(finite(first.get("masked_accuracy")), finite(last.get("masked_accuracy")), 1, percent=True),
        ]
    )
    header = ["language <small>tokens scored</small>", "loss", "masked accuracy"]
    caption = f"held out, step {first['step']:,} and step {last['step']:,}"
    return ('<h3>Held-out loss by language</h3><div class="many">' + "".join(small) + "</div>") + table(
        header, rows, caption
    )


def _change(first: float | None, last: float | None, digits: int, percent: bool = False) -> str:
    return f"{number(first, digits, percent)} → {number(last, digits, percent)}"


def _history(evaluations: list[dict[str, Any]], name: str) -> list[tuple[int, float, float | None]]:
    """(step, loss, masked accuracy) of one language."""
    found = []
    for line in evaluations:
        row = line["languages"].get(name)
        loss = finite(row.get("loss")) if isinstance(row, dict) else None
        if loss is not None:
            found.append((line["step"], loss, finite(row.get("masked_accuracy"))))
    return found


def speed(run: RunFiles) -> str:
    """Throughput, time and the wait for data."""
    speeds, seconds = values(run.metrics, "tokens_per_second"), values(run.metrics, "step_seconds")
    if not speeds or not seconds:
        return ""
    waits = values(run.metrics, "data_wait_seconds")
    last = max(run.metrics[-1]["step"], 1)
    tokens = _token_ticks(run)
    charts = [
        chart("Tokens a second", [thinned(_points(run.metrics, "tokens_per_second"), "tokens a second")], "step",
              tokens, x_limits=(0, last)),
        chart("Learning rate", [thinned(_points(run.metrics, "lr"), "learning rate")], "step", tokens,
              x_limits=(0, last)),
        chart("Norm of the gradient", [thinned(_points(run.metrics, "grad_norm"), "norm")], "step", tokens,
              x_limits=(0, last)),
    ]  # fmt: skip
    whole = math.fsum(seconds)
    rows = [
        ("tokens a second, median", number(statistics.median(speeds))),
        ("tokens a second, slowest and fastest step", f"{number(min(speeds))} to {number(max(speeds))}"),
        ("time in steps", f"{number(whole, 1)} s"),
        ("wait for data", f"{number(math.fsum(waits), 3)} s, {number(math.fsum(waits) / whole, 2, percent=True)}"),
        ("tokens in all", number(run.tokens_at(run.metrics[-1]["step"]))),
    ]
    return section("Speed", facts(rows), f'<div class="charts">{"".join(charts)}</div>')


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], value) for line in lines if (value := finite(line.get(key))) is not None]


def _token_ticks(run: RunFiles) -> list[tuple[float, str]]:
    """Two steps of the axis with the tokens seen by then."""
    counted = [(line["step"], line["tokens"]) for line in run.metrics if finite(line.get("tokens")) is not None]
    if len(counted) < 2:
        return []
    places = [counted[round(part * (len(counted) - 1))] for part in (0.5, 1)]
    return [(step, f"{_short(tokens)} tokens") for step, tokens in dict(places).items()]


def _short(count: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"
