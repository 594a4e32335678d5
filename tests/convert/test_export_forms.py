"""Warm start, distillation and what others can open: one tiny run from a compressed model, exported in every form."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ksub_ds.cli import main
from ksub_ds.common.errors import UserError
from ksub_ds.convert.export import export_run
from ksub_ds.convert.onnx import NEEDS
from ksub_ds.convert.source import MODEL_FILES
from ksub_ds.pretrain.recipe import Recipe, resolve
from ksub_ds.pretrain.warm_start import read_codes

from ..pretrain.runs import Bench, Outcome, environment

pytestmark = pytest.mark.timeout(300)
LONGEST = 512  # tokens, of a tiny model
LOGITS = """
import json, sys
sys.modules["ksub_ds"] = None
import torch
from transformers import AutoModelForMaskedLM as A, AutoTokenizer
ids = torch.arange(5, 37).reshape(2, 16)
found = []
for folder in sys.argv[1:]:
    model = A.from_pretrained(folder, trust_remote_code=folder.endswith("remote")).eval()
    with torch.no_grad():
        found.append([type(model).__name__, model(ids).logits.double().flatten()[::97].tolist()])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=folder.endswith("remote"))
    assert tokenizer.mask_token_id is not None
print("\\nfound " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def plain(bench: Bench, tiny_tokenizer: Path) -> Path:
    """A plain model with its tokenizer, as `ksub export` of a plain run writes it."""
    import torch

    from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, plain_codes
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer)
    torch.manual_seed(0)
    config = KSubRobertaConfig.tiny(vocab_size=tokenizer.vocab_size, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    folder = bench.folder / "plain_model"
    KSubRobertaForMaskedLM(config, plain_codes(tokenizer.vocab_size)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def taught(bench: Bench, plain: Path) -> Path:
    """A run that began with the compressed model and learnt from the plain one."""
    small = bench.folder / "small_model"
    data = ["--data", str(bench.data), "--sequences", "2"]
    command = ["compress", str(plain), "--num-tables", "3", "--table-size", "16", "--out", str(small), *data]
    assert main(command) == 0
    report = json.loads((small / "compression.json").read_text())
    assert report["table_sizes"] == [16, 16, 16] and 0 < report["error"] < 1 and len(report["loss"]) == 2
    settings = {"codes": None, "warm_start": small, "distill_from": plain, "max_steps": 6, "eval_every": 6}
    (outcome,) = bench.run_all(1, [{"arguments": bench.arguments("taught", **settings)}])
    assert outcome == [0]
    return bench.folder / "taught"


def test_a_warm_start_begins_where_the_compressed_model_stands(bench: Bench, taught: Path) -> None:
    report = json.loads((bench.folder / "small_model" / "compression.json").read_text())
    lines = [json.loads(line) for line in (taught / "evaluation.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and lines[0]["loss"] == pytest.approx(report["loss"][1], abs=0.1)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (
        read_codes(bench.folder / "small_model").sha256
        == json.loads((taught / "recipe.json").read_text())["codes_sha256"]
    )
    assert sorted(path.name for path in (taught / "warm_start").iterdir()) == ["config.json", "model.safetensors"]


def test_every_form_gives_the_same_logits_without_ksub_ds(taught: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForMaskedLM

    ours = export_run(taught, tmp_path / "ours", licence="cc-by-4.0")
    export_run(taught, tmp_path / "remote", form="remote-code")
    export_run(ours, tmp_path / "dense", form="dense")
    card = (ours / "README.md").read_text()
    for words in ('license: "cc-by-4.0"', "import ksub_ds", "16 16 16", "6 of 6 steps", "| all |", "distilled from"):
        assert words in card, words
    for folder in (ours, tmp_path / "remote", tmp_path / "dense"):
        assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == LONGEST
        assert [path.name for path in folder.iterdir() if not re.fullmatch(MODEL_FILES, path.name)] == []
    model = AutoModelForMaskedLM.from_pretrained(ours).eval()
    with torch.no_grad():
        expected = model(torch.arange(5, 37).reshape(2, 16)).logits.double().flatten()[::97].tolist()
    command = [sys.executable, "-c", LOGITS, str(tmp_path / "remote"), str(tmp_path / "dense")]
    settings = environment() | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (name, remote), (dense_name, dense) = json.loads(re.search(r"^found (.*)", done.stdout, re.M)[1])
    assert name == "KSubRobertaForMaskedLM" and dense_name == "XLMRobertaForMaskedLM"
    assert remote == pytest.approx(expected, abs=1e-5) and dense == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("network", "form"), [("roberta", "ksub"), ("roberta", "dense"), ("modernbert", "ksub")])
def test_onnx(
    bench: Bench, one_rank: dict[str, Outcome], taught: Path, tmp_path: Path, network: str, form: str
) -> None:
    for package in NEEDS:
        pytest.importorskip(package, reason=f"{package} is optional: pip install {' '.join(NEEDS)}")
    run = taught if network == "roberta" else bench.folder / network
    export_run(run, tmp_path / "model", form=form, onnx=True)  # compares, and raises when they differ
    assert (tmp_path / "model" / "model.onnx").stat().st_size > 1000


@pytest.mark.parametrize("form", ["ksub", "dense"])
def test_a_model_in_bf16(tiny_tokenizer: Path, tmp_path: Path, form: str) -> None:
    """Compared, and made ONNX, in float32; written in the type it has."""
    import torch
    from transformers import AutoModelForMaskedLM

    from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, positional_codes
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer)
    config = KSubRobertaConfig.tiny(vocab_size=tokenizer.vocab_size, pad_token_id=1, embedding_mixing=True)
    torch.manual_seed(0)
    model = KSubRobertaForMaskedLM(config, positional_codes(tokenizer.vocab_size, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        model.get_input_embeddings().mixing.copy_(torch.linalg.qr(torch.randn(128, 128))[0])
    model.bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    onnx = all(importlib.util.find_spec(package) for package in NEEDS)
    export_run(tmp_path / "model", tmp_path / "out", form=form, onnx=onnx)
    written = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert written.dtype == torch.bfloat16
    assert (tmp_path / "out" / "model.onnx").exists() == onnx


def test_a_classifier_becomes_onnx(tiny_tokenizer: Path, tmp_path: Path) -> None:
    from ksub_ds import KSubRobertaConfig, KSubRobertaForSequenceClassification, positional_codes
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    for package in NEEDS:
        pytest.importorskip(package, reason=f"{package} is optional: pip install {' '.join(NEEDS)}")
    import onnxruntime

    tokenizer = load_tokenizer(tiny_tokenizer)
    config = KSubRobertaConfig.tiny(vocab_size=tokenizer.vocab_size, pad_token_id=1)
    config.num_labels = 3
    KSubRobertaForSequenceClassification(config, positional_codes(tokenizer.vocab_size, 3)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out"), "--onnx"]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    row = {"input_ids": [[0, 5, 6, 2]], "attention_mask": [[1, 1, 1, 1]]}
    assert session.run(None, row)[0].shape == (1, 3)


def test_a_text_too_long_for_the_model_is_tried(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the model's length in the tokenizer, the check fails as a user's pipeline would."""
    monkeypatch.setattr("ksub_ds.convert.export.limit_tokenizer", lambda *_: None)
    assert main(["export", str(taught), "--out", str(tmp_path / "out")]) == 2
    assert f"a text of more than {LONGEST} tokens fails in the export" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_one_line(bench: Bench, plain: Path, taught: Path, tmp_path: Path) -> None:
    arguments = {"preset": "tiny", "data": bench.data, "out": tmp_path / "run"}
    with pytest.raises(UserError, match="--warm-start brings its own codes"):
        resolve(Recipe(**arguments, warm_start=plain, plain=True), 1, False)
    with pytest.raises(UserError, match="together with --distill-from"):
        resolve(Recipe(**arguments, warm_start=plain, distill_weight=0.3), 1, False)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        read_codes(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(UserError, match="is a BertModel; give a masked or causal language model over sub-embeddings"):
        read_codes(tmp_path)
    with pytest.raises(UserError, match="is not a model over sub-embeddings; `ksub compress` makes one"):
        export_run(tmp_path, tmp_path / "out")
    assert main(["export", str(taught), "--out", str(tmp_path / "x"), "--dense", "--remote-code"]) == 2
    assert main(["compress", str(plain), "--codes", str(bench.codes), "--out", str(taught)]) == 2  # not its own folder
    other = str(bench.folder / "other.safetensors")
    assert main(["compress", str(plain), "--codes", other, "--out", str(tmp_path / "y")]) == 2
