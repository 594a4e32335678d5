"""Tables of results beside the paper's, as Markdown, CSV or LaTeX."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ksub_ds.common.files import atomic_path
from ksub_ds.evaluate.data.tasks import GLUE_TASKS, LANGUAGES, PAPER_XNLI, paper_glue_row

Format = Literal["markdown", "csv", "latex"]
NOTHING = "–"
GLUE_NAMES = {"sst2": "SST-2", "mnli": "MNLI", "qnli": "QNLI", "qqp": "QQP", "rte": "RTE", "mrpc": "MRPC"} | {
    "cola": "CoLA",
    "stsb": "STS-B",
}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def write_text(path: Path, text: str) -> None:
    """Write text atomically; what UTF-8 cannot hold (bytes of a path) is escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def render(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], form: Format) -> str:
    """Render one table.

    Args:
        title: becomes a heading, a comment line or a caption.
        header: cells of the first row.
        rows: of as many cells each.
        form: in which it is written.
    """
    if form == "csv":
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([[f"# {title}"], header, *rows])
        return stream.getvalue()
    if form == "latex":
        lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in (header, *rows)]
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{_latex(title)}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
                r"\hline",
                lines[0],
                r"\hline",
                *lines[1:],
                r"\hline",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"### {title}", "", lines[0], rule, *lines[1:], ""])


def _latex(cell: str) -> str:
    return re.sub(r"[\\~^&%$#_{}]", lambda found: _LATEX[found[0]], cell).replace("–", "--")


def percent(value: float | None) -> str:
    """Format a share as percent: 0.5213 -> 52.1."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def signed(value: float | None) -> str:
    """Format a difference in points: -0.0142 -> -1.4."""
    return NOTHING if value is None else f"{100 * value:+.1f}"


def short_name(result: dict[str, Any], others: Sequence[dict[str, Any]] = ()) -> str:
    """Return the last part of a model's path, with its kind; what tells it from others where they end alike.

    That is the whole path, or of one path the settings that differ, or else the folder of the results.
    """
    path = Path(result["model"]["path"])
    alike = [each for each in others if Path(each["model"]["path"]).name == path.name and each is not result]
    paths = {each["model"]["path"] for each in alike}
    name = path if paths - {result["model"]["path"]} else path.name or path
    told = [str(result["model"].get("kind", "unknown"))]
    if result["model"]["path"] in paths:
        told += _own_settings(result, alike) or [str(result["_folder"])]
    return f"{name} ({', '.join(told)})"


def _own_settings(result: dict[str, Any], others: Sequence[dict[str, Any]]) -> list[str]:
    """Return the settings, as words, that one of the others has not or has otherwise."""
    values = [each.get("settings", {}) for each in (result, *others)]
    names = dict.fromkeys(name for each in values for name in each)
    different = [name for name in names if any(each.get(name) != values[0].get(name) for each in values[1:])]
    return [f"{name.replace('_', ' ')} {_setting(values[0].get(name))}" for name in different]


def _setting(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else NOTHING if value is None else str(value)


# ---------------------------------------------------------------- XNLI


def xnli_table(results: Sequence[dict[str, Any]], form: Format) -> str:
    """Render Table 4's rows: each result, the paper's row of its kind, and the difference."""
    setting = results[0]["setting"]
    header = ["model", *LANGUAGES, "avg"]
    rows = []
    for result in results:
        rows.append([short_name(result, results), *(percent(value) for value in xnli_numbers(result))])
        low, high = result["average_interval"]
        rows.append(["  95 % interval", *_intervals(result), f"{percent(low)}-{percent(high)}"])
    kinds = list(dict.fromkeys(result["model"].get("kind") for result in results))
    for kind in kinds or ["plain"]:
        row = PAPER_XNLI[setting].get(str(kind))
        if row is not None:
            rows.append([f"paper, {kind}", *(f"{row[name]:.1f}" for name in (*LANGUAGES, "average"))])
    return render(f"XNLI, {setting} (Table 4)", header, rows, form) + ("" if form != "markdown" else _notes(results))


def xnli_numbers(result: dict[str, Any]) -> list[float | None]:
    """Return accuracies in Table 4's order, then the average of those that are there."""
    test = result["test"]
    return [*(test[each]["accuracy"] if each in test else None for each in LANGUAGES), result["average"]]


