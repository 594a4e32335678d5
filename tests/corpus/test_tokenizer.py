"""Tokenizers: the ids of transformers, nothing forged by text, clear errors."""

import gzip
import io
import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers import loading as tokenizer_module
from ksub_ds.corpus.tokenizers import long_words, unigram, xlmr
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.corpus.tokenizers.unigram import UnigramSegmenter

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


def test_long_words_go_the_same_way(tokenizer: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    word = "riverstonebirdτοπαλιό語" * 400
    assert len(word) > unigram.LONGEST_VECTORISED_WORD
    expected = reference(word + " a " + word, add_special_tokens=False).input_ids
    assert tokenizer.encode_batch([f"{word} a {word}"])[0].tolist() == expected
    monkeypatch.setattr(unigram, "LONGEST_VECTORISED_WORD", 10**9)
    assert tokenizer._segmenter.segment([word]) == [np.array(expected[: len(expected) // 2], "<i4").tobytes()]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, *"theriv", "語" * 30, "ﷺ"]), min_size=10, max_size=60).map("".join))
@example("語" * 200)
@example("▁" * 90 + "a")
@example("ﷺ" * 60)
@example("a" + "e\u0301" * 60)
def test_steps_of_bounded_memory_change_no_id(tokenizer: Any, reference: Any, text: str) -> None:
    """Long words in steps, long texts in pieces, words forgotten in between."""
    expected = reference(text + " a " + text, add_special_tokens=False).input_ids
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LONGEST_VECTORISED_WORD": 25, "LONG_STEP": 20, "LONG_OVERLAP": 20}.items():
            patch.setattr(unigram, name, value)
        for name, value in {"LONG_WORD": 24, "BYTES_AT_ONCE": 40, "CACHED_BYTES": 50, "CACHED_WORDS": 20}.items():
            patch.setattr(xlmr, name, value)
        patch.setattr(long_words, "STEP", 20)
        assert tokenizer.encode_batch([text + " a " + text, "", text])[0].tolist() == expected
        assert tokenizer._cached_bytes < 2000


def best_score(word: str, scores: dict[str, float]) -> float:
    """The highest score over all ways to cut a word into pieces."""
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, len(word)), k) for k in range(len(word)))
    ways = ([word[a:b] for a, b in itertools.pairwise([0, *cut, len(word)])] for cut in cuts)
    return max(sum(scores[part] for part in way) for way in ways if all(part in scores for part in way))


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.text("ab", min_size=2, max_size=4), st.floats(-9, -1), max_size=12),
    st.lists(st.text("ab", max_size=7), min_size=1, max_size=6),
)
def test_segmentation_is_the_best_of_all(extra: dict[str, float], words: list[str]) -> None:
    vocabulary = {"▁": -2.0, "a": -3.0, "b": -3.5, "▁a": -4.0} | extra
    pieces, scores = list(vocabulary), np.array(list(vocabulary.values()))
    segmenter = UnigramSegmenter(pieces, scores, np.arange(len(pieces)) + 1, 0, float(scores.min()))
    for word, raw in zip(words, segmenter.segment(words), strict=True):
        parts = [pieces[index - 1] for index in np.frombuffer(raw, "<i4")]
        assert "".join(parts) == "▁" + word
        assert sum(vocabulary[part] for part in parts) == pytest.approx(best_score("▁" + word, vocabulary), abs=1e-9)


def test_of_equal_ways_the_one_whose_last_piece_starts_first_wins() -> None:
    """As in HuggingFace's search; in float32 along a document SentencePiece may take the other."""
    pieces = ["▁", "i", "ii"]
    segmenter = UnigramSegmenter(pieces, np.array([-1.0, -7.1, -9.3]), np.arange(3), 9, -10.0)
    assert np.frombuffer(segmenter.segment(["iii"])[0], "<i4").tolist() == [0, 1, 2]


