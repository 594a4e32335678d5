"""The HuggingFace models: the paper's parameter counts, round trips, and refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaForMaskedLM,
)

from ksub_ds import (
    CodeTable,
    KSubRobertaConfig,
    KSubRobertaForMaskedLM,
    KSubRobertaForSequenceClassification,
    KSubRobertaModel,
    plain_codes,
    positional_codes,
)
from ksub_ds.model.presets import fresh_model, preset_config


def shuffled_codes(num_tokens=500, seed=0):
    table = positional_codes(num_tokens, 3)
    return CodeTable(np.random.default_rng(seed).permutation(table.codes), table.table_sizes)


def tiny_model(table=None, **overrides):
    torch.manual_seed(0)
    table = table or shuffled_codes()
    model = KSubRobertaForMaskedLM(KSubRobertaConfig.tiny(vocab_size=table.num_tokens, **overrides), table)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def batch(num_tokens=500):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, num_tokens, (2, 12), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, -100)
    labels[0, 3] = ids[0, 3]
    return ids, labels


@pytest.mark.parametrize(
    ("preset", "table", "total"),
    [
        ("xlmr_medium", positional_codes(250002, 3), 26_029_714),
        ("xlmr_medium", plain_codes(250002), 153_998_482),
        ("roberta_medium", plain_codes(50265), 51_533_401),
        ("roberta_medium", positional_codes(50265, 3), 25_816_665),
        ("roberta_medium", positional_codes(50265, 8), 25_799_769),
    ],
)
def test_table_1_parameter_counts(preset, table, total):
    """26M, 154M, 26M, 51M of the paper's Tables 1 and 5, to the parameter."""
    with torch.device("meta"):
        model = KSubRobertaForMaskedLM(getattr(KSubRobertaConfig, preset)(), table)
    assert model.num_parameters() == total
    assert sum(p.numel() for p in model.get_input_embeddings().parameters()) == table.num_parameters(512)


def test_small_presets_are_of_one_size():
    """RoBERTa's and ModernBERT's network of the small presets: as many parameters outside the embedding."""
    table, outside = positional_codes(1000, 3), {}
    for preset in ("small", "small_modernbert"):
        model = fresh_model(preset_config(preset, vocab_size=1000), table)
        outside[preset] = model.num_parameters() - table.num_parameters(384) - 1000  # the decoder's bias
    assert outside == {"small": 10_993_920, "small_modernbert": 10_769_664}


def test_plain_model_is_huggingfaces_own():
    """K = 1: the same weights in RobertaForMaskedLM give the same logits and loss."""
    model = tiny_model(plain_codes(500))
    fields = {key: getattr(model.config, key) for key in RobertaConfig.__dataclass_fields__ if key != "model_type"}
    theirs = RobertaForMaskedLM(RobertaConfig(**fields)).eval()
    weights = {name: value for name, value in model.state_dict().items() if "word_embeddings" not in name}
    weights["roberta.embeddings.word_embeddings.weight"] = model.get_input_embeddings().tables[0].detach()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    theirs.tie_weights()
    ids, labels = batch()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    ours, reference = model(ids, attention_mask=mask), theirs(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(ours.logits, reference.logits)
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels).loss, reference.loss)


def test_forward_gives_logits_or_loss():
    model, (ids, labels) = tiny_model(), batch()
    dense = model(ids)
    assert dense.loss is None and dense.logits.shape == (2, 12, 500)
    trained = model(ids, labels=labels)
    assert trained.logits is None
    torch.testing.assert_close(trained.loss, F.cross_entropy(dense.logits.flatten(0, 1), labels.flatten()))
    both = model(ids, labels=labels, output_logits=True, output_hidden_states=True)
    torch.testing.assert_close(both.logits, dense.logits)
    assert both.loss == trained.loss and len(both.hidden_states) == 3
    total = model(ids, labels=labels, loss_reduction="sum").loss
    torch.testing.assert_close(total, trained.loss * (labels != -100).sum())
    assert model(ids, labels=labels, return_dict=False)[0] == trained.loss


def test_scores_and_predictions_without_logits():
    model, (ids, labels) = tiny_model(), batch()
    logits = model(ids).logits[labels != -100]
    wanted = labels[labels != -100]
    scores = model.score_labels(input_ids=ids, labels=labels)
    assert scores.shape == (2,) and scores.dtype == torch.float64
    loss, correct = scores.tolist()
    assert correct == (logits.argmax(1) == wanted).sum()
    assert loss == pytest.approx(F.cross_entropy(logits, wanted, reduction="sum").item(), rel=1e-6)
    probabilities, tokens = model.predict_topk(ids, labels != -100, k=4)
    best = logits.softmax(dim=1).topk(4)
    assert torch.equal(tokens, best.indices)
    torch.testing.assert_close(probabilities, best.values)


def test_gradients_reach_every_parameter():
    model, (ids, labels) = tiny_model().train(), batch()
    model(ids, labels=labels).loss.backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not silent


