"""The `ksub` command: parse, call, print. What the commands do lives in the rooms below.

    ksub codes positional --num-tokens 250002 --num-tables 3 --out codes.safetensors
    ksub pretrain --preset tiny --codes codes.safetensors --data shards --out run

Only the command that was asked for is imported, so `ksub --help` answers at once.
"""

import difflib
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ksub_ds.common.errors import UserError


class Command(NamedTuple):
    """A command of `ksub`.

    Attributes:
        summary: a line for `ksub --help`.
        target: "module:function" under ksub_ds.
        before: None where the function's parameters are the command's options; else what stands before the
            arguments, which the function parses by itself.
    """

    summary: str
    target: str
    before: tuple[str, ...] | None


def options(summary: str, target: str) -> Command:
    """A command whose options are the function's parameters."""
    return Command(summary, target, None)


def words(summary: str, target: str, *before: str) -> Command:
    """A command whose function takes the words of the command line, with `before` in front of them."""
    return Command(summary, target, before)


COMMANDS = {
    "codes positional": options("codes by Algorithm 1: the digits of the token id", "cli.codes:positional"),
    "codes cluster": words(
        "codes by Algorithm 2: hierarchical balanced k-means of vectors, or of a corpus", "cli.codes:cluster"
    ),
    "codes neighbours": options("the tokens that share most codes with a token", "cli.codes:neighbours"),
    "codes inspect": options("sizes, quality and parameters of a code file", "cli.codes:inspect"),
    "codes extend": words("unused codes for new tokens: the vocabulary grows, the tables do not", "cli.codes:extend"),
    "corpus stats": options(
        "tokens and bytes per language of a shards folder, as the paper's Table 7", "cli.results:corpus_stats"
    ),
    "pretrain": words(
        "pretrain a masked language model on DeepSpeed; the same command again resumes", "pretrain.__main__:main"
    ),
    "submit": words(
        "submit a pretraining, evaluation or data job to SLURM; --dry-run prints the sbatch line", "cli.jobs:submit"
    ),
    "analyze": words(
        "similarities and PCA of embeddings and hidden states: numbers, figures, a 3-D page (Figures 2 to 10)",
        "cli.results:analyze",
    ),
    "compress": words("fit small tables to a trained model's embedding, at both ends", "cli.results:compress"),
    "export": options("write a run's model as a HuggingFace folder, checked by its logits", "cli.results:export"),
    "evaluate xnli": words(
        "fine-tune on XNLI and test 15 languages (Table 4); more of the same command = more workers",
        "evaluate.__main__:main",
        "xnli",
    ),
    "evaluate glue": words("fine-tune on GLUE's tasks over a grid (Tables 2 and 3)", "evaluate.__main__:main", "glue"),
    "evaluate watch": words(
        "score each new checkpoint of a running pretraining, without disturbing it", "evaluate.__main__:main", "watch"
    ),
    "evaluate status": words(
        "which jobs of an evaluation are done, running or waiting, and who holds them",
        "evaluate.__main__:main",
        "status",
    ),
    "report": options(
        "results joined into Tables 2 to 4, with differences and a paired test; --html for a run's page",
        "cli.results:report",
    ),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  ksub {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: ksub COMMAND [OPTIONS]\n\n"
        "Masked language models whose embedding is K small tables and a code per token.\n\n"
        + "\n".join(lines)
        + "\n\n`ksub COMMAND --help` tells the options of a command."
    )


def _run(name: str, arguments: Sequence[str]) -> int:
    command = COMMANDS[name]
    module, _, attribute = command.target.partition(":")
    function = getattr(importlib.import_module(f"ksub_ds.{module}"), attribute)
    if command.before is not None:
        return function([*command.before, *arguments]) or 0
    from ksub_ds.common.options import call

    call(function, arguments, f"ksub {name}")
    return 0


def _answer(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from ksub_ds import __version__

        print(f"ksub_ds {__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            try:
                return _run(name, arguments[words:])
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print("interrupted; the same command continues", file=sys.stderr)
                return 130
    group = [name for name in COMMANDS if name.startswith(arguments[0] + " ")]
    if group and arguments[1:2] in ([], ["-h"], ["--help"]):
        print("\n".join(["usage:"] + [f"  ksub {name}  {COMMANDS[name].summary}" for name in group]))
        return 0 if arguments[1:] else 2
    names = dict.fromkeys([*COMMANDS, *(name.split()[0] for name in COMMANDS)])
    near = difflib.get_close_matches(" ".join(arguments[:2]), names, n=1) or difflib.get_close_matches(
        arguments[0], names, n=1
    )
    hint = f"; did you mean `ksub {near[0]}`?" if near else ""
    print(f"error: no command {' '.join(arguments[:2])!r}{hint} (see ksub --help)", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the `ksub` command.

    Returns the exit code: 0, 2 after a user's mistake, 130 after Ctrl-C, or 141 when who reads has gone (`| head`).
    """
    try:
        code = _answer(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout.fileno()):
            raise  # another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 141


def _nobody_reads(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
