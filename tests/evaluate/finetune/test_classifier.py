"""Opening encoders for classification: any of HuggingFace's, each with a fresh head; what is not a model is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ksub_ds.common.errors import UserError
from ksub_ds.evaluate.data.rows import RowSource
from ksub_ds.evaluate.data.tasks import XNLI_COLUMNS
from ksub_ds.evaluate.finetune.classifier import check_encoder, check_fit, describe, load_classifier, open_encoder
from ksub_ds.evaluate.finetune.encoding import encode, load_encoder
from ksub_ds.evaluate.finetune.scoring import predict
from ksub_ds.model.loading import open_config


def test_any_encoder_is_accepted(tiny_tokenizer: Path, tiny_xnli: Path, tmp_path: Path) -> None:
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    encoder = load_encoder(str(tiny_tokenizer))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = XLMRobertaConfig(vocab_size=encoder.vocab_size, max_position_embeddings=40, type_vocab_size=1, **sizes)
    folder = tmp_path / "xlmr"
    XLMRobertaForMaskedLM(config).save_pretrained(folder)
    with pytest.raises(UserError, match="holds no tokenizer; give --tokenizer"):
        open_encoder(str(folder), None)
    check_fit(str(folder), open_encoder(str(folder), str(tiny_tokenizer)), 32)
    with pytest.raises(UserError, match="has positions for 38 tokens"):
        check_fit(str(folder), encoder, 64)
    about = describe(str(folder))
    assert (about["kind"], about["architecture"]) == ("plain", "xlm-roberta")
    data = encode(RowSource(str(tiny_xnli)).read("en", "test", XNLI_COLUMNS), encoder, 32)
    assert predict(load_classifier(str(folder), 3, 0), data).shape == (60, 3)


def test_wrong_models_are_one_line(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in (str(tmp_path / "nothing"), "./here"):
        with pytest.raises(UserError, match=r"is not a model folder|finds no model"):
            load_classifier(path, 3, 0)
    shutil.copytree(tiny_model, tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    weights.pop("roberta.encoder.layer.0.attention.self.query.weight")
    save_file(weights, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are absent, for example .*query.weight"):
        load_classifier(str(tmp_path / "damaged"), 3, 0)
    config = json.loads((tiny_model / "config.json").read_text())
    assert describe(str(tiny_model))["kind"] == "positional" and len(config["table_sizes"]) == 3


def test_a_body_from_another_checkpoint_keeps_the_fresh_head(tiny_model: Path, tmp_path: Path) -> None:
    mnli = load_classifier(str(tiny_model), 3, seed=5)
    with torch.no_grad():
        for parameter in mnli.parameters():
            parameter.add_(0.01)
    mnli.save_pretrained(tmp_path / "mnli")
    model = load_classifier(str(tiny_model), 2, seed=7, body=str(tmp_path / "mnli"))
    fresh = load_classifier(str(tiny_model), 2, seed=7)
    for name, value in model.named_parameters():
        donor = fresh if name.startswith("classifier") else mnli
        assert torch.equal(value, donor.state_dict()[name]), name


def test_a_trained_head_is_drawn_anew(tiny_model: Path, tmp_path: Path) -> None:
    trained = load_classifier(str(tiny_model), 3, seed=7)
    trained.save_pretrained(tmp_path)
    heads = []
    for num_labels, seed in ((3, 0), (3, 1), (3, 1), (1, 0)):
        model = load_classifier(str(tmp_path), num_labels, seed)
        assert model.config.num_labels == num_labels
        bodies = zip(model.base_model.state_dict().values(), trained.base_model.state_dict().values(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in bodies)
        heads.append({key: value for key, value in model.state_dict().items() if key.startswith("classifier")})
    weight = "classifier.out_proj.weight"
    assert not torch.equal(heads[0][weight], trained.state_dict()[weight])
    assert not torch.equal(heads[0][weight], heads[1][weight]) and torch.equal(heads[1][weight], heads[2][weight])
    assert heads[3][weight].shape[0] == 1
    dense = "classifier.dense.weight"
    assert not torch.equal(heads[3][dense], trained.state_dict()[dense])


def test_what_is_no_encoder_is_told_by_its_config(tmp_path: Path) -> None:
    """Nothing but the configuration is read: the weights need not be there."""
    import transformers

    kinds = {
        "gpt2": (transformers.GPT2Config(), r"is a decoder \(gpt2\); give an encoder"),
        "llama": (transformers.LlamaConfig(), r"is a decoder \(llama\)"),
        "t5": (transformers.T5Config(), r"is an encoder-decoder \(t5\)"),
        "vit": (transformers.ViTConfig(), r"no sequence classifier for \(vit\)"),
    }
    for name, (config, message) in kinds.items():
        config.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=message):
            check_encoder(str(tmp_path / name))
    for name in ("Bert", "XLMRoberta", "DebertaV2", "Electra", "XLNet", "ModernBert", "Bart"):
        getattr(transformers, f"{name}Config")().save_pretrained(tmp_path / name)
        check_encoder(str(tmp_path / name))
    (tmp_path / "DebertaV2" / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"DebertaV2: holds pickled weights only \(\*.bin\)"):
        check_encoder(str(tmp_path / "DebertaV2"))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    about = {"base_model_name_or_path": "xlm-roberta-base", "peft_type": "LORA"}
    for content, base in ((json.dumps(about), "xlm-roberta-base"), ("[1]", "BASE"), ("{", "BASE")):
        (tmp_path / "adapter_config.json").write_text(content)
        message = rf"{tmp_path}: is a \w+ adapter \(adapter_config.json\) of {base}, not a model; merge"
        with pytest.raises(UserError, match=f"^--model {message}"):
            check_encoder(str(tmp_path))
        with pytest.raises(UserError, match=f"^{message}"):  # as `ksub compress` opens it
            open_config(tmp_path)
