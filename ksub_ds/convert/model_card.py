"""README.md of an exported model: what it is, how to open it, its parameters, codes, data, results, citation, licence.

Everything in it is read from the run or the model; what is not known is said not to be.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path, read_json
from ksub_ds.common.languages import LANGUAGES

if TYPE_CHECKING:
    from ksub_ds.convert.source import Source

CITATION = """    @misc{k-sub-embedding,
      title  = {Reconstructing Word Embeddings via Scattered k-Sub-Embedding},
      author = {Anonymous},
      note   = {Under review as a conference paper at ICLR 2022}
    }"""


def write_model_card(folder: Path, source: "Source", form: str, licence: str | None) -> None:
    """Write `folder`/README.md."""
    recipe = read_json(source.run.recipe) if source.run else {}
    evaluation = _evaluation(source)
    sections = [
        _front_matter(source, licence, sorted(evaluation.get("languages", {}))),
        f"# {source.name}\n\n{_summary(source)}",
        "## How to open it\n\n" + _opening(source, form),
        "## Parameters\n\n" + _parameters(source, form),
        "## Codes\n\n" + _codes(source),
        "## Training\n\n" + _training(source, recipe),
        "## Results\n\n" + _results(source, evaluation),
        "## Citation\n\nThe method is the paper's:\n\n" + CITATION,
        "## Licence\n\n" + _licence(licence),
    ]
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _front_matter(source: "Source", licence: str | None, languages: list[str]) -> str:
    lines = ["---", "library_name: transformers"]
    if type(source.model).__name__.endswith("ForMaskedLM"):
        lines.append("pipeline_tag: fill-mask")
    lines += ["tags:", "- sub-embedding", "- ksub_ds"]
    known = [language for language in languages if language in LANGUAGES]
    if known:
        lines += ["language:", *(f"- {language}" for language in known)]
    if licence:
        lines.append(f"license: {json.dumps(licence)}")
    return "\n".join([*lines, "---"])


def _summary(source: "Source") -> str:
    table = source.model.code_table()
    if table.num_tables == 1:
        return f"A model with a plain embedding of {table.num_tokens:,} tokens, the baseline of sub-embeddings."
    return (
        f"A model whose embedding of {table.num_tokens:,} tokens is rebuilt from {table.num_tables} small tables of "
        f"{' x '.join(map(str, table.table_sizes))} rows, at the input and in the decoder."
    )


def _opening(source: "Source", form: str) -> str:
    from ksub_ds.convert.source import head_of

    door = f"AutoModel{head_of(type(source.model).__name__)}"
    first = ["import ksub_ds"] if form == "ksub" else []
    more = ", trust_remote_code=True" if form == "remote-code" else ""
    code = [
        *first,
        f"from transformers import {door}, AutoTokenizer",
        f'model = {door}.from_pretrained("FOLDER"{more})',
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{more})',
    ]
    words = {
        "ksub": "The package ksub_ds brings the classes.",
        "remote-code": "The code lies beside it (modeling_ksub.py): read it before you trust it. No ksub_ds needed.",
        "dense": "A plain transformers model: the embedding matrix is written out, nothing else is needed.",
    }
    return words[form] + "\n\n" + "\n".join(f"    {line}" for line in code)


def _parameters(source: "Source", form: str) -> str:
    layer, total = source.model.get_input_embeddings(), source.model.num_parameters()
    plain = layer.num_embeddings * layer.embedding_dim
    ours = sum(each.numel() for each in layer.parameters())
    rows = [
        "| | embedding | whole model |",
        "|---|---|---|",
        f"| over sub-embeddings | {ours:,} | {total:,} |",
        f"| the same with a plain embedding | {plain:,} | {total - ours + plain:,} |",
    ]
    text = "\n".join(rows)
    if layer.mixing is not None:
        text += (
            f"\n\nBeside the tables stands a fixed {layer.embedding_dim} x {layer.embedding_dim} matrix, not counted."
        )
    return text + ("\n\nThis folder holds the plain form." if form == "dense" else "")


def _codes(source: "Source") -> str:
    table = source.model.code_table()
    lines = [
        f"- tokens: {table.num_tokens:,}; table sizes: {' '.join(map(str, table.table_sizes))}",
        f"- sha256 of the codes: `{table.sha256}`",
    ]
    if source.run is not None:
        from ksub_ds.codes.table import CodeTable

        stored = CodeTable.load(source.run.codes).metadata
        lines += [
            f"- {key.replace('_', ' ')}: {stored[key]}" for key in ("algorithm", "vectors", "seed") if key in stored
        ]
    return "\n".join(lines)


def _training(source: "Source", recipe: dict[str, Any]) -> str:
    if source.run is None or source.step is None:
        compressed = source.folder / "compression.json" if source.folder else None
        if compressed is not None and compressed.is_file():
            report = read_json(compressed)
            return (
                f"Compressed from `{report['model']}`: tables fitted to its embedding by least squares "
                f"({100 * report['error']:.1f} % of the variance is lost). No training after that is recorded here."
            )
        return "Not recorded in this folder."
    state = read_json(source.run.checkpoints / f"global_step{source.step}" / "trainer.json")
    lines = [
        f"- {source.step:,} of {recipe['max_steps']:,} steps of {recipe['global_batch_size']:,} sequences of "
        f"{recipe['sequence_length']:,} tokens: {state['tokens']:,} tokens",
        f"- masked language modelling, {100 * recipe['mlm_probability']:g} % of the tokens; {recipe['precision']}; "
        f"seed {recipe['seed']}",
        f"- AdamW, peak learning rate {recipe['peak_lr']:g}, {recipe['warmup_steps']:,} steps of warm-up",
        f"- fingerprint of the data: `{recipe['data_fingerprint']}`",
        f"- languages drawn in proportion to size^{recipe['alpha']:g}",
    ]
    if recipe.get("warm_start"):
        lines.append(f"- started from the weights of `{Path(recipe['warm_start']).name}`")
    if recipe.get("distill_from"):
        lines.append(f"- distilled from `{recipe['distill_from']}`")
    return "\n".join(lines)


def _evaluation(source: "Source") -> dict[str, Any]:
    """The newest held-out measure up to the exported step; empty if there is none."""
    if source.run is None or source.step is None or not source.run.evaluation.is_file():
        return {}
    found: dict[str, Any] = {}
    for line in source.run.evaluation.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # the line a kill cut short
        if values.get("step", source.step + 1) <= source.step:
            found = values
    return found


def _results(source: "Source", evaluation: dict[str, Any]) -> str:
    parts = []
    if evaluation:
        rows = [("all", evaluation), *sorted(evaluation["languages"].items())]
        table = [
            f"Held-out text at step {evaluation['step']:,}:",
            "",
            "| | loss (nats) | masked accuracy |",
            "|---|---|---|",
        ]
        table += [f"| {name} | {row['loss']:.4f} | {100 * row['masked_accuracy']:.2f} % |" for name, row in rows]
        parts.append("\n".join(table))
    parts += [text for text in map(_task, _result_files(source)) if text]
    return "\n\n".join(parts) or "None recorded."


def _result_files(source: "Source") -> list[Path]:
    """results.json files of evaluations that were written into the run folder."""
    return sorted(source.run.path.glob("*/results.json")) if source.run else []


def _task(path: Path) -> str:
    """One evaluation in a line; an unreadable file is left out."""
    try:
        results = read_json(path)
        return f"- {path.parent.name} ({results['setting']}): average {results['average']:.4g}"
    except (UserError, KeyError, TypeError, ValueError):
        return ""


def _licence(licence: str | None) -> str:
    code = "The code (ksub_ds) is under Apache-2.0."
    if licence:
        return f"Weights: {licence}. {code}"
    return f"{code} No licence of the weights was stated; it depends on the data, and whoever publishes them decides."
