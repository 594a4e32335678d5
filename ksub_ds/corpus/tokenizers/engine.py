"""The engine under both kinds of tokenizer: text to ids in bulk, from the description in a tokenizer.json.

`splintr-rs` gives the ids of transformers' own Rust tokenizer (`tokenizers`) many times faster, but it is a young
library. It therefore has to prove itself whenever a tokenizer is opened: a few hundred difficult texts are encoded by
both. Where one id differs, or splintr-rs is not installed or does not support the tokenizer, `tokenizers` does the
work and one line of the log says so. The ids are the same either way.

Text never becomes a special token: the descriptions given to an engine name none of them (see `HIDDEN`).
"""

import functools
import importlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from ksub_ds.common.logging import get_logger

HIDDEN = "\0special {}"  # how special tokens are renamed: no text is cut into a word that holds a blank
CHARACTERS_AT_ONCE = 1 << 18  # `tokenizers` needs some hundred times that in memory
CHECKED_TEXTS = 400
_UNKNOWN = "<unk>"  # splintr-rs finds a Unigram model's unknown token by this name, not by its id
_LESS_THAN, _NO_CHARACTER = "\U0010fffe", "\U0010ffff"  # not characters: see `_name_unknown`
_BETWEEN_WORDS = {" ": re.compile(r"\w \w"), "\n": re.compile(r"\w\n\w"), " \n": re.compile(r"\w[ \n]\w")}

# For the check at opening: words of many scripts, and what tokenizers tend to disagree about.
SAMPLE_WORDS = """
The old rivers sing don't iii (iii) HTTP://www.example.org/a_b?c=d 3.14159 12,345 naïve Straße İstanbul
yürüyor нет Київ το παλιό σπίτι Ελλάς שלום עולם السلام عليكم हिन्दी में नमस्ते ภาษาไทย น้ำ ຄຳ 中文分词 日本語の文章 ﾊﾟｰﾃｨｰ
한국어 각 ệ Việt Nam gözlükçülük mwanafunzi ñandú œuvre ქართული հայերեն አማርኛ தமிழ் ᚠᚢᚦ 𐍈 ꙮ
""".split()  # noqa: SIM905 - a list of one word a line says less
_HOSTILE = ["", " ", "  ", "\n", "\r\n", "\t", "\x00", "\x01", "\x0b", "\x0c", "\x1c", "\x7f", "\x85", "\xa0", "\xad"]
_HOSTILE += ["\u0301", "e\u0301", "\u0345", "\u0e33", "\u1100\u1161", "\u115f", "\u1680", "\u200b", "\u200d", "\u200e"]
_HOSTILE += ["\u2028", "\u202e", "\u2581", "\u2581\u2581", "\u3000", "\ue000", "\ufb01", "\ufdfa", "\ufeff", "\ufffd"]
_HOSTILE += ["\U0001f600", "\U0001f468\u200d\U0001f469", "\U000e0001", "\U0010ffff", "①", "…", "½", "ﷺ", "<s>", "</s>"]
_HOSTILE += [
    "<pad>",
    "<unk>",
    "<mask>",
    "<UNK>",
    "＜unk＞",
    "\U0010fffe",
    "[MASK]",
    "[CLS]",
    "a" * 300,
    "語" * 60,
    "_" * 40,
    "0" * 25,
    "'s",
    "'LL",
    "Ġ",
]


class Engine(Protocol):
    """What turns text into ids, as described by a tokenizer.json."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32."""
        ...


class TokenizersEngine:
    """transformers' own Rust tokenizer: what every id is measured by, and the fallback.

    Args:
        description: of the tokenizer, as in a tokenizer.json.
    """

    def __init__(self, description: dict[str, Any]):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_buffer(description_json(description))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


class SplintrEngine:
    """splintr-rs, in one thread.

    Args:
        description: of the tokenizer, as in a tokenizer.json.

    Raises:
        ImportError: splintr-rs is not installed.
        ValueError: splintr-rs does not support this tokenizer.
    """

    def __init__(self, description: dict[str, Any]):
        splintr = importlib.import_module("splintr")
        self._caches_words = description["model"]["type"] != "Unigram"  # a bounded number of them, of any length
        if not self._caches_words:
            description = _name_unknown(description)
        self._tokenizer = splintr.from_json_bytes(description_json(description))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        ids = np.frombuffer(self._tokenizer.encode_flat(text), dtype="<i4")
        if self._caches_words and len(text) > 2 * CHARACTERS_AT_ONCE:  # endless words, or `cut` would have cut it
            self._tokenizer.clear_cache()
        return ids


