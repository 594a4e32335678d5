"""Sentence encoders through `ksub compress`: every module of modules.json, both layouts, and nothing from outside."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

from ksub_ds.cli import main
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, write_json
from ksub_ds.convert.sentence_encoder import copy_sentence_files, encoder_folder

TYPES = "sentence_transformers.models."
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": TYPES + "Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": TYPES + "Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": TYPES + "Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": TYPES + "Normalize"},
]


def write_encoder(folder: Path, tiny_bpe: Path, place: str = "") -> None:
    """Write a sentence encoder: RoBERTa's first state, a dense layer, and a norm, which has no file."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    torch.manual_seed(1)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=80,
    )  # fmt: skip
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder / place)
    tokenizer.save_pretrained(folder / place)
    write_json(folder / place / "sentence_roberta_config.json", {"max_seq_length": 20, "do_lower_case": False})
    write_json(folder / "modules.json", [MODULES[0] | {"path": place}, *MODULES[1:]])
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "similarity_fn_name": "cosine"})
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 24, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    (folder / "2_Dense").mkdir()
    dense = {
        "in_features": 24,
        "out_features": 6,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    write_json(folder / "2_Dense" / "config.json", dense)
    weights = {"linear.weight": torch.randn(6, 24), "linear.bias": torch.randn(6)}
    save_file(weights, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})


def compress(source: Path | str, out: Path) -> int:
    return main(["compress", str(source), "--num-tables", "2", "--table-size", "30", "--out", str(out)])


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_every_module_is_kept_and_the_encoder_is_in_the_root(place: str, tiny_bpe: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "plain", tmp_path / "small"
    write_encoder(source, tiny_bpe, place)
    assert compress(source, out) == 0
    assert read_json(out / "modules.json") == MODULES
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert read_json(out / "sentence_roberta_config.json")["max_seq_length"] == 20
    assert (out / "config_sentence_transformers.json").is_file() and not (out / "0_Transformer").exists()
    model: Any = AutoModel.from_pretrained(out)
    assert model.config.model_type == "ksub_roberta" and AutoTokenizer.from_pretrained(out)("a house")["input_ids"]
    assert read_json(out / "compression.json")["model"] == str(source)


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_sentence_transformers_opens_it(place: str, tiny_bpe: Path, tmp_path: Path) -> None:
    reason = "sentence-transformers 6 is not installed (pip install -e '.[interop]')"
    library = pytest.importorskip("sentence_transformers", reason=reason)
    write_encoder(tmp_path / "plain", tiny_bpe, place)
    assert library.SentenceTransformer(str(tmp_path / "plain"), device="cpu").encode("a house").shape == (6,)
    assert compress(tmp_path / "plain", tmp_path / "small") == 0
    model = library.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert model.max_seq_length == 20
    assert sum(each.numel() for each in model[0].auto_model.get_input_embeddings().parameters()) == 30 * 24
    row = AutoTokenizer.from_pretrained(tmp_path / "small")("a house", return_tensors="pt")
    with torch.no_grad():
        first = AutoModel.from_pretrained(tmp_path / "small").eval()(**row).last_hidden_state[:, 0]
        expected = torch.nn.functional.normalize(torch.tanh(model[2].linear(first)))[0]
    torch.testing.assert_close(model.encode("a house", convert_to_tensor=True), expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_in_the_hub_cache(tiny_bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name: files are links into the cache's blobs, and the modules lie beside the encoder's files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--some--encoder"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    write_encoder(snapshot, tiny_bpe, "0_Transformer")
    blobs.mkdir()
    for number, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert compress("some/encoder", tmp_path / "small") == 0
    assert (tmp_path / "small" / "2_Dense" / "model.safetensors").stat().st_size > 6 * 25 * 4
    assert not [path for path in (tmp_path / "small").rglob("*") if path.is_symlink()]


@pytest.mark.parametrize("path", ["../secret", "/etc", "a/../../b", "C:/x", "..\\x", "a\0b"])
def test_paths_that_lead_out_are_refused(path: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "modules.json", [MODULES[0], MODULES[2] | {"path": path}])
    with pytest.raises(UserError, match=r"modules\.json: path .* leads out of the folder"):
        copy_sentence_files(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", [None, 3])
def test_a_path_that_is_no_text_is_refused(path: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "modules.json", [MODULES[0], MODULES[2] | {"path": path}])
    with pytest.raises(UserError, match=rf"modules\.json: path {path} of a module is no text"):
        encoder_folder(tmp_path)


def test_a_module_without_its_settings_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "modules.json", MODULES)
    write_json(tmp_path / "config.json", {"model_type": "roberta"})
    (tmp_path / "1_Pooling").mkdir()
    with pytest.raises(UserError, match=r"Pooling lies in 1_Pooling, which has no config\.json"):
        encoder_folder(tmp_path)


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "2_Dense").mkdir(parents=True)
    (tmp_path / "secret").write_text("key")
    (source / "2_Dense" / "config.json").symlink_to(tmp_path / "secret")
    write_json(source / "modules.json", MODULES)
    with pytest.raises(UserError, match=r"2_Dense/config\.json: is a link out of the folder"):
        copy_sentence_files(source, tmp_path / "out")
    (source / "inside").write_text("{}")
    (source / "2_Dense" / "config.json").unlink()
    (source / "2_Dense" / "config.json").symlink_to("../inside")
    copy_sentence_files(source, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "is not the list of modules"),
        ([MODULES[0], MODULES[1] | {"type": "custom_st.Pooling"}], "module 1 is a custom_st.Pooling, which has code"),
        ([MODULES[0], MODULES[1] | {"path": "."}], "has the encoder's folder"),
        ([MODULES[1]], "first module is a sentence_transformers.models.Pooling without a config.json that names a mod"),
    ],
)
def test_what_is_no_sentence_encoder_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    write_json(tmp_path / "modules.json", content)
    with pytest.raises(UserError, match=message):
        encoder_folder(tmp_path)
