"""Vectors of models: HuggingFace folders and names, our runs and our exports."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ksub_ds.codes.positional import plain_codes, positional_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import sha256_file
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.model.configuration import KSubRobertaConfig
from ksub_ds.model.roberta import KSubRobertaForMaskedLM, KSubRobertaForSequenceClassification
from ksub_ds.pretrain.checkpoint import FILES, FORMAT
from ksub_ds.vectors.sources import load_vectors


def small_models():
    """One of each family of names, by family."""
    from transformers import (
        GPT2Config,
        GPT2Model,
        LlamaConfig,
        LlamaModel,
        RobertaConfig,
        RobertaForMaskedLM,
        T5Config,
        T5EncoderModel,
    )

    size = {"vocab_size": 90, "num_hidden_layers": 1, "num_attention_heads": 2}
    yield "roberta", RobertaForMaskedLM(RobertaConfig(hidden_size=8, intermediate_size=8, **size))
    yield "gpt2", GPT2Model(GPT2Config(vocab_size=90, n_embd=8, n_layer=1, n_head=2))
    yield "llama", LlamaModel(LlamaConfig(hidden_size=8, intermediate_size=8, **size))
    yield "t5", T5EncoderModel(T5Config(vocab_size=90, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def test_input_embeddings_of_other_families(tmp_path):
    for family, model in small_models():
        model.save_pretrained(tmp_path / family)
        matrix, _ = load_vectors(tmp_path / family)
        np.testing.assert_array_equal(matrix, model.get_input_embeddings().weight.detach().numpy(), family)


def test_sharded_and_bfloat16_weights(tmp_path):
    _, model = next(small_models())
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="3KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    expected = model.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(load_vectors(tmp_path)[0], expected)

    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    name = next(key for key in places["weight_map"] if key.endswith("word_embeddings.weight"))
    (tmp_path / places["weight_map"][name]).unlink()
    with pytest.raises(UserError, match="is missing; fetch the model anew"):
        load_vectors(tmp_path)
    places["weight_map"][name] = "../outside.safetensors"
    index.write_text(json.dumps(places))
    with pytest.raises(UserError, match="outside its folder"):
        load_vectors(tmp_path)


def test_folders_without_embeddings_say_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="neither a shards folder"):
        load_vectors(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load_vectors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, a pickled file"):
        load_vectors(tmp_path)
    save_file({"a": torch.zeros(3, 2), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no input embedding among its 2 tensors"):
        load_vectors(tmp_path)


def test_a_name_is_looked_up_in_the_cache_only_when_offline(tmp_path):
    _, model = next(small_models())
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / ("0" * 40)
    model.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    code = (
        "from ksub_ds.vectors.sources import load_vectors; print(load_vectors('someone/small')[0].sum())\n"
        "try: load_vectors('someone/absent')\nexcept ValueError as error: print(error)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    total, message = done.stdout.splitlines()
    assert float(total) == pytest.approx(model.get_input_embeddings().weight.sum().item(), abs=1e-4)
    assert message.startswith("someone/absent: no such file or folder, and no model of that name")


def tiny_model(table, kind=KSubRobertaForMaskedLM):
    torch.manual_seed(0)
    return kind(KSubRobertaConfig.tiny(vocab_size=table.num_tokens), table)


def dense(model):
    return model.get_input_embeddings().dense_weight().detach().numpy()


@pytest.mark.parametrize("kind", [KSubRobertaForMaskedLM, KSubRobertaForSequenceClassification])
@pytest.mark.parametrize("table", [positional_codes(300, 3), plain_codes(300)], ids=["sub-embedding", "plain"])
def test_exports_give_their_composed_embeddings(tmp_path, table, kind):
    model = tiny_model(table, kind)
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(load_vectors(tmp_path)[0], dense(model))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("codes", lambda codes: codes.flatten()),
        ("codes", lambda codes: codes.float()),
        ("codes", lambda codes: codes[:0]),
        ("tables.1", lambda rows: rows[0]),
        ("tables.2", lambda rows: rows[:1]),
        ("dedicated", lambda ids: ids + 300),
        ("dedicated_rows", lambda rows: rows[:1]),
    ],
)
def test_damaged_exports_are_one_line(tmp_path, part, change):
    table = positional_codes(300, 3)
    tiny_model(CodeTable(table.codes, table.table_sizes, dedicated=np.array([3, 7]))).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (key,) = [name for name in weights if name.endswith("." + part)]
    save_file(weights | {key: change(weights[key]).contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_vectors(tmp_path)


def write_run(run, table, tokenizer, models):
    """A run folder with one checkpoint a model, as pretrain/checkpoint.py and run_folder.py describe it."""
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    table.save(run / "codes.safetensors")
    tokenizer.save(run / "tokenizer")
    for number, model in enumerate(models, start=1):
        folder = run / "checkpoints" / f"global_step{number}"
        folder.mkdir(parents=True)
        save_file(dict(model.named_parameters()), folder / "model.safetensors")
        save_file({"nothing": torch.zeros(1)}, folder / "optimizer.safetensors")
        (folder / "trainer.json").write_text(json.dumps({"codes_sha256": table.sha256}))
        files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in FILES}
        (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": number, "files": files}))


def test_a_run_gives_its_newest_whole_checkpoint(tmp_path, tiny_tokenizer):
    tokenizer = load_tokenizer(tiny_tokenizer)
    table = positional_codes(tokenizer.vocab_size, 2)
    first, second = tiny_model(table), tiny_model(table)
    with torch.no_grad():
        second.get_input_embeddings().tables[1].add_(1)
    write_run(tmp_path / "run", table, tokenizer, [first, second])
    matrix, description = load_vectors(tmp_path / "run")
    np.testing.assert_array_equal(matrix, dense(second))
    assert description.source == "embeddings of run run, global_step2"
    assert description.tokenizer.fingerprint == tokenizer.fingerprint

    (tmp_path / "run/checkpoints/global_step2/model.safetensors").write_bytes(b"cut short")
    np.testing.assert_array_equal(load_vectors(tmp_path / "run")[0], dense(first))
    (tmp_path / "run/checkpoints/global_step1/manifest.json").unlink()
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        load_vectors(tmp_path / "run")


def test_a_run_whose_codes_were_exchanged_is_refused(tmp_path, tiny_tokenizer):
    tokenizer = load_tokenizer(tiny_tokenizer)
    table = positional_codes(tokenizer.vocab_size, 2)
    write_run(tmp_path / "run", table, tokenizer, [tiny_model(table)])
    plain_codes(tokenizer.vocab_size).save(tmp_path / "run/codes.safetensors")
    with pytest.raises(UserError, match="trained with other codes"):
        load_vectors(tmp_path / "run")


def test_added_tokens_keep_their_vectors(tiny_tokenizer, tmp_path):
    """XLM-R with tokens of the user's own, as transformers 4 saved it: no tokenizer.json."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    plain = load_tokenizer(tiny_tokenizer)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    XLMRobertaModel(XLMRobertaConfig(vocab_size=plain.vocab_size + 2, **size)).save_pretrained(tmp_path)
    shutil.copy(tiny_tokenizer, tmp_path)
    added = {"<ent>": plain.vocab_size, "</ent>": plain.vocab_size + 1}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    entries = {str(number): {"content": token, "special": False} for token, number in added.items()}
    names = {"tokenizer_class": "XLMRobertaTokenizer", "added_tokens_decoder": entries}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    matrix, description = load_vectors(tmp_path)
    assert len(matrix) == plain.vocab_size + 2 == description.tokenizer.vocab_size
    assert plain.vocab_size in description.tokenizer.encode_batch(["<ent> river </ent>"])[0]


