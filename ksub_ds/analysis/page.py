"""Pieces of a self-contained HTML page: escaped text, exact numbers, tables, line charts. No script, no request.

Every number stands in a <data value="..."> element: the value as JSON has it, the text rounded for people. A chart is
stretched SVG for the lines (which keep their width) with HTML labels around it, so that text has the same size on a
phone and on paper.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NOTHING = "–"
MOST_POINTS = 400  # of a line: more than the pixels of a chart say nothing
COLOURS = 7  # classes c0 .. c6 of templates/report.css


def text(value: Any) -> str:
    """Return any value as HTML text, safe in elements and in quoted attributes."""
    return html.escape(str(value))


def number(value: float | int | None, digits: int = 0, percent: bool = False) -> str:
    """Return a number as HTML: exact for programs, rounded for people.

    Args:
        value: the number; `–` is shown for None and for what is not finite.
        digits: shown after the point.
        percent: show a share of 1 in percent.
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    shown = f"{100 * value:.{digits}f} %" if percent else f"{value:,.{digits}f}"
    return f'<data value="{value!r}">{shown}</data>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", words: int = 1) -> str:
    """Return a table of HTML.

    Args:
        header: cells of the first row, as HTML.
        rows: of as many cells each, as HTML.
        caption: plain text above the table. [none]
        words: how many columns, from the left, hold words; the others hold numbers, aligned right.
    """
    kinds = ["w" if index < words else "n" for index in range(len(header))]
    head = "".join(f'<th class="{kind}" scope="col">{cell}</th>' for kind, cell in zip(kinds, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """List names and values (HTML), one below the other."""
    return "<dl>" + "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in rows) + "</dl>"


def tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    """List large numbers: (name, value, remark), values and remarks as HTML."""
    cells = (f"<li><b>{value}</b><span>{text(name)}</span><small>{remark}</small></li>" for name, value, remark in rows)
    return f'<ul class="tiles">{"".join(cells)}</ul>'


def section(title: str, *parts: str) -> str:
    """Return a section with its heading; empty parts are left out, and so is an empty section."""
    body = "\n".join(part for part in parts if part)
    return f"<section><h2>{text(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(markup: str, kind: str = "") -> str:
    """Return a paragraph of HTML."""
    return f'<p class="{kind}">{markup}</p>' if kind else f"<p>{markup}</p>"


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name and its points (x, y), x rising.

    Attributes:
        band: (x, low, high) drawn as an area behind it.
        dots: mark each point, with its value as a tooltip; for few points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    dots: bool = False


def thinned(points: Sequence[tuple[float, float]], name: str) -> Line:
    """Return a line of at most `MOST_POINTS` means, with the range of the values behind each as a band."""
    if len(points) <= MOST_POINTS:
        return Line(name, points)
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    middle = [(group[len(group) // 2][0], sum(y for _, y in group) / len(group)) for group in groups]
    band = [
        (x, min(y for _, y in group), max(y for _, y in group)) for (x, _), group in zip(middle, groups, strict=True)
    ]
    return Line(name, middle, band)


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    second_x: Sequence[tuple[float, str]] = (),
    percent: bool = False,
    small: bool = False,
    limits: tuple[float, float] | None = None,
    x_limits: tuple[float, float] | None = None,
) -> str:
    """Draw a line chart.

    Args:
        title: above it, as HTML.
        lines: those without points are left out.
        x_label: below it.
        second_x: (x, text) of a second row below the axis, for example tokens beside steps.
        percent: y is a share.
        small: one of many; only the limits of its axes are labelled.
        limits: of the y axis. [the data's, and some room]
        x_limits: of the x axis. [the data's]
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    ys = [y for line in lines for _, y in line.points]
    low, high = limits or _around(min(ys), max(ys))
    xs = [x for line in lines for x, _ in line.points]
    left, right = x_limits or (min(xs), max(xs))
    right = right if right > left else left + 1

    def place(x: float, y: float) -> str:
        return f"{1000 * (x - left) / (right - left):.1f},{1000 * (high - min(max(y, low), high)) / (high - low):.1f}"

    ticks = [low, high] if small else _ticks(low, high)
    drawn = "".join(f'<line class="grid" x1="0" x2="1000" y1="{y}" y2="{y}"/>' for y in _heights(ticks, low, high))
    marks = ""
    for index, line in enumerate(lines):
        colour = f"c{index % COLOURS}"
        if line.band:
            edge = [place(x, top) for x, _, top in line.band] + [place(x, down) for x, down, _ in line.band[::-1]]
            drawn += f'<polygon class="band {colour}" points="{" ".join(edge)}"/>'
        drawn += f'<polyline class="{colour}" points="{" ".join(place(x, y) for x, y in line.points)}"/>'
        for x, y in line.points if line.dots or len(line.points) == 1 else ():
            across, down = (float(part) / 10 for part in place(x, y).split(","))
            value = f"{line.name}, {x_label} {x:,.0f}: {_tick(y, percent, 4)}"
            marks += f'<i class="dot {colour}" style="left:{across:.1f}%;top:{down:.1f}%" title="{text(value)}"></i>'
    y_texts = "".join(
        f'<span class="y" style="top:{y / 10:.1f}%">{_tick(value, percent, _digits(ticks, percent))}</span>'
        for value, y in zip(ticks, _heights(ticks, low, high), strict=True)
    )
    x_ticks = [left, right] if small else _ticks(left, right, whole=True)
    x_texts = "".join(_x_text(f"{x:,.0f}", (x - left) / (right - left)) for x in x_ticks)
    second = "".join(_x_text(words, (x - left) / (right - left)) for x, words in second_x if left <= x <= right)
    names = "".join(f'<li class="c{index % COLOURS}">{text(line.name)}</li>' for index, line in enumerate(lines))
    below = f'<div class="x">{x_texts}</div>' + (f'<div class="x">{second}</div>' if second else "")
    return (
        f'<figure class="chart{" small" if small else ""}"><figcaption>{title}</figcaption>'
        f'<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>'
        f"{marks}{y_texts}</div>{below}"
        + ("" if small else f'<div class="label">{text(x_label)}{", and tokens seen" if second else ""}</div>')
        + (f'<ul class="legend">{names}</ul>' if len(lines) > 1 else "")
        + "</figure>"
    )


def _x_text(words: str, part: float) -> str:
    side = "left" if part < 0.08 else "right" if part > 0.92 else "middle"
    return f'<span class="{side}" style="left:{100 * part:.1f}%">{text(words)}</span>'


def _around(low: float, high: float) -> tuple[float, float]:
    room = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _heights(values: Sequence[float], low: float, high: float) -> list[float]:
    return [round(1000 * (high - value) / (high - low), 1) for value in values]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return about four round numbers between two others."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(step * factor for factor in (0.2, 0.25, 0.5, 1, 2, 2.5, 5) if (high - low) / (step * factor) <= 5)
    step = max(1.0, round(step)) if whole else step
    first = math.ceil(low / step)
    return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _digits(ticks: Sequence[float], percent: bool) -> int:
    """Return how many decimals tell neighbouring ticks apart."""
    step = (ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0) * (100 if percent else 1)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return digits if math.isclose(round(step, digits), step, rel_tol=1e-3) else digits + 1


def _tick(value: float, percent: bool, digits: int) -> str:
    return f"{100 * value:.{digits}f} %" if percent else f"{value:,.{digits}f}"
