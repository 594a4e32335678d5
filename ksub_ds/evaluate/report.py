"""Join results into tables: differences from the paper and from the baseline.

Differences between two models have a paired test.

ksub report xnli-cl xnli-tta glue --format markdown
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.errors import OTHER_FORM, UserError
from ksub_ds.common.files import read_json
from ksub_ds.evaluate import result_tables
from ksub_ds.evaluate.data.metrics import exchange_test, paired_test
from ksub_ds.evaluate.data.tasks import (
    CROSS_LINGUAL,
    GLUE_TASKS,
    LANGUAGES,
    PAPER_XNLI,
    TRANSLATE_TRAIN_ALL,
    paper_glue_row,
)
from ksub_ds.evaluate.result_tables import Format, short_name, signed
from ksub_ds.pretrain.open_run import is_run


def report(paths: Sequence[Path], form: Format = "markdown", baseline: Path | None = None) -> str:
    """Render Tables 4, then 2 and 3, of these results, then one table for each other data set.

    Args:
        paths: folders of `ksub evaluate xnli`, `glue`, `classify` or `lm`, or results.json files; one named twice
            counts once, and so do two that hold the same: the same evaluation done again.
        form: markdown, csv or latex.
        baseline: the one of them that the others are compared with. [the first with a plain embedding]

    Raises:
        UserError: no results there, unfinished or damaged ones.
    """
    once: dict[str, dict[str, Any]] = {}
    for result in (result for path in paths for result in load(path)):
        once.setdefault(_content(result), result)
    found = list(once.values())
    if not found:
        raise UserError("give the --out folders of `ksub evaluate xnli` or `glue`")
    chosen = None
    if baseline is not None:
        chosen = once.get(_content(load(baseline)[0]))
        if chosen is None:
            raise UserError(f"--baseline {baseline}: is not among the results")
    parts = []
    for setting in (CROSS_LINGUAL, TRANSLATE_TRAIN_ALL):
        group = [result for result in found if result.get("setting") == setting]
        if group:
            parts.append(result_tables.xnli_table(group, form))
            rows = [*_against_paper(group), *_against_baseline(group, _baseline(group, chosen))]
            if rows:
                header = ["difference, points", *LANGUAGES, "avg", "p"]
                parts.append(result_tables.render(f"XNLI, {setting}: differences", header, rows, form))
    group = [result for result in found if result["task"] == "glue"]
    if group:
        parts.append(result_tables.glue_table(group, form))
        rows = _glue_differences(group, _baseline(group, chosen))
        if rows:
            header = ["difference, points", *result_tables.GLUE_NAMES.values()]
            parts.append(result_tables.render("GLUE: differences of the best cells", header, rows, form))
    own = [result for result in found if result["task"] == "classify"]
    for path in dict.fromkeys(result["data"]["path"] for result in own):
        group = [result for result in own if result["data"]["path"] == path]
        parts.append(result_tables.classify_table(group, form))
        rows = _classify_differences(group, _baseline(group, chosen))
        if rows:
            header = ["difference, points", "test accuracy", "p"]
            parts.append(result_tables.render(f"{Path(path).name}: differences", header, rows, form))
    scored = [result for result in found if result["task"] == "lm"]
    for same in dict.fromkeys(_scored_text(result) for result in scored):
        group = [result for result in scored if _scored_text(result) == same]
        parts.append(result_tables.lm_table(group, form))
        rows = _lm_differences(group, _baseline(group, chosen))
        if rows:
            header = ["difference, bits per byte", *result_tables.lm_languages(group), "mean", "p"]
            parts.append(result_tables.render("Bits per byte: differences", header, rows, form))
    return "\n".join(parts)


def load(path: Path) -> list[dict[str, Any]]:
    """Read the results of a folder (several where several models were evaluated together), each with its "_folder".

    Raises:
        UserError: none, unfinished or damaged ones.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / "results.json"] if (path / "results.json").exists() else sorted(path.glob("*/results.json"))
        if not files and is_run(path):
            raise UserError(f"{path}: is a pretraining run; add --html FILE for its page, and then any results")
        if not files and (path / "watch.json").exists():
            raise UserError(f"{path}: is a folder of `ksub evaluate watch`; its scores are in curve.jsonl")
        if not files and list(path.glob("**/queue/plan.json")):
            raise UserError(f"{path}: is not finished (see `ksub evaluate status {path}`); run its command again")
        if not files:
            raise UserError(f"{path}: holds no results.json; give the --out folder of a `ksub evaluate`")
    else:
        files = [path]
    results = []
    for file in files:
        result = read_json(file)
        if not _makes_a_table(result):
            raise UserError(f"{file}: is not a results.json of `ksub evaluate`, or of another version; evaluate again")
        results.append(result | {"_folder": str(file.parent)})
    return results


def _makes_a_table(result: Any) -> bool:
    """Return whether results are complete: they can be rendered as a table."""
    try:
        if result["task"] == "glue":
            return bool(result_tables.glue_table([result], "markdown"))
        if result["task"] == "classify":
            return bool(result_tables.classify_table([result], "markdown"))
        if result["task"] == "lm":
            return bool(result_tables.lm_table([result], "markdown"))
        return result["setting"] in PAPER_XNLI and bool(result_tables.xnli_table([result], "markdown"))
    except OTHER_FORM:
        return False


