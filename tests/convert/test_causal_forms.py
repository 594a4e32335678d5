"""A causal model compressed from a folder, and exported in every form; each opened where ksub_ds is not, or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ksub_ds.cli import main
from ksub_ds.common.errors import UserError
from ksub_ds.convert.export import export_run
from ksub_ds.pretrain.recipe import Recipe
from ksub_ds.pretrain.warm_start import check_head

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
MODELS = {
    "llama": ("llama", SIZE | {"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", SIZE | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}),
}
READ = """
import json, sys
sys.modules["ksub_ds"] = None  # any import of it raises ImportError
import torch
from transformers import AutoModel, AutoModelForCausalLM as A, AutoTokenizer
found = []
for folder in sys.argv[1:]:
    trust = {"trust_remote_code": folder.endswith("remote-code")}
    model = A.from_pretrained(folder, **trust).eval()
    AutoModel.from_pretrained(folder, **trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    ids = torch.arange(5, 37).reshape(2, 16)
    with torch.no_grad():
        logits = model(ids).logits.double().flatten()[::97].tolist()
    given = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    new = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    found.append([type(model).__name__, logits, new.tolist(), len(tokenizer)])
print("\\nfound " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def compressed(tiny_bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of `ksub compress`, of models whose tokenizer has no mask token, as causal models' have none."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    tokenizer.mask_token = None
    special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": len(tokenizer)}
    folders = {}
    for family, (name, fields) in MODELS.items():
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields, **special))
        plain.generation_config.temperature, plain.generation_config.do_sample = 0.7, True
        plain.save_pretrained(folder / "plain")
        tokenizer.save_pretrained(folder / "plain")
        command = ["compress", str(folder / "plain"), "--num-tables", "3", "--table-size", "12", "--out"]
        assert main([*command, str(folder / "small")]) == 0
        folders[family] = folder / "small"
    return folders


@pytest.mark.timeout(600)  # three models, two forms, and a process that reads all
def test_every_form_gives_the_same_logits_and_tokens(compressed: dict[str, Path], tmp_path: Path, capsys):
    ids = torch.arange(5, 37).reshape(2, 16)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    wanted, folders = [], []
    for family, folder in compressed.items():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert model.generation_config.temperature == 0.7
        with torch.no_grad():
            logits = model(ids).logits.double().flatten()[::97].tolist()
        new = model.generate(ids, **given, do_sample=False).tolist()
        plain_class = json.loads((folder.parent / "plain/config.json").read_text())["architectures"][0]
        for form, name in (("dense", plain_class), ("remote-code", type(model).__name__)):
            folders.append(str(tmp_path / family / form))
            export_run(folder, folders[-1], form=form)
            assert "pipeline_tag: text-generation" in (Path(folders[-1]) / "README.md").read_text()
            wanted.append([name, logits, new, model.config.vocab_size])
    said = capsys.readouterr()
    assert "mask" not in said.out + said.err, "nothing asks a causal model's tokenizer for a mask token"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", READ, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (name, logits, new, size), found in zip(wanted, json.loads(done.stdout.split("\nfound ")[1]), strict=True):
        assert found == [name, pytest.approx(logits, rel=1e-4, abs=1e-5), new, size]


def test_no_onnx(compressed: dict[str, Path], tmp_path: Path, capsys):
    assert main(["export", str(compressed["llama"]), "--out", str(tmp_path / "out"), "--onnx"]) == 2
    assert "--onnx: is for encoders" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_is_no_start_for_masked_pretraining(compressed: dict[str, Path]):
    with pytest.raises(UserError, match="is a KSubGPT2ForCausalLM, but --preset tiny learns"):
        check_head(compressed["gpt2"], Recipe("tiny", Path("shards"), Path("run"), objective="mlm"))


def test_its_masked_loss_is_refused(compressed: dict[str, Path], tmp_path: Path, capsys):
    plain = str(compressed["llama"].parent / "plain")
    assert main(["compress", plain, "--out", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    assert "predicts no masked tokens" in capsys.readouterr().err
