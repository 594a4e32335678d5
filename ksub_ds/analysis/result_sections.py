"""The sections of a run's report that come from elsewhere: scores on XNLI and GLUE, and an analysis."""

import base64
import re
from pathlib import Path
from typing import Any

from ksub_ds.analysis.page import facts, number, paragraph, section, table, text
from ksub_ds.analysis.run_files import finite
from ksub_ds.common.errors import OTHER_FORM, UserError
from ksub_ds.common.files import read_json
from ksub_ds.evaluate.data.tasks import GLUE_TASKS, LANGUAGES, PAPER_XNLI, paper_glue_row

FIGURE_WORDS = {
    "embeddings": "The embedding in its first three principal axes (as Figure 2)",
    "similarity": "Mean cosine similarity by layer (as Figure 3)",
    "layers": "States of each layer (as Figures 4 to 10)",
    "tokens": "Chosen tokens through the layers",
}
LARGEST_PICTURE = 20_000_000  # bytes
FIGURE_DPI = 170  # a little larger than in print, where it is 200


def scores(files: dict[Path, dict[str, Any]]) -> str:
    """Return one table for each setting of XNLI, and one each for GLUE, data sets of one's own and bits per byte.

    Args:
        files: results by their files.

    Raises:
        UserError: one is damaged.
    """
    for path, result in files.items():
        try:
            _score_tables([result])
        except OTHER_FORM as error:
            raise UserError(f"{path}: is damaged ({error!r}); run `ksub evaluate` again") from error
    return _score_tables(list(files.values()))


def _score_tables(results: list[dict[str, Any]]) -> str:
    own = [result for result in results if result.get("task") == "classify"]
    scored = [result for result in results if result.get("task") == "lm"]
    results = [result for result in results if result not in [*own, *scored]]
    xnli = [result for result in results if result.get("task") != "glue" and result.get("setting") != "glue"]
    glue = [result for result in results if result not in xnli]
    settings = dict.fromkeys(str(result.get("setting")) for result in xnli)
    tables = [
        _xnli(setting, [result for result in xnli if str(result.get("setting")) == setting]) for setting in settings
    ]
    tables += [_glue(glue)] if glue else []
    tables += [_classify(own)] if own else []
    tables += [_bits_per_byte(scored)] if scored else []
    return section("Scores", *tables, *(_settings(result) for result in [*results, *own, *scored]))


def _bits_per_byte(results: list[dict[str, Any]]) -> str:
    languages = dict.fromkeys(language for result in results for language in result["languages"])
    rows = [
        [
            text(language),
            *(number(finite(result["languages"].get(language, {}).get("bits_per_byte")), 3) for result in results),
        ]
        for language in languages
    ]
    rows.append(["<b>mean</b>", *(number(finite(result.get("average")), 3) for result in results)])
    return "<h3>Bits per byte</h3>" + table(["language", *map(_name, results)], rows)


def _classify(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            _name(result),
            text(Path(str(result["data"]["path"])).name),
            *(_xnli_cell(result["scores"].get(split)) for split in ("validation", "test")),
        ]
        for result in results
    ]
    return "<h3>Other data sets</h3>" + table(["model", "data", "validation accuracy", "test accuracy"], rows)


def _xnli(setting: str, results: list[dict[str, Any]]) -> str:
    """Return languages as rows, models as columns: it fits a phone."""
    kinds = list(dict.fromkeys(str(_model(result).get("kind")) for result in results))
    paper = {kind: row for kind in kinds if (row := PAPER_XNLI.get(setting, {}).get(kind)) is not None}
    others = sorted({language for result in results for language in result["test"]} - set(LANGUAGES))
    header = ["language", *(_name(result) for result in results), *(f"paper, {text(kind)}" for kind in paper)]
    rows = []
    for language in (*LANGUAGES, *others):
        own = [_xnli_cell(result["test"].get(language)) for result in results]
        rows.append([text(language), *own, *(_paper_cell(row.get(language)) for row in paper.values())])
    average = [
        _xnli_cell({"accuracy": result.get("average"), "interval": result.get("average_interval")})
        for result in results
    ]
    rows.append(["<b>average</b>", *average, *(_paper_cell(row.get("average")) for row in paper.values())])
    return f"<h3>XNLI, {text(setting)} (Table 4)</h3>" + table(header, rows)


def _xnli_cell(row: Any) -> str:
    if not isinstance(row, dict):
        return number(None)
    cell = number(finite(row.get("accuracy")), 1, percent=True)
    interval = row.get("interval")
    if isinstance(interval, list) and len(interval) == 2:
        low, high = (number(finite(value), 1, percent=True) for value in interval)
        cell += f" <small>{low} to {high}</small>"
    return cell


def _paper_cell(value: float | None) -> str:
    return number(value, 1) + (" %" if value is not None else "")