def _name_unknown(description: dict[str, Any]) -> dict[str, Any]:
    """Give the unknown token of a Unigram tokenizer the name that splintr-rs looks for.

    No text may spell that name. So "<" is replaced, in all other pieces and by the last steps of the normaliser, by a
    code point that no piece holds; where a text holds that one, it becomes another that is as unknown.

    Raises:
        ValueError: there is no unknown token, or a piece holds one of the two code points.
    """
    model = description["model"]
    unknown, vocabulary = model.get("unk_id"), model["vocab"]
    if unknown is None or any(_LESS_THAN in piece or _NO_CHARACTER in piece for piece, _ in vocabulary):
        raise ValueError("its unknown token cannot be named")
    pieces = [(piece.replace("<", _LESS_THAN), score) for piece, score in vocabulary]
    pieces[unknown] = _UNKNOWN, pieces[unknown][1]
    steps = [description["normalizer"]] if description.get("normalizer") else []
    for found, content in ((_LESS_THAN, _NO_CHARACTER), ("<", _LESS_THAN)):
        steps.append({"type": "Replace", "pattern": {"String": found}, "content": content})
    normalizer = {"type": "Sequence", "normalizers": steps}
    return {**description, "normalizer": normalizer, "model": {**model, "vocab": pieces}}


def _without_model(description: dict[str, Any]) -> Any:
    """Return the Tokenizer of a description with its normalizer and pre-tokenizer, and no vocabulary."""
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    return Tokenizer.from_buffer(description_json({**description, "added_tokens": [], "model": model}))


def description_json(description: dict[str, Any]) -> bytes:
    """Write the description of a tokenizer as transformers writes a tokenizer.json.

    Python's json takes most of its time for the scores of a Unigram model; most of its 250,000 pieces share theirs.
    """
    model = description["model"]
    unigram = model["type"] == "Unigram"
    rest = {**description, "model": {**model, "vocab": []}} if unigram else description
    text = json.dumps(rest, ensure_ascii=False, indent=2)
    if not unigram:
        return text.encode()
    quote, number = json.encoder.encode_basestring, functools.cache(repr)
    pair = "      [\n        %s,\n        %s\n      ]"
    pairs = ",\n".join([pair % (quote(piece), number(score)) for piece, score in model["vocab"]])
    before, after = text.encode().split(b'"vocab": []')
    return b'%b"vocab": [\n%b\n    ]%b' % (before, pairs.encode(), after)


def check_texts() -> list[str]:
    """Return the texts that an engine is checked on: each word and each oddity alone, then mixtures of them."""
    draw = random.Random(0)
    parts = SAMPLE_WORDS + _HOSTILE
    mixed = [draw.choice(["", " "]).join(draw.choices(parts, k=draw.randint(2, 9))) for _ in range(CHECKED_TEXTS)]
    return (parts + mixed)[:CHECKED_TEXTS]


def expected_ids(description: dict[str, Any], texts: list[str]) -> list[np.ndarray]:
    """Return the ids that `tokenizers` gives a few texts.

    Of a Unigram model it opens only the pieces that occur in the texts, and the worst, which sets the unknown
    characters' score: the others change nothing, and opening 250,000 takes seconds.

    Returns:
        Arrays of int32, one a text.
    """
    model = description["model"]
    if model["type"] != "Unigram":
        return TokenizersEngine(description).encode(texts)
    vocabulary = model["vocab"]
    longest = max(len(piece) for piece, _ in vocabulary)
    bare = _without_model(description)
    parts = texts if bare.normalizer is None else [bare.normalizer.normalize_str(text) for text in texts]
    if bare.pre_tokenizer is not None:
        parts = list({word for part in parts for word, _ in bare.pre_tokenizer.pre_tokenize_str(part)})
    present = {part[i:j] for part in parts for i in range(len(part)) for j in range(i + 1, i + 1 + longest)}
    kept = {index for index, (piece, _) in enumerate(vocabulary) if piece in present}
    kept |= {model["unk_id"], min(range(len(vocabulary)), key=lambda index: vocabulary[index][1])}
    ids = np.array(sorted(kept), dtype=np.int32)
    small = {**model, "vocab": [vocabulary[i] for i in ids], "unk_id": int(np.searchsorted(ids, model["unk_id"]))}
    return [ids[found] for found in TokenizersEngine({**description, "model": small}).encode(texts)]


