"""Models as they are published: heads that are not read or are absent, prefixes and tied weights as they come."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ksub_ds import compress, positional_codes
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.model.loading import open_config, open_model

SIZE = {"vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CONFIGS: dict[str, Any] = {
    "Bert": transformers.BertConfig(**SIZE),
    "Roberta": transformers.RobertaConfig(**SIZE),
    "XLMRoberta": transformers.XLMRobertaConfig(**SIZE),
    "Electra": transformers.ElectraConfig(**SIZE, embedding_size=12),
    "DistilBert": transformers.DistilBertConfig(vocab_size=120, dim=16, n_layers=1, n_heads=2, hidden_dim=16),
}
IDS = torch.arange(3, 23).reshape(2, 10)


def save(class_name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    family = class_name.partition("For")[0].removesuffix("Model")
    model = getattr(transformers, class_name)(CONFIGS[family]).eval()
    model.save_pretrained(folder)
    return model


def edit_weights(folder: Path, change: Any) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | fields)


def states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.base_model(IDS).last_hidden_state


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "ksub_ds"]


@pytest.mark.parametrize(
    ("published", "opened", "without"),
    [
        ("BertForPreTraining", "BertForMaskedLM", "bert.pooler.dense, cls.seq_relationship"),
        ("BertForNextSentencePrediction", "BertModel", "cls.seq_relationship"),
        ("ElectraForPreTraining", "ElectraModel", "discriminator_predictions.dense, discriminator_predictions.dense_"),
    ],
)
def test_other_heads_are_left_out(published: str, opened: str, without: str, tmp_path: Path, lines: Any) -> None:
    source = save(published, tmp_path)
    model = open_model(tmp_path)
    assert type(model).__name__ == opened
    torch.testing.assert_close(states(model), states(source))
    assert len(lines()) == 1 and f"a {published}, read as {opened}, without {without}" in lines()[0]
    assert states(compress(tmp_path, positional_codes(120, 3))).isfinite().all()


def test_the_masked_token_head_of_bert_for_pretraining_stays(tmp_path: Path) -> None:
    source = save("BertForPreTraining", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(open_model(tmp_path)(IDS).logits, source(IDS).prediction_logits)


@pytest.mark.parametrize(
    "published",
    [
        "BertForQuestionAnswering",
        "DistilBertForQuestionAnswering",
        "ElectraModel",
        "RobertaForMaskedLM",
        "RobertaForMultipleChoice",
        "XLMRobertaForSequenceClassification",
        "XLMRobertaForTokenClassification",
    ],
)
def test_known_heads_are_read_without_a_word(published: str, tmp_path: Path, lines: Any) -> None:
    source = save(published, tmp_path)
    model = open_model(tmp_path)
    assert type(model) is type(source) and not lines()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        inputs = IDS[:, None] if published.endswith("MultipleChoice") else IDS
        assert torch.equal(next(iter(model(inputs).values())), next(iter(source(inputs).values())))


@pytest.mark.parametrize("wanted", ["XLMRobertaForMaskedLM", "XLMRobertaForSequenceClassification"])
def test_a_head_that_is_named_but_absent_is_not_made_up(wanted: str, tmp_path: Path, lines: Any) -> None:
    """As sentence encoders often are: config.json is still that of the model they were made of."""
    source = save("XLMRobertaModel", tmp_path)
    edit_config(tmp_path, architectures=[wanted])
    model = open_model(tmp_path)
    assert type(model).__name__ == "XLMRobertaModel"
    torch.testing.assert_close(model(IDS).pooler_output, source(IDS).pooler_output)
    assert f"a {wanted}, read as XLMRobertaModel" in lines()[0]


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("pooler", [True, False])
def test_a_bare_encoder_with_and_without_prefix_and_pooler(prefix: str, pooler: bool, tmp_path: Path) -> None:
    source = save("BertModel", tmp_path)
    kept = lambda name: pooler or not name.startswith("pooler.")  # noqa: E731 - shorter than a function
    edit_weights(tmp_path, lambda weights: {prefix + name: value for name, value in weights.items() if kept(name)})
    model: Any = open_model(tmp_path)
    assert (model.pooler is not None) == pooler
    torch.testing.assert_close(states(model), states(source))
    small = compress(tmp_path, positional_codes(120, 3))
    small.save_pretrained(tmp_path / "small")
    assert (open_model(tmp_path / "small").pooler is not None) == pooler


@pytest.mark.parametrize(("published", "opened"), [("BertForMaskedLM", "BertForMaskedLM"), ("BertModel", "BertModel")])
def test_a_configuration_that_names_no_class(published: str, opened: str, tmp_path: Path) -> None:
    source = save(published, tmp_path)
    edit_config(tmp_path, architectures=None)
    model = open_model(tmp_path)
    assert type(model).__name__ == opened
    torch.testing.assert_close(states(model), states(source))


@pytest.mark.parametrize(
    ("published", "embedding", "decoder"),
    [
        ("BertForMaskedLM", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("XLMRobertaForMaskedLM", "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        ("ElectraForMaskedLM", "electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"),
    ],
)
def test_tied_weights_stored_once(published: str, embedding: str, decoder: str, tmp_path: Path, lines: Any) -> None:
    """transformers stores the embedding; other tools the decoder, or both."""
    source = save(published, tmp_path)
    edit_weights(tmp_path, lambda weights: {decoder if k == embedding else k: v for k, v in weights.items()})
    assert torch.equal(open_model(tmp_path)(IDS).logits, source(IDS).logits)
    edit_weights(tmp_path, lambda weights: weights | {embedding: weights[decoder].clone()})
    edit_weights(tmp_path, lambda weights: weights | {f"{source.base_model_prefix}.embeddings.position_ids": IDS})
    assert torch.equal(open_model(tmp_path)(IDS).logits, source(IDS).logits) and not lines()


def test_an_encoder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    save("BertForMaskedLM", tmp_path)
    edit_weights(tmp_path, lambda weights: {k: v for k, v in weights.items() if ".encoder." not in k})
    with pytest.raises(UserError, match=r"16 weights of a BertForMaskedLM are absent \(bert\.encoder\.layer\.0\.att"):
        open_model(tmp_path)


def test_half_a_head_is_refused(tmp_path: Path) -> None:
    save("BertForMaskedLM", tmp_path)
    edit_weights(tmp_path, lambda weights: {k: v for k, v in weights.items() if "transform" not in k})
    with pytest.raises(UserError, match="4 weights of a BertForMaskedLM are absent"):
        open_model(tmp_path)


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    transformers.OPTConfig(vocab_size=120, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a model of type opt; give an encoder of BERT"):
        open_config(tmp_path)
    edit_config(tmp_path, architectures=["OPTForSequenceClassification"])
    with pytest.raises(UserError, match="is a OPTForSequenceClassification; give an encoder of BERT"):
        open_config(tmp_path)


def test_causal_models_are_read_with_the_head_that_is_there(tmp_path: Path) -> None:
    small = {"vocab_size": 120, "n_embd": 8, "n_layer": 1, "n_head": 2}
    source = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).eval()
    source.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=None)  # as older folders
    assert torch.equal(open_model(tmp_path)(IDS).logits, source(IDS).logits)
    edit_config(tmp_path, architectures=["GPT2ForTokenClassification"])  # whose head is not there
    model = open_model(tmp_path)
    assert type(model).__name__ == "GPT2Model"
    assert torch.equal(model(IDS).last_hidden_state, source.transformer(IDS).last_hidden_state)


def test_above_the_folder_of_a_model(tmp_path: Path) -> None:
    save("BertModel", tmp_path / "above" / "0_Transformer")
    with pytest.raises(UserError, match=r"above: holds no config\.json; give .*above/0_Transformer"):
        open_config(tmp_path / "above")


def test_where_zero_3_takes_the_place_of_the_meta_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its DeepSpeed integration, transformers builds models without the meta device."""
    from ksub_ds.model import base

    config = transformers.LlamaConfig(**SIZE, pad_token_id=0)
    small = compress(transformers.LlamaForCausalLM(config), positional_codes(120, 3))
    small.save_pretrained(tmp_path)
    whole = transformers.PreTrainedModel.get_init_context

    def without_meta(*arguments: Any, **keywords: Any) -> list[Any]:
        return [each for each in whole(*arguments, **keywords) if not isinstance(each, torch.device)]

    monkeypatch.setattr(transformers.PreTrainedModel, "get_init_context", without_meta)
    with pytest.raises(ValueError, match="a new model needs a code table"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.setattr(base, "is_deepspeed_zero3_enabled", lambda: True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.code_table().sha256 == small.code_table().sha256
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": "x"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"hidden_act": "no such"},
        {"architectures": [5]},
        {"architectures": "BertModel"},
        {"dtype": "evil"},
        {"model_type": []},
        {"attn_implementation": "no such"},
    ],
    ids=str,
)
def test_a_damaged_configuration_is_one_line(fields: dict[str, Any], tmp_path: Path) -> None:
    save("BertForMaskedLM", tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(UserError) as caught:
        open_model(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 5}', '{"metadata": {}, "weight_map": {}}'])
def test_a_damaged_index_is_one_line(content: str, tmp_path: Path) -> None:
    save("BertForMaskedLM", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        open_model(tmp_path)