def _glue(results: list[dict[str, Any]]) -> str:
    """Return tasks and metrics as rows (the paper has the first metric), each model's best and median as columns."""
    header = ["task"]
    papers = []
    for result in results:
        header += [f"{_name(result)}, best", f"{_name(result)}, median"]
        found = paper_glue_row(str(_model(result).get("kind", "")), _model(result).get("num_tables"))
        if found is not None and found not in papers:
            papers.append(found)
    header += [f"paper, {text(name)}" for name, _ in papers]
    rows = []
    for task in GLUE_TASKS:
        own = [_part(result["test"].get(task), what) for result in results for what in ("best", "median")]
        names = [*GLUE_TASKS[task].metrics, "mismatched"]
        names = [name for name in names if any(finite(values.get(name)) is not None for values in own)]
        for index, name in enumerate(names or [""]):
            label = ("" if index else text(task)) + f" <small>{text(name)}</small>"
            cells = [number(finite(values.get(name)), 1, percent=True) for values in own]
            rows.append([label, *cells, *("" if index else _paper_cell(row.get(task)) for _, row in papers)])
    return "<h3>GLUE (Tables 2 and 3)</h3>" + table(header, rows)


def _part(row: Any, what: str) -> dict[str, Any]:
    """Return the best or the median values of a task's row; nothing if it has none."""
    values = row.get(what) if isinstance(row, dict) else None
    return values if isinstance(values, dict) else {}


def _settings(result: dict[str, Any]) -> str:
    """Return what a reader must know of a result: settings, selection, what was missing."""
    rows = [("selection", text(result["selection"]))] if result.get("selection") else []
    seeds = result.get("seeds")
    if isinstance(seeds, dict) and len(seeds) > 1:  # of a single one, the table has it all
        shown = (
            f"{text(seed)}: {number(finite(values.get('average')), 1, percent=True)}"
            for seed, values in seeds.items()
            if isinstance(values, dict)
        )
        rows.append(("average of each seed", ", ".join(shown)))
    if one_answer := [task for task, row in result.get("test", {}).items() if _part(row, "best").get("degenerate")]:
        rows.append(("gave one answer to all rows", text(_words(one_answer))))
    rows += [(key, text(_words(value))) for key in ("settings", "missing") if (value := result.get(key))]
    data = result.get("data")
    if isinstance(data, dict) and (
        missing := {key: value for key, value in (data.get("missing") or {}).items() if value}
    ):
        rows.append(("no data for", text(_words(missing))))
    if isinstance(data, dict) and data.get("fingerprint"):
        rows.append(("data fingerprint", f"<code>{text(data['fingerprint'])}</code>"))
    if _model(result).get("fingerprint"):
        rows.append(("model fingerprint", f"<code>{text(_model(result)['fingerprint'])}</code>"))
    return f"<h3>{_name(result)}: {text(result.get('setting'))}</h3>" + facts(rows) if rows else ""


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_words(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list | tuple):
        return ", ".join(_words(inner) for inner in value)
    return str(value)


def _model(result: dict[str, Any]) -> dict[str, Any]:
    model = result.get("model")
    return model if isinstance(model, dict) else {"path": model}


def _name(result: dict[str, Any]) -> str:
    path = Path(str(_model(result).get("path") or "model"))
    return text(path.name or path)


def analyses(folders: list[Path]) -> str:
    """Return numbers and figures of `ksub analyze`.

    Raises:
        UserError: an analysis.json that is damaged.
    """
    parts = []
    for folder in folders:
        path = folder / "analysis.json"
        try:
            parts.append(_analysis(folder, read_json(path)))
        except OTHER_FORM as error:
            raise UserError(f"{path}: is damaged ({error!r}); run `ksub analyze` again") from error
    return section("Analysis", *parts)


def _analysis(folder: Path, values: Any) -> str:
    rows = [
        [
            text(model["name"]),
            number(layer["layer"]),
            number(layer["explained_variance_ratio"].get("3"), 3),
            number(layer["s_inter"], 3),
            number(layer["s_intra"], 3),
        ]
        for model in values["models"]
        for layer in model["layers"]
    ]
    header = ["model", "layer", "r<sub>3</sub>", "S<sub>inter</sub>", "S<sub>intra</sub>"]
    languages = ", ".join(values["settings"]["languages"])
    words = f"On {number(values['models'][0]['layers'][0]['states'])} tokens of {text(languages)}; layer 0 is the "
    words += "embedding's output. r<sub>3</sub> is the share of the variance on three axes, S<sub>inter</sub> the mean "
    words += "cosine of states of different tokens, S<sub>intra</sub> of occurrences of one token."
    pictures = "".join(_picture(folder, str(name)) for name in values["figures"])
    return pictures + paragraph(words, "soft") + table(header, rows)


def _picture(folder: Path, name: str) -> str:
    path = folder / f"{name}.png"
    if not re.fullmatch(r"[\w.+=-]+", name) or not path.is_file() or path.stat().st_size > LARGEST_PICTURE:
        return ""
    kind, _, model = name.partition("-")
    words = FIGURE_WORDS.get(kind, kind) + (f": {model}" if model else "")
    picture = path.read_bytes()
    width = round(int.from_bytes(picture[16:20]) * 96 / FIGURE_DPI)  # of a PNG, in CSS pixels: as wide as in print
    data = base64.b64encode(picture).decode()
    return (
        f'<figure class="picture"><img alt="{text(words)}" width="{width}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text(words)}</figcaption></figure>"
    )