def open_engine(describe: Callable[[], dict[str, Any]], name: str) -> Engine:
    """Open splintr-rs if it gives the ids of `tokenizers` on `check_texts`, else `tokenizers`.

    Args:
        describe: gives the description of the tokenizer, as in a tokenizer.json; of its size, nothing stays in memory.
        name: of the tokenizer, in the log.
    """
    description, texts = describe(), check_texts()
    try:
        engine = SplintrEngine(description)
        pairs = zip(engine.encode(texts), expected_ids(description, texts), strict=True)
        wrong = sum(not np.array_equal(found, expected) for found, expected in pairs)
        if not wrong:
            return engine
        reason = f"gives other ids for {wrong} of {len(texts)} texts"
    except ImportError:
        reason = "is not installed (pip install 'splintr-rs>=0.22,<0.23')"
    except BaseException as error:  # the library raises several kinds; a Rust panic is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"does not support it ({' '.join(str(error).split())[:100]})"
    get_logger().warning(f"{name}: splintr-rs {reason}; tokenising with the slower `tokenizers`, same ids")
    return TokenizersEngine(description)


class BulkEncoder:
    """Encodes many texts, the engine being opened with the first of them.

    Opening takes seconds for 250,000 pieces, and training or exporting a model encodes nothing.

    Args:
        describe: gives the description of the tokenizer, as in a tokenizer.json.
        name: of the tokenizer, in the log.
    """

    def __init__(self, describe: Callable[[], dict[str, Any]], name: str):
        self._describe, self._name = describe, name
        self._engine: Engine | None = None
        self._separators = ""

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32, without special tokens around it."""
        if self._engine is None:
            self._engine = open_engine(self._describe, self._name)
            self._separators = separators(self._engine)
        parts: list[list[np.ndarray]] = []
        waiting: list[tuple[int, str]] = []  # the number of a text, and a piece of it
        size = 0
        for number, text in enumerate(texts):
            parts.append([])
            for piece in cut(text, self._separators):
                waiting.append((number, piece))
                size += len(piece)
                if size >= CHARACTERS_AT_ONCE:
                    self._encode_waiting(self._engine, waiting, parts)
                    waiting, size = [], 0
        self._encode_waiting(self._engine, waiting, parts)
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    @staticmethod
    def _encode_waiting(engine: Engine, waiting: list[tuple[int, str]], parts: list[list[np.ndarray]]) -> None:
        for (number, _), ids in zip(waiting, engine.encode([piece for _, piece in waiting]), strict=True):
            parts[number].append(ids)


def separators(engine: Engine) -> str:
    """Return those of blank and newline before which a text can be cut without a change of ids.

    Tokenizers that write a blank before every text they are given (Llama's) would write one at each cut.
    """
    half = len(SAMPLE_WORDS) // 2
    left, right = " ".join(SAMPLE_WORDS[:half]), " ".join(SAMPLE_WORDS[half:])

    def harmless(separator: str) -> bool:
        whole, *parts = engine.encode([left + separator + right, left, separator + right])
        return np.array_equal(whole, np.concatenate(parts))

    return "".join(filter(harmless, " \n"))


def cut(text: str, separators: str) -> Iterator[str]:
    """Cut a text into pieces of CHARACTERS_AT_ONCE or a little more, where it changes no id.

    That is before a single separator between two words. Text without any stays whole.

    Args:
        text: any.
        separators: of blank and newline.

    Yields:
        The pieces, in order; together they are the text.
    """
    begin = 0
    while separators and len(text) - begin > 2 * CHARACTERS_AT_ONCE:
        found = _BETWEEN_WORDS[separators].search(text, begin + CHARACTERS_AT_ONCE)
        if found is None:
            break
        yield text[begin : found.start() + 1]
        begin = found.start() + 1
    yield text[begin:]
