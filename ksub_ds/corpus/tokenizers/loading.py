"""Opening a tokenizer: a single SentencePiece `.model` in XLM-R's layout, or a HuggingFace folder.

    tokenizer = load_tokenizer("sentencepiece.bpe.model")   # XLM-R's kind
    tokenizer = load_tokenizer("roberta-base-folder")       # any fast tokenizer with a mask token

Text never becomes a special token: "</s>" in a document is encoded as characters. Packing relies on that (a `</s>` in
a row is always a border between documents). `xlmr.py` holds XLM-R's layout, `engine.py` turns text into ids for both
kinds, and `parallel.py` does so in several processes.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.corpus.tokenizers.engine import HIDDEN, BulkEncoder
from ksub_ds.corpus.tokenizers.xlmr import MODEL_NAME, XlmrTokenizer


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer. Instances can be pickled (worker processes)."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    fingerprint: str

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32, without special tokens around it."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; special tokens show by name."""
        ...

    def tokens(self) -> list[str]:
        """Return the N tokens by id, spelt as in the vocabulary ("▁water")."""
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that transformers' AutoTokenizer opens."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer.

    Args:
        path: a SentencePiece `.model` file in XLM-R's layout, or a folder in HuggingFace's form.

    Raises:
        UserError: missing, damaged, or without a mask, start, end or padding token.
    """
    path = Path(path)
    if path.is_file():
        return XlmrTokenizer(path.read_bytes(), str(path))
    if not path.is_dir():
        raise UserError(
            f"{path}: no such tokenizer; give a SentencePiece .model file or a HuggingFace tokenizer folder"
        )
    model, description = path / MODEL_NAME, path / "tokenizer.json"
    if model.is_file():
        tokenizer = XlmrTokenizer(model.read_bytes(), str(model))
        if not description.is_file() or tokenizer.same_vocabulary(read_json(description)):
            return tokenizer
    return HuggingFaceTokenizer(path)


class HuggingFaceTokenizer:
    """Any fast HuggingFace tokenizer by folder, for example roberta-base's byte-level BPE."""

    def __init__(self, folder: Path):
        self._folder = folder
        source = _open_folder(folder)
        self.vocab_size = 1 + max(source.get_vocab().values())  # ids may have gaps
        self.bos_id = _required(folder, "bos_token", source.bos_token_id, source.cls_token_id)
        self.eos_id = _required(folder, "eos_token", source.eos_token_id, source.sep_token_id)
        self.pad_id = _required(folder, "pad_token", source.pad_token_id)
        self.mask_id = _required(folder, "mask_token", source.mask_token_id)
        unknown = source.unk_token_id
        self.unk_id = self.pad_id if unknown is None else int(unknown)  # byte-level BPE never needs it
        self.special_ids = tuple(sorted({int(index) for index in source.all_special_ids}))
        self._decoder = source.backend_tokenizer
        self._encoder = BulkEncoder(self._describe, str(folder))
        canonical = json.dumps([self._describe(), self.special_ids], sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def _describe(self) -> dict[str, Any]:
        return _text_only(json.loads(self._decoder.to_str()))

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (self._folder,)

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
        """Write a folder that transformers' AutoTokenizer opens."""
        _open_folder(self._folder).save_pretrained(folder)


def _open_folder(folder: Path) -> Any:
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", MODEL_NAME)
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder}: holds no tokenizer (none of {', '.join(names)}); give the folder of one")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises many kinds for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: transformers cannot open this tokenizer ({reason}); save it again") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{folder}: has no fast form (tokenizer.json); convert it with transformers first")
    return tokenizer


def _required(folder: Path, name: str, *candidates: int | None) -> int:
    for candidate in candidates:
        if candidate is not None:
            return int(candidate)
    raise UserError(f"{folder}: {name} is missing; masked language modelling needs it: add it to tokenizer_config.json")


def _text_only(definition: dict[str, Any]) -> dict[str, Any]:
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
