"""`ksub corpus stats`, `ksub analyze` and `ksub report`: looking at shards, models and results."""

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
        results: Folders of `ksub evaluate xnli`, `glue`, `classify` or `lm`. With --html: a run folder, then
            results and analyses to show in its page.
        format: How to print the tables.
        baseline: The result that the others are compared with. [the first with a plain embedding]
        html: Write the report of a pretraining run to this file.

    Raises:
        UserError: no results, or options that contradict each other.
    """
    if not results:
        raise UserError("give the --out folders of `ksub evaluate`, or a run folder and --html FILE")
    if html is not None:
        if baseline is not None or format != "markdown":
            raise UserError("--html: --baseline and --format are for the tables only; leave them out")
        from ksub_ds.analysis.run_report import write_report

        write_report(results[0], html, results[1:])
        return
    from ksub_ds.evaluate.report import report as join_results

    print(join_results(results, format, baseline))
