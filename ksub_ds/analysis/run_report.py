"""The report of a run as one self-contained HTML page: no network, no script, no file beside it.

    ksub report run --html report.html

It reads the run folder as it is, finished or not; every number carries its exact value (page.py). The sections that
come from the run folder itself are below, in the order of the page; scores and analyses are in result_sections.py.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ksub_ds.analysis import result_sections
from ksub_ds.analysis.page import NOTHING, Line, chart, facts, number, paragraph, section, table, text, thinned, tiles
from ksub_ds.analysis.run_files import RunFiles, finite, quality, read_results, read_run, values
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path
from ksub_ds.common.logging import get_logger

STYLE = Path(__file__).parent / "templates" / "report.css"
# enforces what the page promises: nothing is fetched, nothing runs, even if a name should slip through the escaping
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PAGE_HEAD = '<!doctype html>\n<html lang="en">\n'  # how a page begins; what does not is no page of ours
RECIPE_ROWS = (
    *("objective", "global_batch_size", "micro_batch_size", "sequence_length", "peak_lr", "warmup_steps", "max_steps"),
    *(
        "schedule",
        "decay_steps",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "gradient_clipping",
        "mlm_probability",
    ),
    *("alpha", "dropout", "decoder_bias", "seed", "precision", "attention", "compile", "deterministic", "deepspeed"),
    *("codes", "data"),
    *("warm_start", "distill_from", "distill_weight"),
)
CODES_ROWS = (
    *("algorithm", "tokens (N)", "tables (K)", "table sizes (M_k)", "rows in use", "code space in use", "collisions"),
    *("leaves", "automaton", "vectors", "seed", "last level", "tokenizer fingerprint", "sha256"),
)
QUALITY_WORDS = {
    "rank_correlation": "rank correlation of shared codes with closeness, over random pairs",
    "neighbours_share": "codes a token shares with each of its 10 nearest",
    "positional_neighbours_share": "the same under positional codes",
    "explained_variance": "variance of the vectors that the codes explain",
    "positional_explained_variance": "the same under positional codes",
    "inertia_over_free": "inertia over that of k-means with free sizes, by level",
    "largest_leaf": "largest leaf, tokens",
    "level_sizes": "tokens a group, by level",
}


def write_report(run: Path, html: Path, results: Sequence[Path] = ()) -> None:
    """Write the report of a run.

    Args:
        run: a run folder of `ksub pretrain`.
        html: the page to write.
        results: folders of `ksub evaluate` (results.json) and of `ksub analyze` (analysis.json), to be shown too.

    Raises:
        UserError: not a run, nothing usable in one of `results`, or `html` cannot be written.
    """
    html = Path(html)
    if html.is_file() and not html.read_bytes().startswith(PAGE_HEAD.encode()):
        raise UserError(f"--html {html}: is a file that is no page of this command; choose another name")
    files = read_run(Path(run))
    found, analyses = read_results([Path(each) for each in results])
    sections = [
        heading(files),
        parameters(files),
        learning(files),
        result_sections.scores(found),
        result_sections.analyses(analyses),
        speed(files),
        codes(files),
        provenance(files),
    ]
    page = _page(f"Run {files.path.resolve().name}", [part for part in sections if part])
    try:
        with atomic_path(html) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8
    except OSError as error:
        raise UserError(f"--html {html}: cannot be written ({error.strerror}); choose another place") from error
    get_logger().info(f"{html}: {len(page.encode(errors='replace')) / 1e6:.1f} MB, one page")


def _page(title: str, sections: Sequence[str]) -> str:
    head = (
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>"
    )
    body = "\n".join(sections)
    return f"{PAGE_HEAD}<head>\n{head}\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"


def heading(run: RunFiles) -> str:
    """Return name, state and the most important numbers."""
    step = run.metrics[-1]["step"] if run.metrics else 0
    steps = run.recipe.get("max_steps")
    state = "finished" if step == steps else "not finished"
    kind = "plain embedding" if run.table.num_tables == 1 else f"K = {run.table.num_tables} sub-embedding tables"
    if run.table.num_dedicated:
        kind += f" and {run.table.num_dedicated:,} dedicated rows"
    parameters = run.parameters
    saved = 1 - parameters["embedding"] / parameters["embedding_plain"]
    fewer = f"{number(saved, 2, percent=True)} fewer than plain" if run.table.num_tables > 1 else "the baseline"
    rows = [
        ("steps", number(step), f"of {number(steps)}, {state}"),
        ("embedding parameters", number(parameters["embedding"]), fewer),
    ]
    if run.metrics:
        rows.append(("training loss", number(run.metrics[-1]["loss"], 3), f"nats a {_predicted(run)} token, last step"))
    if run.evaluations:
        last = run.evaluations[-1]
        rows.append(("held-out loss", number(finite(last.get("loss")), 3), f"at step {number(last['step'])}"))
        if finite(last.get("bits_per_byte")) is not None:
            rows.append(("bits per byte", number(last["bits_per_byte"], 3), f"held out{_missing_bytes(last)}"))
        accuracy = number(finite(last.get(run.accuracy_key)), 1, percent=True)
        rows.append((_accuracy(run), accuracy, f"held out, at step {number(last['step'])}"))
    speeds = values(run.metrics, "tokens_per_second")
    if speeds:
        rows.append(("tokens a second", number(statistics.median(speeds)), "median over the steps"))
    preset = text(run.recipe.get("preset", ""))
    return (
        f"<h1>{text(run.path.resolve().name)}</h1>"
        + paragraph(f"{preset}, {text(kind)}, vocabulary of {number(run.table.num_tokens)}", "soft")
        + tiles(rows)
        + _failure(run)
    )


def _predicted(run: RunFiles) -> str:
    return "predicted" if run.causal else "masked"


def _accuracy(run: RunFiles) -> str:
    return run.accuracy_key.replace("_", " ")


def _missing_bytes(scores: dict[str, Any]) -> str:
    """Return what makes bits per byte a number too high: tokens of unknown bytes."""
    unknown = scores.get("unknown_tokens")
    return f"; {number(unknown)} unknown tokens, whose bytes are not counted" if unknown else ""


def _failure(run: RunFiles) -> str:
    """Return why the last start ended early, if it did."""
    if not run.failure:
        return ""
    told = [f"{key.replace('_', ' ')} {value}" for key, value in run.failure.items() if key != "reason"]
    return paragraph(f"<b>{text(run.failure.get('reason', 'failed'))}</b> ({text(', '.join(told))})", "note")


def parameters(run: RunFiles) -> str:
    """Return the paper's Table 1 for this run."""
    counted = run.parameters
    sizes = " + ".join(f"{size:,}" for size in run.table.table_sizes)
    if run.table.num_dedicated:
        sizes += f", and {run.table.num_dedicated:,} dedicated"
    saved = 1 - counted["embedding"] / counted["embedding_plain"]
    tokens = number(run.table.num_tokens)
    rows = [
        ["vocabulary, tokens", tokens, tokens],
        ["parameters", number(counted["total_plain"]), number(counted["total"])],
        ["embedding rows", tokens, text(sizes)],
        ["embedding parameters", number(counted["embedding_plain"]), number(counted["embedding"])],
        ["saved", NOTHING, number(saved, 2, percent=True)],
    ]
    header = ["", "plain embedding", f"this run, K&nbsp;=&nbsp;{run.table.num_tables}"]
    whole = 1 - counted["total"] / counted["total_plain"]
    words = f"The whole model is {number(whole, 1, percent=True)} smaller than with a plain embedding, at width d = "
    words += f"{number(counted['hidden_size'])}. "
    words += (
        "Input embedding and decoder are one and the same."
        if counted["ends"] == 1
        else "The decoder has tables of its own, as many as the input embedding, which is counted here."
    )
    return section("Parameters (Table 1 of this run)", table(header, rows), paragraph(words, "soft"))


