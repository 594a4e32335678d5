"""What begins a document, whose bytes count, and what a tokenizer loses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from ksub_ds.common.errors import UserError
from ksub_ds.evaluate.lm.tokens import CausalTokenizer

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
