"""Command lines parsed into settings by tyro, whose framed messages become our one line.

Settings are dataclasses, or the parameters of a function; their docstrings are the help.
"""

import contextlib
import functools
import inspect
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ksub_ds.common.errors import UserError

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
    return _parse(kind, arguments, prog, inspect.getdoc(kind), default)


def call(function: Callable[..., object], arguments: Sequence[str], prog: str) -> None:
    """Call a function whose parameters are the options.

    Raises:
        UserError: the arguments are wrong, or the function raised it.
        SystemExit: --help was given, and is printed.
    """
    bind = functools.wraps(function)(lambda *values, **named: functools.partial(function, *values, **named))
    _parse(bind, arguments, prog, None)()


def _parse(kind: Any, arguments: Sequence[str] | None, prog: str, description: str | None, default: Any = None) -> Any:
    import tyro

    said = io.StringIO()
    given = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=prog, description=description, **given)
    except SystemExit as leave:
        if not leave.code:
            raise
    raise UserError(f"{_one_line(said.getvalue())}; see `{prog} --help`", agreed=True)


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
    return said + (f"; did you mean {near[1]}?" if near else "")
