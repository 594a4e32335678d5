"""What begins a document, whose bytes count, what a tokenizer loses; each token but the first is predicted once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ksub_ds.common.errors import UserError
from ksub_ds.evaluate.lm.tokens import CausalTokenizer, Window, windows

TEXT = "the green bird. σπίτι 中文 😀"


def test_a_document_begins_with_the_start_token_else_with_the_end_token(
    make_causal_tokenizer: Callable[..., Path],
) -> None:
    for special in ({"bos_token": "<s>", "eos_token": "</s>"}, {"eos_token": "<|endoftext|>"}):
        folder = make_causal_tokenizer(**special)
        tokenizer = CausalTokenizer(str(folder))
        (tokens,) = tokenizer.encode([TEXT])
        wrapped = AutoTokenizer.from_pretrained(folder)
        start = next(iter(special.values()))
        expected = [wrapped.convert_tokens_to_ids(start), *wrapped(TEXT, add_special_tokens=False)["input_ids"]]
        assert tokens.ids.tolist() == expected and tokenizer.start_token == start
        assert tokens.num_bytes == len(TEXT.encode()) and tokens.restored and tokens.unknown == 0


def test_without_a_start_the_first_token_counts_for_nothing(make_causal_tokenizer: Callable[..., Path]) -> None:
    folder = make_causal_tokenizer()
    tokenizer = CausalTokenizer(str(folder))
    (tokens,) = tokenizer.encode([TEXT])
    wrapped = AutoTokenizer.from_pretrained(folder)
    ids = wrapped(TEXT)["input_ids"]
    assert tokenizer.start_id is None and tokens.ids.tolist() == ids
    assert tokens.num_bytes == len(TEXT.encode()) - len(wrapped.decode(ids[:1]).encode())


def test_text_never_becomes_a_special_token(make_causal_tokenizer: Callable[..., Path]) -> None:
    tokenizer = CausalTokenizer(str(make_causal_tokenizer(bos_token="<s>")))
    (tokens,) = tokenizer.encode(["a <s> b"])
    assert tokenizer.start_id not in tokens.ids[1:] and tokens.restored


def test_what_is_lost_is_counted(tiny_tokenizer: Path) -> None:
    """XLM-R's kind drops line breaks, rewrites ligatures, and does not know all signs."""
    tokenizer = CausalTokenizer(str(tiny_tokenizer))
    whole, broken, ligature, unknown = tokenizer.encode(["the bird sings", "the\n\nbird", "ﬁ", "the 𐎠 bird"])
    assert whole.restored and not broken.restored and not ligature.restored and not unknown.restored
    assert whole.unknown == 0 and unknown.unknown == 1
    assert broken.num_bytes == len("the\n\nbird"), "what is dropped counts in the bytes"
    assert whole.ids.dtype == np.int64 and whole.ids[0] == tokenizer.start_id == 0


def test_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="transformers finds no tokenizer there"):
        CausalTokenizer(str(tmp_path))


@given(st.integers(0, 300), st.integers(1, 40), st.data())
def test_each_token_is_predicted_once_with_its_context(length: int, window: int, data: st.DataObject) -> None:
    context = data.draw(st.integers(1, window))
    found = windows(length, window, context)
    assert [token for part in found for token in range(part.first, part.end + 1)] == list(range(1, length))
    for part in found:
        assert 0 <= part.begin < part.first <= part.end < length and part.length <= window
        assert part.first - part.begin >= min(context, part.first), "the first one predicted has the least before it"


def test_the_last_window_reads_as_much_as_fits() -> None:
    assert windows(11, 4, 1) == [Window(0, 1, 4), Window(4, 5, 8), Window(6, 9, 10)]
    assert windows(8, 4, 3) == [Window(0, 1, 4), Window(2, 5, 6), Window(3, 7, 7)]
    assert windows(3, 4, 2) == [Window(0, 1, 2)] and windows(1, 4, 2) == [] == windows(0, 4, 2)
