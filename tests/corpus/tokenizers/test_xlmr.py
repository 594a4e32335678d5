"""XLM-R's layout: the ids of transformers, nothing forged by text, models of another kind refused."""

import functools
import gzip
import io
import itertools
import json
import pickle
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.corpus.tokenizers.xlmr import GENERIC_CLASS, MODEL_NAME, XlmrTokenizer, edit_config, put_nfc_first

SPECIAL_TEXT = "a </s> b<mask> <s> <pad> <unk>"


@pytest.fixture(scope="module")
def reference(tiny_tokenizer: Path) -> Any:
    """transformers' own tokenizer of the same model."""
    from transformers import XLMRobertaTokenizer

    return XLMRobertaTokenizer.from_pretrained(tiny_tokenizer.parent)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Any:
    return load_tokenizer(tiny_tokenizer)


# Known words, unknown letters, marks that combine, odd white space, literal word marks, controls.
PIECES = ["river", "το", "παλιό", "yürür", " ", "\n", "\u00a0", "\u3000", "\u2028", "▁", "▁▁", "e\u0301", "ﻻ\u064b"]
PIECES += [
    "\x01",
    "\x1c",
    "\u200b",
    "ﬁ",
    "①",
    "語",
    "\x0b",
    "\x0c",
    "\U0001f600",
    "\u1680",
    "\ufeff",
    "A",
    "b.",
    "ệ",
    "\u0301",
    "\x85",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=20).map("".join))
@example("")
@example("  \n ")
@example("iii (iii) river" * 50)
def test_ids_are_those_of_transformers(tokenizer: Any, reference: Any, text: str) -> None:
    if any(token in text for token in reference.all_special_tokens):
        return  # a meant difference: see test_text_never_becomes_a_special_token
    expected = reference(text, add_special_tokens=False).input_ids
    assert tokenizer.encode_batch([text])[0].tolist() == expected


def test_text_never_becomes_a_special_token(tokenizer: Any) -> None:
    """Spelt-out special tokens are the characters they are made of (unknown ones may be <unk>)."""
    ids = tokenizer.encode_batch([SPECIAL_TEXT])[0].tolist()
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id} & set(ids)


def test_saved_folder_is_the_same_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "saved")
    texts = ["The old river sings.", "το παλιό σπίτι", "bir nehir, 語 語語 x"]
    ids = [array.tolist() for array in tokenizer.encode_batch(texts)]
    opened = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert opened(texts, add_special_tokens=False).input_ids == ids
    assert (opened.mask_token_id, len(opened)) == (tokenizer.mask_id, tokenizer.vocab_size)
    again = load_tokenizer(tmp_path / "saved")
    assert type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert [array.tolist() for array in copy.encode_batch(texts)] == ids
    assert tokenizer.decode(ids[0]) == texts[0]
    assert tokenizer.decode([0, *ids[0][:2], tokenizer.mask_id, 2]).startswith("<s>")


@pytest.mark.parametrize(
    "extra", [{"user_defined_symbols": ["<mask>"]}, {"bos_id": 0, "unk_id": 1}, {"model_type": "bpe"}]
)
def test_models_of_another_kind_are_refused(extra: dict[str, Any], tiny_text: Path, tmp_path: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{"input": str(tiny_text / "en.jsonl"), "model_writer": model, "vocab_size": 80, "hard_vocab_limit": False}
        | {"minloglevel": 2, "num_threads": 1}
        | extra
    )
    (tmp_path / "other.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=r"other.model: "):
        load_tokenizer(tmp_path / "other.model")


OPTIONS: list[dict[str, Any]] = [
    {"treat_whitespace_as_suffix": True},
    {"add_dummy_prefix": False},
    {"remove_extra_whitespaces": False},
    {"split_by_whitespace": False},
    {"normalization_rule_name": "identity"},
    {"normalization_rule_name": "nfkc"},
    {"normalization_rule_name": "nmt_nfkc_cf"},
    {"split_by_number": False, "split_digits": True, "split_by_unicode_script": False},
]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(OPTIONS), st.lists(st.sampled_from(["river ", "of the", "\t", "\n", "  ", "The old", "1 2"])))
def test_options_give_the_ids_of_sentencepiece_or_are_refused(option: dict[str, Any], parts: list[str]) -> None:
    import sentencepiece

    model = _trained(json.dumps(option))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.model"
        path.write_bytes(model)
        try:
            tokenizer = load_tokenizer(path)
        except UserError as error:
            assert re.search(r"own\.model: (was made with|its normaliser keeps) .* train it with", str(error))
            assert option not in OPTIONS[-2:]
            return
    assert option in OPTIONS[-2:]
    text, reference = "".join(parts), sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [reference.unk_id() if index == 3 else index - 1 for index in tokenizer.encode_batch([text])[0].tolist()]
    assert ids == reference.encode(text)


@functools.cache
def _trained(option: str) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    text = ["The old river of the south sings 1 2 12 of the old river", "the river of the old south 22"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, **json.loads(option),
    )  # fmt: skip
    return model.getvalue()


