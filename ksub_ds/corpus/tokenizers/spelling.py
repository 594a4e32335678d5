"""What tokens spell: how a vocabulary writes a word, and how many UTF-8 bytes of text a token stands for.

The bytes make losses under different vocabularies comparable. A blank is one byte, also where SentencePiece adds it
before the first word of a text, and where it stands for a line break. The text is the tokenizer's: after its
normaliser, which may have changed a character for another.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from ksub_ds.corpus.tokenizers.huggingface import HuggingFaceTokenizer
from ksub_ds.corpus.tokenizers.loading import Tokenizer
from ksub_ds.corpus.tokenizers.xlmr import SPACE

_BYTE_SPACE = "Ġ"  # how byte-level BPE writes a blank
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def spellings(word: str) -> tuple[str, ...]:
    """Return how vocabularies may write a word as one token: with SentencePiece's blank, byte-level BPE's, or none."""
    return f"{SPACE}{word}", f"{_BYTE_SPACE}{word}", word


@functools.lru_cache(maxsize=4)  # asked for at each evaluation
def token_bytes(tokenizer: Tokenizer) -> np.ndarray | None:
    """Return the UTF-8 bytes of each token.

    Args:
        tokenizer: of SentencePiece's kind, with or without byte fallback, or of byte-level BPE's.

    Returns:
        (N,) int64; 0 for special tokens, the unknown one included. None for other kinds of tokenizers: WordPiece, in
        which tokens do not say where blanks were, and those that write a blank in another way ("</w>").
    """
    tokens, steps, added = tokenizer.tokens(), {"Metaspace"}, set()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        definition = tokenizer.definition()
        steps = {_kind(step) for step in _steps(definition["decoder"])}
        added = {token["id"] for token in definition["added_tokens"]}
    if "ByteLevel" in steps:
        # A character a byte, except in tokens that were added as text.
        sizes = [len(token.encode()) if index in added else len(token) for index, token in enumerate(tokens)]
    elif "Metaspace" in steps:
        has_bytes = "ByteFallback" in steps
        sizes = [
            1 if has_bytes and _BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode()) for token in tokens
        ]
    else:
        return None
    counts = np.array(sizes, dtype=np.int64)
    counts[list(tokenizer.special_ids)] = 0
    if tokenizer.unk_id is not None:
        counts[tokenizer.unk_id] = 0
    counts.flags.writeable = False
    return counts


def _kind(step: dict[str, Any]) -> str:
    """Return what a decoder's step is: Metaspace for both ways to turn SentencePiece's sign into blanks."""
    if step["type"] == "Metaspace":
        return "Metaspace" if step["replacement"] == SPACE else "other"
    if step["type"] == "Replace":
        return "Metaspace" if (step["pattern"], step["content"]) == ({"String": SPACE}, " ") else "other"
    return str(step["type"])


def _steps(decoder: Any) -> Iterator[dict[str, Any]]:
    """Yield a decoder's steps, as tokenizer.json describes them."""
    if decoder:
        yield decoder
        for step in decoder.get("decoders", []):
            yield from _steps(step)
