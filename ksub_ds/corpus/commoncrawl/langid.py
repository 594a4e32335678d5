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
import importlib.metadata
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from py3langid import langid as py3langid
from scipy.sparse import coo_matrix, csr_matrix

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_bytes, sha256_file

# Merged docstring, to be folded in:
# """Language identification on windows of a page, with py3langid's model, many pages at a time.
#
# py3langid (Lui and Baldwin's langid.py, retrained on 139 languages) is naive Bayes over byte n-grams that an
# automaton finds. Its own `classify` walks that automaton in Python, byte by byte. Here all windows of a batch take
# each step together in numpy, about seven times faster; the scores are the same (a test compares them).
#
# A page is judged by WINDOWS windows of WINDOW_CHARACTERS characters, spread evenly from its start to its end. Each
# window has a probability per language; a page's confidence is their mean, weighted by bytes. So it says which
# share of the page is in the language: long text drives a single score of naive Bayes to 1 whatever the rest of the
# page holds. Digits, ASCII punctuation and blanks count for nothing.
#
# Dialects that the model tells apart and the 15 do not are added up: by ISO 639-3's macrolanguages, ary and arz are
# Arabic, wuu and yue Chinese; katharevousa and biblical Greek (grc) are Greek.
# """


WINDOWS, WINDOW_CHARACTERS = 5, 100
BATCH_PAGES = 256  # bounds the memory of a batch to a few tens of MB
PART_OF = {"ary": "ar", "arz": "ar", "wuu": "zh", "yue": "zh", "grc": "el"}

_NO_WORD = re.compile(r"[\x00-@\[-`{-\x7f]+")  # ASCII without its letters


class WindowIdentifier:
    """py3langid's model on windows of the page; see the module's text."""

    def __init__(self, threshold: float):
        self._threshold = threshold
        model = py3langid.LanguageIdentifier.from_model_file(py3langid.MODEL_FILE)
        # Rows of the automaton's transition table, the row each state has, the feature a state completes (or -1).
        self._next_state = np.asarray(model.tk_nextmove).astype(np.int32)
        self._row = np.asarray(model.tk_row).astype(np.int32) << 8
        self._feature = np.asarray(model.tk_output, dtype=np.int32)
        languages = [PART_OF.get(name, name) for name in model.nb_classes]
        wanted = [*LANGUAGES, OTHER]
        group = [wanted.index(name) if name in LANGUAGES else len(LANGUAGES) for name in languages]
        order = np.argsort(group, kind="stable")  # equal languages side by side, then everything else
        self._first_of_group = np.searchsorted(np.asarray(group)[order], range(len(wanted)))
        self._weights = np.ascontiguousarray(np.asarray(model.nb_ptc, dtype=np.float32)[:, order])
        self._prior = np.asarray(model.nb_pc, dtype=np.float32)[order]
        version = importlib.metadata.version("py3langid")
        digest = sha256_file(Path(py3langid.MODEL_DIR) / py3langid.MODEL_FILE)
        settings = f"windows 1, {WINDOWS} x {WINDOW_CHARACTERS}, {sorted(PART_OF.items())}, {threshold!r}"
        self.fingerprint = sha256_bytes(f"py3langid {version} {digest} {settings}".encode())

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """See LanguageIdentifier."""
        answers: list[tuple[str, float]] = []
        for start in range(0, len(texts), BATCH_PAGES):
            answers += self._identify(texts[start : start + BATCH_PAGES])
        return answers

    def _identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        windows_of_page = [cut_windows(text) for text in texts]
        windows = [window for page in windows_of_page for window in page]
        first = np.cumsum([0, *map(len, windows_of_page)])[:-1]
        weights = np.array([len(window) for window in windows], dtype=np.float64)
        probabilities = self.probabilities(windows) * weights[:, None]
        shares = np.add.reduceat(probabilities, first, axis=0) / np.maximum(np.add.reduceat(weights, first), 1)[:, None]
        shares = shares[:, : len(LANGUAGES)]
        best = shares.argmax(axis=1)
        scores = shares[np.arange(len(best)), best].round(4)
        return [
            (LANGUAGES[index] if score >= self._threshold and score > 0 else OTHER, score)
            for index, score in zip(best.tolist(), scores.tolist(), strict=True)
        ]

    def probabilities(self, windows: Sequence[bytes]) -> np.ndarray:
        """(windows, 16) float64: the probability of each of LANGUAGES, then of anything else.

        As in py3langid: the log posterior of log(1 + count) of each feature, over the root of the window's bytes.
        """
        lengths = np.array([len(window) for window in windows])
        counts = self._count(windows, lengths)
        features_found = np.diff(counts.indptr) > 0
        # Row by row, in the order of the features: no window's sum depends on its neighbours, as with BLAS it may.
        scores = (counts @ self._weights + self._prior).astype(np.float64)
        scores[~features_found] = 0
        scores /= np.sqrt(np.maximum(lengths, 1))[:, None]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        groups = np.add.reduceat(scores, self._first_of_group, axis=1)
        return groups / groups.sum(axis=1, keepdims=True)

    def _count(self, windows: Sequence[bytes], lengths: np.ndarray) -> csr_matrix:
        """log(1 + count) of the features in each window: (windows, features), CSR, float32."""
        longest_first = np.argsort(-lengths, kind="stable")
        longest = int(lengths.max(initial=0))
        padded = np.zeros((len(windows), longest), dtype=np.uint8)
        padded[np.arange(longest) < lengths[:, None]] = np.frombuffer(b"".join(windows), dtype=np.uint8)
        columns = np.ascontiguousarray(padded[longest_first].T)
        num_active = np.searchsorted(-lengths[longest_first], -np.arange(longest), side="left")
        state = np.zeros(len(windows), dtype=np.int32)
        features, rows = [], []
        for column, active in zip(columns, num_active.tolist(), strict=True):
            state = self._next_state[self._row[state[:active]] + column[:active]]
            feature = self._feature[state]
            found = np.flatnonzero(feature >= 0)
            features.append(feature[found])
            rows.append(found)
        feature = np.concatenate([np.empty(0, np.int32), *features])
        row = longest_first[np.concatenate([np.empty(0, np.intp), *rows])]
        shape = (len(windows), len(self._weights))
        counts = coo_matrix((np.ones(len(feature), np.float32), (row, feature)), shape=shape).tocsr()
        counts.sort_indices()
        counts.data = np.log1p(counts.data)
        return counts


def cut_windows(text: str) -> list[bytes]:
    """Up to WINDOWS pieces of the text, in UTF-8 without what is no word; at least one, maybe empty."""
    text = text.strip()
    if len(text) <= WINDOWS * WINDOW_CHARACTERS:
        starts = list(range(0, max(len(text), 1), WINDOW_CHARACTERS))
    else:
        starts = [(len(text) - WINDOW_CHARACTERS) * index // (WINDOWS - 1) for index in range(WINDOWS)]
    return [_normalise(text[start : start + WINDOW_CHARACTERS]) for start in starts]


def _normalise(piece: str) -> bytes:
    """NFC, and lower case when all is upper case, as py3langid does; no blanks, digits, ASCII punctuation."""
    if piece.isupper():
        piece = piece.lower()
    piece = unicodedata.normalize("NFC", _NO_WORD.sub(" ", piece).strip())
    return piece.encode("utf-8", "surrogatepass")


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
        from ksub_ds.corpus.commoncrawl.langid import WindowIdentifier

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
