"""Paragraphs of a page and their 64-bit hashes, by CCNet's rule (Wenzek et al. 2020, section 3.1).

A paragraph is a line. Before hashing it is stripped, put in lower case, its digits become 0, and
punctuation and control characters go; the hash is the first 8 bytes of the SHA-1 of the UTF-8.
CCNet drops a fixed list of punctuation; here it is every character of Unicode's categories P* and Cc.

Whole batches of pages are normalised at once by one look-up per character in a table, which costs a
tenth of doing it line by line.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np

_DROPPED = 0x110000  # no character


@functools.cache
def _table() -> np.ndarray:
    """(0x110000,) uint32: what each code point becomes."""
    table = np.arange(0x110000, dtype=np.uint32)
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category == "Nd":
            table[code] = ord("0")
        elif category[0] == "P" or category == "Cc":
            table[code] = _DROPPED
    table[ord("\n")] = ord("\n")  # parts the paragraphs
    return table


def rule() -> str:
    """What decides the hashes, for fingerprints: the rule's name and the version of Unicode."""
    return f"sha1[:8] of strip, lower, Nd to 0, drop P* and Cc; Unicode {unicodedata.unidata_version}"


def normalise(paragraphs: Sequence[str]) -> list[bytes]:
    """Each paragraph (no newline inside) as the UTF-8 that is hashed."""
    if not paragraphs:
        return []
    # A newline ends every rule that looks at neighbours (the final sigma), so all go through as one string.
    joined = "\n".join([paragraph.strip() for paragraph in paragraphs]).lower()
    codes = _table()[np.frombuffer(joined.encode("utf-32-le"), dtype="<u4")]
    return codes[codes != _DROPPED].tobytes().decode("utf-32-le").encode().split(b"\n")


def hash_paragraphs(paragraphs: Sequence[str]) -> np.ndarray:
    """(n,) uint64 hashes of n paragraphs."""
    sha1 = hashlib.sha1
    digests = b"".join([sha1(each, usedforsecurity=False).digest()[:8] for each in normalise(paragraphs)])
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)
