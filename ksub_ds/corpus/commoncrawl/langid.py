"""Language identification: which of the 15 languages a page is written in, if any.

    identifier = load_identifier("py3langid")
    identifier.identify(["Ένα μικρό σπίτι", "Pieni vanha talo"])     # [("el", 1.0), ("other", 0.0)]

There are two identifiers. "py3langid", the default, needs no download: its wheel holds a model of 139 languages, which
`WindowIdentifier` applies to a sample of the page. "fasttext" is CCNet's: lid.176 on the whole page without its
newlines, kept from probability 0.5 on (Wenzek et al. 2020). Both models know many more languages than the 15 and
answer "other" for them; an identifier that knows only the 15 would take Finnish for one of them.

`benchmarks/langid.py` measures their quality and speed.
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
from ksub_ds.common.languages import LANGUAGES
from ksub_ds.common.logging import get_logger

OTHER = "other"
IdentifierName = Literal["py3langid", "fasttext"]
THRESHOLD = 0.5  # CCNet's; for WindowIdentifier it means "at least half of the page"
WINDOWS, WINDOW_CHARACTERS = 5, 100
BATCH_PAGES = 256  # bounds the memory of a batch to a few tens of MB
PART_OF = {"ary": "ar", "arz": "ar", "wuu": "zh", "yue": "zh", "grc": "el"}

# The labels of NLLB's, OpenLID's and GlotLID's fastText models: ISO 639-3 and a script, such as eng_Latn.
ISO_639_3 = {
    "ara": "ar", "arb": "ar", "bul": "bg", "deu": "de", "ger": "de", "ell": "el", "gre": "el", "eng": "en",
    "spa": "es", "fra": "fr", "fre": "fr", "hin": "hi", "rus": "ru", "swa": "sw", "swh": "sw", "tha": "th",
    "tur": "tr", "urd": "ur", "vie": "vi", "zho": "zh", "chi": "zh", "cmn": "zh",
}  # fmt: skip
ARABIC = ("acm", "acq", "aeb", "ajp", "apc", "ars")  # of ISO 639-3's macrolanguage, besides those of PART_OF
SCRIPTS = {
    **dict.fromkeys(("de", "en", "es", "fr", "sw", "tr", "vi"), ("latn",)),
    **dict.fromkeys(("ar", "ur"), ("arab",)),
    **dict.fromkeys(("bg", "ru"), ("cyrl",)),
    "el": ("grek",),
    "hi": ("deva",),
    "th": ("thai",),
    "zh": ("hani", "hans", "hant"),
}
LEAST_PART = 0.01  # probabilities below are not added to those of other labels of the same language

_NOT_LETTERS = re.compile(r"[\x00-@\[-`{-\x7f]+")  # ASCII without its letters


class LanguageIdentifier(Protocol):
    """What the pipeline needs of an identifier. The answer for a text must not depend on the rest of its batch."""

    fingerprint: str
    """A hash of what decides the answers: name, version, model, threshold."""

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """Return for each text a language of LANGUAGES or "other", and the confidence in 0..1 of the best of the 15.

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
        return WindowIdentifier(threshold)
    if name == "fasttext":
        if model is None:
            raise UserError("--langid fasttext: name the model too, --langid-model lid.176.bin (or lid.176.ftz)")
        return FastTextIdentifier(model, threshold)
    raise UserError(f"--langid {name}: must be py3langid or fasttext")