def test_a_folder_saved_with_its_tokenizer_json_is_opened_whatever_the_options(tmp_path: Path) -> None:
    """Shards keep such a folder; its ids are those of transformers, as when they were made."""
    model = _trained(json.dumps(OPTIONS[1]))
    tokenizer = XlmrTokenizer(model, "own.model")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("nfc", [False, True])
@pytest.mark.parametrize("option", [{}, {"normalization_rule_name": "identity"}])
def test_saved_files_are_those_that_transformers_writes(option: dict[str, Any], nfc: bool, tmp_path: Path) -> None:
    model = _trained(json.dumps(option))
    XlmrTokenizer(model, "own.model", nfc).save(tmp_path / "ours")
    _save_with_transformers(model, nfc, tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def _save_with_transformers(model: bytes, nfc: bool, folder: Path) -> None:
    from transformers import XLMRobertaTokenizer

    folder.mkdir()
    (folder / MODEL_NAME).write_bytes(model)
    tokenizer = XLMRobertaTokenizer.from_pretrained(folder)
    if nfc:
        put_nfc_first(tokenizer)
    tokenizer.save_pretrained(folder)
    edit_config(folder, {"tokenizer_class": GENERIC_CLASS} if nfc else {})


def test_real_ids_are_those_of_transformers(ksub_data: Path, tmp_path: Path) -> None:
    """A sample of every language with the published vocabulary; float32 sums would fail some of these."""
    from transformers import XLMRobertaTokenizer

    model = ksub_data / "tokenizer" / "sentencepiece.bpe.model"
    shutil.copy(model, tmp_path)
    reference = XLMRobertaTokenizer.from_pretrained(tmp_path).backend_tokenizer
    tokenizer = load_tokenizer(model)
    hello = tokenizer.encode_batch(["Hello World!"])[0].tolist()
    assert (hello, tokenizer.mask_id, tokenizer.vocab_size) == ([35378, 6661, 38], 250001, 250002)
    for path in sorted((ksub_data / "text").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in itertools.islice(lines, 0, 600, 24)]
        expected = [encoding.ids for encoding in reference.encode_batch_fast(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected, path.name


def test_a_word_of_a_million_letters(ksub_data: Path) -> None:
    """As transformers, which takes it whole."""
    tokenizer = load_tokenizer(ksub_data / "tokenizer" / "sentencepiece.bpe.model")
    assert len(tokenizer.encode_batch(["a" * 1_000_000])[0]) == 200_001


def renamed(reference: Any) -> Any:
    """transformers' tokenizer with its special tokens out of reach: what text that spells one must give."""
    from tokenizers import Tokenizer

    definition = json.loads(reference.backend_tokenizer.to_str()) | {"added_tokens": [], "post_processor": None}
    special = set(reference.all_special_tokens)
    vocabulary = [[f"\0 {p}" if p in special else p, score] for p, score in definition["model"]["vocab"]]
    return Tokenizer.from_str(json.dumps(definition | {"model": definition["model"] | {"vocab": vocabulary}}))


NAMES = ["<s>", "</s>", "<pad>", "<unk>", "<UNK>", "＜ＵＮＫ＞", "<mask>", "\0special <s>", "<unk", "UNK>", "<0x00>"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, *NAMES]) | st.text(max_size=4), max_size=12).map("".join))
@example("a<UNK>b 語")
@example("<unk> <UNK> ＜ＵＮＫ＞")
@example("語" * 3000 + "<UNK>")
def test_spelt_out_special_tokens_are_ordinary_text(tokenizer: Any, reference: Any, text: str) -> None:
    expected = renamed(reference).encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_batch([text])[0].tolist() == expected


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf", "identity"])
def test_models_with_other_normalisers(rule: str, make_documents: Any, tmp_path: Path) -> None:
    import sentencepiece
    from transformers import XLMRobertaTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*make_documents("en", 100), *make_documents("el", 100)]), model_writer=model,
        vocab_size=200, hard_vocab_limit=False, normalization_rule_name=rule, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    if rule != "nmt_nfkc":  # SentencePiece makes a line break <unk>: only a folder that says XLM-R takes it for a blank
        for path in (tmp_path, tmp_path / "sentencepiece.bpe.model"):
            with pytest.raises(UserError, match=r"keeps tabs and line breaks .*tokenizer_class"):
                load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    reference = renamed(XLMRobertaTokenizer.from_pretrained(tmp_path))
    draw = random.Random(0)
    texts = ["The old\triver\u00a0sings  a\u3000small  ﬁ bird\r\n", "THE OLD ΤΟ ΠΑΛΙΌ ＲＩＶＥＲ", "river" * 3000]
    texts += ["".join(draw.choices([*PIECES, *NAMES, "river ", "The"], k=12)) for _ in range(300)]
    expected = [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in load_tokenizer(tmp_path).encode_batch(texts)] == expected


def test_a_protobuf_that_is_too_old_is_named(tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sentencepiece
    from google.protobuf import runtime_version

    monkeypatch.setattr(runtime_version, "MAJOR", 6)
    monkeypatch.delitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    with pytest.raises(UserError, match=r"protobuf .* is older .*pip install -U 'protobuf>="):
        load_tokenizer(tiny_tokenizer)