def lines_said(monkeypatch):
    """The log's lines, from now on."""
    lines = []
    monkeypatch.setattr(get_logger(), "info", lines.append)
    return lines


def test_an_encoder_comes_before_its_decoder_and_others_are_asked_for_by_name(tmp_path, monkeypatch):
    said = lines_said(monkeypatch)
    names = ["model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight", "lm_head.weight"]
    tensors = {name: torch.full((30 + number, 4), float(number)) for number, name in enumerate(names)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    for source in (tmp_path / "model.safetensors", tmp_path):
        matrix, _ = load_vectors(source)
        assert matrix.shape == (31, 4) and matrix[0, 0] == 1
        assert "takes the vectors of model.encoder.embed_tokens.weight, not of model.decoder" in said.pop()
        for number, name in enumerate(names):
            matrix, description = load_vectors(source, tensor=name)
            assert len(matrix) == 30 + number and name in description.source
        with pytest.raises(UserError, match=r"--tensor absent: .* has no such tensor; it has model.decoder.embed"):
            load_vectors(source, tensor="absent")
    np.save(tmp_path / "v.npy", np.zeros((3, 2)))
    with pytest.raises(UserError, match=r"--tensor x: .*v.npy is not a .safetensors file"):
        load_vectors(tmp_path / "v.npy", tensor="x")


def test_weights_without_an_index(tmp_path, monkeypatch):
    """Shards and variants are opened if all is there, else what is missing is named."""
    said = lines_said(monkeypatch)
    (tmp_path / "config.json").write_text("{}")
    first, second = (tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    words = torch.arange(20.0).reshape(10, 2)
    save_file({"x.bias": torch.zeros(3)}, first)
    with pytest.raises(UserError, match=r"of 2 shards; model-00002-of-00002.safetensors is missing; fetch the model"):
        load_vectors(tmp_path)
    save_file({"embed_tokens.weight": words}, second)
    np.testing.assert_array_equal(load_vectors(tmp_path)[0], words)
    assert "no index; opens model-00001-of-00002.safetensors, model-00002" in said.pop()
    variant = tmp_path / "model.fp16.safetensors"
    save_file({"embed_tokens.weight": words.half(), "x.bias": torch.zeros(3)}, variant)
    with pytest.raises(UserError, match="holds several models"):
        load_vectors(tmp_path)
    first.unlink()
    second.rename(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(load_vectors(tmp_path)[0], words)
    variant.unlink()
    with pytest.raises(UserError, match=r"holds no model.safetensors, only adapter_model.safetensors; give the file"):
        load_vectors(tmp_path)