class WindowIdentifier:
    """py3langid's model on windows of a page, many pages at a time.

    py3langid (Lui and Baldwin's langid.py, retrained on 139 languages) is naive Bayes over byte n-grams, which an
    automaton finds. Its own `classify` runs that automaton in Python, byte by byte. Here all windows of a batch take
    each step together in numpy, about seven times faster, with the same scores (a test compares them).

    A page is judged by WINDOWS windows of WINDOW_CHARACTERS characters, spread evenly from its start to its end. Each
    window has a probability per language; the confidence of a page is their mean, weighted by bytes. It estimates
    the share of the page in that language, whereas a single score of naive Bayes tends to 1 on long text whatever else
    the page holds. Digits, ASCII punctuation and blanks are ignored.

    Varieties that the model tells apart and the 15 do not are summed: by ISO 639-3's macrolanguages, ary and arz are
    Arabic, wuu and yue Chinese; katharevousa and biblical Greek (grc) are Greek.

    Args:
        threshold: least confidence of a language.
    """

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
        order = np.argsort(group, kind="stable")  # languages of a group side by side, all others last
        self._first_of_group = np.searchsorted(np.asarray(group)[order], range(len(wanted)))
        self._weights = np.ascontiguousarray(np.asarray(model.nb_ptc, dtype=np.float32)[:, order])
        self._prior = np.asarray(model.nb_pc, dtype=np.float32)[order]
        version = importlib.metadata.version("py3langid")
        digest = sha256_file(Path(py3langid.MODEL_DIR) / py3langid.MODEL_FILE)
        settings = f"windows 1, {WINDOWS} x {WINDOW_CHARACTERS}, {sorted(PART_OF.items())}, {threshold!r}"
        self.fingerprint = sha256_bytes(f"py3langid {version} {digest} {settings}".encode())

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """Identify the language of each text, see LanguageIdentifier."""
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
        """Return (windows, 16) float64, the probability of each of LANGUAGES, then of all other languages.

        As in py3langid: the log posterior of log(1 + count) of each feature, divided by the root of the window's bytes.
        """
        lengths = np.array([len(window) for window in windows])
        counts = self._count(windows, lengths)
        features_found = np.diff(counts.indptr) > 0
        # A sparse product sums row by row, in the order of the features: with BLAS a sum may depend on other windows.
        scores = (counts @ self._weights + self._prior).astype(np.float64)
        scores[~features_found] = 0
        scores /= np.sqrt(np.maximum(lengths, 1))[:, None]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        groups = np.add.reduceat(scores, self._first_of_group, axis=1)
        return groups / groups.sum(axis=1, keepdims=True)

    def _count(self, windows: Sequence[bytes], lengths: np.ndarray) -> csr_matrix:
        """Return log(1 + count) of the features in each window: (windows, features), CSR, float32."""
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
    """Cut up to WINDOWS pieces from a text, in UTF-8 with non-word characters removed; at least one, maybe empty."""
    text = text.strip()
    if len(text) <= WINDOWS * WINDOW_CHARACTERS:
        starts = list(range(0, max(len(text), 1), WINDOW_CHARACTERS))
    else:
        starts = [(len(text) - WINDOW_CHARACTERS) * index // (WINDOWS - 1) for index in range(WINDOWS)]
    return [_normalise(text[start : start + WINDOW_CHARACTERS]) for start in starts]


def _normalise(piece: str) -> bytes:
    """Put a piece in NFC, and in lower case if all is upper case, as py3langid; remove ASCII except letters."""
    if piece.isupper():
        piece = piece.lower()
    piece = unicodedata.normalize("NFC", _NOT_LETTERS.sub(" ", piece).strip())
    return piece.encode("utf-8", "surrogatepass")


def language_of_label(label: str) -> str | None:
    """Return the language of LANGUAGES that a label such as `__label__eng_Latn`, "zho_Hant" or "zh-cn" means, or None.

    A language in another script than its own (hin_Latn) is another language here.
    """
    code, *parts = re.split("[-_]", label.removeprefix("__label__").lower())
    code = PART_OF.get(code, ISO_639_3.get(code, "ar" if code in ARABIC else code))
    scripts = [part for part in parts if len(part) == 4 and part.isalpha()]
    return code if code in LANGUAGES and all(script in SCRIPTS[code] for script in scripts) else None


class FastTextIdentifier:
    """fastText's supervised model on the whole text without newlines, as CCNet uses lid.176.

    A model whose labels include codes of LANGUAGES answers with these (lid.176); the labels of other models are mapped
    to them (`language_of_label`), and the probabilities of labels that mean one language are added.

    Args:
        model: lid.176.bin or lid.176.ftz.
        threshold: least confidence of a language.

    Raises:
        UserError: fastText is not installed, the model is missing or damaged, or its labels are not languages.
    """

    def __init__(self, model: Path, threshold: float):
        try:
            fasttext: Any = importlib.import_module("fasttext")
        except ImportError as error:
            raise UserError("--langid fasttext: needs a package; pip install fasttext-predict") from error
        if not model.is_file():
            raise UserError(f"--langid-model {model}: no such file; take lid.176.bin or lid.176.ftz from fasttext.cc")
        try:
            self._model = fasttext.load_model(str(model))
            # A threshold below every probability: 0 leaves out labels of a hierarchical softmax.
            labels = self._model.predict("a", k=-1, threshold=-1.0)[0]
        except (ValueError, RuntimeError, MemoryError) as error:
            raise UserError(f"--langid-model {model}: is not a fastText model ({error})") from error
        self._threshold = threshold
        self._languages, mapped = _languages_of_labels(labels, f"--langid-model {model}")
        # As many answers are asked for as can mean one of the 15; one where every language has one label.
        self._options = {"k": -1, "threshold": LEAST_PART} if mapped else {"k": 1}
        how = f" labels mapped 1 {sorted(self._languages.items())}" if mapped else ""
        self.fingerprint = sha256_bytes(f"fasttext {sha256_file(model)} {threshold!r}{how}".encode())

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """Identify the language of each text, see LanguageIdentifier."""
        return [self._identify(text) for text in texts]

    def _identify(self, text: str) -> tuple[str, float]:
        line = text.replace("\n", " ").encode("utf-8", "replace").decode()  # half a surrogate pair is not valid UTF-8
        sums: dict[str, float] = {}
        for label, score in zip(*self._model.predict(line, **self._options), strict=True):
            language = self._languages.get(label, label)
            sums[language] = sums.get(language, 0.0) + float(score)
        if not sums:
            return OTHER, 0.0
        language = max(sums, key=lambda name: sums[name])
        score = min(sums[language], 1.0)  # fastText's tables round to a little above 1
        return (language, score) if language in LANGUAGES and score >= self._threshold else (OTHER, score)


def _languages_of_labels(labels: Sequence[str], option: str) -> tuple[dict[str, str], bool]:
    """Return the language of every label that means one of LANGUAGES, and whether labels had to be mapped.

    Raises:
        UserError: none does.
    """
    names = {label: label.removeprefix("__label__") for label in labels}
    plain = {label: name for label, name in names.items() if name in LANGUAGES}
    found = plain or {label: code for label in labels if (code := language_of_label(label)) is not None}
    if not found:
        shown = ", ".join(sorted(labels)[:5]) + (", ..." if len(labels) > 5 else "")
        raise UserError(
            f"{option}: none of its {len(labels)} labels ({shown}) is a code of the 15 languages, such as __label__en "
            "or __label__eng_Latn; give a model that identifies languages, such as lid.176.bin of fasttext.cc"
        )
    missing = [language for language in LANGUAGES if language not in found.values()]
    if not plain:
        pairs = ", ".join(f"{names[label]} -> {found[label]}" for label in sorted(found))
        get_logger().info(f"{option}: labels mapped to the 15 languages: {pairs}")
    if missing:
        get_logger().warning(f"warning: {option}: has no label for {', '.join(missing)}; no page of them is kept")
    return found, not plain
