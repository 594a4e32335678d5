"""Tokenizers of HuggingFace's form: any fast one, and any that transformers can make fast.

transformers opens the folder, without code from it and without the network. Where it makes the tokenizer from a
SentencePiece model, that model itself is asked whether the pieces are right: version 5 silently makes some of them
without their normaliser, or with five tokens.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers.engine import HIDDEN, SAMPLE_WORDS, BulkEncoder
from ksub_ds.corpus.tokenizers.location import holds_tokenizer
from ksub_ds.corpus.tokenizers.xlmr import GENERIC_CLASS, edit_config, put_nfc_first

_SAMPLE_TEXTS = ["ﬁ", "①", "ＡＢ ｶﾞ", "e\u0301"]  # what NFKC changes
_EQUAL_SCORES = 1e-3  # a text may have two best segmentations, and SentencePiece adds float32 numbers


class HuggingFaceTokenizer:
    """Any fast HuggingFace tokenizer by folder, for example roberta-base's byte-level BPE.

    One without a mask token makes shards for causal models only. It need not have a padding token; one that is another
    special token too does not count as one. Without a start token the end token begins a row, as in GPT-2.

    Args:
        folder: of the tokenizer.
        nfc: whether text is put in Unicode's form NFC first.

    Raises:
        UserError: it cannot be opened, or lacks a special token that shards need.
    """

    def __init__(self, folder: Path, nfc: bool = False):
        self._folder, self._nfc = folder, nfc
        source = _open_folder(folder, nfc)
        self.vocab_size = 1 + max(source.get_vocab().values())  # ids may have gaps
        self.mask_id: int | None = source.mask_token_id
        self.eos_id = _required(folder, "eos_token", source.eos_token_id, source.sep_token_id)
        starts = (source.bos_token_id, source.cls_token_id)
        self.bos_id = _required(folder, "bos_token", *starts, self.eos_id if self.mask_id is None else None)
        self.pad_id: int | None = source.pad_token_id
        unknown = source.unk_token_id
        taken = {"bos_token": self.bos_id, "eos_token": self.eos_id, "mask_token": self.mask_id, "unk_token": unknown}
        if self.mask_id is not None:
            self.pad_id = _required(folder, "pad_token", source.pad_token_id)
            _check_padding(folder, source, taken)
        elif self.pad_id in taken.values():
            self.pad_id = None
        self.unk_id: int | None = self.pad_id if unknown is None else unknown  # byte-level BPE never needs it
        self.special_ids = tuple(sorted({int(index) for index in source.all_special_ids}))
        self._decoder = _reread(source.backend_tokenizer) if nfc else source.backend_tokenizer
        self._encoder = BulkEncoder(self._describe, str(folder))
        canonical = json.dumps([self._describe(), self.special_ids], sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def definition(self) -> dict[str, Any]:
        """Return the content of the tokenizer.json."""
        return json.loads(self._decoder.to_str())

    def _describe(self) -> dict[str, Any]:
        return text_only(self.definition())

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (self._folder, self._nfc)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32, without special tokens around it."""
        return self._encoder.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; special tokens show by name."""
        return self._decoder.decode([int(index) for index in ids], skip_special_tokens=False)

    def tokens(self) -> list[str]:
        """Return the N tokens by id, spelt as in the vocabulary; an id without a token is an empty string."""
        return [self._decoder.id_to_token(index) or "" for index in range(self.vocab_size)]

    def save(self, folder: Path) -> None:
        """Write a folder that transformers' AutoTokenizer opens.

        Raises:
            UserError: the copy would give other ids.
        """
        _open_folder(self._folder, self._nfc).save_pretrained(folder)
        if self._nfc:
            edit_config(folder, {"tokenizer_class": GENERIC_CLASS})
        if HuggingFaceTokenizer(folder).fingerprint != self.fingerprint:
            raise UserError(
                f"{self._folder}: transformers saves this tokenizer as another than it opens; save a tokenizer.json "
                "of it with the version of transformers that it was made with, and give that folder"
            )

    def check_pieces(self, model: Path) -> None:
        """Check a few texts against SentencePiece and the model that transformers made the tokenizer from.

        Args:
            model: the `.model` file.

        Raises:
            UserError: one is cut into other pieces.
        """
        from sentencepiece import SentencePieceProcessor

        try:
            reference = SentencePieceProcessor(model_proto=model.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{model}: is not a SentencePiece model, or is damaged; get it anew") from error
        normalizer = self._decoder.normalizer
        for text in [*SAMPLE_WORDS, *_SAMPLE_TEXTS, " ".join(SAMPLE_WORDS)]:
            ids = self._decoder.encode(text, add_special_tokens=False).ids
            found = [None if index == self.unk_id else self._decoder.id_to_token(index) for index in ids]
            # What the family does to text before SentencePiece (ALBERT's lower case) does not count as one.
            expected = _pieces(reference, text if normalizer is None else normalizer.normalize_str(text))
            if found != expected and not _equally_good(reference, found, expected):
                shown = ["?" if piece is None else piece for piece in found][:8]
                raise UserError(
                    f"{self._folder}: transformers cuts {text[:20]!r} into {shown}, {model.name} itself into "
                    f"{['?' if piece is None else piece for piece in expected][:8]}; save a tokenizer.json with the "
                    "version of transformers that the model was made with, and give that folder"
                )


def _reread(backend: Any) -> Any:
    """Return a tokenizer as it is after saving and opening, which changes the last digit of some scores, once."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(backend.to_str())


