"""Which documents of a language are scored: a choice that depends on the text and a seed, and on no model.

Every document has a key, the hash of the seed and its text. The documents with the smallest keys are taken until their
bytes reach the limit, and the last of them is cut there: all languages have the same number of bytes, as far as they
have so many.
"""

import hashlib
import heapq
from dataclasses import dataclass

from ksub_ds.corpus.shards.writer import split_of
from ksub_ds.corpus.text.layout import TextLayout
from ksub_ds.corpus.text.reader import DocumentReader
from ksub_ds.corpus.text.sources import LanguageText


@dataclass(frozen=True)
class Choice:
    """How documents are chosen.

    Attributes:
        seed: of the choice.
        num_bytes: the most UTF-8 bytes; None = all.
        num_documents: the most documents; None = all.
        held_out: only the documents that sharding with this --validation-fraction keeps out of training; None = all.
    """

    seed: int = 0
    num_bytes: int | None = None
    num_documents: int | None = None
    held_out: float | None = None


@dataclass(frozen=True)
class ChosenText:
    """The documents of a language that are scored, in the order of their keys.

    Attributes:
        texts: the documents.
        available: how many there were to choose from.
        cut: whether the last one was cut to the limit.
    """

    texts: list[str]
    available: int
    cut: bool


def choose(text: LanguageText, layout: TextLayout, choice: Choice) -> ChosenText:
    """Read all documents of a language once and keep the chosen ones; no more than these are in memory.

    Args:
        text: of the language; what is skipped is counted there.
        layout: how documents lie in the files.
        choice: which.
    """
    kept: list[tuple[int, int, str, int]] = []  # a heap, largest key first: (-key, -number, text, bytes)
    total, available = 0, 0
    for number, document in enumerate(DocumentReader(text.sources, text.skipped, layout)):
        raw = document.encode()
        if choice.held_out is not None and split_of(raw, choice.held_out) != "validation":
            continue
        available += 1
        digest = hashlib.blake2b(raw, digest_size=8, key=f"ksub lm {choice.seed}".encode()).digest()
        heapq.heappush(kept, (-int.from_bytes(digest, "big"), -number, document, len(raw)))
        total += len(raw)
        while _is_surplus(total - kept[0][3], len(kept) - 1, choice):
            total -= heapq.heappop(kept)[3]
    texts = [document for *_, document, _ in sorted(kept, key=lambda entry: (-entry[0], -entry[1]))]
    over = 0 if choice.num_bytes is None else total - choice.num_bytes
    if over > 0:
        last = texts[-1].encode()
        texts[-1] = last[: len(last) - over].decode(errors="ignore")  # not inside a character
    return ChosenText([document for document in texts if document], available, over > 0)


def _is_surplus(bytes_without: int, count_without: int, choice: Choice) -> bool:
    """Return whether the others are enough without the document of the largest key."""
    enough = choice.num_bytes is not None and bytes_without >= choice.num_bytes
    return enough or (choice.num_documents is not None and count_without >= choice.num_documents)
