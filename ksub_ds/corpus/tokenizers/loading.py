"""Opening a tokenizer: a single SentencePiece `.model` in XLM-R's layout, or a HuggingFace folder.

    tokenizer = load_tokenizer("sentencepiece.bpe.model")   # XLM-R's kind
    tokenizer = load_tokenizer("roberta-base-folder")       # any fast tokenizer
    tokenizer = load_tokenizer("FacebookAI/xlm-roberta-base")  # a model in the local cache of the hub

A SentencePiece model alone does not tell which id a piece has. XLM-R's, CamemBERT's and mBART's models look alike, and
tokens may have been added to each; tokenizer_config.json, config.json, added_tokens.json and special_tokens_map.json
tell them apart. So a folder is what these files say (`Declaration`). Only if they say XLM-R, with nothing added, or
nothing at all, XLM-R's layout is taken; everything else is opened by transformers.

Text never becomes a special token: "</s>" in a document is encoded as characters. Packing relies on that (a `</s>` in
a row is always a border between documents). `xlmr.py` holds XLM-R's layout, `huggingface.py` the others, `engine.py`
turns text into ids for both kinds, and `parallel.py` does so in several processes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.corpus.tokenizers.huggingface import HuggingFaceTokenizer
from ksub_ds.corpus.tokenizers.location import DESCRIPTION, locate, sentencepiece_files
from ksub_ds.corpus.tokenizers.xlmr import MODEL_NAME, SPECIAL_TOKENS, XlmrTokenizer

XLMR_CLASS = "XLMRobertaTokenizer"
_GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")  # classes without a layout of their own
_XLMR_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>"}
_XLMR_NAMES |= {"cls_token": "<s>", "mask_token": "<mask>"}
_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer. Instances can be pickled (worker processes)."""

    vocab_size: int
    bos_id: int
    eos_id: int
    special_ids: tuple[int, ...]
    fingerprint: str

    @property
    def pad_id(self) -> int | None:
        """The padding token, if it has one of its own."""
        ...

    @property
    def unk_id(self) -> int | None:
        """The unknown token, if any text needs it."""
        ...

    @property
    def mask_id(self) -> int | None:
        """The mask token; causal models need none."""
        ...

    def __hash__(self) -> int:
        """Return what caches look a tokenizer up by."""
        ...

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


@dataclass(frozen=True)
class Declaration:
    """What a folder says of its tokenizer.

    Attributes:
        class_name: transformers' class, without "Fast" at the end; None if no file tells.
        config: tokenizer_config.json.
        special: special_tokens_map.json.
        added: added_tokens.json.
    """

    class_name: str | None
    config: dict[str, Any]
    special: dict[str, Any]
    added: dict[str, Any]

    @property
    def is_generic(self) -> bool:
        """Whether tokenizer.json alone decides."""
        return self.class_name in _GENERIC_CLASSES

    @property
    def is_other_class(self) -> bool:
        """Whether the class lays out the ids of a SentencePiece model in another way than XLM-R's."""
        return self.class_name not in (None, XLMR_CLASS, *_GENERIC_CLASSES)

    def unlike_xlmr(self, mask_id: int) -> str | None:
        """Return what makes the tokenizer other than XLM-R's with the same model; None if it is XLM-R's."""
        if self.class_name not in (None, XLMR_CLASS):
            return f"its class is {self.class_name}"
        usual_ids = {token: str(index) for token, index in {**SPECIAL_TOKENS, "<mask>": mask_id}.items()}
        for token, number in self._numbered():
            if token is None or usual_ids.get(token) != number:
                return f"{token!r} is token {number}"
        for facts in (self.config, self.special):
            for key, usual in _XLMR_NAMES.items():
                token = _content(facts.get(key))
                if token not in (usual, None):
                    return f"{key} is {token!r}"
            for entry in (entry for key in _SPECIAL_LISTS for entry in _entries(facts.get(key))):
                token = _content(entry)
                if token not in (*SPECIAL_TOKENS, "<mask>"):
                    return f"{token!r} is a special token"
        return "add_prefix_space is false" if self.config.get("add_prefix_space") is False else None

    def _numbered(self) -> Iterator[tuple[str | None, str]]:
        decoder = self.config.get("added_tokens_decoder")
        for number, entry in decoder.items() if isinstance(decoder, dict) else ():
            yield _content(entry), number
        for token, number in self.added.items():
            yield token, str(number)