def _pieces(reference: Any, text: str) -> list[str | None]:
    """Return SentencePiece's pieces of a text, None for the unknown one."""
    ids = reference.encode(text, out_type=int)
    return [None if index == reference.unk_id() else reference.id_to_piece(index) for index in ids]


def _equally_good(reference: Any, found: list[str | None], expected: list[str | None]) -> bool:
    """Return whether two lists of pieces are the same text with the same score."""
    if ["" if piece is None else piece for piece in found] == [] or found.count(None) != expected.count(None):
        return False
    texts = ["".join("\0" if piece is None else piece for piece in pieces) for pieces in (found, expected)]
    scores = [
        sum(reference.get_score(reference.piece_to_id(piece or "<unk>")) for piece in p) for p in (found, expected)
    ]
    return texts[0] == texts[1] and abs(scores[0] - scores[1]) < _EQUAL_SCORES


def _open_folder(folder: Path, nfc: bool) -> Any:
    if not holds_tokenizer(folder):
        raise UserError(
            f"{folder}: holds no tokenizer (none of tokenizer.json, sentencepiece.bpe.model, vocab.json, vocab.txt); "
            "give the folder of one"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: transformers cannot open this tokenizer ({reason}); save it again") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{folder}: has no fast form (tokenizer.json); convert it with transformers first")
    if nfc:
        put_nfc_first(tokenizer)
    return tokenizer


def _check_padding(folder: Path, source: Any, taken: dict[str, int | None]) -> None:
    """Check that padding has a token of its own.

    RoBERTa's models count no position for the padding token and never learn its vector, wherever it stands.

    Args:
        folder: of the tokenizer.
        source: transformers' tokenizer.
        taken: the other special tokens by name.

    Raises:
        UserError: it has not.
    """
    same = next((name for name, index in taken.items() if index == source.pad_token_id), None)
    if same is not None:
        free = next((token for token in ("<pad>", "[PAD]") if token in source.get_vocab()), None)
        known = "" if free is None else f" (the vocabulary has {free})"
        raise UserError(
            f"{folder}: pad_token is {source.pad_token}, as {same}, so the model would take that for padding "
            f"everywhere; name a pad_token of its own in tokenizer_config.json{known}"
        )


def _required(folder: Path, name: str, *candidates: int | None) -> int:
    for candidate in candidates:
        if candidate is not None:
            return int(candidate)
    raise UserError(
        f"{folder}: {name} is missing, which shards need; name an unused token of the vocabulary in "
        f'tokenizer_config.json ("{name}": "<...>")'
    )


def text_only(definition: dict[str, Any]) -> dict[str, Any]:
    """Keep what turns text into ids of a tokenizer.json, and rename special tokens so that no text spells one."""
    special = {token["content"] for token in definition["added_tokens"] if token["special"]}
    model = definition["model"]
    kept = {model.get("unk_token")}  # some models look it up by name
    rename = {token: HIDDEN.format(token) for token in special - kept}
    if model["type"] == "Unigram":
        rename = {token: HIDDEN.format(token) for token in special}
        model["vocab"] = [[rename.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {rename.get(piece, piece): index for piece, index in model["vocab"].items()}
    ordinary = [token for token in definition["added_tokens"] if not token["special"]]
    return {
        **definition,
        "added_tokens": ordinary,
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "decoder": None,
    }
