"""README.md of an exported model: what it is, how to open it, its parameters, codes, data, results, citation, licence.

Everything in it is read from the run or the model; it says what is not recorded there.
"""

import json
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path, read_json
from ksub_ds.common.languages import LANGUAGES
from ksub_ds.convert.sentence_encoder import read_modules
from ksub_ds.convert.source import ExportSource, head_of
from ksub_ds.pretrain.heldout_eval import accuracy_key_of
from ksub_ds.pretrain.open_run import RunCheckpoint

CITATION = """    @misc{k-sub-embedding,
      title  = {Reconstructing Word Embeddings via Scattered k-Sub-Embedding},
      author = {Anonymous},
      note   = {Under review as a conference paper at ICLR 2022}
    }"""

TAGS = ["tags:", "- sub-embedding", "- ksub_ds"]
FRONT = 4_000  # characters in which they stand
TASKS = {  # as the Hub names them
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
}


def write_model_card(folder: Path, source: ExportSource, form: str, licence: str | None) -> None:
    """Write `folder`/README.md.

    Args:
        folder: the exported folder.
        source: what was exported.
        form: "ksub", "remote-code" or "dense", as `export_run` takes it.
        licence: of the weights; None if it is not stated.
    """
    evaluation, sentences = _evaluation(source), bool(read_modules(folder))
    sections = [
        _front_matter(source, licence, sorted(evaluation.get("languages", {})), sentences),
        f"# {source.name}\n\n{_summary(source)}",
        "## How to open it\n\n" + _opening(source, form, sentences),
        "## Parameters\n\n" + _parameters(source, form),
        "## Codes\n\n" + _codes(source),
        "## Training\n\n" + _training(source),
        "## Results\n\n" + _results(source, evaluation),
        "## Citation\n\nThe method is the paper's:\n\n" + CITATION,
        "## Licence\n\n" + _licence(licence),
    ]
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def is_export(folder: Path) -> bool:
    """Return whether a folder has our model card, so that `ksub export` made it."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    with open(card, encoding="utf-8", errors="replace") as stream:
        return "\n".join(TAGS) in stream.read(FRONT)


def _front_matter(source: ExportSource, licence: str | None, languages: list[str], sentences: bool) -> str:
    lines = ["---", f"library_name: {'sentence-transformers' if sentences else 'transformers'}"]
    task = "sentence-similarity" if sentences else TASKS.get(head_of(type(source.model).__name__))
    if task:
        lines.append(f"pipeline_tag: {task}")
    lines += TAGS
    known = [language for language in languages if language in LANGUAGES]
    if known:
        lines += ["language:", *(f"- {language}" for language in known)]
    if licence:
        lines.append(f"license: {json.dumps(licence)}")
    return "\n".join([*lines, "---"])


def _summary(source: ExportSource) -> str:
    table = source.model.code_table()
    if table.num_tables == 1 and table.unique:
        return f"A model with a plain embedding of {table.num_tokens:,} tokens, the baseline of sub-embeddings."
    own = f"; {table.num_dedicated:,} tokens have a row of their own besides" if table.num_dedicated else ""
    if not table.unique:
        return (
            f"A model whose embedding of {table.num_tokens:,} tokens is rebuilt from {table.num_tables} small tables "
            f"of {max(table.table_sizes)} rows, by product quantisation{own}. It predicts no tokens: some may share a "
            "code."
        )
    return (
        f"A model whose embedding of {table.num_tokens:,} tokens is rebuilt from {table.num_tables} small tables of "
        f"{' x '.join(map(str, table.table_sizes))} rows, at the input and in the decoder{own}."
    )


def _opening(source: ExportSource, form: str, sentences: bool) -> str:
    auto_model = f"AutoModel{head_of(type(source.model).__name__)}"
    more = ", trust_remote_code=True" if form == "remote-code" else ""
    if sentences:
        code = [
            "from sentence_transformers import SentenceTransformer",
            f'model = SentenceTransformer("FOLDER"{more})',
        ]
    else:
        code = [
            f"from transformers import {auto_model}, AutoTokenizer",
            f'model = {auto_model}.from_pretrained("FOLDER"{more})',
            f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{more})',
        ]
    if form == "ksub":
        code.insert(0, "import ksub_ds")
    words = {
        "ksub": "The package ksub_ds brings the classes.",
        "remote-code": "The code lies beside it (modeling_ksub.py): read it before you trust it. No ksub_ds needed.",
        "dense": "A plain transformers model: the embedding matrix is written out, nothing else is needed.",
    }
    return words[form] + "\n\n" + "\n".join(f"    {line}" for line in code)


def _parameters(source: ExportSource, form: str) -> str:
    layer, total = source.model.get_input_embeddings(), source.model.num_parameters()
    has_head = head_of(type(source.model).__name__) == "ForCausalLM"
    matrices = 2 if has_head and not source.model.config.tie_word_embeddings else 1
    plain = matrices * layer.num_embeddings * layer.embedding_dim
    ours = matrices * sum(each.numel() for each in layer.parameters())
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


def _codes(source: ExportSource) -> str:
    table = source.model.code_table()
    lines = [
        f"- tokens: {table.num_tokens:,}; table sizes: {' '.join(map(str, table.table_sizes))}"
        + (f"; dedicated rows: {table.num_dedicated:,}" if table.num_dedicated else ""),
        f"- sha256 of the codes: `{table.sha256}`",
    ]
    if source.checkpoint is not None:
        stored, keys = source.checkpoint.run.table.metadata, ("algorithm", "vectors", "seed", "dedicated_by")
        lines += [f"- {key.replace('_', ' ')}: {stored[key]}" for key in keys if key in stored]
    return "\n".join(lines)


def _training(source: ExportSource) -> str:
    if source.checkpoint is not None:
        return _run_training(source.checkpoint)
    compressed = source.folder / "compression.json" if source.folder else None
    if compressed is not None and compressed.is_file():
        report = read_json(compressed)
        taught = report.get("distillation")
        then = "No training after that is recorded here."
        if taught:
            then = f"Then it learnt the original's vectors of {taught['texts']:,} texts, in {taught['steps']:,} steps."
        way = "product quantisation" if report.get("input_only") else "least squares"
        variance = "variance, frequent tokens weighing more," if report.get("weighted") else "variance"
        return (
            f"Compressed from `{report['model']}`: tables fitted to its embedding by {way} "
            f"({100 * report['error']:.1f} % of the {variance} is lost). {then}"
        )
    return "Not recorded in this folder."


def _run_training(checkpoint: RunCheckpoint) -> str:
    recipe = checkpoint.run.record
    learnt = f"masked language modelling, {100 * recipe['mlm_probability']:g} % of the tokens"
    if checkpoint.run.recipe.is_causal:
        learnt = "causal language modelling, each token from those before it in its row"
    lines = [
        f"- {checkpoint.step:,} of {recipe['max_steps']:,} steps of {recipe['global_batch_size']:,} sequences of "
        f"{recipe['sequence_length']:,} tokens: {checkpoint.state.tokens:,} tokens",
        f"- {learnt}; {recipe['precision']}; seed {recipe['seed']}",
        f"- AdamW, peak learning rate {recipe['peak_lr']:g}, {recipe['warmup_steps']:,} steps of warm-up"
        + (f", schedule {recipe['schedule']}" if "schedule" in recipe else ""),
        f"- fingerprint of the data: `{recipe['data_fingerprint']}`",
        f"- languages drawn in proportion to size^{recipe['alpha']:g}",
    ]
    if recipe.get("warm_start"):
        lines.append(f"- started from the weights of `{Path(recipe['warm_start']).name}`")
    if recipe.get("distill_from"):
        lines.append(f"- distilled from `{recipe['distill_from']}`")
    return "\n".join(lines)


def _evaluation(source: ExportSource) -> dict[str, Any]:
    """Return the newest evaluation on held-out text up to the exported step; empty if there is none."""
    if source.checkpoint is None:
        return {}
    step = source.checkpoint.step
    return next((line for line in reversed(source.checkpoint.run.evaluations) if line["step"] <= step), {})


def _results(source: ExportSource, evaluation: dict[str, Any]) -> str:
    parts = []
    if evaluation:
        rows = [("all", evaluation), *sorted(evaluation["languages"].items())]
        key = accuracy_key_of(evaluation)
        has_bits = "bits_per_byte" in evaluation
        table = [
            f"Held-out text at step {evaluation['step']:,}:",
            "",
            f"| | loss (nats) | {key.replace('_', ' ')} |{' bits per byte |' if has_bits else ''}",
            f"|---|---|---|{'---|' if has_bits else ''}",
        ]
        table += [
            f"| {name} | {row['loss']:.4f} | {100 * row[key]:.2f} % |"
            + (f" {row['bits_per_byte']:.4f} |" if "bits_per_byte" in row else " |" * has_bits)
            for name, row in rows
        ]
        if has_bits and (unknown := evaluation.get("unknown_tokens")):
            table += ["", f"Bits per byte are approximate: the bytes of {unknown:,} unknown tokens are not known."]
        parts.append("\n".join(table))
    parts += [text for text in map(_task, _result_files(source)) if text]
    return "\n\n".join(parts) or "None recorded."


def _result_files(source: ExportSource) -> list[Path]:
    """Return the results.json files of evaluations that were written into the run folder."""
    return sorted(source.checkpoint.run.folder.path.glob("*/results.json")) if source.checkpoint else []


def _task(path: Path) -> str:
    """Return a line about one evaluation; empty if its file cannot be read."""
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
