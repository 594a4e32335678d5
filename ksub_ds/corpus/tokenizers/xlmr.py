"""XLM-R's tokenizer: a SentencePiece unigram model in the layout of transformers' XLMRobertaTokenizer.

A token's id is the piece's id + 1 from piece 3 on; <s> 0, <pad> 1, </s> 2, <unk> 3; <mask> comes last. The ids of a
text are those of transformers, with one intended difference: text that spells a special token ("</s>", "<mask>") is
encoded as the ordinary characters it is made of, never as the special token.

transformers heeds the pieces and the normaliser of a model, not the options that it was trained with. Of some options
SentencePiece's own ids would be others: see `differs_from_sentencepiece`.
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
GENERIC_CLASS = "PreTrainedTokenizerFast"  # does what tokenizer.json says; other classes of transformers do not
_NFC = {"type": "NFC"}


class XlmrTokenizer:
    """Bulk encoding with a SentencePiece model in XLM-R's layout.

    Args:
        model: the bytes of the `.model` file.
        name: what to call it in error messages.
        nfc: whether text is put in Unicode's form NFC first.

    Raises:
        UserError: the model is damaged, or not of this kind.
    """

    def __init__(self, model: bytes, name: str, nfc: bool = False):
        self._model, self._name, self._nfc = model, name, nfc
        proto = parse_model(model, name)
        pieces = [piece.piece for piece in proto.pieces]
        self.vocab_size = len(pieces) + 2
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = 0, 1, 2, 3
        self.mask_id = self.vocab_size - 1
        self.special_ids: tuple[int, ...] = (0, 1, 2, 3, self.mask_id)
        layout = b"sentencepiece in XLM-R layout after NFC\0" if nfc else b"sentencepiece in XLM-R layout\0"
        self.fingerprint = hashlib.sha256(layout + model).hexdigest()
        self._tokens: list[str] = [*SPECIAL_TOKENS, *pieces[3:], "<mask>"]
        self._encoder = BulkEncoder(self._describe, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return XlmrTokenizer, (self._model, self._name, self._nfc)

    def _normalizer(self, charsmap: bytes) -> dict[str, Any] | None:
        steps: list[dict[str, Any]] = [_NFC] if self._nfc else []
        if charsmap:
            steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
        return {"type": "Sequence", "normalizers": steps} if len(steps) > 1 else next(iter(steps), None)

    def _describe(self) -> dict[str, Any]:
        """Return the tokenizer.json that transformers makes of the model, as far as it turns text into ids."""
        proto = parse_model(self._model, self._name)
        special = [(HIDDEN.format(token), 0.0) for token in SPECIAL_TOKENS]
        scores = [piece.score for piece in proto.pieces]
        pieces = zip(self._tokens[4:-1], scores[3:], strict=True)
        split_words = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": self._normalizer(proto.normalizer_spec.precompiled_charsmap),
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
        if self._nfc:
            put_nfc_first(converted)
        converted.save_pretrained(folder)
        edit_config(folder, {"tokenizer_class": GENERIC_CLASS} if self._nfc else {})
        (folder / MODEL_NAME).write_bytes(self._model)

    def same_vocabulary(self, tokenizer_json: dict[str, Any]) -> bool:
        """Return whether a tokenizer.json beside the model has the same tokens by id."""
        model = tokenizer_json.get("model", {})
        added = {token["content"]: token["id"] for token in tokenizer_json.get("added_tokens", [])}
        vocabulary = [entry[0] for entry in model.get("vocab", [])] if model.get("type") == "Unigram" else []
        if vocabulary[-1:] != ["<mask>"]:
            vocabulary.append("<mask>")
        return vocabulary == self._tokens and added == {**SPECIAL_TOKENS, "<mask>": self.mask_id}

    def same_segmentation(self, tokenizer_json: dict[str, Any]) -> bool:
        """Return whether a tokenizer.json prepares text as this tokenizer does, so that the model can replace it."""
        normalizer = tokenizer_json.get("normalizer")
        if normalizer != self._normalizer(parse_model(self._model, self._name).normalizer_spec.precompiled_charsmap):
            return False
        steps = (tokenizer_json.get("pre_tokenizer") or {}).get("pretokenizers", [])
        return [step["type"] for step in steps] == ["WhitespaceSplit", "Metaspace"] and (
            steps[1].get("prepend_scheme", "always") == "always" and steps[1].get("add_prefix_space", True)
        )

    def differs_from_sentencepiece(self) -> str | None:
        """Return the option of the model for which SentencePiece itself gives other ids; None if there is none."""
        proto = parse_model(self._model, self._name)
        normal, trained = proto.normalizer_spec, proto.trainer_spec
        if trained.treat_whitespace_as_suffix:
            return "treat_whitespace_as_suffix=true"
        if not normal.add_dummy_prefix:
            return "add_dummy_prefix=false"
        if not normal.remove_extra_whitespaces:
            return "remove_extra_whitespaces=false"
        if not normal.escape_whitespaces:
            return "escape_whitespaces=false"
        if any(SPACE in token.lstrip(SPACE) for token in self._tokens):  # a piece of more than one word
            return "split_by_whitespace=false"
        return None

    def keeps_line_breaks(self) -> bool:
        """Return whether the normaliser leaves tabs and line breaks, which SentencePiece then makes <unk>.

        transformers, and so this class, takes them for blanks.
        """
        from tokenizers.normalizers import Precompiled

        charsmap = parse_model(self._model, self._name).normalizer_spec.precompiled_charsmap
        return not charsmap or bool(Precompiled(charsmap).normalize_str("\t\n").strip(" "))


def edit_config(folder: Path, changes: dict[str, Any]) -> None:
    """Leave out of a saved tokenizer_config.json how the tokenizer was loaded, and change what is given."""
    path = folder / "tokenizer_config.json"
    facts = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    for key in ("is_local", "local_files_only"):  # HF_HUB_OFFLINE changes them
        facts.pop(key, None)
    path.write_text(json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def put_nfc_first(tokenizer: Any) -> None:
    """Let a fast tokenizer of transformers put text in Unicode's form NFC before everything else, if it does not."""
    from tokenizers.normalizers import NFC, Sequence

    backend = tokenizer.backend_tokenizer
    if backend.normalizer is None:
        backend.normalizer = NFC()
        return
    step = json.loads(backend.normalizer.__getstate__())
    if step.get("normalizers", [step])[:1] != [_NFC]:
        backend.normalizer = Sequence([NFC(), backend.normalizer])


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
