"""XLM-R's tokenizer: a SentencePiece unigram model in the layout of transformers' XLMRobertaTokenizer.

A token's id is the piece's id + 1 from piece 3 on; <s> 0, <pad> 1, </s> 2, <unk> 3; <mask> comes last. The ids of a
text are those of transformers, with one intended difference: text that spells a special token ("</s>", "<mask>") is
encoded as the ordinary characters it is made of, never as the special token.
"""

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers.engine import HIDDEN, BulkEncoder

SPACE = "▁"  # SentencePiece's mark for the start of a word
MODEL_NAME = "sentencepiece.bpe.model"
SPECIAL_TOKENS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}  # and <mask>, the last id


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
        pieces = [piece.piece for piece in proto.pieces]
        self.vocab_size = len(pieces) + 2
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = 0, 1, 2, 3
        self.mask_id = self.vocab_size - 1
        self.special_ids: tuple[int, ...] = (0, 1, 2, 3, self.mask_id)
        self.fingerprint = hashlib.sha256(b"sentencepiece in XLM-R layout\0" + model).hexdigest()
        self._tokens: list[str] = [*SPECIAL_TOKENS, *pieces[3:], "<mask>"]
        self._encoder = BulkEncoder(self._describe, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return XlmrTokenizer, (self._model, self._name)

    def _describe(self) -> dict[str, Any]:
        """Return the tokenizer.json that transformers makes of the model, as far as it turns text into ids."""
        proto = parse_model(self._model, self._name)
        charsmap = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
        special = [(HIDDEN.format(token), 0.0) for token in SPECIAL_TOKENS]
        scores = [piece.score for piece in proto.pieces]
        pieces = zip(self._tokens[4:-1], scores[3:], strict=True)
        split_words = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap} if charsmap else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, split_words]},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "Unigram",
                "unk_id": self.unk_id,
                "vocab": [*special, *pieces, (HIDDEN.format("<mask>"), 0.0)],
                "byte_fallback": False,
            },
        }

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32, without special tokens around it."""
        return self._encoder.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; special tokens show as `<s>`, `<mask>` and so on."""
        text = "".join(self._tokens[index] for index in ids).replace(SPACE, " ")
        return text.removeprefix(" ")

    def tokens(self) -> list[str]:
        """Return the N tokens by id, spelt as in the vocabulary ("▁water")."""
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
        """Return whether a tokenizer.json beside the model gives the same ids, so that the model can replace it."""
        model = tokenizer_json.get("model", {})
        added = {token["content"]: token["id"] for token in tokenizer_json.get("added_tokens", [])}
        vocabulary = [entry[0] for entry in model.get("vocab", [])] if model.get("type") == "Unigram" else []
        if vocabulary[-1:] != ["<mask>"]:
            vocabulary.append("<mask>")
        return vocabulary == self._tokens and added == {**SPECIAL_TOKENS, "<mask>": self.mask_id}


def parse_model(model: bytes, name: str) -> Any:
    """Read a SentencePiece model and check that it is of XLM-R's kind.

    Args:
        model: the bytes of the `.model` file.
        name: what to call it in error messages.

    Returns:
        The ModelProto message.

    Raises:
        UserError: damaged, of another kind, or protobuf is too old to read it.
    """
    from google.protobuf.message import DecodeError

    proto = _empty_message()
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


def _empty_message() -> Any:
    import google.protobuf

    try:
        from sentencepiece import sentencepiece_model_pb2  # its classes are made at run time
    except Exception as error:  # protobuf's VersionError, which old versions of it lack
        raise UserError(
            f"protobuf {google.protobuf.__version__} is older than sentencepiece needs to read a .model file; "
            "pip install -U 'protobuf>=7.36.1'"
        ) from error
    return vars(sentencepiece_model_pb2)["ModelProto"]()
