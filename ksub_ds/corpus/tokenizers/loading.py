"""Opening a tokenizer: a single SentencePiece `.model` in XLM-R's layout, or a HuggingFace folder.

    tokenizer = load_tokenizer("sentencepiece.bpe.model")   # XLM-R's kind
    tokenizer = load_tokenizer("roberta-base-folder")       # any fast tokenizer
    tokenizer = load_tokenizer("FacebookAI/xlm-roberta-base")  # a model in the local cache of the hub

A folder is what its files say (`declared.py`). Only if they say XLM-R, with nothing added, or nothing at all, XLM-R's
layout is taken; everything else is opened by transformers.

Text never becomes a special token: "</s>" in a document is encoded as characters. Packing relies on that (a `</s>` in
a row is always a border between documents). `xlmr.py` holds XLM-R's layout, `huggingface.py` the others, `engine.py`
turns text into ids for both kinds, and `parallel.py` does so in several processes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.corpus.tokenizers.declared import XLMR_CLASS, Declaration, read_declaration
from ksub_ds.corpus.tokenizers.huggingface import HuggingFaceTokenizer
from ksub_ds.corpus.tokenizers.location import DESCRIPTION, locate, sentencepiece_files
from ksub_ds.corpus.tokenizers.xlmr import MODEL_NAME, XlmrTokenizer


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
