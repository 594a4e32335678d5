"""What a run leaves out whole, a language or a file: told in its last lines, and refused by --strict."""

from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.text.sources import LOST, LanguageText

# Besides every damaged_...: reasons of the reader for which a file is not read, or not to its end.
UNREAD = {"compressed_table", "inflates_too_much", "no_text_column", "not_the_file", "unreadable_file"}


class LeftOut:
    """The languages and files that a run leaves out, as lines.

    Args:
        text: the text that was found.
        others: what was found besides, of no language.

    Attributes:
        lines: what is left out, in words.
    """

    def __init__(self, text: dict[str, LanguageText], others: Skipped):
        self._text = text
        self.lines = [f"left out: {', '.join(lines)}" for lines in [_lines(others, others.counts)] if lines]
        for language, entry in text.items():
            lines = _lines(entry.skipped, entry.skipped.counts)
            if lines:
                self.lines.append(f"left out of {language}: {', '.join(lines)}")

    def add_unread(self, manifest: dict[str, Any]) -> None:
        """Add the languages without a document, and the files that were not read to their end.

        Args:
            manifest: of the shards that were made from the text, now or by an earlier run.
        """
        for language, entry in manifest["languages"].items():
            counts = {reason: n for reason, n in entry["skipped"].items() if _is_unread(reason)}
            lines = _lines(self._text[language].skipped, counts)
            if lines:
                self.lines.append(f"not read to the end in {language}: {', '.join(lines)}")
        unread = [language for language, entry in manifest["languages"].items() if not entry["files"]]
        if unread:
            self.lines.append(f"no readable document in {', '.join(unread)}")

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
        if reason in LOST or _is_unread(reason):
            lost.add(reason, skipped.examples.get(reason, ""), count)
    return lost.lines()


def _is_unread(reason: str) -> bool:
    return reason in UNREAD or reason.startswith("damaged_")
