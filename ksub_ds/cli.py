"""The `ksub` command: parse, call, print. What the commands do lives in the rooms below.

    ksub codes positional --num-tokens 250002 --num-tables 3 --out codes.safetensors
    ksub pretrain --preset tiny --codes codes.safetensors --data shards --out run

Only the command that was asked for is imported, so `ksub --help` answers at once.
"""

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from ksub_ds.common.errors import UserError

SUMMARIES = {
    "codes positional": "codes by Algorithm 1: the digits of the token id",
    "codes cluster": "codes by Algorithm 2: hierarchical balanced k-means of vectors, or of a corpus",
    "codes neighbours": "the tokens that share most codes with a token",
    "codes inspect": "sizes, quality and parameters of a code file",
    "codes extend": "unused codes for new tokens: the vocabulary grows, the tables do not",
    "corpus stats": "tokens and bytes per language of a shards folder, as the paper's Table 7",
    "pretrain": "pretrain a masked language model on DeepSpeed; the same command again resumes",
    "submit": "submit a pretraining, evaluation or data job to SLURM; --dry-run prints the sbatch line",
    "analyze": "similarities and PCA of embeddings and hidden states: numbers, figures, a 3-D page (Figures 2 to 10)",
    "compress": "fit small tables to a trained model's embedding, at both ends",
    "export": "write a run's model as a HuggingFace folder, checked by its logits",
    "evaluate xnli": "fine-tune on XNLI and test 15 languages (Table 4); more of the same command = more workers",
    "evaluate glue": "fine-tune on GLUE's tasks over a grid (Tables 2 and 3)",
    "evaluate watch": "score each new checkpoint of a running pretraining, without disturbing it",
    "evaluate status": "which jobs of an evaluation are done, running or waiting, and who holds them",
    "report": "results joined into Tables 2 to 4, with differences and a paired test; --html for a run's page",
}


def codes_positional(
    num_tables: int,
    out: Path,
    num_tokens: int | None = None,
    tokenizer: Path | None = None,
    reserve_special_tokens: bool = False,
) -> None:
    """Make codes by Algorithm 1: f_k(n) is the k-th digit of n in base M, M the least with M^K >= N.

    Args:
        num_tables: K, how many tables replace the embedding.
        out: The code file to write (.safetensors).
        num_tokens: N, the size of the vocabulary. [the tokenizer's]
        tokenizer: SentencePiece .model or HuggingFace folder; its fingerprint goes into the file.
        reserve_special_tokens: Give <s>, </s>, <pad>, <unk>, <mask> rows of their own in every table.
    """
    from ksub_ds.codes.positional import positional_codes

    special_ids: tuple[int, ...] = ()
    fingerprint = {}
    if tokenizer is not None:
        from ksub_ds.corpus.tokenizer import load_tokenizer

        loaded = load_tokenizer(tokenizer)
        if num_tokens not in (None, loaded.vocab_size):
            raise UserError(f"--num-tokens {num_tokens}: {tokenizer} has {loaded.vocab_size} tokens; leave one out")
        num_tokens, fingerprint = loaded.vocab_size, {"tokenizer_fingerprint": loaded.fingerprint}
        special_ids = loaded.special_ids if reserve_special_tokens else ()
    elif num_tokens is None:
        raise UserError("give --num-tokens N or --tokenizer PATH")
    elif reserve_special_tokens:
        raise UserError("--reserve-special-tokens: give --tokenizer PATH too, it names the special tokens")
    try:
        table = positional_codes(num_tokens, num_tables, special_ids)
    except ValueError as error:
        raise UserError(str(error)) from error
    table.metadata.update(fingerprint)
    table.save(out)
    print(f"{out}: {table.num_tokens:,} tokens, tables of {' '.join(map(str, table.table_sizes))} rows")


def codes_inspect(path: Positional[Path], embedding_dim: int = 512) -> None:
    """Print what a code file holds, after checking it.

    Args:
        path: The code file.
        embedding_dim: d, the width at which parameters are counted.
    """
    from ksub_ds.codes.inspection import describe
    from ksub_ds.codes.table import CodeTable

    table = CodeTable.load(path)
    if embedding_dim < table.num_tables:
        raise UserError(f"--embedding-dim {embedding_dim}: must be at least the {table.num_tables} tables of {path}")
    rows = describe(table, embedding_dim)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def codes_cluster(arguments: Sequence[str]) -> None:
    """`ksub codes cluster` has its options in vectors/build.py, shared with preprocessing/build_codes.py."""
    import tyro

    from ksub_ds.common import distributed
    from ksub_ds.vectors.build import ClusterVectors, build_codes, report

    settings = tyro.cli(ClusterVectors, args=arguments, prog="ksub codes cluster", description=ClusterVectors.__doc__)
    table = build_codes(settings)
    if distributed.is_main():
        print(report(table, settings.out))


