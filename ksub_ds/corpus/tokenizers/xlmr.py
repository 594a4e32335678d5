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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers.long_words import units, units_in_steps
from ksub_ds.corpus.tokenizers.unigram import SPACE, UnigramSegmenter

MODEL_NAME = "sentencepiece.bpe.model"
SPECIAL_TOKENS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}  # and <mask>, the last id
CACHED_WORDS = 300_000  # about 100 MB a process; the ids do not depend on it
CACHED_BYTES = 32 << 20  # of these words and their ids
BYTES_AT_ONCE = 1 << 20  # of text: a page can have a million different words, or normalise to ten times its size
LONG_WORD = 1 << 14  # bytes; longer ones are encoded in steps, and not remembered


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
        self._cached_bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return XlmrTokenizer, (self._model, self._name)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without special tokens around it."""
        parts: list[list[bytes]] = [[] for _ in texts]
        waiting: list[tuple[int, list[bytes]]] = []  # the number of a text, and words of it
        size = 0
        for number, text in enumerate(texts):
            for raw in self._cut(text.encode()):
                waiting.append((number, self._split(raw)))
                size += len(raw)
                if size >= BYTES_AT_ONCE:
                    self._encode_waiting(waiting, parts)
                    waiting, size = [], 0
        self._encode_waiting(waiting, parts)
        return [np.frombuffer(b"".join(part), dtype="<i4") for part in parts]

    def _cut(self, raw: bytes) -> Iterator[bytes]:
        """A text in pieces of BYTES_AT_ONCE, or what more it takes to the next white space."""
        begin = 0
        while found := self._separator.search(raw, begin + BYTES_AT_ONCE):
            yield raw[begin : found.start()]
            begin = found.end()
        yield raw[begin:]

    def _encode_waiting(self, waiting: list[tuple[int, list[bytes]]], parts: list[list[bytes]]) -> None:
        """Append the ids of each run of words to the parts of its text."""
        words = set[bytes]().union(*(run for _, run in waiting))
        missing = words.difference(self._cache)
        if len(self._cache) + len(missing) > CACHED_WORDS or self._cached_bytes > CACHED_BYTES:
            self.forget()
            missing = words
        long = {word: self._encode_long(word) for word in missing if len(word) > LONG_WORD}
        new = dict(self._encode_words(sorted(missing.difference(long), key=len)))
        self._cached_bytes += sum(map(len, new)) + sum(map(len, new.values()))
        self._cache.update(new)
        known = self._cache | long if long else self._cache
        for number, run in waiting:
            parts[number].append(b"".join(map(known.__getitem__, run)))

    def _encode_long(self, word: bytes) -> bytes:
        """The ids of a word of more than LONG_WORD bytes; normalising can make many small ones of it."""
        ids = []
        for step in units_in_steps(word.decode(), self._normalizer or str):
            different = list(dict.fromkeys(step))
            known = dict(zip(different, self._segmenter.segment(different), strict=True))
            ids.append(b"".join([known[unit] for unit in step]))
        return b"".join(ids)

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
        parts = {i: units(normal[i]) for i in odd}
        for i in odd:
            normal[i] = ""  # encoded apart, below
        encoded = self._segmenter.segment(normal)
        if odd:
            flat = iter(self._segmenter.segment([unit for i in odd for unit in parts[i]]))
            for i in odd:
                encoded[i] = b"".join(next(flat) for _ in parts[i])
        return zip(words, encoded, strict=True)

    def forget(self) -> None:
        """Drop the remembered words (the ids do not depend on them)."""
        self._cache.clear()
        self._cached_bytes = 0

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
