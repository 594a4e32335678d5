"""Opening tokenizers: folders of HuggingFace's form, what stands for what, clear errors."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

SPECIAL_TEXT = "a </s> b<mask> <s> <pad> <unk>"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Any:
    return load_tokenizer(tiny_tokenizer)


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


def test_a_folder_whose_tokenizer_json_differs_is_not_taken_for_its_model(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    changed = AutoTokenizer.from_pretrained(tmp_path)
    changed.add_tokens(["riverbird"])
    changed.save_pretrained(tmp_path)
    opened = load_tokenizer(tmp_path)
    assert opened.vocab_size == tokenizer.vocab_size + 1 and opened.fingerprint != tokenizer.fingerprint
    assert tokenizer.vocab_size in opened.encode_batch(["a riverbird sings"])[0]
    assert not set(opened.encode_batch([SPECIAL_TEXT])[0].tolist()) & {0, 1, 2, opened.mask_id}


def test_byte_level_bpe_by_folder(tiny_bpe: Path, tmp_path: Path) -> None:
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


def named(folder: Path, tiny_bpe: Path, **tokens: str | None) -> Path:
    """A copy of a tokenizer that names these special tokens, or with None does not."""
    path = shutil.copytree(tiny_bpe, folder) / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"} | tokens
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def test_a_tokenizer_without_a_mask_token_needs_an_end_token_only(tiny_bpe: Path, tmp_path: Path) -> None:
    bare = {"mask_token": None, "bos_token": None, "cls_token": None}
    tokenizer = load_tokenizer(named(tmp_path / "bare", tiny_bpe, **bare, pad_token=None))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (2, 2, None, None)
    assert load_tokenizer(named(tmp_path / "same", tiny_bpe, **bare, pad_token="</s>")).pad_id is None
    assert load_tokenizer(named(tmp_path / "own", tiny_bpe, **bare)).pad_id == 1
    with pytest.raises(UserError, match=r"eos_token is missing, which shards need; name an unused token .*config"):
        load_tokenizer(named(tmp_path / "endless", tiny_bpe, **bare, eos_token=None, sep_token=None))
    with pytest.raises(UserError, match="pad_token is missing"):
        load_tokenizer(named(tmp_path / "masked", tiny_bpe, pad_token=None))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokenizers_of_causal_models(kind: str, causal_tokenizers: dict[str, Path], tmp_path: Path) -> None:
    folder = causal_tokenizers[kind]
    tokenizer, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["The old river.", "το παλιό 語\n\n\U0001f600 x", "a\ttab  two blanks", "see </s> and <|endoftext|>"]
    encoded = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert encoded[:3] == reference(texts[:3], add_special_tokens=False).input_ids
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert not set(encoded[3]) & set(tokenizer.special_ids)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.vocab_size) == (None, None, len(reference))
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    assert pickle.loads(pickle.dumps(tokenizer)).encode_batch(texts)[0].tolist() == encoded[0]


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
