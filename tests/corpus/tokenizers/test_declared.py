"""A folder with a SentencePiece model is what its other files say, not XLM-R's layout whatever they say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers.declared import read_declaration
from ksub_ds.corpus.tokenizers.huggingface import HuggingFaceTokenizer
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.corpus.tokenizers.xlmr import XlmrTokenizer

TEXTS = ["The old river sings.", "το παλιό σπίτι", "<ent> bir nehir </ent>, 語 語語 x\n\ty", ""]
PLAIN = {f"{name}_token": token for name, token in (("bos", "<s>"), ("eos", "</s>"), ("mask", "<mask>"))}


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
    from transformers import AutoTokenizer

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


def test_a_file_that_is_no_object_is_named(tiny_tokenizer: Path, tmp_path: Path) -> None:
    folder = make_folder(tiny_tokenizer, tmp_path / "x")
    (folder / "added_tokens.json").write_text("[]")
    with pytest.raises(UserError, match=r"added_tokens\.json: is no JSON object"):
        load_tokenizer(folder)
