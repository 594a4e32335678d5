"""What an analysis draws: the paper's Figures 2 to 10 as PDF, SVG and PNG, and explore.html with the same clouds.

Colours are safe for colour-blind readers: Okabe and Ito's for lines and markers, viridis for the last code. Points of
a cloud are pixels inside the vector files, so that a PDF of 30,000 points stays small; axes and text are vectors.

explore.html is one file that makes no request, whose clouds can be rotated, zoomed and pointed at. The drawing is a
hundred lines of script in templates/explore.html; `write_explorer` puts the numbers into it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D  # noqa: F401 - the projection="3d" below

from ksub_ds.analysis.measure import Cloud, Measurement
from ksub_ds.common.files import atomic_path

FORMATS = ("pdf", "svg", "png")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "ksub_ds",  # the same numbers give the same file
    "text.parse_math": False,  # names come from users; "$" is a dollar
}
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CODE_COLOURS = "viridis"
PLAIN_COLOUR = "#7a7a7a"
COLUMNS = 3
FOLLOWED_STYLE: dict[str, Any] = {"s": 38, "edgecolors": "white", "linewidths": 0.7, "zorder": 10, "depthshade": False}
EXPLORER_TEMPLATE = Path(__file__).parent / "templates" / "explore.html"
SCALE = 1000  # coordinates are whole thousandths of the cloud's radius: finer than a pixel, and short to write


def save_figures(measurements: Sequence[Measurement], folder: Path) -> list[str]:
    """Draw Figures 2 to 10 into `folder` and return the names without suffix."""
    names = ["embeddings", "similarity"]
    with matplotlib.rc_context(STYLE):
        _save(embeddings_figure(measurements), folder / names[0])
        _save(similarity_figure(measurements), folder / names[1])
        for measurement in measurements:
            name = measurement.encoder.name
            _save(layers_figure(measurement), folder / f"layers-{name}")
            names.append(f"layers-{name}")
            if measurement.followed:
                _save(followed_figure(measurement), folder / f"tokens-{name}")
                names.append(f"tokens-{name}")
    return names


def _save(figure: Figure, stem: Path) -> None:
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # placed once; each format would else place everything anew
    for suffix in FORMATS:
        with atomic_path(stem.with_name(f"{stem.name}.{suffix}")) as temporary:
            dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[suffix]
            figure.savefig(temporary, format=suffix, dpi=200, bbox_inches="tight", pad_inches=0.15, metadata=dated)


def embeddings_figure(measurements: Sequence[Measurement]) -> Figure:
    """Draw Figure 2: the embedding of every model in its first three principal axes."""
    figure, panels = _clouds_grid(len(measurements))
    for panel, each in zip(panels, measurements, strict=True):
        colours = _scatter(panel, each.embedding, each.encoder.last_codes)
        panel.set_title(f"{each.encoder.name}\n{_ratio(each.embedding)}")
        _colour_bar(figure, colours, panel)
    return figure


def layers_figure(measurement: Measurement) -> Figure:
    """Draw Figures 4 to 10: the states of one model layer by layer, with the followed tokens where their mean lies."""
    figure, panels = _clouds_grid(len(measurement.layers))
    colours = None
    for index, (panel, layer) in enumerate(zip(panels, measurement.layers, strict=True)):
        colours = _scatter(panel, layer.cloud, measurement.encoder.last_codes)
        for place, (word, _), colour, marker in zip(
            layer.followed, measurement.followed, _cycle(LINE_COLOURS), _cycle(MARKERS), strict=False
        ):
            if np.isfinite(place).all():
                panel.scatter(*place, color=colour, marker=marker, label=word, **FOLLOWED_STYLE)
        panel.set_title(f"layer {index}{' (embedding)' if index == 0 else ''}\n{_ratio(layer.cloud)}")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), title="mean state of the token")
    _colour_bar(figure, colours, panels)
    figure.suptitle(f"{measurement.encoder.name}: states of {measurement.sample.num_tokens:,} tokens", fontsize=10)
    return figure


def similarity_figure(measurements: Sequence[Measurement]) -> Figure:
    """Draw Figure 3: S_inter and S_intra over the layers, all models on one plot."""
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, kind, words in zip(
        panels, ("inter", "intra"), ("states of different tokens", "occurrences of one token"), strict=True
    ):
        for each, colour, marker in zip(measurements, _cycle(LINE_COLOURS), _cycle(MARKERS), strict=False):
            values = [getattr(layer.similarity, kind) for layer in each.layers]
            panel.plot(
                [np.nan if value is None else value for value in values],
                color=colour, marker=marker, markersize=4, linewidth=1.4, label=each.encoder.name,
            )  # fmt: skip
        panel.set_title(f"$S_\\mathrm{{{kind}}}$", loc="left", parse_math=True)
        panel.set_title(words, loc="right", fontsize=8)
        panel.set_xlabel("layer (0: embedding)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("mean cosine similarity")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(measurements)))
    return figure


def followed_figure(measurement: Measurement) -> Figure:
    """Draw chosen tokens through the layers: how close the mean state of each is to the centre of all states."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    panel = figure.subplots()
    lines = np.array([layer.to_centre for layer in measurement.layers])
    for column, (word, _), colour, marker in zip(
        lines.T, measurement.followed, _cycle(LINE_COLOURS), _cycle(MARKERS), strict=False
    ):
        if np.isfinite(column).all():
            panel.plot(column, color=colour, marker=marker, markersize=4, linewidth=1.4, label=word)
    panel.set_title(f"{measurement.encoder.name}: from the embedding to the last layer")
    panel.set_xlabel("layer (0: embedding)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylabel("cosine, mean state of the token\nwith the mean of all states")
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    if panel.get_lines():
        panel.legend(title="token", ncols=2)
    return figure


def _clouds_grid(count: int) -> tuple[Figure, list[Any]]:
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.7 * columns + 0.6, 2.75 * rows + 0.7), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, number + 1, projection="3d") for number in range(count)]


