"""What was left out of the text, by reason, with the first example of each."""

from collections import Counter


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
