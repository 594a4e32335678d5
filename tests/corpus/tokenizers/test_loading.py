"""Opening tokenizers: HuggingFace's form, clear errors; a model is what the files beside it say, not always XLM-R's."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers.huggingface import HuggingFaceTokenizer
from ksub_ds.corpus.tokenizers.loading import load_tokenizer, read_declaration
from ksub_ds.corpus.tokenizers.xlmr import XlmrTokenizer

SPECIAL_TEXT = "a </s> b<mask> <s> <pad> <unk>"
TEXTS = ["The old river sings.", "το παλιό σπίτι", "<ent> bir nehir </ent>, 語 語語 x\n\ty", ""]
PLAIN = {f"{name}_token": token for name, token in (("bos", "<s>"), ("eos", "</s>"), ("mask", "<mask>"))}


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


def make_folder(model: Path, folder: Path, name: str = "sentencepiece.bpe.model", **files: dict[str, Any]) -> Path:
    """A folder with the model under this name, and JSON files."""
    folder.mkdir(parents=True)
    shutil.copy(model, folder / name)
    for key, content in files.items():
        (folder / f"{key}.json").write_text(json.dumps(content))
    return folder


def added(number: int) -> dict[str, Any]:
    """The files that transformers 4 wrote for XLM-R's slow tokenizer with two tokens of the user's own."""
    entries = {
        str(number + place): {"content": token, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        for place, token in enumerate(("<ent>", "</ent>"))
    }
    return {
        "tokenizer_config": {"tokenizer_class": "XLMRobertaTokenizer", "added_tokens_decoder": entries} | PLAIN,
        "added_tokens": {"<ent>": number, "</ent>": number + 1},
        "config": {"model_type": "xlm-roberta", "vocab_size": number + 2},
    }


@pytest.fixture(params=["camembert", "camembert by config.json", "mbart50", "added tokens"])
def other(request: pytest.FixtureRequest, tiny_tokenizer: Path, tmp_path: Path) -> Path:
    """A folder whose model has the layout of XLM-R's, and whose ids are others."""
    mask = XlmrTokenizer(tiny_tokenizer.read_bytes(), "").mask_id
    files: dict[str, Any] = {
        "camembert": {"tokenizer_config": {"tokenizer_class": "CamembertTokenizer"}},
        "camembert by config.json": {"config": {"model_type": "camembert"}},
        "mbart50": {"tokenizer_config": {"tokenizer_class": "MBart50Tokenizer", "src_lang": "en_XX"}},
        "added tokens": added(mask + 1),
    }[request.param]
    return make_folder(tiny_tokenizer, tmp_path / "given", **files)


def test_ids_are_those_of_transformers_and_stay_so(other: Path, tmp_path: Path) -> None:
    tokenizer, reference = load_tokenizer(other), AutoTokenizer.from_pretrained(other)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    expected = reference(TEXTS, add_special_tokens=False).input_ids
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == expected
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (len(reference), reference.mask_token_id)
    tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXTS, add_special_tokens=False).input_ids == expected


def test_layouts_differ(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """The case in point: the same model, numbered in two ways."""
    folder = make_folder(tiny_tokenizer, tmp_path / "c", tokenizer_config={"tokenizer_class": "CamembertTokenizer"})
    ours, plain = (load_tokenizer(path).encode_batch(["The old river"])[0] for path in (folder, tiny_tokenizer))
    assert (ours - plain).tolist() == [3] * len(plain)
    with pytest.raises(UserError, match=r"files beside it say CamembertTokenizer.* give the folder"):
        load_tokenizer(folder / "sentencepiece.bpe.model")


SAYS_XLMR: list[dict[str, Any]] = [
    {},
    {"tokenizer_config": {"tokenizer_class": "XLMRobertaTokenizerFast"} | PLAIN},
    {"config": {"model_type": "xlm-roberta"}, "special_tokens_map": PLAIN | {"pad_token": {"content": "<pad>"}}},
    {"config": {"model_type": "ksub_roberta"}, "tokenizer_config": {"extra_special_tokens": ["<s>", "</s>"]}},
]


@pytest.mark.parametrize("files", SAYS_XLMR)
@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "spiece.model"])
def test_plain_xlmr_is_opened_from_its_model(
    files: dict[str, Any], name: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(make_folder(tiny_tokenizer, tmp_path / "x", name, **files))
    assert isinstance(tokenizer, XlmrTokenizer)
    assert tokenizer.fingerprint == load_tokenizer(tiny_tokenizer).fingerprint


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"added_tokens": {"<ent>": 400}}, "'<ent>' is token 400"),
        ({"added_tokens": {"<mask>": 400}}, "'<mask>' is token 400"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": {"content": "x"}}}}, "'x' is token 9"),
        ({"tokenizer_config": {"added_tokens_decoder": {"?": "x"}}}, "'x' is token ?"),
        ({"tokenizer_config": {"pad_token": "</s>"}}, "pad_token is '</s>'"),
        ({"special_tokens_map": {"cls_token": {"content": "[CLS]"}}}, "cls_token is '[CLS]'"),
        ({"special_tokens_map": {"additional_special_tokens": ["<q>"]}}, "'<q>' is a special token"),
        ({"tokenizer_config": {"extra_special_tokens": {"q_token": "<q>"}}}, "'<q>' is a special token"),
        ({"tokenizer_config": {"add_prefix_space": False}}, "add_prefix_space is false"),
        ({"tokenizer_config": {"tokenizer_class": "BarthezTokenizer"}}, "its class is BarthezTokenizer"),
    ],
)
def test_what_makes_it_another(files: dict[str, Any], reason: str, tiny_tokenizer: Path, tmp_path: Path) -> None:
    assert read_declaration(make_folder(tiny_tokenizer, tmp_path / "x", **files)).unlike_xlmr(mask_id=300) == reason


JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4), st.lists, max_leaves=4)
KEYS = [
    "tokenizer_class",
    "model_type",
    "added_tokens_decoder",
    "mask_token",
    "extra_special_tokens",
    "add_prefix_space",
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), JSON | st.dictionaries(st.text(max_size=3), JSON)))
def test_any_json_is_read(tmp_path: Path, content: dict[str, Any]) -> None:
    for name in ("tokenizer_config", "config", "special_tokens_map", "added_tokens"):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    reason = read_declaration(tmp_path).unlike_xlmr(mask_id=300)
    assert reason is None or isinstance(reason, str)


def test_a_file_that_is_not_an_object_is_named(tiny_tokenizer: Path, tmp_path: Path) -> None:
    folder = make_folder(tiny_tokenizer, tmp_path / "x")
    (folder / "added_tokens.json").write_text("[]")
    with pytest.raises(UserError, match=r"added_tokens\.json: is not a JSON object"):
        load_tokenizer(folder)
