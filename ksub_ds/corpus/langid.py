"""Which of the 15 languages a page is written in, or none of them.

    identifier = load_identifier("py3langid")
    identifier.identify(["Ένα μικρό σπίτι", "Pieni vanha talo"])     # [("el", 1.0), ("other", 0.0)]

Two identifiers. "py3langid", the default, needs no download: the model of 139 languages lies in its wheel, and
`window_langid` applies it to a sample of the page. "fasttext" is CCNet's: lid.176 on the whole page without its
newlines, kept from probability 0.5 on (Wenzek et al. 2020). Both know the neighbours of the 15 as well, and say
"other" of them; an identifier that knows the 15 alone would call Finnish one of them.

How well they do is measured by `benchmarks/langid.py`.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_bytes, sha256_file

LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
"""The 15 languages of XNLI and CC-15."""
OTHER = "other"
IdentifierName = Literal["py3langid", "fasttext"]
THRESHOLD = 0.5  # CCNet's; for window_langid it means "at least half of the page"


class LanguageIdentifier(Protocol):
    """What the pipeline asks of an identifier. A text's answer depends on that text alone, not on its batch."""

    fingerprint: str
    """Changes whenever an answer might: name, version, model, threshold."""

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """For each text a language of LANGUAGES or "other", and the confidence in 0..1 of the best of the 15.

        Below the threshold the language is "other".
        """
        ...


def load_identifier(
    name: str = "py3langid", model: Path | None = None, threshold: float | None = None
) -> LanguageIdentifier:
    """Load an identifier by name.

    Args:
        name: "py3langid" or "fasttext".
        model: the model file; fasttext needs one (lid.176.bin or lid.176.ftz), py3langid brings its own.
        threshold: least confidence that keeps a page; None is 0.5.

    Raises:
        UserError: an unknown name, a threshold out of range, a model that is missing, unwanted or unreadable, or a
            package that is not installed.
    """
    threshold = THRESHOLD if threshold is None else threshold
    if not 0 <= threshold <= 1:
        raise UserError(f"--langid-threshold {threshold}: must lie in 0..1; the default is {THRESHOLD}")
    if name == "py3langid":
        if model is not None:
            raise UserError(f"--langid-model {model}: py3langid brings its own model; add --langid fasttext")
        from ksub_ds.corpus.window_langid import WindowIdentifier

        return WindowIdentifier(threshold)
    if name == "fasttext":
        if model is None:
            raise UserError("--langid fasttext: name the model too, --langid-model lid.176.bin (or lid.176.ftz)")
        return FastTextIdentifier(model, threshold)
    raise UserError(f"--langid {name}: must be py3langid or fasttext")


class FastTextIdentifier:
    """fastText's supervised model on the whole text without newlines, as CCNet uses lid.176."""

    def __init__(self, model: Path, threshold: float):
        try:
            fasttext: Any = importlib.import_module("fasttext")
        except ImportError as error:
            raise UserError("--langid fasttext: needs a package; pip install fasttext-predict") from error
        if not model.is_file():
            raise UserError(f"--langid-model {model}: no such file; take lid.176.bin or lid.176.ftz from fasttext.cc")
        try:
            self._model = fasttext.load_model(str(model))
            self._model.predict("a", k=1)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise UserError(f"--langid-model {model}: is not a fastText model ({error})") from error
        self._threshold = threshold
        self.fingerprint = sha256_bytes(f"fasttext {sha256_file(model)} {threshold!r}".encode())

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """See LanguageIdentifier."""
        return [self._identify(text) for text in texts]

    def _identify(self, text: str) -> tuple[str, float]:
        line = text.replace("\n", " ").encode("utf-8", "replace").decode()  # half a surrogate pair is no UTF-8
        labels, scores = self._model.predict(line, k=1)
        if not labels:
            return OTHER, 0.0
        language = labels[0].removeprefix("__label__")
        score = min(float(scores[0]), 1.0)  # fastText's tables round to a little above 1
        return (language, score) if language in LANGUAGES and score >= self._threshold else (OTHER, score)