def read_declaration(folder: Path) -> Declaration:
    """Read what the files of a folder say.

    Raises:
        UserError: a file is damaged.
    """
    config, model = _read_object(folder / "tokenizer_config.json"), _read_object(folder / "config.json")
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if not name and model.get("model_type"):
        from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

        name = TOKENIZER_MAPPING_NAMES.get(str(model["model_type"]))
    name = str(name).removesuffix("Fast") if name else None
    special, added = _read_object(folder / "special_tokens_map.json"), _read_object(folder / "added_tokens.json")
    return Declaration(name, config, special, added)


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; get it anew")
    return content


def _content(entry: object) -> str | None:
    """Return the text of a token, written as itself or as an object with its properties."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return None if content is None else str(content)


def _entries(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list) else []


def load_tokenizer(given: str | Path, nfc: bool = False) -> Tokenizer:
    """Open a tokenizer.

    Args:
        given: a SentencePiece `.model` file in XLM-R's layout, a folder in HuggingFace's form, or the name of a model
            in the local cache of the hub.
        nfc: put text in Unicode's form NFC first. A tokenizer that was saved with this step keeps it.

    Raises:
        UserError: missing, damaged, of a kind whose ids would be wrong, or without an end token; with a
            mask token, also without a start or padding token.
    """
    path = locate(given)
    if path.is_file():
        return _open_file(path, nfc)
    model = next(iter(sentencepiece_files(path)), None)
    if model is None:
        return HuggingFaceTokenizer(path, nfc)
    declaration = read_declaration(path)
    if (path / DESCRIPTION).is_file():
        same = _same_as_description(model, path / DESCRIPTION, declaration, nfc) if model.name == MODEL_NAME else None
        return same or HuggingFaceTokenizer(path, nfc)
    if declaration.class_name in (None, XLMR_CLASS):
        tokenizer = XlmrTokenizer(model.read_bytes(), str(model), nfc)
        if declaration.unlike_xlmr(tokenizer.mask_id) is None:
            _check_options(tokenizer, model, declaration)
            return tokenizer
    opened = HuggingFaceTokenizer(path, nfc)
    opened.check_pieces(model)
    return opened


def _open_file(path: Path, nfc: bool) -> XlmrTokenizer:
    """Open a SentencePiece model by itself.

    Raises:
        UserError: not a model, or not of XLM-R's layout.
    """
    tokenizer = XlmrTokenizer(path.read_bytes(), str(path), nfc)
    declaration = read_declaration(path.parent)
    if declaration.is_other_class:
        raise UserError(
            f"{path}: the files beside it say {declaration.class_name}, which numbers the pieces in another way than "
            f"XLM-R; give the folder: {path.parent}"
        )
    _check_options(tokenizer, path, declaration)
    return tokenizer


def _same_as_description(model: Path, description: Path, declaration: Declaration, nfc: bool) -> XlmrTokenizer | None:
    """Open the model if it gives the ids of the tokenizer.json beside it; else return None."""
    content = read_json(description)
    try:
        plain = XlmrTokenizer(model.read_bytes(), str(model), nfc)
    except UserError:
        return None  # of another kind
    try:
        if not plain.same_vocabulary(content):
            return None
        if not declaration.is_generic:  # transformers makes such a tokenizer from its vocabulary alone
            return plain
        for saved_with_nfc in (False, True):
            tokenizer = XlmrTokenizer(model.read_bytes(), str(model), saved_with_nfc)
            if tokenizer.same_segmentation(content):
                return plain if nfc else tokenizer
    except (AttributeError, IndexError, KeyError, TypeError):
        pass  # no tokenizer.json at all: whoever opens it next says so
    return None


def _check_options(tokenizer: XlmrTokenizer, path: Path, declaration: Declaration) -> None:
    """Check that SentencePiece itself would give the same ids.

    Raises:
        UserError: it would not.
    """
    option = tokenizer.differs_from_sentencepiece()
    if option is not None:
        name, value = option.split("=")
        usual = "false" if value == "true" else "true"
        raise UserError(
            f"{path}: was made with {option}, so SentencePiece cuts text otherwise than XLM-R's layout does; train it "
            f"with {name}={usual}, or give a folder with a tokenizer.json made of it"
        )
    if declaration.class_name is None and tokenizer.keeps_line_breaks():
        raise UserError(
            f"{path}: its normaliser keeps tabs and line breaks (normalization_rule_name identity, nfkc or nfkc_cf), "
            "which SentencePiece makes <unk>; train it with nmt_nfkc or nmt_nfkc_cf, or give a folder with it as "
            f'{MODEL_NAME} and a tokenizer_config.json of {{"tokenizer_class": "{XLMR_CLASS}"}}: then they are blanks, '
            "as in transformers"
        )