def learning(run: RunFiles) -> str:
    """Return loss and accuracy over steps and tokens, then per language."""
    if not run.metrics:
        return section("Learning", paragraph("No step has been recorded yet.", "note"))
    tokens = _token_ticks(run)
    training = thinned(_points(run.metrics, "loss"), "training")
    held_out = Line("held out", _points(run.evaluations, "loss"), dots=True)
    accuracy = [
        thinned(_points(run.metrics, run.accuracy_key), "training, one batch"),
        Line("held out", _points(run.evaluations, run.accuracy_key), dots=True),
    ]
    last = max(run.metrics[-1]["step"], *(line["step"] for line in run.evaluations), 1)
    charts = [
        chart(f"Loss, nats a {_predicted(run)} token", [training, held_out], "step", tokens, x_limits=(0, last)),
        chart(_accuracy(run).capitalize(), accuracy, "step", tokens, percent=True, x_limits=(0, last)),
    ]
    band = paragraph("Lines are means where steps are many; the pale band is their range.", "soft")
    return section(
        "Learning", f'<div class="charts">{"".join(charts)}</div>', band if training.band else "", _languages(run)
    )


def _languages(run: RunFiles) -> str:
    """Return a small chart for each language, all on one scale, and first and last numbers."""
    if not run.evaluations:
        return paragraph("No evaluation on held-out text has been recorded.", "note")
    names = sorted({name for line in run.evaluations for name in line["languages"]})
    histories = {name: _history(run.evaluations, name, run.accuracy_key) for name in names}
    losses = [loss for history in histories.values() for _, loss in _losses(history)]
    if not losses:
        return ""
    room = 0.05 * (max(losses) - min(losses)) or 1.0
    limits = (max(0.0, min(losses) - room), max(losses) + room)
    reach = (float(run.evaluations[0]["step"]), float(max(run.evaluations[-1]["step"], 1)))
    small = [
        chart(
            f"{text(name)}: {number(history[-1][1], 2)}",
            [Line(name, _losses(history), dots=True)],
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
    ends = [
        (f"{text(name)} <small>{number(counts.get(name))}</small>", history[0], history[-1])
        for name, history in histories.items()
        if history
    ]
    begin, end = (_scores(line, run.accuracy_key) for line in (first, last))
    ends.append((f"<b>all</b> <small>{number(sum(counts.values()))}</small>", begin, end))
    has_bits = any(end.bits is not None for _, _, end in ends)
    rows = [
        [name, _change(begin.loss, end.loss, 3), _change(begin.accuracy, end.accuracy, 1, percent=True)]
        + ([_change(begin.bits, end.bits, 3)] if has_bits else [])
        for name, begin, end in ends
    ]
    header = ["language <small>tokens scored</small>", "loss", _accuracy(run)] + ["bits per byte"] * has_bits
    caption = f"held out, step {first['step']:,} and step {last['step']:,}"
    return ('<h3>Held-out loss by language</h3><div class="many">' + "".join(small) + "</div>") + table(
        header, rows, caption
    )


def _change(first: float | None, last: float | None, digits: int, percent: bool = False) -> str:
    return f"{number(first, digits, percent)} → {number(last, digits, percent)}"


class _Scores(NamedTuple):
    """One evaluation of one language, or of all."""

    step: int
    loss: float | None
    accuracy: float | None
    bits: float | None


def _scores(line: dict[str, Any], accuracy: str, name: str | None = None) -> _Scores:
    """Return the scores of a language, or of all, in a line of evaluation.jsonl."""
    row = line if name is None else line["languages"].get(name)
    row = row if isinstance(row, dict) else {}
    return _Scores(line["step"], *(finite(row.get(key)) for key in ("loss", accuracy, "bits_per_byte")))


def _history(evaluations: list[dict[str, Any]], name: str, accuracy: str) -> list[_Scores]:
    """Return the scores of one language, in those evaluations that have them."""
    found = (_scores(line, accuracy, name) for line in evaluations)
    return [scores for scores in found if scores.loss is not None]


def _losses(history: list[_Scores]) -> list[tuple[float, float]]:
    return [(scores.step, scores.loss) for scores in history if scores.loss is not None]


def speed(run: RunFiles) -> str:
    """Return throughput, time and the wait for data."""
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
        (
            "wait for data",
            f"{number(math.fsum(waits), 3)} s, {number(math.fsum(waits) / whole if whole else 0.0, 2, percent=True)}",
        ),
        ("tokens in all", number(run.tokens_at(run.metrics[-1]["step"]))),
        *_use_of_devices(run),
    ]
    return section("Speed", facts(rows), f'<div class="charts">{"".join(charts)}</div>')


def _use_of_devices(run: RunFiles) -> list[tuple[str, str]]:
    """Return what the model's own operations use of the devices, as far as it was recorded."""
    flops, mfu, memory = (values(run.metrics, key) for key in ("model_tflops", "mfu", "peak_memory_gb"))
    rows = []
    if flops:
        rows.append(("TFLOP/s of the model, median", number(statistics.median(flops), 3)))
    if mfu:
        rows.append(("share of the devices' bf16 peak (MFU), median", number(statistics.median(mfu), 1, percent=True)))
    if memory:
        rows.append(("most GPU memory in use, rank 0", f"{number(max(memory), 2)} GB"))
    return rows


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], value) for line in lines if (value := finite(line.get(key))) is not None]


