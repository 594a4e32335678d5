"""Tokenizers that transformers opens: checked against SentencePiece, with padding of their own, with NFC on request."""

import io
import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers.huggingface import HuggingFaceTokenizer
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.corpus.tokenizers.xlmr import XlmrTokenizer

WORDS = "Tiếng Việt là ngôn ngữ của người Việt"
TEXTS = [unicodedata.normalize(form, WORDS) for form in ("NFC", "NFD")]  # two marks on ế, ệ, ữ, ườ


def test_a_conversion_that_loses_the_normaliser_is_refused(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """transformers 5 does so to mBART's."""
    shutil.copy(tiny_tokenizer, tmp_path)
    config = {"tokenizer_class": "MBartTokenizer", "src_lang": "en_XX"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"transformers cuts .* sentencepiece.bpe.model itself into .* tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("taken", ["eos_token", "bos_token", "mask_token", "unk_token"])
def test_padding_has_a_token_of_its_own(taken: str, tiny_bpe: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bpe, tmp_path / "x")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": config[taken]}))
    with pytest.raises(UserError, match=r"pad_token is .*, as .*tokenizer_config.json \(the vocabulary has <pad>\)"):
        load_tokenizer(folder)


@pytest.fixture(scope="module")
def vietnamese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model that knows the letters of WORDS."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, *WORDS.split()] * 20), model_writer=model, vocab_size=60,
        hard_vocab_limit=False, character_coverage=1.0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("vi") / "sentencepiece.bpe.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(params=["xlmr", "bpe", "camembert"])
def given(request: pytest.FixtureRequest, vietnamese: Path, tiny_bpe: Path, tmp_path: Path) -> Path:
    """A tokenizer of each kind: from XLM-R's model, a tokenizer.json, another family's model."""
    if request.param != "camembert":
        return {"xlmr": vietnamese, "bpe": tiny_bpe}[request.param]
    (tmp_path / "c").mkdir()
    shutil.copy(vietnamese, tmp_path / "c")
    (tmp_path / "c" / "tokenizer_config.json").write_text('{"tokenizer_class": "CamembertTokenizer"}')
    return tmp_path / "c"


def ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of the texts."""
    return [array.tolist() for array in tokenizer.encode_batch(texts)]


@pytest.mark.parametrize("model_type", [None, "xlm-roberta", "ksub_roberta"])
def test_nfc_stays_with_the_tokenizer(given: Path, model_type: str | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from ksub_ds.model.registration import register

    register()
    plain, tokenizer = load_tokenizer(given), load_tokenizer(given, nfc=True)
    composed, decomposed = ids(tokenizer, TEXTS)
    assert composed == decomposed == ids(plain, TEXTS)[0] != ids(plain, TEXTS)[1]
    assert tokenizer.fingerprint != plain.fingerprint
    saved = tmp_path / "saved"
    tokenizer.save(saved)
    if model_type is not None:  # as in an exported model
        (saved / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert AutoTokenizer.from_pretrained(saved)(TEXTS, add_special_tokens=False).input_ids == [composed, decomposed]
    again = load_tokenizer(saved)
    assert type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint
    assert ids(again, TEXTS) == [composed, decomposed]
    assert load_tokenizer(saved, nfc=True).fingerprint == tokenizer.fingerprint
    again.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == tokenizer.fingerprint


def test_a_normaliser_in_tokenizer_json_counts(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """A tokenizer.json that says more than the model beside it is not replaced by the model."""
    from tokenizers.normalizers import Lowercase, Sequence
    from transformers import AutoTokenizer

    plain = load_tokenizer(tiny_tokenizer)
    plain.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), XlmrTokenizer)
    lower = AutoTokenizer.from_pretrained(tmp_path)
    backend: Any = lower.backend_tokenizer
    backend.normalizer = Sequence([backend.normalizer, Lowercase()])
    lower.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    opened = load_tokenizer(tmp_path)
    assert isinstance(opened, HuggingFaceTokenizer)
    assert ids(opened, ["THE OLD RIVER"]) == ids(plain, ["the old river"]) != ids(plain, ["THE OLD RIVER"])
