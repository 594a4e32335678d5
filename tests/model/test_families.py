"""Every encoder family over sub-embeddings: both ends replaced, saved, found again by the Auto classes, written out."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

from ksub_ds import CodeTable, positional_codes, replace_embeddings
from ksub_ds.corpus.masking import masked_positions
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.replacement import to_plain

SIZE = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES = {
    "bert": SIZE,
    "roberta": SIZE | {"max_position_embeddings": 40},
    "xlm-roberta": SIZE | {"max_position_embeddings": 40},
    "camembert": SIZE | {"max_position_embeddings": 40},
    "electra": SIZE | {"embedding_size": 24},
    "distilbert": {"vocab_size": 120, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "modernbert": SIZE
    | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2},
}
HEADS = {"bare": AutoModel, "mlm": AutoModelForMaskedLM, "classifier": AutoModelForSequenceClassification}
TABLE = CodeTable(np.random.default_rng(0).permutation(positional_codes(120, 3).codes), [5, 5, 5])


def plain_model(family, head="mlm"):
    torch.manual_seed(0)
    model = HEADS[head].from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 120, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return ids, mask, torch.where(torch.rand(ids.shape, generator=generator) < 0.4, ids, -100)


def outputs(model, ids, mask):
    result = model(ids, attention_mask=mask)
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_with_new_embeddings(family, head, tmp_path):
    source = plain_model(family, head)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    model = replace_embeddings(source, TABLE)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert isinstance(model.get_input_embeddings(), SubEmbedding)
    assert not any(120 in parameter.shape for parameter in model.parameters() if parameter.ndim > 1), "no N x d left"
    ids, mask, labels = batch()

    # The plain model with the matrix that the tables stand for computes the same.
    dense = model.get_input_embeddings().dense_weight()
    with torch.no_grad():
        source.get_input_embeddings().weight.copy_(dense)
    expected = outputs(source, ids, mask)
    torch.testing.assert_close(outputs(model, ids, mask), expected)
    if head == "mlm":
        loss = model(ids, attention_mask=mask, labels=labels).loss
        torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), labels.flatten()))
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert model.score_labels(input_ids=ids, labels=labels, attention_mask=mask)[1] <= (labels != -100).sum()

    # Back to a plain model, and through a folder, by the Auto class.
    plain = to_plain(model, type(source))
    assert type(plain) is type(source)
    torch.testing.assert_close(outputs(plain, ids, mask), expected)
    model.save_pretrained(tmp_path / "ours")
    again = HEADS[head].from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(model) and torch.equal(outputs(again, ids, mask), outputs(model, ids, mask))
    plain.save_pretrained(tmp_path / "plain")
    read = HEADS[head].from_pretrained(tmp_path / "plain").eval()
    assert type(read) is type(source)
    torch.testing.assert_close(outputs(read, ids, mask), expected)

    # transformers' own class must not read our folder as a plain one.
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(source).from_pretrained(tmp_path / "ours")


def places(labels, count=None):
    """Where the labels are and what they are, filled up to `count` by places that do not count."""
    positions, targets = masked_positions(labels.numpy(), count)
    return {"masked_positions": torch.from_numpy(positions), "targets": torch.from_numpy(targets)}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    torch.manual_seed(7)  # of dropout
    output = model(**inputs, output_correct=True)
    output.loss.backward()
    return output, {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_and_targets_say_what_labels_say(family, reduction):
    model = replace_embeddings(plain_model(family), TABLE).train()
    ids, mask, labels = batch()
    inputs = {"input_ids": ids, "attention_mask": mask, "loss_reduction": reduction}
    wanted, gradients = loss_and_gradients(model, **inputs, labels=labels)
    same, same_gradients = loss_and_gradients(model, **inputs, **places(labels))
    assert torch.equal(same.loss, wanted.loss) and torch.equal(same["correct"], wanted["correct"])
    assert all(torch.equal(each, gradients[name]) for name, each in same_gradients.items())
    filled, filled_gradients = loss_and_gradients(model, **inputs, **places(labels, count=40))
    torch.testing.assert_close(filled.loss, wanted.loss)
    assert torch.equal(filled["correct"], wanted["correct"])
    torch.testing.assert_close(filled_gradients, gradients)
    model.eval()
    assert torch.equal(*(model.score_labels(input_ids=ids, **given) for given in ({"labels": labels}, places(labels))))


@pytest.mark.parametrize("count", [None, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_a_masked_token(family, count):
    model = replace_embeddings(plain_model(family), TABLE).train()
    ids, mask, labels = batch()
    inputs = {"input_ids": ids, "attention_mask": mask, "loss_reduction": "sum"}
    output, gradients = loss_and_gradients(model, **inputs, **places(torch.full_like(labels, -100), count))
    assert output.loss == 0 and output["correct"] == 0
    assert all(each is None or not each.any() for each in gradients.values())  # NaN would be any
    nothing = places(torch.full_like(labels, -100), count)
    assert model.score_labels(input_ids=ids, **nothing).tolist() == [0, 0]


def test_labels_are_given_in_one_way():
    model = replace_embeddings(plain_model("bert"), TABLE)
    ids, _, labels = batch()
    pair = places(labels)
    with pytest.raises(ValueError, match="give either"):
        model(ids, labels=labels, **pair)
    for name in pair:
        with pytest.raises(ValueError, match="give both, or labels"):
            model(ids, **{name: pair[name]})
    with pytest.raises(ValueError, match="needs labels"):
        model(ids, **pair, output_predictions=True)
    assert model(ids, **pair).logits is None and model(ids, **pair, output_logits=True).logits.shape == (2, 12, 120)
    predictions = model(ids, labels=labels, output_predictions=True)["predictions"]
    assert torch.equal(predictions, torch.where(labels != -100, model(ids).logits.argmax(2), -100))


@pytest.mark.parametrize("family", ["bert", "modernbert", "electra", "distilbert"])
def test_heads_read_each_others_folders_and_grow(family, tmp_path):
    model = replace_embeddings(plain_model(family), TABLE)
    model.save_pretrained(tmp_path)
    for door in (AutoModel, AutoModelForSequenceClassification):
        other = door.from_pretrained(tmp_path)
        theirs = other.base_model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in model.base_model.state_dict().items())
    ids, mask, labels = batch()
    before = model(ids, attention_mask=mask).logits
    model.resize_token_embeddings(125)
    after = model(ids, attention_mask=mask).logits
    assert after.shape[-1] == 125 and torch.equal(after[..., :120], before)
    assert model(ids, labels=labels).loss.isfinite()
    with pytest.raises(ValueError, match="code space is full"):
        model.resize_token_embeddings(126)


@pytest.mark.parametrize("family", ["xlm-roberta", "bert", "modernbert"])
def test_dedicated_rows_go_where_the_tables_go(family, tmp_path):
    """Through a folder, every head and a plain model; into fewer tokens; and out of the configuration without them."""
    source, (ids, mask, _) = plain_model(family), batch()
    dedicated = [0, 1, 7, 30, 119]
    model = replace_embeddings(source, CodeTable(TABLE.codes, TABLE.table_sizes, dedicated=dedicated))
    layer = model.get_input_embeddings()
    plain = replace_embeddings(source, TABLE)
    plain.get_input_embeddings().load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(outputs(model, ids, mask), outputs(plain, ids, mask))  # the rows are zero
    assert "num_dedicated" not in plain.config.to_json_string() and "num_dedicated" not in plain.config.to_dict()
    with torch.no_grad():
        layer.dedicated_rows.normal_()
        source.get_input_embeddings().weight.copy_(layer.dense_weight())
    assert model.config.num_dedicated == 5
    assert model.code_table().dedicated.tolist() == dedicated
    torch.testing.assert_close(outputs(model, ids, mask), outputs(source, ids, mask))
    torch.testing.assert_close(outputs(to_plain(model, type(source)), ids, mask), outputs(source, ids, mask))
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, ids, mask), outputs(model, ids, mask))
    for door in (AutoModel, AutoModelForSequenceClassification):
        theirs = door.from_pretrained(tmp_path).base_model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in model.base_model.state_dict().items())
    before = model(ids % 100).logits
    for size, kept in ((125, 5), (100, 4), (1, 1)):
        model.resize_token_embeddings(size)
        assert model.config.num_dedicated == kept == len(layer.dedicated_rows), size
        if size > 1:
            torch.testing.assert_close(model(ids % 100).logits[..., :100], before[..., :100])
    model.save_pretrained(tmp_path / "small")
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "small").code_table().dedicated.tolist() == [0]


def test_other_codes_for_one_of_ours():
    model = replace_embeddings(plain_model("bert"), TABLE)
    fewer = replace_embeddings(model, positional_codes(100, 2))
    assert type(fewer) is type(model) and fewer.config.vocab_size == 100
    assert torch.equal(fewer.decoder_bias, model.decoder_bias[:100])
    assert torch.equal(fewer.bert.pooler.dense.weight, model.bert.pooler.dense.weight) if fewer.bert.pooler else True


def test_a_folder_in_a_process_that_only_imports_ksub_ds(tmp_path):
    model = replace_embeddings(plain_model("bert"), TABLE)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, ksub_ds; from transformers import AutoModelForMaskedLM as A\n"
        "model = A.from_pretrained(sys.argv[1]).eval(); ids = torch.arange(24).reshape(2, 12)\n"
        "print(repr(model(ids, labels=ids.flip(1)).loss.item()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    ids = torch.arange(24).reshape(2, 12)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(model(ids, labels=ids.flip(1)).loss.item(), rel=1e-6)


def test_hidden_states_in_a_process_that_built_no_bare_encoder(tmp_path):
    """transformers records what a class declares when it is first built; here only the masked model is."""
    for family in FAMILIES:
        replace_embeddings(plain_model(family), TABLE).save_pretrained(tmp_path / family)
    code = (
        "import sys, torch, ksub_ds; from transformers import AutoModelForMaskedLM as A\n"
        "for folder in sys.argv[1:]:\n"
        "    model = A.from_pretrained(folder).eval(); ids = torch.arange(24).reshape(2, 12)\n"
        "    for each in (model, model.base_model):\n"
        "        states = each(ids, output_hidden_states=True).hidden_states\n"
        "        print(folder, type(each).__name__, None if states is None else len(states))"
    )
    folders = [str(tmp_path / family) for family in FAMILIES]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = [line.rsplit(" ", 2)[1:] for line in done.stdout.splitlines()]
    assert len(counts) == 2 * len(FAMILIES) and all(count == "3" for _, count in counts), counts


def test_what_cannot_be_converted_is_refused():
    small = OPTForCausalLM(
        OPTConfig(vocab_size=120, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8)
    )
    with pytest.raises(ValueError, match=r"OPTForCausalLM cannot .* known are RobertaModel, BertModel, .* with a head"):
        replace_embeddings(small, TABLE)
    with pytest.raises(ValueError, match="codes of 130 tokens for a model of 120"):
        replace_embeddings(plain_model("bert", "bare"), positional_codes(130, 3))
    decoder = AutoModel.from_config(AutoConfig.for_model("bert", is_decoder=True, **SIZE))
    with pytest.raises(ValueError, match="set up as a decoder"):
        replace_embeddings(decoder, TABLE)
    with pytest.raises(ValueError, match="has no plain form BertModel"):
        to_plain(replace_embeddings(plain_model("roberta", "bare"), TABLE), type(plain_model("bert", "bare")))


def test_rows_that_are_added_later_change_nothing_and_keep_those_there(tmp_path):
    ids, mask, _ = batch()
    source = plain_model("bert")
    model = replace_embeddings(source, CodeTable(TABLE.codes, TABLE.table_sizes, dedicated=[7, 50]))
    with torch.no_grad():
        model.get_input_embeddings().dedicated_rows.normal_()
    before, labelled = outputs(model, ids, mask), model(ids, labels=ids).loss
    layer = model.add_dedicated_rows([50, 3])
    assert model.code_table().dedicated.tolist() == [3, 7, 50] and model.config.num_dedicated == 3
    assert torch.equal(outputs(model, ids, mask), before)
    torch.testing.assert_close(model(ids, labels=ids).loss, labelled)
    model(ids, labels=ids).loss.backward()
    assert layer.dedicated_rows.grad is not None and layer.dedicated_rows.requires_grad
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForMaskedLM.from_pretrained(tmp_path).eval(), ids, mask), before)
    plain = replace_embeddings(source, TABLE)
    assert plain.add_dedicated_rows([]) is plain.get_input_embeddings() and plain.config.num_dedicated == 0
    with pytest.raises(ValueError, match="dedicated token 120 is not in"):
        plain.add_dedicated_rows([120])