def _token_ticks(run: RunFiles) -> list[tuple[float, str]]:
    """Return the step in the middle of the axis and the last one, with the tokens seen by then."""
    counted = [(line["step"], line["tokens"]) for line in run.metrics if finite(line.get("tokens")) is not None]
    if len(counted) < 2:
        return []
    last = counted[-1]
    middle = min(counted, key=lambda each: abs(each[0] - last[0] / 2))
    return [(step, f"{_short(tokens)} tokens") for step, tokens in dict([middle, last]).items()]


def _short(count: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def codes(run: RunFiles) -> str:
    """Describe the code table, and how well its codes fit the vectors they were made from."""
    from ksub_ds.codes.inspection import describe

    described = dict(describe(run.table, run.parameters["hidden_size"]))
    rows = [(name, text(described[name])) for name in CODES_ROWS if name in described]
    found = quality(run.table)
    good = [[text(words), _quality_cell(found[key])] for key, words in QUALITY_WORDS.items() if key in found]
    parts = [facts(rows)]
    if good:
        parts.append(table(["how good the codes are", ""], good))
    return section("Codes", *parts)


def _quality_cell(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(_quality_cell(each) for each in value)
    return number(value, 0 if isinstance(value, int) else 4) if finite(value) is not None else text(value)


def _plans(run: RunFiles) -> str:
    """Return which steps of an extended run trained under which plan; nothing for a run that was never extended."""
    recorded = run.recipe.get("plans")
    plans = [each for each in recorded if isinstance(each, dict)] if isinstance(recorded, list) else []
    rows = [
        [text(each.get(key, NOTHING)) for key in ("from_step", "max_steps", "schedule", "decay_steps")]
        for each in plans
    ]
    header = ["after step", "planned to step", "schedule", "steps of decay"]
    return "<h3>Plans, one for each --extend</h3>" + table(header, rows) if rows else ""


def provenance(run: RunFiles) -> str:
    """Return recipe, software, hosts, fingerprints and commands: what it takes to repeat the run."""
    import ksub_ds

    recipe = [(key, text(run.recipe[key])) for key in RECIPE_ROWS if run.recipe.get(key) is not None]
    keys = [key for key in ("codes_sha256", "data_fingerprint") if key in run.recipe]
    prints = [(str(key), f"<code>{text(run.recipe[key])}</code>") for key in keys]
    checkpoints = ", ".join(f"{step:,}" for step in sorted(run.checkpoint_steps)) or "none"
    prints += [("checkpoints of steps", checkpoints), ("report made by", f"ksub_ds {text(ksub_ds.__version__)}")]
    starts = [[text(each.when), text(each.ranks), text(each.device), text(each.versions)] for each in run.starts]
    header = ["start", "ranks, hosts, engine", "device", "software"]
    commands = "".join(f"<pre>{text(line)}</pre>" for line in run.commands)
    return section(
        "Provenance",
        "<h3>Recipe</h3>" + facts(recipe),
        _plans(run),
        "<h3>Fingerprints</h3>" + facts(prints),
        "<h3>Starts</h3>" + table(header, starts, words=4) if starts else "",
        "<h3>Commands</h3>" + commands if commands else "",
    )
