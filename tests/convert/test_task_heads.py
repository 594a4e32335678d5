"""Models with a head for a task: compressed, exported in every form, opened where ksub_ds is not, and in pipelines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ksub_ds import KSubRobertaConfig, positional_codes, replace_embeddings
from ksub_ds.cli import main
from ksub_ds.convert.export import compare_with_reload
from ksub_ds.convert.onnx import NEEDS
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.model.roberta import KSubRobertaForTokenClassification

SIZE = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
LABELS = {0: "O", 1: "B-BIRD", 2: "I-BIRD"}
POSITIONS, GROUPED = {"max_position_embeddings": 80}, {"num_key_value_heads": 2}
MODELS = {  # plain class, its configuration, the Hub's name of the task
    "tokens": ("RobertaForTokenClassification", POSITIONS | {"id2label": LABELS}, "token-classification"),
    "answers": ("BertForQuestionAnswering", POSITIONS, "question-answering"),
    "choices": ("XLMRobertaForMultipleChoice", POSITIONS, "multiple-choice"),
    "causal": (
        "MistralForSequenceClassification",
        {"num_key_value_heads": 2, "id2label": LABELS},
        "text-classification",
    ),
}
TEXT = "The bird sings near the river."
READ = """
import json, sys
sys.modules["ksub_ds"] = None  # any import of it raises ImportError
import torch, transformers
found = []
for folder in sys.argv[1:]:
    trust = {"trust_remote_code": folder.endswith("remote-code")}
    config = transformers.AutoConfig.from_pretrained(folder, **trust)
    auto = getattr(transformers, "AutoModelFor" + config.architectures[0].partition("For")[2])
    model, ids = auto.from_pretrained(folder, **trust).eval(), torch.arange(5, 37).reshape(2, 16)
    with torch.no_grad():
        output = model(ids[:, None] if "Choice" in auto.__name__ else ids)
    labels = sorted(config.id2label.values())
    found.append([labels, [each.flatten().tolist() for each in output.values() if isinstance(each, torch.Tensor)]])
