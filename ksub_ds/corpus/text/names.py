"""What the name of a file or folder of text says: its form, its compression, its split, its language.

en.train.jsonl.gz          en, train, .jsonl, gzip
en/test-00000-of-00001.parquet
rus_Cyrl/                  ru
"""

import re
from typing import NamedTuple

from ksub_ds.common.compression import SUFFIXES as COMPRESSIONS
from ksub_ds.common.languages import language_name

PARQUET, ARROW = ".parquet", ".arrow"
FORMS = (".jsonl", ".json", ".txt", PARQUET, ARROW)

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel", "eval", "heldout", "holdout"),
    "test": ("test", "testing", "devtest"),
}
SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_SPLIT_SUBTAG = re.compile(rf"[-_]({'|'.join(SPLIT_OF)})(?![^-_])", re.IGNORECASE)


class TextName(NamedTuple):
    """The parts of a text file's name: `form` is one of FORMS; `compression` a suffix in small letters, or ""."""

    stem: str
    form: str
    compression: str


def parse_text_name(name: str) -> TextName | None:
    """Return the parts of a text file's name; None for other files.

    Args:
        name: of a file, suffixes in letters of any case.
    """
    plain, compression = name, ""
    suffix = "." + name.rpartition(".")[2].lower()
    if suffix in COMPRESSIONS:
        plain, compression = name[: -len(suffix)], suffix
    stem, dot, form = plain.rpartition(".")
    return TextName(stem, "." + form.lower(), compression) if dot and "." + form.lower() in FORMS else None


def is_hidden(name: str) -> bool:
    """Return whether a name is one that systems and editors keep out of sight, or the folder of such names in a zip."""
    return name.startswith(".") or name == "__MACOSX"


def split_of_words(text: str) -> str | None:
    """Return the split, "train", "validation" or "test", that a word of a name stands for; the last such word counts.

    Args:
        text: names, without the suffixes of their form.
    """
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", text)]
    return next((SPLIT_OF[word] for word in reversed(words) if word in SPLIT_OF), None)


def language_of_name(first: str) -> str | None:
    """Return the name of the language that the first part of a file's or folder's name stands for, or None.

    Args:
        first: up to the first dot; words of a split are left out of it, so that en-test is en.
    """
    return language_name(_SPLIT_SUBTAG.sub("", first))
