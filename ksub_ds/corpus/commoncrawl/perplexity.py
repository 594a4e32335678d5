"""CCNet's quality buckets: how well a language model of Wikipedia predicts a page.

    buckets = load_buckets(Path("lm"))      # lm/<language>.sp.model and lm/<language>.arpa.bin
    buckets.bucket("en", text)              # ("head", 287.4)

As in CCNet (Wenzek et al. 2020, section 3.3): the page is normalised, cut into SentencePiece pieces, scored by a
5-gram KenLM model, and its perplexity is 10^(-log10 probability / (pieces + 1)), the end of the text being one more
token to predict. Below its language's 30th percentile a page is "head", below the 60th "middle", else "tail". CCNet
has such models and percentiles for ten of the 15 languages; a language without a model, or without percentiles,
passes as "all". `cutoffs.json` in the folder ({"sw": [310.0, 540.0]}) adds or replaces percentiles, which your own
models need. Only the first 262,144 characters of a page are judged, where CCNet takes all.
"""

import importlib
import math
import unicodedata
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, sha256_bytes
from ksub_ds.common.languages import LANGUAGES

ALL, HEAD, MIDDLE, TAIL = BUCKETS = ("all", "head", "middle", "tail")
CUTOFFS_FILE = "cutoffs.json"
LONGEST_JUDGED = 1 << 18  # characters: SentencePiece needs up to a thousand bytes for each

# The perplexities at CCNet's 30th and 60th percentiles, for its own models.
CUTOFFS: dict[str, tuple[float, float]] = {
    "ar": (490, 790),
    "bg": (450, 680),
    "de": (370, 590),
    "el": (450, 670),
    "en": (340, 520),
    "es": (180, 290),
    "fr": (180, 330),
    "hi": (480, 790),
    "ru": (210, 310),
    "zh": (1460, 1950),
}


class Buckets:
    """Language models by language, all opened at once, so that a bad one is found at the start, not hours later.

    Args:
        folder: of the models; None = no models.

    Raises:
        UserError: no model in the folder, a model without its tokenizer, damaged cutoffs, kenlm not installed.
    """

    def __init__(self, folder: Path | None):
        self._files = {} if folder is None else _find_models(folder)
        self._cutoffs = CUTOFFS if folder is None else CUTOFFS | _read_cutoffs(folder / CUTOFFS_FILE)
        self._models = {language: _open_models(*files) for language, files in self._files.items()}
        described = [(language, *map(_describe, files)) for language, files in sorted(self._files.items())]
        used = {language: self._cutoffs.get(language) for language in self._files}
        self.fingerprint = sha256_bytes(f"perplexity 2 {described} {sorted(used.items())}".encode())

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that have a model."""
        return tuple(sorted(self._files))

    def bucket(self, language: str, text: str) -> tuple[str, float | None]:
        """Return the bucket of a page and its perplexity, rounded to one decimal as in CCNet.

        Returns:
            ("all", None) for a language without a model and for a page without any piece of text;
            ("all", perplexity) for a language without percentiles.
        """
        if language not in self._files:
            return ALL, None
        perplexity = self.perplexity(language, text)
        if perplexity is None or language not in self._cutoffs:
            return ALL, perplexity
        head, middle = self._cutoffs[language]
        return (HEAD if perplexity < head else MIDDLE if perplexity < middle else TAIL), perplexity

    def perplexity(self, language: str, text: str) -> float | None:
        """Return the perplexity of `text` per piece, rounded to one decimal; None if no piece is left of it.

        Raises:
            KeyError: the language has no model.
        """
        pieces, model = self._models[language]
        line = " ".join(pieces.encode(normalise(text[:LONGEST_JUDGED]), out_type=str))
        words = line.split()
        if not words:
            return None
        exponent = -model.score(line) / (len(words) + 1)
        return round(10.0**exponent, 1) if exponent < 300 else math.inf


def load_buckets(folder: Path | None) -> Buckets:
    """Load the models in `folder`; with None there are no models, and every page is "all".

    Raises:
        UserError: no model in the folder, a model without its tokenizer, damaged cutoffs, kenlm not installed.
    """
    return Buckets(folder)


class _Normal(dict[int, str]):
    """What CCNet replaces a character by (after lower case and NFD), filled in when the character first occurs."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if code < 32 or 127 <= code < 160 or unicodedata.category(character) == "Mn":
            self[code] = ""  # control characters, line ends among them, and accents
        elif character.isdecimal():
            self[code] = "0"
        elif 0xD800 <= code < 0xE000:
            self[code] = "?"  # half of a surrogate pair, which UTF-8 cannot hold
        else:
            self[code] = character
        return self[code]


