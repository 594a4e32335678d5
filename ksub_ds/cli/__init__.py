"""The `ksub` command: parse, call, print. What the commands do is in the packages below.

    ksub codes positional --num-tokens 250002 --num-tables 3 --out codes.safetensors
    ksub pretrain --preset tiny --codes codes.safetensors --data shards --out run

Only the command that is called is imported, so `ksub --help` answers at once.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ksub_ds.common.exit_codes import DONE, USER_ERROR, run_main
from ksub_ds.common.option_help import hanging


class Command(NamedTuple):
    """A command of `ksub`.

    Attributes:
        summary: a line for `ksub --help`.
        target: "module:function" under ksub_ds.
        before: None if the function's parameters are the command's options; else words put before the arguments,
            which the function parses itself.
    """

    summary: str
    target: str
    before: tuple[str, ...] | None


def options(summary: str, target: str) -> Command:
    """Register a command whose options are the function's parameters."""
    return Command(summary, target, None)


def words(summary: str, target: str, *before: str) -> Command:
    """Register a command whose function takes the words of the command line.

    Args:
        summary: a line for `ksub --help`.
        target: "module:function" under ksub_ds.
        before: words put before those of the command line.
    """
    return Command(summary, target, before)


COMMANDS = {
    "codes positional": options("make codes by Algorithm 1: the digits of the token id", "cli.codes:positional"),
    "codes cluster": words(
        "make codes by Algorithm 2: hierarchical balanced k-means of vectors, or of a corpus", "cli.codes:cluster"
    ),
    "codes neighbours": options("list the tokens that share the most codes with a token", "cli.codes:neighbours"),
    "codes inspect": options("show sizes, quality and parameters of a code file", "cli.codes:inspect"),
    "codes extend": words("give new tokens unused codes: the vocabulary grows, the tables do not", "cli.codes:extend"),
    "codes dedicate": words(
        "give frequent tokens rows of their own beside the shared ones", "cli.codes:dedicate_tokens"
    ),
    "corpus stats": options(
        "count tokens and bytes per language of a shards folder, as in the paper's Table 7", "cli.inspect:corpus_stats"
    ),
    "pretrain": words(
        "pretrain a masked or causal model on DeepSpeed; the same command again resumes",
        "pretrain.__main__:main",
    ),
    "submit": words(
        "submit a pretraining, evaluation or data job to SLURM; --dry-run prints the sbatch line", "cli.submit:submit"
    ),
    "analyze": words(
        "measure similarities and PCA of embeddings and hidden states, with figures (Figures 2 to 10)",
        "cli.inspect:analyze",
    ),
    "compress": words("fit small tables to a trained model's embedding, at both ends", "cli.convert:compress"),
    "export": options("write a run's model as a HuggingFace folder, checked by its logits", "cli.convert:export"),
    "evaluate xnli": words(
        "fine-tune on XNLI and test 15 languages (Table 4); run it again elsewhere for more workers",
        "evaluate.__main__:main",
        "xnli",
    ),
    "evaluate glue": words("fine-tune on GLUE over a grid (Tables 2 and 3)", "evaluate.__main__:main", "glue"),
    "evaluate classify": words("fine-tune on a data set of your own", "evaluate.__main__:main", "classify"),
    "evaluate lm": words(
        "score text under causal models: bits per byte of each language", "evaluate.__main__:main", "lm"
    ),
    "evaluate watch": words(
        "score each new checkpoint of a running pretraining without disturbing it", "evaluate.__main__:main", "watch"
    ),
    "evaluate status": words(
        "show which jobs of an evaluation are done, running or waiting, and which worker has them",
        "evaluate.__main__:main",
        "status",
    ),
    "report": options(
        "join results into Tables 2 to 4, with differences and a paired test; --html for a run's page",
        "cli.inspect:report",
    ),
}


def _help() -> str:
    return (
        "usage: ksub COMMAND [OPTIONS]\n\n"
        "Masked language models whose embedding is K small tables and a code per token.\n\n"
        + _table(list(COMMANDS))
        + "\n\n`ksub COMMAND --help` lists the options of a command."
    )


def _table(names: Sequence[str]) -> str:
    """Return the commands with their summaries, as wide as the terminal."""
    column = max(map(len, names)) + 9
    return "\n".join(hanging(f"  ksub {name}".ljust(column) + COMMANDS[name].summary, column) for name in names)


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
            return _run(name, arguments[words:])
    group = [name for name in COMMANDS if name.startswith(arguments[0] + " ")]
    if group and arguments[1:2] in (["-h"], ["--help"]):
        print(f"usage: ksub {arguments[0]} COMMAND [OPTIONS]\n\n{_table(group)}")
        return DONE
    print(f"error: no command {' '.join(arguments[:2])!r}; {_hint(arguments, group)}", file=sys.stderr)
    return USER_ERROR


def _hint(arguments: Sequence[str], group: Sequence[str]) -> str:
    """Name the command that a mistyped one may be; where none is near, what there is.

    Args:
        arguments: the words behind `ksub`, the first of which is a group's or no command's.
        group: its commands.
    """
    if group:
        near = difflib.get_close_matches("".join(arguments[1:2]), [name.split()[1] for name in group], n=1)
        return f"did you mean `ksub {arguments[0]} {near[0]}`?" if near else f"there are {', '.join(group)}"
    names = dict.fromkeys([*COMMANDS, *(name.split()[0] for name in COMMANDS)])
    typed = (" ".join(arguments[:2]), arguments[0])
    near = next(filter(None, (difflib.get_close_matches(words, names, n=1) for words in typed)), [])
    return f"did you mean `ksub {near[0]}`?" if near else "see ksub --help"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `ksub` command.

    Args:
        arguments: the words behind `ksub`. [those of this process]

    Returns:
        The exit code (ksub_ds/common/exit_codes.py lists all).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    resumes = words[:1] in (["pretrain"], ["evaluate"]) or (words[:1] == ["compress"] and "--distill" in words)
    return run_main(lambda: _answer(words), resumes)