def _intervals(result: dict[str, Any]) -> list[str]:
    cells = []
    for language in LANGUAGES:
        scores = result["test"].get(language)
        cells.append("-".join(percent(value) for value in scores["interval"]) if scores else NOTHING)
    return cells


def _notes(results: Sequence[dict[str, Any]]) -> str:
    """Return what a reader must know of each row: seeds, epochs, what was left out."""
    lines = []
    for result in results:
        settings, missing = result["settings"], result["data"]["missing"]
        text = f"{short_name(result, results)}: seeds {' '.join(result['seeds'])}, {settings['epochs']} epochs, "
        text += f"{result['selection']}"
        if result.get("average_deviation") is not None:
            text += f", standard deviation of the average over seeds {percent(result['average_deviation'])}"
        for split in ("train", "validation", "test"):
            if missing[split]:
                text += f"; no {split} set for {' '.join(missing[split])}"
        for key, what in (("max_train_examples", "training"), ("max_test_examples", "test")):
            if settings.get(key):
                text += f"; only the first {settings[key]:,} {what} rows of a language"
        lines.append(f"- {text}.")
    return "\n" + "\n".join(lines) + "\n"


# ---------------------------------------------------------------- GLUE


def glue_table(results: Sequence[dict[str, Any]], form: Format) -> str:
    """Render Tables 2 and 3's rows: best and median of the grid; the paper's row of each kind."""
    header = ["model", *GLUE_NAMES.values()]
    rows = []
    for result in results:
        for what in ("best", "median"):
            cells = [glue_cell(result, task, what) for task in GLUE_TASKS]
            rows.append([f"{short_name(result, results)}, {what}", *cells])
    told = set()
    for result in results:
        paper = paper_glue_row(result["model"].get("kind", ""), result["model"].get("num_tables"))
        if paper and paper[0] not in told:
            told.add(paper[0])
            rows.append([f"paper, {paper[0]}", *(f"{paper[1][task]:.1f}" for task in GLUE_TASKS)])
    return render("GLUE (Tables 2 and 3)", header, rows, form) + ("" if form != "markdown" else _glue_notes(results))


def glue_cell(result: dict[str, Any], task: str, what: str) -> str:
    """Return a task's numbers, two where the paper does not say which it means (MRPC and QQP: accuracy / F1).

    Args:
        result: of a `ksub evaluate glue`.
        task: of GLUE.
        what: "best" or "median", over the seeds.
    """
    scores = result["test"].get(task)
    if scores is None:
        return NOTHING
    names = GLUE_TASKS[task].metrics[: 1 if task == "cola" else 2]
    cell = " / ".join(percent(scores[what][name]) for name in names)
    if task == "mnli" and scores[what].get("mismatched") is not None:
        cell += f" / {percent(scores[what]['mismatched'])}"
    return cell


def _glue_notes(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "- MNLI: matched / mismatched; QQP and MRPC: accuracy / F1; CoLA: Matthews; STS-B: Pearson / Spearman; "
        "all on validation, best epoch."
    ]
    for result in results:
        text = f"{short_name(result, results)}: {result['settings']['epochs']} epochs"
        if result["missing"]:
            reasons = "; ".join(f"{task}: {reason}" for task, reason in result["missing"].items())
            text += f"; left out: {reasons}"
        starts = {scores["starts_from"] for task, scores in result["test"].items() if GLUE_TASKS[task].from_mnli}
        if starts:
            text += f"; RTE, MRPC, STS-B start from {' and '.join(sorted(starts))}"
        degenerate = [task for task, scores in result["test"].items() if scores["best"].get("degenerate")]
        if degenerate:
            text += f"; degenerate (one answer for all rows): {' '.join(degenerate)}"
        lines.append(f"- {text}.")
    return "\n" + "\n".join(lines) + "\n"


