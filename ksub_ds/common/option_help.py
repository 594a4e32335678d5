"""The text of --help: options in sections, each described in whole sentences, with the default as [VALUE].

A field `preset: Annotated[str, Section("model")]` begins a section, and the fields behind it belong to it until the
next one begins; those before the first are plain "options". Descriptions are the fields' docstrings, or the Args of
a function. tyro prints what `page` builds, and never parses with it: the command line is the settings' own.
"""

import ast
import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

DEFAULTS = {"None": "none", "": "none", "True": "on", "False": "off"}  # as they are told


class Section(NamedTuple):
    """The mark of the first option of a section of --help.

    Attributes:
        title: of the section; " options" is put behind it.
    """

    title: str


class Option(NamedTuple):
    """An option as the settings declare it.

    Attributes:
        name: of the field or parameter.
        hint: its type, with all that is annotated.
        field: a dataclass field with its default, if it has one.
        description: one paragraph.
        section: title, or "" for none.
    """

    name: str
    hint: Any
    field: Any
    description: str
    section: str


def options_of(kind: Callable[..., object]) -> list[Option]:
    """Return the options of a dataclass, or of a function, in their order."""
    hints = get_type_hints(kind, include_extras=True)
    described = _fields_described(kind) if dataclasses.is_dataclass(kind) else _parameters_described(kind)
    found: list[Option] = []
    section = ""
    for name, field in _defaults(kind):
        marks = getattr(hints[name], "__metadata__", ())
        section = next((mark.title for mark in marks if isinstance(mark, Section)), section)
        found.append(Option(name, hints[name], field, described.get(name, ""), section))
    return found


def page(kind: Callable[..., object]) -> type:
    """Return a dataclass whose help, printed by tyro with `OmitArgPrefixes`, is that of `kind` in sections."""
    from tyro.conf import arg

    shown = [_as_flag(option) for option in options_of(kind)]
    rows = [(option.section, (option.name, _annotated(option), option.field)) for option in shown]
    fields: list[Any] = [field for section, field in rows if not section]
    for number, title in enumerate(dict.fromkeys(section for section, _ in rows if section)):
        part = dataclasses.make_dataclass(
            f"Part{number}",
            [field for section, field in rows if section == title],
            kw_only=True,
            namespace={"__doc__": ""},
        )
        fields.append((f"part{number}", Annotated[part, arg(name=title)]))
    return dataclasses.make_dataclass("Page", fields, kw_only=True)


def hanging(text: str, column: int = 0) -> str:
    """Return one paragraph filled to the terminal's width, its lines but the first indented to a column."""
    width = max(40, column + 30, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, subsequent_indent=" " * column, break_long_words=False, break_on_hyphens=False)


def paragraphs(text: str) -> str:
    """Return a text with each of its paragraphs filled to the terminal's width."""
    return "\n\n".join(hanging(" ".join(part.split())) for part in re.split(r"\n\s*\n", text))


def _defaults(kind: Callable[..., object]) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(kind):
        for each in dataclasses.fields(kind):
            if each.init:
                yield each.name, dataclasses.field(default=each.default, default_factory=each.default_factory)
        return
    for parameter in inspect.signature(kind).parameters.values():
        missing = parameter.default is parameter.empty
        yield parameter.name, dataclasses.field() if missing else dataclasses.field(default=parameter.default)


def _fields_described(kind: Any) -> dict[str, str]:
    """Return the strings that stand behind the fields of a dataclass, and of those it extends."""
    found = {}
    for each in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(each)))  # type: ignore[arg-type]  # a class, not an instance
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef))
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def _parameters_described(function: Callable[..., object]) -> dict[str, str]:
    """Return what the Args section of a docstring says of each parameter."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", inspect.getdoc(function) or "", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _as_flag(option: Option) -> Option:
    """Return an option `bool | None`, which `parse` takes as --NAME and --no-NAME, as the bool that tyro shows so."""
    if option.hint != bool | None:
        return option
    return option._replace(hint=bool, field=dataclasses.field(default=False))


def _annotated(option: Option) -> Any:
    """Return the option's type with its description, and its default where the description does not end in one."""
    from tyro.conf import arg

    told = re.fullmatch(r"(.*?) *(\[[^][]*\])", option.description)

    def default(value: str) -> str:
        return told[2] if told else f"[{DEFAULTS.get(value, value)}]"

    marks: tuple[Any, ...] = getattr(option.hint, "__metadata__", ())
    own: Any = next((mark for mark in marks if type(mark) is type(arg())), arg())
    text = told[1] if told else option.description
    metavar = own.metavar or _several(option.hint)
    return Annotated[option.hint, dataclasses.replace(own, help=text, help_behavior_hint=default, metavar=metavar)]


def _several(hint: Any) -> str | None:
    """Return how any number of values are written (`INT ...`); None for other types, which tyro writes well."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    kinds = [each for each in get_args(hint) if get_origin(each) is tuple] if get_origin(hint) is not tuple else [hint]
    if len(kinds) != 1 or get_args(kinds[0])[1:] != (...,):
        return None
    value = get_args(kinds[0])[0]
    choices = get_args(value) if get_origin(value) is Literal else ()
    return ("{" + ",".join(map(str, choices)) + "}" if choices else value.__name__.upper()) + " ..."