def _scatter(panel: Any, cloud: Cloud, last_codes: np.ndarray | None) -> Any:
    """Draw the points and return what a colour bar needs, None when there are no codes."""
    style: dict[str, Any] = {"s": 3, "alpha": 0.7, "linewidths": 0, "rasterized": True, "depthshade": False}
    if last_codes is None:
        panel.scatter(*cloud.points.T, color=PLAIN_COLOUR, **style)
        colours = None
    else:
        limits = {"vmin": 0, "vmax": max(1, int(last_codes.max()))}
        colours = panel.scatter(*cloud.points.T, c=last_codes[cloud.tokens], cmap=CODE_COLOURS, **limits, **style)
    for axis, name in zip((panel.xaxis, panel.yaxis, panel.zaxis), ("PC 1", "PC 2", "PC 3"), strict=True):
        axis.set_label_text(name)
        axis.labelpad = -11
        axis.set_ticklabels([])  # a coordinate means nothing by itself; the grid shows the scale
        axis.set_pane_color((0.97, 0.97, 0.97))
        axis.line.set_color("#888888")
    panel.grid(visible=True)
    panel.tick_params(color="#bbbbbb", length=0)
    panel.set_box_aspect(None, zoom=1.12)
    panel.computed_zorder = False  # the markers of the followed tokens lie above the points
    return colours


def _colour_bar(figure: Figure, colours: Any, panels: Any) -> None:
    if colours is not None:
        bar: Any = figure.colorbar(colours, ax=panels, shrink=0.6, aspect=30, pad=0.08, label="last code")
        bar.solids.set_alpha(1)
        bar.outline.set_visible(False)


def _ratio(cloud: Cloud) -> str:
    return f"r₃ = {cloud.axes.explained(3):.3f}"


def _cycle(values: Sequence[str]) -> list[str]:
    return [*values] * 8


def write_explorer(measurements: Sequence[Measurement], path: Path) -> None:
    """Write explore.html of some models."""
    template = EXPLORER_TEMPLATE.read_text(encoding="utf-8")
    with atomic_path(path) as temporary:
        page = template.replace("/*DATA*/", script_json([_explorer_model(each) for each in measurements]))
        temporary.write_text(page, encoding="utf-8")


def script_json(value: Any) -> str:
    """Return JSON that is safe inside <script>: no word of a user can close the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})


def _explorer_model(each: Measurement) -> dict[str, Any]:
    """Return one model: its words and last codes, numbered anew, and its clouds, the embedding first."""
    clouds = [each.embedding, *(layer.cloud for layer in each.layers)]
    ids, places = np.unique(np.concatenate([cloud.tokens for cloud in clouds]), return_inverse=True)
    borders = np.cumsum([len(cloud.tokens) for cloud in clouds])[:-1]
    vocabulary = each.encoder.tokenizer.tokens()
    codes = each.encoder.last_codes
    names = ["embedding matrix", "layer 0 (embedding)"] + [f"layer {index}" for index in range(1, len(each.layers))]
    followed = [None, *(layer.followed for layer in each.layers)]
    return {
        "name": each.encoder.name,
        "words": [vocabulary[index] if index < len(vocabulary) else f"#{index}" for index in ids.tolist()],
        "codes": None if codes is None else codes[ids].tolist(),
        "most": None if codes is None else max(1, int(codes.max())),
        "clouds": [
            _explorer_cloud(name, cloud, own.tolist(), marks, each.followed)
            for name, cloud, own, marks in zip(names, clouds, np.split(places, borders), followed, strict=True)
        ],
    }


def _explorer_cloud(
    name: str, cloud: Cloud, own: list[int], marks: np.ndarray | None, followed: list[tuple[str, int]]
) -> dict[str, Any]:
    # the centre and radius of the bulk: one far vector must not shrink all others to a dot
    middle = np.quantile(cloud.points, [0.005, 0.995], axis=0).mean(axis=0)
    radius = float(np.quantile(np.linalg.norm(cloud.points - middle, axis=1), 0.995)) or 1.0

    def scaled(points: np.ndarray) -> list[int]:
        return np.rint((points - middle) / radius * SCALE).astype(int).ravel().tolist()

    marked = zip(followed, [] if marks is None else marks, strict=False)
    return {
        "name": name,
        "r3": cloud.axes.explained(3),
        "tokens": own,
        "xyz": scaled(cloud.points),
        "followed": [[word, scaled(place) if np.isfinite(place).all() else None] for (word, _), place in marked],
    }
