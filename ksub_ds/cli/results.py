"""`ksub export`, `compress`, `analyze`, `report` and `corpus stats`: commands on a model, a run or shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ksub_ds.common.errors import UserError
from ksub_ds.common.options import parse


def corpus_stats(shards: Positional[Path], verify: bool = False) -> None:
    """Print tokens and bytes per language of a shards folder beside the paper's Table 7.

    Args:
        shards: A folder of token shards, made by shard_cc.py or shard_text.py.
        verify: Read every shard in full and compare its checksum; else only its header and length are checked.
    """
    from ksub_ds.corpus.shards.dataset import ShardDataset
    from ksub_ds.corpus.statistics import corpus_table

    ShardDataset.open(shards, verify=verify)
    print(corpus_table(shards))


def compress(arguments: Sequence[str]) -> None:
    """Fit small tables to a trained model's embedding, with the options of convert/compress.py."""
    from ksub_ds.convert.compress import CompressModel, compress_model

    compress_model(parse(CompressModel, arguments, "ksub compress"))


def export(
    run: Positional[Path],
    out: Path,
    step: int | None = None,
    remote_code: bool = False,
    dense: bool = False,
    onnx: bool = False,
    license: str | None = None,
) -> None:
    """Write the model of a run as a HuggingFace folder, reload it and compare logits before publishing.

    Args:
        run: A run folder of `ksub pretrain`, or a folder of `ksub compress`.
        out: The folder to write.
        step: Export the checkpoint of this step. [the newest]
        remote_code: Add the model's code: the folder then opens without ksub_ds, by trust_remote_code=True.
        dense: Write a plain XLM-R or RoBERTa with its N x d matrix, which any tool opens.
        onnx: Write model.onnx too, checked with onnxruntime.
        license: License of the weights, for the model card, as the Hub spells it (apache-2.0, cc-by-4.0).

    Raises:
        UserError: options that contradict each other, or a run that cannot be exported.
    """
    from ksub_ds.convert.export import export_run

    if remote_code and dense:
        raise UserError("--remote-code and --dense: a dense folder needs no code of ours; give only one of them")
    form: Literal["ksub", "remote-code", "dense"] = "dense" if dense else "remote-code" if remote_code else "ksub"
    export_run(run, out, step, form, onnx, license)


def analyze(arguments: Sequence[str]) -> None:
    """Analyze embeddings and hidden states, with the options of analysis/analyze.py."""
    from ksub_ds.analysis.analyze import Analyze, summary
    from ksub_ds.analysis.analyze import analyze as run_analysis

    print(summary(run_analysis(parse(Analyze, arguments, "ksub analyze"))))


def report(
    results: Positional[tuple[Path, ...]],
    format: Literal["markdown", "csv", "latex"] = "markdown",
    baseline: Path | None = None,
    html: Path | None = None,
) -> None:
    """Join results of `ksub evaluate` into the paper's tables; or, with --html, write the page of a run.

    Args:
        results: Folders of `ksub evaluate xnli` or `glue`. With --html: a run folder, then any results
            and analyses to show in its page.
        format: How to print the tables.
        baseline: The result that the others are compared with. [the first with a plain embedding]
        html: Write the report of a pretraining run to this file.

    Raises:
        UserError: no results, or options that contradict each other.
    """
    if not results:
        raise UserError("give the --out folders of `ksub evaluate xnli` or `glue`, or a run folder and --html FILE")
    if html is not None:
        if baseline is not None or format != "markdown":
            raise UserError("--html: --baseline and --format are for the tables only; leave them out")
        from ksub_ds.analysis.run_report import write_report

        write_report(results[0], html, results[1:])
        return
    from ksub_ds.evaluate.report import report as join_results

    print(join_results(results, format, baseline))
