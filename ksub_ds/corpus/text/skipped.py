"""What was left out of the text: counts by reason, with the first example of each; and what is lost whole by it."""

from collections import Counter
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger

LOST = {
    "held_out_split",
    "no_language",
    "not_a_regular_file",
    "not_in_state_json",
    "other_form",
    "other_suffix",
    "unreadable_folder",
}
"""Reasons for which whole files are left out that may hold text that is wanted. Other reasons lose nothing."""

# Besides every damaged_...: reasons of the reader for which a file is not read, or not to its end.
UNREAD = {"compressed_table", "empty_file", "file_without_document", "inflates_too_much", "no_text_column"}
UNREAD |= {"not_the_file", "unreadable_file"}

TOO_LONG_PAIRS = "pair_too_long"
WITHOUT_TEXT = ("no_text_key", "no_text_column")


class Skipped:
    """Counts of files and documents left out, and evidence for each reason.

    Attributes:
        counts: how many, by reason.
        examples: the first case of each reason in words: the file, the line, what was found there.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str = "", count: int = 1) -> None:
        """Count something left out.

        Args:
            reason: a key of the counts, such as "not_utf8".
            example: where, and what was found; kept, with control characters escaped, if it is the first of its reason.
            count: how many.
        """
        self.counts[reason] += count
        if example:
            self.examples.setdefault(reason, example if example.isprintable() else ascii(example)[1:-1])

    def total(self) -> int:
        """Return how much was left out, for all reasons."""
        return self.counts.total()

    def lines(self) -> list[str]:
        """Return a line for each reason: the count, and the example in brackets."""
        return [
            f"{reason} {count:,}" + (f" (first: {self.examples[reason]})" if reason in self.examples else "")
            for reason, count in sorted(self.counts.items())
        ]


def shown(text: str, longest: int = 60) -> str:
    """Return text of a file as a line of the log can show it: cut, control characters and half characters escaped.

    Args:
        text: from a file, or a file's name; whatever it holds.
        longest: characters that are shown.
    """
    cut = text[:longest]
    return (cut if cut.isprintable() else ascii(cut)[1:-1]) + ("..." if len(text) > longest else "")


class LeftOut:
    """The languages and files that a run leaves out, as lines.

    Args:
        text: what was skipped of each language.
        others: what was found besides, of no language.

    Attributes:
        lines: what is left out, in words.
    """

    def __init__(self, text: dict[str, Skipped], others: Skipped):
        self._text = text
        self.lines = [f"left out: {', '.join(lines)}" for lines in [_lines(others, others.counts)] if lines]
        for language, skipped in text.items():
            lines = _lines(skipped, skipped.counts)
            if lines:
                self.lines.append(f"left out of {language}: {', '.join(lines)}")

    def add_unread(self, made: dict[str, dict[str, Any]]) -> None:
        """Add the languages without a document, and the files that were not read to their end.

        Args:
            made: the manifest's entries of the shards that were made from the text, now or by an earlier run.
        """
        for language, entry in made.items():
            counts = {reason: n for reason, n in entry["skipped"].items() if is_unread(reason)}
            lines = _lines(self._text[language], counts)
            if lines and entry["files"]:  # the next line names the others
                self.lines.append(f"not read to the end in {language}: {', '.join(lines)}")
        empty = [name for name, entry in made.items() if not entry["files"]]
        too_long = {name: made[name]["skipped"].get(TOO_LONG_PAIRS, 0) for name in empty}
        if unread := [name for name in empty if not too_long[name]]:
            self.lines.append(f"no readable document in {', '.join(unread)}")
        for name in filter(too_long.get, empty):
            self.lines.append(f"no pair of {name} fits a row: {too_long[name]:,} are longer than --sequence-length")

    def first_example(self) -> str:
        """Return what was found first where text was expected, as " (first: ...)"; "" if nothing is known."""
        examples = (skipped.examples for skipped in self._text.values())
        found = next((each[reason] for each in examples for reason in WITHOUT_TEXT if reason in each), None)
        return f" (first: {found})" if found else ""

    def report(self) -> None:
        """Log all lines."""
        for line in self.lines:
            get_logger().info(f"warning: {line}")

    def refuse(self, outcome: str) -> None:
        """Refuse what is left out, if anything is.

        Args:
            outcome: what was done, for the message.

        Raises:
            UserError: something is left out.
        """
        if self.lines:
            self.report()
            more = f", and {len(self.lines) - 1} more lines above" if len(self.lines) > 1 else ""
            raise UserError(f"--strict: {self.lines[0]}{more}; {outcome}")


def _lines(skipped: Skipped, counts: dict[str, int]) -> list[str]:
    lost = Skipped()
    for reason, count in counts.items():
        if reason in LOST or is_unread(reason):
            lost.add(reason, skipped.examples.get(reason, ""), count)
    return lost.lines()


def is_unread(reason: str) -> bool:
    """Return whether a reason is one for which a file is not read, or not to its end."""
    return reason in UNREAD or reason.startswith("damaged_")