def test_reload_in_a_process_that_only_imports_ksub_ds(tmp_path):
    """The loss after a reload, with permuted codes: codes that came back wrong would show."""
    model, (ids, labels) = tiny_model(), batch()
    model.save_pretrained(tmp_path / "model")
    torch.save({"ids": ids, "labels": labels}, tmp_path / "batch.pt")
    code = (
        "import sys, torch, ksub_ds; from transformers import AutoModelForMaskedLM as A\n"
        "folder = sys.argv[1]; model = A.from_pretrained(folder + '/model').eval()\n"
        "batch = torch.load(folder + '/batch.pt', weights_only=True)\n"
        "print(repr(model(batch['ids'], labels=batch['labels']).loss.item()), model.num_parameters())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loss, count = done.stdout.split()
    assert float(loss) == model(ids, labels=labels).loss.item() and int(count) == model.num_parameters()


def test_across_our_heads(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert isinstance(classifier, KSubRobertaForSequenceClassification)
    bare = AutoModel.from_pretrained(tmp_path)
    assert isinstance(bare, KSubRobertaModel)
    for other in (classifier.roberta, bare):
        ours = dict(model.roberta.state_dict())
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in ours.items())
    ids, _ = batch()
    assert classifier(ids, labels=torch.tensor([0, 2])).loss.isfinite()
    half = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.get_input_embeddings().codes.dtype == torch.int32
    assert torch.equal(half.get_input_embeddings().codes, model.get_input_embeddings().codes)


@pytest.mark.parametrize("theirs", [RobertaForMaskedLM, XLMRobertaForMaskedLM, RobertaModel])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_huggingfaces_own_classes_refuse_our_folder(theirs, bare, plain, tmp_path):
    model = tiny_model(plain_codes(500) if plain else None)
    (model.roberta if bare else model).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        theirs.from_pretrained(tmp_path)


def test_a_folder_without_its_codes_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "roberta.embeddings.word_embeddings.codes"
    for damaged in (None, torch.zeros_like(weights[name])):
        changed = {key: value for key, value in weights.items() if key != name}
        if damaged is not None:
            changed[name] = damaged
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="no usable codes"):
            KSubRobertaForMaskedLM.from_pretrained(tmp_path)


def test_configurations_that_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match="unknown configuration field 'hiden_size'"):
        KSubRobertaConfig.tiny(hiden_size=64)
    with pytest.raises(StrictDataclassClassValidationError, match="does not divide"):
        KSubRobertaConfig.tiny(hidden_size=130)
    with pytest.raises(ValueError, match="needs a code table"):
        KSubRobertaForMaskedLM(KSubRobertaConfig.tiny(vocab_size=500))
    with pytest.raises(ValueError, match=r"vocab_size 501 is not the code table's 500 tokens"):
        KSubRobertaForMaskedLM(KSubRobertaConfig.tiny(vocab_size=501), shuffled_codes())


def test_what_would_break_the_tie_is_refused():
    model = tiny_model()
    assert model.resize_token_embeddings(500) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="must be a SubEmbedding, not Embedding"):
        model.set_input_embeddings(torch.nn.Embedding(5, 5))


def test_growing_keeps_the_old_logits_bit_for_bit(tmp_path):
    model, (ids, labels) = tiny_model(), batch()
    before, parameters = model(ids).logits, model.num_parameters()
    model(ids, labels=labels)  # builds what is derived from the old codes
    model.resize_token_embeddings(510)
    after = model(ids).logits
    assert after.shape[-1] == 510 and torch.equal(after[..., :500], before)
    assert model.num_parameters() == parameters + 10 and model.config.vocab_size == 510
    assert model.lm_head.bias[500:].eq(model.lm_head.bias[:500].mean()).all()
    new = torch.where(labels == -100, -100, 500 + labels % 10)
    torch.testing.assert_close(
        model(ids, labels=new).loss, F.cross_entropy(model(ids).logits.flatten(0, 1), new.flatten())
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path).eval()(ids).logits, after)
    model.resize_token_embeddings(500)
    assert torch.equal(model(ids).logits, before) and model.num_parameters() == parameters
    with pytest.raises(ValueError, match=r"the code space is full: 13 new tokens, .* only 12 are unused"):
        model.resize_token_embeddings(513)
    assert torch.equal(model(ids).logits, before)


def test_new_tokens_go_where_their_vectors_lie():
    table = shuffled_codes(300)
    model = KSubRobertaForSequenceClassification(KSubRobertaConfig.tiny(vocab_size=300), table)
    vectors = model.get_input_embeddings().dense_weight()[[7, 70]].detach() + 0.001
    model.resize_token_embeddings(302, vectors=vectors)
    codes = model.code_table().codes
    assert (codes[300:, :-1] == codes[[7, 70], :-1]).all()


def test_the_given_configuration_is_left_alone():
    config = KSubRobertaConfig.tiny(vocab_size=500)
    model = KSubRobertaForMaskedLM(config, shuffled_codes())
    assert config.table_sizes is None and model.config.table_sizes == [8, 8, 8]


def test_presets_are_table_5(tmp_path):
    for config in (KSubRobertaConfig.roberta_medium(), KSubRobertaConfig.xlmr_medium()):
        config.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
        }.items() <= stored.items()
    assert tiny_model().config._attn_implementation == "sdpa"


def test_a_head_without_bias():
    model, (ids, labels) = tiny_model(decoder_bias=False), batch()
    dense = model(ids).logits
    assert model.lm_head.bias is None
    torch.testing.assert_close(model(ids, labels=labels).loss, F.cross_entropy(dense.flatten(0, 1), labels.flatten()))