def codes_neighbours(path: Positional[Path], token: Positional[str], tokenizer: Path, count: int = 10) -> None:
    """Print the tokens that share most codes with a token: its leaf first, then by the number of shared codes.

    Args:
        path: The code file.
        token: A token as the vocabulary spells it ("▁water", with the mark of a word's beginning).
        tokenizer: SentencePiece .model or HuggingFace folder that the codes were made for.
        count: How many to print.
    """
    from ksub_ds.codes.inspection import code_neighbours
    from ksub_ds.codes.table import CodeTable
    from ksub_ds.corpus.tokenizer import load_tokenizer

    table, loaded = CodeTable.load(path), load_tokenizer(tokenizer)
    theirs = table.metadata.get("tokenizer_fingerprint", loaded.fingerprint)
    if table.num_tokens != loaded.vocab_size or theirs != loaded.fingerprint:
        raise UserError(f"--tokenizer {tokenizer}: {path} was made for another tokenizer; give that one")
    if count < 1:
        raise UserError(f"--count {count}: must be at least 1")
    tokens = loaded.tokens()
    if token not in tokens:
        alike = difflib.get_close_matches(token, [each for each in tokens if each[:2] == token[:2]], n=3)
        marked = [each for each in (f"▁{token}", f"Ġ{token}") if each in tokens]
        near = ", ".join(dict.fromkeys([*marked, *alike]))
        raise UserError(f"{token!r} is no token of {tokenizer}" + (f"; near: {near}" if near else ""))
    own = tokens.index(token)
    width = max(len(f"{code}") for code in table.table_sizes)

    def line(index: int, words: str) -> str:
        codes = " ".join(f"{code:>{width}}" for code in table.codes[index].tolist())
        return f"{codes}  {words:<14}  {index:>7}  {tokens[index]}"

    print(line(own, "the token"))
    for index, shared, same_leaf in code_neighbours(table, own, count):
        print(line(index, "same leaf" if same_leaf else f"{shared} of {table.num_tables} codes"))


def codes_extend(arguments: Sequence[str]) -> None:
    """`ksub codes extend` has its options in vectors/extend.py."""
    import tyro

    from ksub_ds.vectors.build import report
    from ksub_ds.vectors.extend import ExtendCodes, extend_code_file

    settings = tyro.cli(ExtendCodes, args=arguments, prog="ksub codes extend", description=ExtendCodes.__doc__)
    print(report(extend_code_file(settings), settings.out))


def compress(arguments: Sequence[str]) -> None:
    """`ksub compress` has its options in pretrain/compress.py."""
    import tyro

    from ksub_ds.pretrain.compress import CompressModel, compress_model

    compress_model(tyro.cli(CompressModel, args=arguments, prog="ksub compress", description=CompressModel.__doc__))