_NORMAL = _Normal(
    zip(map(ord, "，、„”“«»」「《》´’∶：？！（）；–━►～〈〉【】％。"), ',,"""""""""\'\'::?!();---~<>[]%.', strict=True)
)
_NORMAL |= {ord("—"): " - ", ord("．"): ". ", ord("…"): "..."}


def normalise(text: str) -> str:
    """Normalise a page as for the training of CCNet's models: lower case, no accents, digits 0, ASCII punctuation.

    Line ends are control characters and are removed too, not replaced by blanks: so does CCNet, and its percentiles
    hold for that.
    """
    return unicodedata.normalize("NFD", text.strip().lower()).translate(_NORMAL)


def _open_models(tokenizer_path: Path, model_path: Path) -> tuple[Any, Any]:
    """Open the SentencePiece tokenizer and the KenLM model of one language.

    Raises:
        UserError: kenlm is not installed, or a file is damaged.
    """
    import sentencepiece

    try:
        kenlm: Any = importlib.import_module("kenlm")
    except ImportError as error:
        raise UserError("--lm-models: needs the package kenlm; pip install kenlm (and a C++ compiler)") from error
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.load_from_serialized_proto(tokenizer_path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{tokenizer_path}: is not a SentencePiece model; get it again ({error})") from error
    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    config.load_method = kenlm.LoadMethod.LAZY  # mapped: the ranks of a machine share one copy in memory
    try:
        return pieces, kenlm.Model(str(model_path), config)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise UserError(f"{model_path}: is not a KenLM model; get it again ({reason})") from error


def _find_models(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return (tokenizer, language model) of each of the 15 languages that has them.

    Raises:
        UserError: no folder, no model in it, or a model without its tokenizer.
    """
    if not folder.is_dir():
        raise UserError(f"--lm-models {folder}: no such folder; it holds <language>.sp.model and <language>.arpa.bin")
    found = {}
    for language in LANGUAGES:
        models = [path for path in (folder / f"{language}.arpa.bin", folder / f"{language}.arpa") if path.is_file()]
        tokenizer = folder / f"{language}.sp.model"
        if models and not tokenizer.is_file():
            raise UserError(f"{tokenizer}: is missing; {models[0].name} is of no use without it")
        if models:
            found[language] = (tokenizer, models[0])
    if not found:
        raise UserError(f"--lm-models {folder}: no <language>.arpa.bin there, nor <language>.arpa")
    return found


def _read_cutoffs(path: Path) -> dict[str, tuple[float, float]]:
    if not path.exists():
        return {}
    cutoffs = read_json(path)
    if not isinstance(cutoffs, dict):
        raise UserError(f'{path}: must be like {{"sw": [310.0, 540.0]}}')
    for language, pair in cutoffs.items():
        numbers = isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, int | float) for x in pair)
        if not numbers or not 0 < pair[0] <= pair[1]:
            raise UserError(f"{path}: {language} is {pair!r}; must be two perplexities, the smaller one first")
    return {language: (float(pair[0]), float(pair[1])) for language, pair in cutoffs.items()}


def _describe(path: Path) -> tuple[str, int, str]:
    """Return name, size and a hash of the first and last MiB: hashing whole models of gigabytes takes too long."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        ends = stream.read(1 << 20)
        stream.seek(max(0, size - (1 << 20)))
        ends += stream.read()
    return path.name, size, sha256_bytes(ends)
