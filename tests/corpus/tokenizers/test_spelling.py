"""Bytes of each token: those of the text that tokens decode to."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ksub_ds.corpus.tokenizers.loading import Tokenizer, load_tokenizer
from ksub_ds.corpus.tokenizers.spelling import token_bytes

TEXTS = ["The old house.", "ένα μικρό σπίτι", "bir küçük ev, yavaşça", "🦉 owl\n\ttab  two blanks", "naïve café"]


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE of SentencePiece's form that spells unknown characters by bytes, as Llama 2's does."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "T", ".", ",", "th", "▁th"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Backend(BPE(vocabulary, [("t", "h"), ("▁", "th")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token", "mask_token"), special, strict=True))
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def bytes_of(tokenizer: Tokenizer, text: str) -> int:
    sizes = token_bytes(tokenizer)
    assert sizes is not None and sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int64
    assert not sizes[list(tokenizer.special_ids)].any()
    (ids,) = tokenizer.encode_batch([text])
    return int(sizes[ids].sum())


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_bpe(tiny_bpe: Path, text: str) -> None:
    """Bytes of every character, as they stand; the text is not changed."""
    assert bytes_of(load_tokenizer(tiny_bpe), text) == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_byte_fallback(byte_fallback: Path, text: str) -> None:
    """One byte more: the blank that is put before a text."""
    assert bytes_of(load_tokenizer(byte_fallback), text) == len(text.encode()) + 1


def test_sentencepiece(tiny_tokenizer: Path) -> None:
    """The blank before a text, blanks run together, and of characters that are not in the vocabulary nothing."""
    tokenizer = load_tokenizer(tiny_tokenizer)
    assert bytes_of(tokenizer, "the old house") == len(" the old house")
    assert bytes_of(tokenizer, "ένα  μικρό\nσπίτι") == len(" ένα μικρό σπίτι".encode())
    (ids,) = tokenizer.encode_batch(["the 🦉"])
    assert tokenizer.unk_id in ids and bytes_of(tokenizer, "the 🦉") == len(" the ")


def test_tokens_that_were_added_are_text(tiny_bpe: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(tiny_bpe, tmp_path / "more")
    source = AutoTokenizer.from_pretrained(tmp_path / "more")
    source.add_tokens(["Ġé"])  # spelt as byte-level BPE spells a blank and a letter, and meant as it stands
    source.save_pretrained(tmp_path / "more")
    tokenizer = load_tokenizer(tmp_path / "more")
    sizes = token_bytes(tokenizer)
    assert sizes is not None and sizes[-1] == len("Ġé".encode())


def test_wordpiece_does_not_say_where_blanks_were(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##re"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["decoder"]["type"] == "WordPiece"
    assert token_bytes(load_tokenizer(tmp_path)) is None


@pytest.mark.parametrize("step", ["Replace", "Metaspace"])
def test_blanks_in_another_sign_are_not_sentencepiece_s(byte_fallback: Path, tmp_path: Path, step: str) -> None:
    folder = shutil.copytree(byte_fallback, tmp_path / "other")
    definition = json.loads((folder / "tokenizer.json").read_text())
    steps = {
        "Replace": {"type": "Replace", "pattern": {"String": "</w>"}, "content": " "},
        "Metaspace": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition | {"decoder": steps[step]}))
    assert token_bytes(load_tokenizer(folder)) is None
