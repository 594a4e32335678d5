"""Windows over a document, so that each of its tokens is predicted once and with enough before it.

A document of n tokens is predicted in windows of at most `window` tokens that the model reads. The first window
predicts all it can. Each later one reads at least `context` tokens again before the first that it predicts, the last
one as many as fit: so no token stands at the beginning of a window as if nothing came before it.
(lm-evaluation-harness rolls its windows in this way, with a context of 1.)
"""

from typing import NamedTuple


class Window(NamedTuple):
    """A part of a document: tokens `begin` to `end` - 1 are read, `first` to `end` predicted.

    The state of token i predicts token i + 1, so begin < first <= end.
    """

    begin: int
    first: int
    end: int

    @property
    def length(self) -> int:
        """How many tokens are read."""
        return self.end - self.begin


def windows(length: int, window: int, context: int) -> list[Window]:
    """Divide a document: every token but the first is predicted once.

    Args:
        length: tokens of the document, the one that starts it included.
        window: the most tokens that the model reads at a time.
        context: the fewest tokens read before one that is predicted, where the document has as many.
    """
    assert 1 <= context <= window, "every prediction reads something"
    found = []
    first = 1
    while first < length:
        end = min(window if first == 1 else first - context + window, length - 1)
        found.append(Window(max(0, end - window), first, end))
        first = end + 1
    return found
