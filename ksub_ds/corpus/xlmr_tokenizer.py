"""XLM-R's tokenizer in bulk: the ids of transformers' XLMRobertaTokenizer, several times faster.

A SentencePiece unigram model in XLM-R's layout: model id = piece id + 1 from piece 3 on; <s> 0,
<pad> 1, </s> 2, <unk> 3; <mask> comes last. The text is cut at ASCII white space, every different
word is normalised (HuggingFace's own normaliser) and segmented (unigram.py) once and then looked up,
so that frequent words cost one dictionary look-up.

One difference from transformers is meant: text that spells a special token ("</s>", "<mask>") is
encoded as the ordinary characters it is made of, never as the special token.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.unigram import SPACE, UnigramSegmenter

MODEL_NAME = "sentencepiece.bpe.model"
SPECIAL_TOKENS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}  # and <mask>, the last id
CACHED_WORDS = 300_000  # about 100 MB a process; the ids do not depend on it

# White space as HuggingFace's pre-tokenizer (Rust's char::is_whitespace) counts it.
_WHITESPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")


class XlmrTokenizer:
    """Bulk encoding with a SentencePiece model in XLM-R's layout.

    Args:
        model: the bytes of the `.model` file.
        name: what to call it in error messages.

    Raises:
        UserError: the model is damaged, or not of this kind.
    """

    def __init__(self, model: bytes, name: str):
        self._model, self._name = model, name
        proto = parse_model(model, name)
        self._normalizer = _normalizer(proto.normalizer_spec.precompiled_charsmap)
        printable = [chr(code) for code in range(33, 127)]
        self._ascii_stays = self._normalizer is None or all(self._normalizer(c) == c for c in printable)
        kept = {mark: self._normalizer is None or bool(self._normalizer(mark)) for mark in " \t\n\r\x0b\x0c"}
        self._deleted = [mark.encode() for mark in kept if not kept[mark]]
        self._separator = re.compile(b"[%s]+" % "".join(mark for mark in kept if kept[mark]).encode())
        pieces = [piece.piece for piece in proto.pieces]
        self.vocab_size = len(pieces) + 2
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = 0, 1, 2, 3
        self.mask_id = self.vocab_size - 1
        self.special_ids: tuple[int, ...] = (0, 1, 2, 3, self.mask_id)
        self.fingerprint = hashlib.sha256(b"sentencepiece in XLM-R layout\0" + model).hexdigest()
        self._tokens: list[str] = [*SPECIAL_TOKENS, *pieces[3:], "<mask>"]
        scores = np.array([0.0, 0.0, 0.0, *(piece.score for piece in proto.pieces[3:])])
        # A piece with a word's mark inside can stand in no word.
        usable = [i for i in range(3, len(pieces)) if SPACE not in pieces[i][1:]]
        self._segmenter = UnigramSegmenter(
            [pieces[i] for i in usable],
            scores[usable],
            np.array(usable) + 1,
            self.unk_id,
            worst_score=float(scores.min()),
        )
        self._cache: dict[bytes, bytes] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return XlmrTokenizer, (self._model, self._name)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without special tokens around it."""
        documents = [self._split(text.encode()) for text in texts]
        missing = set().union(*documents).difference(self._cache)
        if missing:
            if len(self._cache) + len(missing) > CACHED_WORDS:
                self._cache.clear()
                missing = set().union(*documents)
            self._cache.update(self._encode_words(sorted(missing, key=len)))
        ids_of = self._cache.__getitem__
        return [np.frombuffer(b"".join(map(ids_of, words)), dtype="<i4") for words in documents]

    def _split(self, raw: bytes) -> list[bytes]:
        """Cut at ASCII white space, which always parts words, unless the normaliser deletes that character."""
        if any(mark in raw for mark in self._deleted):
            return list(filter(None, self._separator.split(raw)))
        return raw.split()

    def _encode_words(self, words: list[bytes]) -> Iterable[tuple[bytes, bytes]]:
        """(word, its ids as bytes). What the normaliser makes of a word can be none, one or more words."""
        normal = [word.decode() for word in words]
        normalize = self._normalizer
        if normalize is not None:
            plain = self._ascii_stays
            normal = [w if plain and w.isascii() and w.isprintable() else normalize(w) for w in normal]
        # Most words stay one word; nothing, several, or a mark spelt out in the text takes the long way.
        odd = [i for i, word in enumerate(normal) if SPACE in word or word.split() != [word]]
        units = {i: _units(normal[i]) for i in odd}
        for i in odd:
            normal[i] = ""  # encoded apart, below
        encoded = self._segmenter.segment(normal)
        if odd:
            flat = iter(self._segmenter.segment([unit for i in odd for unit in units[i]]))
            for i in odd:
                encoded[i] = b"".join(next(flat) for _ in units[i])
        return zip(words, encoded, strict=True)

    def forget(self) -> None:
        """Drop the remembered words (for measuring; the ids do not depend on them)."""
        self._cache.clear()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens show as `<s>`, `<mask>` and so on."""
        text = "".join(self._tokens[index] for index in ids).replace(SPACE, " ")
        return text.removeprefix(" ")

    def tokens(self) -> list[str]:
        """The N tokens by id, spelt as in the vocabulary ("▁water")."""
        return list(self._tokens)

    def save(self, folder: Path) -> None:
        """Write a folder that transformers' AutoTokenizer opens: tokenizer.json, its config, and the model."""
        from transformers import XLMRobertaTokenizer

        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            # Converting needs a folder: given the file alone, transformers 5 silently builds a
            # vocabulary of five tokens.
            (Path(temporary) / MODEL_NAME).write_bytes(self._model)
            converted = XLMRobertaTokenizer.from_pretrained(temporary)
        assert len(converted) == self.vocab_size, "the conversion to a HuggingFace tokenizer lost pieces"
        converted.save_pretrained(folder)
        config = folder / "tokenizer_config.json"
        facts = json.loads(config.read_text(encoding="utf-8"))
        for key in ("is_local", "local_files_only"):  # how it was loaded, HF_HUB_OFFLINE included
            facts.pop(key, None)
        config.write_text(json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / MODEL_NAME).write_bytes(self._model)

    def same_vocabulary(self, tokenizer_json: dict[str, Any]) -> bool:
        """Whether a tokenizer.json found beside the model gives the same ids, so that the model can stand for it."""
        model = tokenizer_json.get("model", {})
        added = {token["content"]: token["id"] for token in tokenizer_json.get("added_tokens", [])}
        vocabulary = [entry[0] for entry in model.get("vocab", [])] if model.get("type") == "Unigram" else []
        if vocabulary[-1:] != ["<mask>"]:
            vocabulary.append("<mask>")
        return vocabulary == self._tokens and added == {**SPECIAL_TOKENS, "<mask>": self.mask_id}