# ---------------------------------------------------------------- a data set of one's own


def classify_table(results: Sequence[dict[str, Any]], form: Format) -> str:
    """Render accuracy and macro F1 on validation and, where it has labels, on test."""
    names = {"accuracy": "accuracy", "macro_f1": "macro F1"}
    header = ["model", *(f"{split} {name}" for split in ("validation", "test") for name in names.values())]
    rows = []
    for result in results:
        scores = [result["scores"].get(split, {}) for split in ("validation", "test")]
        cells = [percent(each.get(name)) for each in scores for name in names]
        rows.append([short_name(result, results), *cells])
    title = f"{Path(results[0]['data']['path']).name}, {len(results[0]['classes'])} classes"
    return render(title, header, rows, form) + ("" if form != "markdown" else _classify_notes(results))


def _classify_notes(results: Sequence[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        text = (
            f"{short_name(result, results)}: seeds {' '.join(result['seeds'])}, {result['settings']['epochs']} epochs"
        )
        test = result["rows"].get("test")
        if test is None:
            text += "; there is no test set: scores are those that chose the epoch"
        elif test.get("interval"):
            low, high = test["interval"]
            text += f"; test accuracy {percent(low)}-{percent(high)} (95 %)"
        if test and test["unlabelled"]:
            text += f"; {test['unlabelled']:,} test rows have no label: answered in predictions.json, not scored"
        lines.append(f"- {text}.")
    return "\n" + "\n".join(lines) + "\n"


# ---------------------------------------------------------------- bits per byte


def lm_table(results: Sequence[dict[str, Any]], form: Format) -> str:
    """Render bits per byte of each language and their mean: a row a model."""
    languages = lm_languages(results)
    rows = []
    for result in results:
        cells = [_bits(result["languages"].get(language, {}).get("bits_per_byte")) for language in languages]
        rows.append([short_name(result, results), *cells, _bits(result["average"])])
    settings = results[0]["settings"]
    title = f"Bits per byte, windows of {settings['window']:,} tokens, context {settings['context']:,}"
    table = render(title, ["model", *languages, "mean"], rows, form)
    return table + ("" if form != "markdown" else _lm_notes(results))


def lm_languages(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the languages that any of the results has, in their order."""
    return list(dict.fromkeys(language for result in results for language in result["languages"]))


def _bits(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _lm_notes(results: Sequence[dict[str, Any]]) -> str:
    """Return what a reader must know of each row: how much text, what tokens are, and what the tokenizer loses."""
    lines = []
    for result in results:
        each = result["languages"].values()
        sums = {
            name: sum(scores[name] for scores in each)
            for name in ("nats", "tokens", "bytes", "documents", "documents_not_restored", "unknown_tokens")
        }
        text = (
            f"{short_name(result, results)}: {sums['documents']:,} documents, {sums['bytes']:,} bytes; "
            f"{sums['nats'] / sums['tokens']:.3f} nats a token, {sums['tokens'] / sums['bytes']:.3f} tokens a byte"
        )
        if result["tokenizer"]["start"] is None:
            text += "; no start token: the first token of a document is not scored, nor its bytes counted"
        if sums["documents_not_restored"]:
            text += (
                f"; {sums['documents_not_restored']:,} documents do not decode to their text "
                f"({sums['unknown_tokens']:,} unknown tokens): what is lost costs nothing, so the true bits are more"
            )
        if result["missing"]:
            text += f"; no readable document in {' '.join(result['missing'])}"
        lines.append(f"- {text}.")
    return "\n" + "\n".join(lines) + "\n"