def corpus_stats(shards: Positional[Path], verify: bool = False) -> None:
    """Print tokens and bytes per language of a shards folder beside the paper's Table 7.

    Args:
        shards: A folder of token shards: of shard_cc.py or shard_text.py.
        verify: Also read all of every shard and compare its checksum; else only its head and length are looked at.
    """
    from ksub_ds.corpus.shards import ShardDataset
    from ksub_ds.corpus.statistics import corpus_table

    ShardDataset.open(shards, verify=verify)
    print(corpus_table(shards))


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
        remote_code: Bring the model's code along: the folder opens without ksub_ds, by trust_remote_code=True.
        dense: A plain XLM-R or RoBERTa with its N x d matrix, which any tool opens.
        onnx: Write model.onnx too, compared with onnxruntime.
        license: Of the weights, for the model card, as the Hub spells it (apache-2.0, cc-by-4.0).
    """
    from ksub_ds.pretrain.export import export_run

    if remote_code and dense:
        raise UserError("--remote-code and --dense: a dense folder needs no code of ours; give one of them")
    form: Literal["ksub", "remote-code", "dense"] = "dense" if dense else "remote-code" if remote_code else "ksub"
    export_run(run, out, step, form, onnx, license)


def analyze(arguments: Sequence[str]) -> None:
    """`ksub analyze` has its options in analysis/analyze.py."""
    import tyro

    from ksub_ds.analysis.analyze import Analyze, summary
    from ksub_ds.analysis.analyze import analyze as run_analysis

    print(summary(run_analysis(tyro.cli(Analyze, args=arguments, prog="ksub analyze"))))


def pretrain(arguments: Sequence[str]) -> int:
    """`ksub pretrain` parses its own recipe."""
    from ksub_ds.pretrain.__main__ import main as pretrain_main

    return pretrain_main(arguments)


def job_options(settings: Any, arguments: list[str]) -> None:
    """Parse what `ksub submit` is to hand to a job, as the job will, and check what needs no file.

    Args:
        settings: of `ksub submit` (cluster/submit.py).
    """
    import tyro

    if settings.job == "pretrain":
        from ksub_ds.pretrain.recipe import Recipe, find_deepspeed_config, resolve

        recipe = tyro.cli(Recipe, args=arguments, prog="ksub pretrain")
        find_deepspeed_config(resolve(recipe, settings.ranks, on_gpu=True).deepspeed)
    elif settings.job == "evaluate":
        from ksub_ds.evaluate.__main__ import settings_kind

        tyro.cli(settings_kind(arguments), args=arguments[1:], prog="ksub evaluate")
    else:
        from ksub_ds.corpus.crawl_settings import ShardCC, check

        check(tyro.cli(ShardCC, args=arguments, prog="preprocessing/shard_cc.py", description=ShardCC.__doc__))


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
    """
    if not results:
        raise UserError("give the --out folders of `ksub evaluate xnli` or `glue`, or a run folder and --html FILE")
    if html is not None:
        from ksub_ds.analysis.run_report import write_report

        write_report(results[0], html, results[1:])
        return
    from ksub_ds.evaluate.report import report as join_results

    print(join_results(results, format, baseline))


COMMANDS: dict[str, Callable[..., None]] = {
    "codes positional": codes_positional,
    "codes neighbours": codes_neighbours,
    "codes inspect": codes_inspect,
    "corpus stats": corpus_stats,
    "export": export,
    "report": report,
}


def _help() -> str:
    width = max(map(len, SUMMARIES))
    lines = [f"  ksub {name:<{width}}  {summary}" for name, summary in SUMMARIES.items()]
    return (
        "usage: ksub COMMAND [OPTIONS]\n\n"
        "Masked language models whose embedding is K small tables and a code per token.\n\n"
        + "\n".join(lines)
        + "\n\n`ksub COMMAND --help` tells the options of a command."
    )


def _run(name: str, arguments: Sequence[str]) -> int:
    if name == "pretrain":
        return pretrain(arguments)
    if name == "submit":
        from ksub_ds.cluster.submit import submit

        return submit(arguments, job_options)
    if name.startswith("evaluate "):
        from ksub_ds.evaluate.__main__ import main as evaluate_main

        return evaluate_main([name.removeprefix("evaluate "), *arguments])
    if name == "codes cluster":
        codes_cluster(arguments)
        return 0
    if name == "codes extend":
        codes_extend(arguments)
        return 0
    if name == "compress":
        compress(arguments)
        return 0
    if name == "analyze":
        analyze(arguments)
        return 0
    import tyro

    tyro.cli(COMMANDS[name], args=arguments, prog=f"ksub {name}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the `ksub` command. Returns the exit code: 0, 2 after a user's mistake, or 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from ksub_ds import __version__

        print(f"ksub_ds {__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in SUMMARIES:
            try:
                return _run(name, arguments[words:])
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print("interrupted; the same command continues", file=sys.stderr)
                return 130
    group = [name for name in SUMMARIES if name.startswith(arguments[0] + " ")]
    if group and arguments[1:2] in ([], ["-h"], ["--help"]):
        print("\n".join(["usage:"] + [f"  ksub {name}  {SUMMARIES[name]}" for name in group]))
        return 0 if arguments[1:] else 2
    near = difflib.get_close_matches(" ".join(arguments[:2]), SUMMARIES, n=1, cutoff=0.3)
    hint = f"; did you mean `ksub {near[0]}`?" if near else ""
    print(f"error: no command {' '.join(arguments[:2])!r}{hint} (see ksub --help)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