def _content(result: dict[str, Any]) -> str:
    """Return all that results.json holds, wherever it lies."""
    return json.dumps({key: value for key, value in result.items() if key != "_folder"}, sort_keys=True)


def _baseline(group: list[dict[str, Any]], chosen: dict[str, Any] | None) -> dict[str, Any] | None:
    for result in group:
        if result is chosen or (chosen is None and result["model"].get("kind") == "plain"):
            return result
    return None


def _against_paper(group: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for result in group:
        kind = result["model"].get("kind")
        theirs = PAPER_XNLI[result["setting"]].get(kind)
        if theirs is None:
            continue
        whole = set(result["test"]) == set(LANGUAGES)  # an average over fewer languages compares with nothing
        cells = [
            signed(result["test"][each]["accuracy"] - theirs[each] / 100)
            if each in result["test"]
            else result_tables.NOTHING
            for each in LANGUAGES
        ]
        average = signed(result["average"] - theirs["average"] / 100) if whole else result_tables.NOTHING
        rows.append([f"{short_name(result, group)} - paper, {kind}", *cells, average, ""])
    return rows


def _against_baseline(group: list[dict[str, Any]], baseline: dict[str, Any] | None) -> list[list[str]]:
    """Return differences on the languages both have, and the p of their mean over rows, languages and seeds."""
    rows = []
    for result in group if baseline is not None else []:
        if result is baseline:
            continue
        assert baseline is not None
        common = [each for each in LANGUAGES if each in result["test"] and each in baseline["test"]]
        gaps = {each: result["test"][each]["accuracy"] - baseline["test"][each]["accuracy"] for each in common}
        p = _paired(result, baseline, common)
        cells = [signed(gaps.get(each)) for each in LANGUAGES]
        average = signed(float(np.mean(list(gaps.values())))) if common else result_tables.NOTHING
        told = "other test rows" if p is None else f"{p:.4f}"
        rows.append([f"{short_name(result, group)} - {short_name(baseline, group)}", *cells, average, told])
    return rows


def _paired(ours: dict[str, Any], theirs: dict[str, Any], languages: list[str]) -> float | None:
    """Return the p of the difference in mean accuracy; None where the test rows are not the same.

    XNLI's languages are parallel: a row counts once, with the mean over languages and seeds, because its translations
    are not independent.

    Raises:
        UserError: a damaged predictions.json.
    """
    per_row = []
    labels = []
    for result in (ours, theirs):
        path = Path(result["_folder"]) / "predictions.json"
        if not path.exists():
            return None
        stored = read_json(path)
        try:
            gold = {each: np.frombuffer(stored["labels"][each].encode(), np.uint8) for each in languages}
            answers = [
                [np.frombuffer(run[each].encode(), np.uint8) for each in languages]
                for run in stored["predictions"].values()
            ]
        except OTHER_FORM as error:
            raise UserError(f"{path}: is damaged ({error!r}); evaluate again") from error
        if not answers or any(list(map(len, run)) != list(map(len, gold.values())) for run in answers):
            raise UserError(f"{path}: is damaged (not an answer to each label); evaluate again")
        labels.append({each: gold[each].tobytes() for each in languages})
        per_row.append([[ours == right for ours, right in zip(run, gold.values(), strict=True)] for run in answers])
    sizes = {len(gold) for gold in labels[0].values()}
    if labels[0] != labels[1] or not languages:
        return None
    if len(sizes) == 1:
        ours_by_row, theirs_by_row = (np.mean(runs, axis=(0, 1)) for runs in per_row)
    else:  # languages cut to different sizes are not parallel: every row stands alone
        ours_by_row, theirs_by_row = (np.mean([np.concatenate(run) for run in runs], axis=0) for runs in per_row)
    return paired_test(ours_by_row, theirs_by_row)["p"]


def _glue_differences(group: list[dict[str, Any]], baseline: dict[str, Any] | None) -> list[list[str]]:
    rows = []
    for result in group:
        paper = paper_glue_row(result["model"].get("kind", ""), result["model"].get("num_tables"))
        if paper is not None:
            name, theirs = paper
            cells = [_gap(result, task, theirs[task] / 100) for task in GLUE_TASKS]
            rows.append([f"{short_name(result, group)} - paper, {name}", *cells])
        if baseline is not None and result is not baseline:
            name = f"{short_name(result, group)} - {short_name(baseline, group)}"
            gaps = [
                _gap(result, task, baseline["test"][task]["best"]["score"]) if task in baseline["test"] else "–"
                for task in GLUE_TASKS
            ]
            rows += [[name, *gaps], ["  p", *(_glue_p(result, baseline, task) for task in GLUE_TASKS)]]
    return rows


def _glue_p(ours: dict[str, Any], theirs: dict[str, Any], task: str) -> str:
    """Return the p of two best cells in the metric that chose them; a dash where the rows are not the same.

    Raises:
        UserError: a damaged predictions.json.
    """
    stored = []
    for result in (ours, theirs):
        path = Path(result["_folder"]) / "predictions.json"
        if task not in result["test"] or not path.exists():
            return result_tables.NOTHING
        values = read_json(path)
        try:
            stored.append([_numbers(values[part][task]) for part in ("labels", "predictions")])
        except OTHER_FORM as error:
            raise UserError(f"{path}: is damaged ({error!r}); evaluate again") from error
    (labels, answers), (other_labels, other_answers) = stored
    if not np.array_equal(labels, other_labels) or not len(labels) == len(answers) == len(other_answers):
        return result_tables.NOTHING
    return f"{exchange_test(GLUE_TASKS[task].metrics[0], answers, other_answers, labels)['p']:.4f}"


def _classify_differences(group: list[dict[str, Any]], baseline: dict[str, Any] | None) -> list[list[str]]:
    """Return differences of test accuracy, with the p of the answers row by row.

    Raises:
        UserError: a damaged predictions.json.
    """
    rows = []
    for result in group if baseline is not None else []:
        assert baseline is not None
        if result is baseline or "test" not in result["scores"] or "test" not in baseline["scores"]:
            continue
        right, labels = [], []
        for each in (result, baseline):
            path = Path(each["_folder"]) / "predictions.json"
            stored = read_json(path)
            try:
                gold = [label for label in stored["labels"] if label is not None]
                answers = [
                    [answer for answer, label in zip(run, stored["labels"], strict=True) if label is not None]
                    for run in stored["predictions"].values()
                ]
                first, *more = [[a == b for a, b in zip(run, gold, strict=True)] for run in answers]
                right.append(np.mean([first, *more], axis=0))
            except OTHER_FORM as error:
                raise UserError(f"{path}: is damaged ({error!r}); evaluate again") from error
            labels.append(stored["labels"])
        gap = signed(result["scores"]["test"]["accuracy"] - baseline["scores"]["test"]["accuracy"])
        told = f"{paired_test(*right)['p']:.4f}" if labels[0] == labels[1] else "other test rows"
        rows.append([f"{short_name(result, group)} - {short_name(baseline, group)}", gap, told])
    return rows


def _scored_text(result: dict[str, Any]) -> str:
    """Return what two evaluations of language models must share to be compared: text, windows, precision."""
    return json.dumps([result["data"]["languages"], result["settings"]], sort_keys=True)


def _lm_differences(group: list[dict[str, Any]], baseline: dict[str, Any] | None) -> list[list[str]]:
    """Return differences in bits per byte, and the p of their mean over languages, document by document."""
    rows = []
    languages = result_tables.lm_languages(group)
    for result in group if baseline is not None else []:
        if result is baseline:
            continue
        assert baseline is not None
        ours, theirs = result["languages"], baseline["languages"]
        gaps = {
            each: ours[each]["bits_per_byte"] - theirs[each]["bits_per_byte"]
            for each in languages
            if each in ours and each in theirs
        }
        p = _lm_p(result, baseline, list(gaps))
        cells = [f"{gaps[each]:+.3f}" if each in gaps else result_tables.NOTHING for each in languages]
        mean = f"{np.mean(list(gaps.values())):+.3f}" if gaps else result_tables.NOTHING
        name = f"{short_name(result, group)} - {short_name(baseline, group)}"
        rows.append([name, *cells, mean, "other bytes" if p is None else f"{p:.4f}"])
    return rows


def _lm_p(ours: dict[str, Any], theirs: dict[str, Any], languages: list[str]) -> float | None:
    """Return the p of the difference of the means; None where the bytes that were scored are not the same.

    Raises:
        UserError: a damaged documents.json.
    """
    sides = []
    for result in (ours, theirs):
        path = Path(result["_folder"]) / "documents.json"
        stored = read_json(path)
        try:
            num_bytes = [np.array(stored[each]["bytes"], dtype=np.int64) for each in languages]
            nats = [np.array(stored[each]["nats"], dtype=np.float64) for each in languages]
            parts = [part / total.sum() for part, total in zip(nats, num_bytes, strict=True)]
            assert [len(part) for part in nats] == [len(part) for part in num_bytes]
        except (*OTHER_FORM, AssertionError) as error:
            raise UserError(f"{path}: is damaged ({error!r}); evaluate again") from error
        sides.append((num_bytes, parts))
    (our_bytes, our_parts), (their_bytes, their_parts) = sides
    same = all(np.array_equal(one, other) for one, other in zip(our_bytes, their_bytes, strict=True))
    if not languages or not same:
        return None
    return paired_test(np.concatenate(our_parts), np.concatenate(their_parts))["p"]


def _numbers(stored: Any) -> np.ndarray:
    """Return stored answers, a string of digits or a list of numbers, as an array."""
    return np.array([int(digit) for digit in stored] if isinstance(stored, str) else stored, dtype=np.float64)


def _gap(result: dict[str, Any], task: str, theirs: float) -> str:
    scores = result["test"].get(task)
    return result_tables.NOTHING if scores is None else signed(scores["best"]["score"] - theirs)
