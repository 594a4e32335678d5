"""Command lines parsed into settings by tyro, whose framed messages become our one line.

Settings are dataclasses, or the parameters of a function; their docstrings are the help.
"""

import contextlib
import functools
import inspect
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from ksub_ds.common.errors import UserError
from ksub_ds.common.option_help import hanging, page, paragraphs

Settings = TypeVar("Settings")


def parse(
    kind: type[Settings], arguments: Sequence[str] | None, prog: str, default: Settings | None = None
) -> Settings:
    """Parse a command line into settings.

    Args:
        kind: a dataclass.
        arguments: the words behind the command; None takes those of this process.
        prog: the command, as the user types it.
        default: gives the values of options left out, also of required ones. [those of the class]

    Raises:
        UserError: what is wrong with the arguments; all ranks raise it, as they parse the same words.
        SystemExit: --help was given, and is printed.
    """
    return _parse(kind, kind, _spelt_out(kind, sys.argv[1:] if arguments is None else arguments), prog, default)


def _spelt_out(kind: Any, arguments: Sequence[str]) -> list[str]:
    """Give flags that may be left open (`bool | None`) the value that tyro wants behind them."""
    hints = get_type_hints(kind)
    open_flags = [name.replace("_", "-") for name, hint in hints.items() if hint == bool | None]
    spelt = {f"--{no}{name}": [f"--{name}", str(not no)] for name in open_flags for no in ("", "no-")}
    return [part for word in arguments for part in spelt.get(word, [word])]


def call(function: Callable[..., object], arguments: Sequence[str], prog: str) -> None:
    """Call a function whose parameters are the options.

    Args:
        function: the command.
        arguments: words of the command line.
        prog: name of the command, for --help and messages.

    Raises:
        UserError: the arguments are wrong, or the function raised it.
        SystemExit: --help was given, and is printed.
    """
    bind = functools.wraps(function)(lambda *values, **named: functools.partial(function, *values, **named))
    _parse(bind, function, arguments, prog)()


def _parse(
    kind: Any, declared: Callable[..., object], arguments: Sequence[str] | None, prog: str, default: Any = None
) -> Any:
    """Parse into `kind`, whose options and help are those of `declared`.

    Raises:
        UserError: what is wrong with the arguments.
        SystemExit: help, or a completion for the shell, is printed.
    """
    import tyro

    words = list(sys.argv[1:] if arguments is None else arguments)
    _refuse_lost(declared, words)
    given = {} if default is None else {"default": default}
    said, printed = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            return tyro.cli(kind, args=words, prog=prog, **given)
    except SystemExit as leave:
        if not leave.code:
            if not {"-h", "--help"} & set(words):  # a script for the shell's completion
                print(printed.getvalue(), end="")
                raise
            print_help(declared, prog)
    raise UserError(f"{_one_line(said.getvalue())}; see `{prog} --help`", agreed=True)


def _refuse_lost(declared: Callable[..., object], words: Sequence[str]) -> None:
    """Refuse what argparse would take and lose: an option twice, where both name what is read, and an empty path.

    Numbers and names may be given again, as scripts do to change a default; several values or paths would be left out.

    Raises:
        UserError: an option stands there twice, or a path is empty, which would mean the folder one is in.
    """
    given = [word.partition("=")[0].replace("_", "-") for word in words]
    for name, hint in get_type_hints(declared).items():
        option, several = f"--{name.replace('_', '-')}", get_origin(hint) is tuple
        is_path = Path in (hint, *get_args(hint))
        if given.count(option) > 1 and (several or is_path):
            remedy = f"put all its values behind one {option}" if several else "it takes one"
            raise UserError(f"{option}: is given twice; {remedy}", agreed=True)
        behind = [word for before, word in zip(given, words[1:], strict=False) if before == option]
        if is_path and ("" in behind or f"{option}=" in words):
            raise UserError(f"{option}: is empty; give a path (a variable that is not set?)", agreed=True)


def print_help(declared: Callable[..., object], prog: str) -> NoReturn:
    """Print the help of settings, or of a function's parameters, and leave.

    Raises:
        SystemExit: always, with code 0.
    """
    import tyro

    printed = io.StringIO()
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):
        tyro.cli(page(declared), args=["--help"], prog=prog, description="", config=config)
    usage, _, boxes = printed.getvalue().partition("\n\n")
    about = re.split(r"^(?:Args|Raises|Returns|Attributes):$", inspect.getdoc(declared) or "", flags=re.MULTILINE)[0]
    rows = "\n".join(line.rstrip() for line in boxes.splitlines()).strip("\n")
    print("\n\n".join([hanging(usage, 4), paragraphs(about.strip()), rows]))
    raise SystemExit(0)


def _one_line(box: str) -> str:
    """Return tyro's message without its frame: what is wrong, and the option nearest to an unknown one."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in plain.splitlines() if not line.startswith(("╭", "╰"))]
    rows = [line if re.search(r"\w", line) else "" for line in lines]  # rules divide paragraphs, as empty lines do
    paragraphs = [" ".join(part.split("\n")) for part in re.split(r"\n\n+", "\n".join(rows).strip())]
    if "╭" not in plain:  # a terminal without such characters: the title has a line of its own
        paragraphs = paragraphs[1:] or paragraphs
    said = paragraphs[0].rstrip(".")
    if said.startswith("Missing from"):  # each with its help text
        names = re.findall(r"(?:^Missing from [^:]*: |[(]required[)] )(--[\w-]+|[A-Z]{2,})", said)
        unknown = [text for text in paragraphs if text.startswith("Unrecognized")]
        return "; ".join([f"give {', '.join(names)}" if names else said, *unknown])
    near = re.search(r": *(--[\w-]+) ", " ".join(paragraphs[1:2])) if said.startswith("Unrecognized") else None
    return _wrong_value(said) + (f"; did you mean {near[1]}?" if near else "")


def _wrong_value(said: str) -> str:
    """Return tyro's message on a wrong or missing value as option, value and what it must be; any other as it is."""
    if choice := re.fullmatch(r"invalid choice '(.*)' for argument '(.*)'[.] Expected one of [(](.*)[)]", said):
        value, option, listed = choice.groups()
        *others, last = sorted({*re.findall(r"'(.*?)'", listed)} - {"None"})  # None: the option may be left out
        return f"{option} {value}: must be {' or '.join(filter(None, [', '.join(others), last]))}"
    if number := re.fullmatch(r"Error parsing (--[\w-]+): .*?\b(int|float)\b.*?'(.*)'\]?", said, re.IGNORECASE):
        option, kind, value = number.groups()
        return f"{option} {value}: must be a {'whole ' * (kind.lower() == 'int')}number"
    if missing := re.match(r"Missing value for argument '(.*?)'", said):
        return f"{missing[1].upper() if missing[1][0] != '-' else missing[1]}: needs a value"
    return said
