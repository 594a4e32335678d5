"""explore.html: the point clouds of an analysis, to rotate, zoom and point at; one file that makes no request.

The drawing is a hundred lines of script in templates/explore.html; this module puts the numbers into it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.analysis.measure import Cloud, Measurement
from ksub_ds.common.files import atomic_path

TEMPLATES = Path(__file__).parent / "templates"
SCALE = 1000  # coordinates are whole thousandths of the cloud's radius: finer than a pixel, and short to write


def write_explorer(measurements: Sequence[Measurement], path: Path) -> None:
    """Write the page of some models."""
    template = (TEMPLATES / "explore.html").read_text(encoding="utf-8")
    with atomic_path(path) as temporary:
        page = template.replace("/*DATA*/", script_json([_model(each) for each in measurements]))
        temporary.write_text(page, encoding="utf-8")


def script_json(value: Any) -> str:
    """Return JSON that is safe inside <script>: no word of a user can close the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})


def _model(each: Measurement) -> dict[str, Any]:
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
            _cloud(name, cloud, own.tolist(), marks, each.followed)
            for name, cloud, own, marks in zip(names, clouds, np.split(places, borders), followed, strict=True)
        ],
    }


def _cloud(
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