print("\\nfound " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def compressed(tiny_bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of `ksub compress`, beside the plain ones."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bpe)
    special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": len(tokenizer)}
    folders = {}
    for name, (class_name, fields, _) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        plain_class = getattr(transformers, class_name)
        model = plain_class(plain_class.config_class(**SIZE, **fields, **special))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder / "plain")
        tokenizer.save_pretrained(folder / "plain")
        command = ["compress", str(folder / "plain"), "--num-tables", "2", "--table-size", "30", "--out"]
        assert main([*command, str(folder / "small")]) == 0
        folders[name] = folder / "small"
    return folders


def open_head(folder: Path, name: str) -> Any:
    auto = getattr(transformers, "AutoModelFor" + MODELS[name][0].partition("For")[2])
    return auto.from_pretrained(folder).eval()


def numbers(model: Any, name: str) -> list[list[float]]:
    ids = torch.arange(5, 37).reshape(2, 16)
    with torch.no_grad():
        output = model(ids[:, None] if name == "choices" else ids)
    return [each.flatten().tolist() for each in output.values() if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_compression_keeps_the_head_and_its_labels(compressed: dict[str, Path], name: str) -> None:
    small = open_head(compressed[name], name)
    assert type(small).__name__ == "KSub" + MODELS[name][0].removeprefix("XLM")
    plain, kept = load_file(compressed[name].parent / "plain/model.safetensors"), small.state_dict()
    same = [weight for weight in plain if weight in kept]
    assert all(torch.equal(plain[weight], kept[weight]) for weight in same)
    assert {weight for weight in plain if weight not in kept} == {f"{small.embedding_name()}.weight"}
    if "id2label" in MODELS[name][1]:
        assert small.config.id2label == LABELS


@pytest.mark.timeout(600)  # four models, two forms, and a process that reads all
def test_every_form_gives_the_same_answers_without_ksub_ds(compressed: dict[str, Path], tmp_path: Path) -> None:
    wanted, folders = [], []
    for name, folder in compressed.items():
        model = open_head(folder, name)
        for form in ("dense", "remote-code"):
            folders.append(str(tmp_path / name / form))
            assert main(["export", str(folder), "--out", folders[-1], f"--{form}"]) == 0
            card = (Path(folders[-1]) / "README.md").read_text()
            head = MODELS[name][0].partition("For")[2]
            assert f"pipeline_tag: {MODELS[name][2]}\n" in card and f"import AutoModelFor{head}, AutoTok" in card
            wanted.append([sorted(model.config.id2label.values()), numbers(model, name)])
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", READ, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (labels, values), found in zip(wanted, json.loads(done.stdout.split("\nfound ")[1]), strict=True):
        assert found == [labels, [pytest.approx(each, rel=1e-4, abs=1e-5) for each in values]]


def test_pipelines(compressed: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same entities and classes as from the dense export, and no complaint about the kind of model."""
    transformers.logging.enable_propagation()
    try:
        for name, task in (("tokens", "token-classification"), ("causal", "text-classification")):
            out = tmp_path / name
            assert main(["export", str(compressed[name]), "--out", str(out), "--dense"]) == 0
            ours, dense = (transformers.pipeline(task, str(folder), device="cpu") for folder in (compressed[name], out))
            found, expected = ours(TEXT), dense(TEXT)
            assert found and len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert one.keys() == other.keys()
                assert one == {
                    key: pytest.approx(value, rel=1e-3) if key == "score" else value for key, value in other.items()
                }
    finally:
        transformers.logging.disable_propagation()
    assert "not supported" not in caplog.text


def test_a_causal_classifier_without_padding_is_compared(tmp_path: Path) -> None:
    """transformers' own reads one text at a time then."""
    config = transformers.GPT2Config(vocab_size=120, n_embd=8, n_layer=1, n_head=2)
    model = replace_embeddings(transformers.GPT2ForSequenceClassification(config).eval(), positional_codes(120, 2))
    model.save_pretrained(tmp_path)
    assert compare_with_reload(model, tmp_path, None) == 0
    with torch.no_grad():
        model.score.weight *= 2
    assert compare_with_reload(model, tmp_path, None) > 1e-4


def test_beside_an_xlmr_tokenizer_the_dense_form_is_xlmr(tiny_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    config = KSubRobertaConfig(**SIZE, vocab_size=tokenizer.vocab_size, pad_token_id=1, max_position_embeddings=80)
    KSubRobertaForTokenClassification(config, positional_codes(tokenizer.vocab_size, 2)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out"), "--dense"]) == 0
    written = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert written.architectures == ["XLMRobertaForTokenClassification"] and written.model_type == "xlm-roberta"


def test_what_is_refused_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"vocab_size": 120, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = transformers.T5Config(vocab_size=120, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5ForTokenClassification(t5).save_pretrained(tmp_path / "t5")
    decoder = transformers.BertConfig(**small, intermediate_size=8, is_decoder=True)
    transformers.BertForTokenClassification(decoder).save_pretrained(tmp_path / "decoder")
    pickled = transformers.BertForQuestionAnswering(transformers.BertConfig(**small, intermediate_size=8))
    pickled.config.architectures = ["BertForQuestionAnswering"]
    pickled.config.save_pretrained(tmp_path / "pickled")
    torch.save(pickled.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    for name, words in (
        ("t5", "is a T5ForTokenClassification; give an encoder of BERT"),
        ("decoder", "BertForTokenClassification is set up as a decoder"),
        ("pickled", "weights must be safetensors: pickled ones are not read"),
    ):
        command = ["compress", str(tmp_path / name), "--num-tables", "2", "--table-size", "12"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        (line,) = (each for each in capsys.readouterr().err.splitlines() if each.startswith("error: "))
        assert words in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["answers", "choices", "causal"])
def test_onnx_of_a_head(compressed: dict[str, Path], tmp_path: Path, name: str) -> None:
    for package in NEEDS:
        pytest.importorskip(package, reason=f"{package} is optional: pip install {' '.join(NEEDS)}")
    import onnxruntime

    assert main(["export", str(compressed[name]), "--out", str(tmp_path / "out"), "--onnx"]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    ids = torch.arange(5, 37).reshape(2, 16)
    row = (ids[:, None] if name == "choices" else ids).numpy()
    found = session.run(None, {"input_ids": row, "attention_mask": row * 0 + 1})
    outputs = [each.name for each in session.get_outputs()]
    assert outputs == (["start_logits", "end_logits"] if name == "answers" else ["output"])
    for each, expected in zip(found, numbers(open_head(compressed[name], name), name), strict=True):
        assert each.flatten().tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
