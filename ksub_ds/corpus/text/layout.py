"""Where the text of a document is: which key or column holds it, and what to say when none does."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.text.skipped import shown

TEXT_COLUMNS = ("text", "raw_content")
LIKELY = ("text", "content", "body", "article", "document", "passage", "page_content", "raw_text", "sentence")
KEYS_SHOWN = 12
TRANSLATION = "translation"  # of the object with the sides of a pair


@dataclass(frozen=True)
class TextLayout:
    """How documents lie in their files, as far as the files do not say so themselves.

    Attributes:
        text_column: the key or column that holds the text; None = the first of TEXT_COLUMNS that is there.
        line_documents: whether each line of a .txt is a document; else blank lines separate them.

    Raises:
        UserError: the column has no name.
    """

    text_column: str | None = None
    line_documents: bool = False

    def __post_init__(self) -> None:
        if self.text_column == "":
            raise UserError("--text-column '': give the name of the key or column that holds the text")

    def recipe(self) -> dict[str, Any]:
        """Return what differs from the default: it decides the shards."""
        recipe: dict[str, Any] = {}
        if self.text_column is not None:
            recipe["text_column"] = self.text_column
        if self.line_documents:
            recipe["line_documents"] = True
        return recipe

    def columns(self) -> tuple[str, ...]:
        """Return the names of the column, the first that is there counts."""
        return TEXT_COLUMNS if self.text_column is None else (self.text_column,)

    def text_of(self, row: Mapping[str, Any]) -> Any:
        """Return what stands where the text should be in a row, None if there is nothing."""
        if self.text_column is not None:
            return row.get(self.text_column)
        return row.get("text", row.get("raw_content"))

    def missing(self, columns: Iterable[str], texts: Iterable[str]) -> str:
        """Return in words that a table or object has no text, and what to do.

        Args:
            columns: the columns or keys found.
            texts: those of them that hold strings, the likeliest last.
        """
        columns, texts = list(columns), list(texts)
        wanted = " or ".join(f'"{shown(name)}"' for name in self.columns())
        words = f"no {wanted}, only {', '.join(map(shown, columns[:KEYS_SHOWN])) or 'nothing'}"
        words += " ..." if len(columns) > KEYS_SHOWN else ""
        if TRANSLATION in columns:
            return words + "; these are pairs of sentences: give their folder as --parallel"
        likely = [text for name in LIKELY for text in texts if text.casefold() == name]
        choice = next(iter(likely), texts[-1] if texts else None)
        if choice is not None and choice.isprintable():
            words += f"; give --text-column {shlex.quote(choice)}"
        return words

    def missing_in(self, value: Any) -> str:
        """Return in words why a JSON value has no text, and what to do.

        Args:
            value: what was read.
        """
        if not isinstance(value, Mapping):
            return f"a JSON {_kind(value)}, not an object with a text"
        for name in self.columns():
            if name in value:
                return f'"{shown(name)}" holds a JSON {_kind(value[name])}, not a string'
        strings = sorted((name for name in value if isinstance(value[name], str)), key=lambda name: len(value[name]))
        return self.missing(value, strings)


DEFAULT_LAYOUT = TextLayout()


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "boolean", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "number")