def test_scores_are_added_in_float64() -> None:
    pieces = ["▁", "a", "b", "ab"]
    segmenter = UnigramSegmenter(pieces, np.array([-1.0, -10.00000001, -10.0, -20.000000005]), np.arange(4), 9, -30.0)
    assert np.frombuffer(segmenter.segment(["ab"])[0], "<i4").tolist() == [0, 3]


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


def test_a_folder_whose_tokenizer_json_differs_is_not_taken_for_its_model(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    changed = AutoTokenizer.from_pretrained(tmp_path)
    changed.add_tokens(["riverbird"])
    changed.save_pretrained(tmp_path)
    opened = load_tokenizer(tmp_path)
    assert opened.vocab_size == tokenizer.vocab_size + 1 and opened.fingerprint != tokenizer.fingerprint
    assert tokenizer.vocab_size in opened.encode_batch(["a riverbird sings"])[0]
    assert not set(opened.encode_batch([SPECIAL_TEXT])[0].tolist()) & {0, 1, 2, opened.mask_id}


def test_mistakes_are_named(tiny_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent.model")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(tiny_tokenizer.read_bytes()[:5000] + b"\xff" * 20)
    with pytest.raises(UserError, match=r"damaged.model: "):
        load_tokenizer(damaged)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "broken" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="cannot open"):
        load_tokenizer(tmp_path / "broken")


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


def test_a_model_without_normalisation(tiny_text: Path, tmp_path: Path) -> None:
    import sentencepiece
    from transformers import XLMRobertaTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tiny_text / "en.jsonl"), model_writer=model, vocab_size=80, hard_vocab_limit=False,
        normalization_rule_name="identity", minloglevel=2, num_threads=1,
    )  # fmt: skip
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    reference = XLMRobertaTokenizer.from_pretrained(tmp_path)
    text = "The old\triver\u00a0sings  a\u3000small  ﬁ bird\r\n"
    expected = reference(text, add_special_tokens=False).input_ids
    assert load_tokenizer(tmp_path).encode_batch([text])[0].tolist() == expected


def test_byte_level_bpe_by_folder(tiny_bpe: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(tiny_bpe)
    texts = ["The old river.", " το παλιό 語\n\n\U0001f600 x", "", SPECIAL_TEXT]
    encoded = [array.tolist() for array in tokenizer.encode_batch(texts)]
    reference = AutoTokenizer.from_pretrained(tiny_bpe)
    assert encoded[:3] == reference(texts[:3], add_special_tokens=False).input_ids
    assert [tokenizer.decode(ids) for ids in encoded] == texts  # bytes lose nothing
    assert not set(encoded[3]) & set(tokenizer.special_ids)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    assert pickle.loads(pickle.dumps(tokenizer)).encode_batch(texts)[0].tolist() == encoded[0]
    assert tokenizer.vocab_size == len(reference) and tokenizer.mask_id == reference.mask_token_id


def test_a_tokenizer_without_a_mask_token_is_refused(tiny_bpe: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bpe, tmp_path / "bare")
    path = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "mask_token"}
    path.write_text(json.dumps(kept | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match="mask_token is missing"):
        load_tokenizer(folder)


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


def test_a_huggingface_tokenizer_takes_long_texts_in_pieces(
    tiny_bpe: Path, make_documents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny_bpe)
    lines = make_documents("en", 30, seed=3)
    texts = ["\n".join(lines), "", " \n ".join(lines[:9]), "short", "  ".join(lines)]
    whole = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_AT_ONCE", 150)
    pieces = list(tokenizer_module._cut(texts[0]))
    assert len(pieces) > 20 and "".join(pieces) == texts[0]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == whole
    assert len(tokenizer.encode_batch(["x" * 1000])[0]) >= 1  # cut anywhere


def test_ids_with_gaps(tmp_path: Path) -> None:
    """N is one more than the largest id, not the number of tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3, "a": 4, "b": 10, "<mask>": 12}
    backend = Backend(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "mask")} | {
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 13 and tokenizer.encode_batch(["a b"])[0].tolist() == [4, 10]
    assert len(tokenizer.tokens()) == 13 and tokenizer.tokens()[5] == ""