def parse_model(model: bytes, name: str) -> Any:
    """The SentencePiece model as a protobuf message, checked to be of XLM-R's kind."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2  # its classes are made at run time

    proto: Any = vars(sentencepiece_model_pb2)["ModelProto"]()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise UserError(f"{name}: is not a SentencePiece model, or is damaged ({error}); get it anew") from error
    if len(proto.pieces) < 4 or [piece.piece for piece in proto.pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise UserError(
            f"{name}: its first pieces are not <unk> <s> </s>; train SentencePiece with its default special ids"
        )
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise UserError(f"{name}: is not a unigram model; give the folder of a HuggingFace tokenizer instead")
    normal = proto.pieces[3].NORMAL
    unusual = next((piece.piece for piece in proto.pieces[3:] if piece.type != normal), None)
    clash = next((piece.piece for piece in proto.pieces[3:] if piece.piece in ("<mask>", "<pad>")), unusual)
    if clash is not None:
        raise UserError(
            f"{name}: piece {clash!r} is a symbol of its own kind, which XLM-R's layout has no place for; "
            "train without user_defined_symbols and byte_fallback, or give a HuggingFace tokenizer folder"
        )
    return proto


def _normalizer(charsmap: bytes) -> Any:
    from tokenizers import normalizers

    return normalizers.Precompiled(charsmap).normalize_str if charsmap else None


def _units(text: str) -> list[str]:
    """The words HuggingFace's pre-tokenizer makes of a normalised text, each without its leading mark."""
    units: list[str] = []
    for word in filter(None, _WHITESPACE.split(text)):
        # A mark spelt out in the text starts a new word, as the pre-tokenizer's own marks do.
        units += word.removeprefix(SPACE).split(SPACE)
    return units
