"""Text without a blank for megabytes, piece by piece: what a page may hold that is none.

A normaliser looks at a few characters at a time, and needs a hundred times a word's size in memory. So a very
long word is normalised in steps, and the units in it (normalising can make blanks) come out as they are complete.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator

from ksub_ds.corpus.tokenizers.unigram import SPACE

STEP, REACH = 1 << 16, 1 << 12  # characters normalised at once, and how much further a good place to cut may lie

# White space as HuggingFace's pre-tokenizer (Rust's char::is_whitespace) counts it.
WHITESPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")

# Letters that a normaliser may join to the one before: Hangul, half-width kana, the vowel AM of Thai and Lao.
_JOINED = re.compile("[\u0e33\u0eb3\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff\uff65-\uffdc]")


def cut(text: str) -> Iterator[str]:
    """Pieces of about STEP characters, each but the first beginning with a character that stands for itself."""
    begin = 0
    while begin < len(text):
        end = begin + STEP
        last = end + REACH  # no such character within reach: that is no text of any language
        while end < min(last, len(text)) and not _stands_alone(text[end]):
            end += 1
        yield text[begin:end]
        begin = end


def _stands_alone(character: str) -> bool:
    return unicodedata.category(character) in ("Lu", "Ll", "Lo", "Nd") and not _JOINED.match(character)


def units(text: str) -> list[str]:
    """The words HuggingFace's pre-tokenizer makes of a normalised text, each without its leading mark."""
    found: list[str] = []
    for word in filter(None, WHITESPACE.split(text)):
        # A mark spelt out in the text starts a new word, as the pre-tokenizer's own marks do.
        found += word.removeprefix(SPACE).split(SPACE)
    return found


def units_in_steps(word: str, normalise: Callable[[str], str]) -> Iterator[list[str]]:
    """units(normalise(word)), a few at a time."""
    rest: list[str] = []
    for piece in map(normalise, cut(word)):
        place = max([piece.rfind(SPACE), *(match.start() for match in WHITESPACE.finditer(piece))])
        if place >= 0:
            yield units("".join([*rest, piece[:place]]))
            rest = []
        rest.append(piece[max(place, 0) :])
    yield units("".join(rest))
