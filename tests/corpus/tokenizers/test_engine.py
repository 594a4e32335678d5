"""The engine: splintr-rs where it proves itself, else `tokenizers`, the same ids either way."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.corpus.tokenizers import engine
from ksub_ds.corpus.tokenizers.engine import SplintrEngine, TokenizersEngine, check_texts, cut, expected_ids
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

TEXTS = [*check_texts(), "The old river sings.", "a<UNK>b 語", "</s> <mask> <unk>", "το παλιό\nσπίτι " * 30]


@pytest.fixture(params=["tiny_tokenizer", "tiny_bpe"])
def path(request: pytest.FixtureRequest) -> Any:
    """A tokenizer of each kind."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings logged."""
    found: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning", lambda self, message: found.append(message))
    return found


def ids_of(path: Path, kind: type) -> list[list[int]]:
    """The ids of TEXTS, by an engine of this kind."""
    tokenizer: Any = load_tokenizer(path)
    ids = [array.tolist() for array in tokenizer.encode_batch(TEXTS)]
    assert isinstance(tokenizer._encoder._engine, kind)
    return ids


def test_without_splintr_the_ids_are_the_same(path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ids_of(path, SplintrEngine)
    assert not warnings
    monkeypatch.setitem(sys.modules, "splintr", None)
    assert ids_of(path, TokenizersEngine) == expected
    assert len(warnings) == 1 and str(path) in warnings[0] and "is not installed" in warnings[0]


def test_an_engine_with_other_ids_is_not_used(path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ids_of(path, SplintrEngine)
    encode = SplintrEngine._encode
    monkeypatch.setattr(SplintrEngine, "_encode", lambda self, text: encode(self, text)[: 1 if "語" in text else None])
    assert ids_of(path, TokenizersEngine) == expected
    assert len(warnings) == 1 and "gives other ids for" in warnings[0]


def test_a_panic_of_the_engine_ends_nothing(path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyO3's PanicException is not an Exception; neither is an interrupt, which passes."""
    panic = type("PanicException", (BaseException,), {})
    expected = ids_of(path, SplintrEngine)

    def broken(error: BaseException) -> Any:
        def open_tokenizer(content: bytes) -> None:
            raise error

        return SimpleNamespace(from_json_bytes=open_tokenizer)

    monkeypatch.setitem(sys.modules, "splintr", broken(panic("index out of bounds")))
    assert ids_of(path, TokenizersEngine) == expected
    assert len(warnings) == 1 and "does not support it (index out of bounds)" in warnings[0]
    monkeypatch.setitem(sys.modules, "splintr", broken(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(path).encode_batch(["a"])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["<", ">", "unk", "UNK", "＜", "ꙮ", "\U0010fffe", "\U0010ffff", "a", " "]), max_size=30)
)
def test_the_name_of_the_unknown_token_is_ordinary_text(tiny_tokenizer: Path, parts: list[str]) -> None:
    description = load_tokenizer(tiny_tokenizer)._describe()  # type: ignore[attr-defined]
    text = "".join(parts)
    found, expected = (engine(description).encode([text])[0] for engine in (SplintrEngine, TokenizersEngine))
    assert found.tolist() == expected.tolist()


def test_endless_words_are_not_cached(tiny_bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHARACTERS_AT_ONCE", 100)
    tokenizer: Any = load_tokenizer(tiny_bpe)
    tokenizer.encode_batch(["river stone"])
    splintr = tokenizer._encoder._engine._tokenizer
    assert splintr.cache_len > 0
    tokenizer.encode_batch(["a" * 1000])
    assert splintr.cache_len == 0


def test_the_check_expects_what_the_whole_vocabulary_gives(path: Path) -> None:
    tokenizer: Any = load_tokenizer(path)
    texts = check_texts()
    assert len(set(texts)) > 300
    whole = TokenizersEngine(tokenizer._describe()).encode(texts)
    for found, expected in zip(expected_ids(tokenizer._describe(), texts), whole, strict=True):
        assert np.array_equal(found, expected) and found.dtype == np.int32


def test_near_ties_are_decided_in_float64() -> None:
    """Of equal ways the first wins, and sums that float32 cannot tell apart differ."""
    pieces = [["<s>", 0.0], ["</s>", 0.0], ["<pad>", 0.0], ["\0unk", 0.0], ["<mask>", 0.0], ["▁", -1.0], ["i", -7.1]]
    pieces += [["ii", -9.3], ["a", -10.00000001], ["b", -10.0], ["ab", -20.000000005], ["x", -30.0]]
    model = {"type": "Unigram", "unk_id": 3, "vocab": pieces, "byte_fallback": False}
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    split = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, mark]}
    parts = {"normalizer": None, "pre_tokenizer": split, "post_processor": None, "decoder": None}
    description = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], **parts, "model": model}
    opened = engine.open_engine(lambda: json.loads(json.dumps(description)), "ties")
    assert isinstance(opened, SplintrEngine)
    assert [ids.tolist() for ids in opened.encode(["iii", "ab"])] == [[5, 6, 7], [5, 10]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["river", "語", " ", "\n", "  ", "\u0301", "e", "▁", "."]), max_size=80).map("".join))
def test_texts_are_cut_where_it_changes_no_id(tiny_tokenizer: Path, tiny_bpe: Path, text: str) -> None:
    for path in (tiny_tokenizer, tiny_bpe):
        tokenizer = load_tokenizer(path)
        whole = [ids.tolist() for ids in tokenizer.encode_batch([text, "", text])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "CHARACTERS_AT_ONCE", 15)
            assert "".join(cut(text, " \n")) == text
            assert [ids.tolist() for ids in tokenizer.encode_batch([text, "", text])] == whole


def test_long_texts_are_cut_and_endless_words_are_not(make_documents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHARACTERS_AT_ONCE", 150)
    text = "\n".join(make_documents("en", 30, seed=3))
    assert len(list(cut(text, " \n"))) > 20 and list(cut("x" * 1000, " \n")) == ["x" * 1000]
    assert list(cut(text, "")) == [text]


def test_texts_stay_whole_where_a_blank_is_written_before_each(
    tiny_tokenizer: Path, tiny_bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 2's normaliser writes one before every text that it is given, and would before every piece."""
    for path in (tiny_tokenizer, tiny_bpe):
        tokenizer: Any = load_tokenizer(path)
        tokenizer.encode_batch(["a"])
        assert tokenizer._encoder._separators == " \n"
    letters = {"<unk>": 0, "▁": 1, **{letter: 2 + number for number, letter in enumerate("eivr\n")}}
    model = {"type": "BPE", "vocab": letters, "merges": [], "unk_token": "<unk>", "fuse_unk": True}
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blanks]}
    parts = {"normalizer": steps, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    description = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], **parts, "model": model}
    text = "river river\nriver " * 20
    expected = TokenizersEngine(description).encode([text])[0].tolist()
    monkeypatch.setattr(engine, "CHARACTERS_AT_ONCE", 50)
    encoder = engine.BulkEncoder(lambda: json.loads(json.dumps(description)), "llama")
    assert encoder.encode_batch([text])[0].tolist() == expected
