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
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers.engine import HIDDEN, BulkEncoder, description_json

SPACE = "▁"  # SentencePiece's mark for the start of a word
MODEL_NAME = "sentencepiece.bpe.model"
SPECIAL_TOKENS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}  # and MASK, the last id
MASK = "<mask>"
GENERIC_CLASS = "PreTrainedTokenizerFast"  # does what tokenizer.json says; other classes of transformers do not
_NFC = {"type": "NFC"}
_CONFIG = {
    "add_prefix_space": True,
    "backend": "tokenizers",
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "extra_special_tokens": ["<s>", "</s>"],
    "mask_token": MASK,
    "model_max_length": int(1e30),
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "tokenizer_class": "XLMRobertaTokenizer",
    "unk_id": 0,
    "unk_token": "<unk>",
}


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
        pieces, self._scores, self._options = parse_model(model, name)
        self.vocab_size = len(pieces) + 2
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = 0, 1, 2, 3
        self.mask_id = self.vocab_size - 1
        self.special_ids: tuple[int, ...] = (0, 1, 2, 3, self.mask_id)
        layout = b"sentencepiece in XLM-R layout after NFC\0" if nfc else b"sentencepiece in XLM-R layout\0"
        self.fingerprint = hashlib.sha256(layout + model).hexdigest()
        self._tokens: list[str] = [*SPECIAL_TOKENS, *pieces[3:], MASK]
        self._encoder = BulkEncoder(self._describe, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return XlmrTokenizer, (self._model, self._name, self._nfc)

    def _normalizer(self) -> dict[str, Any] | None:
        charsmap = self._options.normalizer_spec.precompiled_charsmap
        steps: list[dict[str, Any]] = [_NFC] if self._nfc else []
        if charsmap:
            steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
        return {"type": "Sequence", "normalizers": steps} if len(steps) > 1 else next(iter(steps), None)

    def _tokenizer_json(self) -> dict[str, Any]:
        """Return the tokenizer.json that transformers makes of the model."""
        special = {**SPECIAL_TOKENS, MASK: self.mask_id}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
        scores = [0.0] * len(SPECIAL_TOKENS) + self._scores[3:].tolist() + [0.0]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": index, "content": token, **flags} for token, index in special.items()],
            "normalizer": self._normalizer(),
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": _template("<s>", "A", "</s>"),
                "pair": _template("<s>", "A", "</s>", "</s>", "B", "</s>"),
                "special_tokens": {
                    token: {"id": token, "ids": [special[token]], "tokens": [token]} for token in ("</s>", "<s>")
                },
            },
            "decoder": spaces,
            "model": {
                "type": "Unigram",
                "unk_id": self.unk_id,
                "vocab": list(zip(self._tokens, scores, strict=True)),
                "byte_fallback": False,
            },
        }

    def _describe(self) -> dict[str, Any]:
        """Return the tokenizer.json as far as it turns text into ids, with the special tokens hidden."""
        description = self._tokenizer_json()
        vocabulary = description["model"]["vocab"]
        for index in self.special_ids:
            token, score = vocabulary[index]
            vocabulary[index] = HIDDEN.format(token), score
        return {**description, "added_tokens": [], "post_processor": None, "decoder": None}

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
        """Write a folder that transformers' AutoTokenizer opens: tokenizer.json, its config, and the model.

        They are the files that transformers writes, without importing it, which takes seconds.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = {**_CONFIG, "tokenizer_class": GENERIC_CLASS} if self._nfc else _CONFIG
        (folder / "tokenizer.json").write_bytes(description_json(self._tokenizer_json()))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / MODEL_NAME).write_bytes(self._model)

    def same_vocabulary(self, tokenizer_json: dict[str, Any]) -> bool:
        """Return whether a tokenizer.json beside the model has the same tokens by id."""
        model = tokenizer_json.get("model", {})
        added = {token["content"]: token["id"] for token in tokenizer_json.get("added_tokens", [])}
        vocabulary = [entry[0] for entry in model.get("vocab", [])] if model.get("type") == "Unigram" else []
        if vocabulary[-1:] != [MASK]:
            vocabulary.append(MASK)
        return vocabulary == self._tokens and added == {**SPECIAL_TOKENS, MASK: self.mask_id}

    def same_segmentation(self, tokenizer_json: dict[str, Any]) -> bool:
        """Return whether a tokenizer.json prepares text as this tokenizer does, so that the model can replace it."""
        if tokenizer_json.get("normalizer") != self._normalizer():
            return False
        steps = (tokenizer_json.get("pre_tokenizer") or {}).get("pretokenizers", [])
        return [step["type"] for step in steps] == ["WhitespaceSplit", "Metaspace"] and (
            steps[1].get("prepend_scheme", "always") == "always" and steps[1].get("add_prefix_space", True)
        )

    def differs_from_sentencepiece(self) -> str | None:
        """Return the option of the model for which SentencePiece itself gives other ids; None if there is none."""
        normal, trained = self._options.normalizer_spec, self._options.trainer_spec
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

        charsmap = self._options.normalizer_spec.precompiled_charsmap
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


def _template(*parts: str) -> list[dict[str, Any]]:
    """Return the steps of a post-processor: "A" and "B" are the texts, all others special tokens."""
    return [{"Sequence" if part in "AB" else "SpecialToken": {"id": part, "type_id": 0}} for part in parts]


def parse_model(model: bytes, name: str) -> tuple[list[str], np.ndarray, Any]:
    """Read a SentencePiece model and check that it is of XLM-R's kind.

    Args:
        model: the bytes of the `.model` file.
        name: what to call it in error messages.

    Returns:
        The pieces, their scores as float32, and a ModelProto message of all the rest.

    Raises:
        UserError: damaged, of another kind, or protobuf is too old to read it.
    """
    from google.protobuf.message import DecodeError

    proto = _empty_message()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise UserError(f"{name}: is not a SentencePiece model, or is damaged ({error}); get it anew") from error
    pieces = [each.piece for each in proto.pieces]
    if pieces[:3] != ["<unk>", "<s>", "</s>"] or len(pieces) < 4:
        raise UserError(
            f"{name}: its first pieces are not <unk> <s> </s>; train SentencePiece with its default special ids"
        )
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise UserError(f"{name}: is not a unigram model; give the folder of a HuggingFace tokenizer instead")
    normal = proto.pieces[3].NORMAL
    kinds = zip(pieces, (each.type for each in proto.pieces), strict=True)
    clash = next((piece for piece, kind in islice(kinds, 3, None) if kind != normal or piece in (MASK, "<pad>")), None)
    if clash is not None:
        raise UserError(
            f"{name}: piece {clash!r} is a symbol of its own kind, which XLM-R's layout has no place for; "
            "train without user_defined_symbols and byte_fallback, or give a HuggingFace tokenizer folder"
        )
    scores = np.array([each.score for each in proto.pieces], dtype=np.float32)
    options = _empty_message()
    options.normalizer_spec.CopyFrom(proto.normalizer_spec)
    options.trainer_spec.CopyFrom(proto.trainer_spec)
    return pieces, scores, options


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
