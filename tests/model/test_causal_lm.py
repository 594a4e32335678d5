"""Causal models over sub-embeddings: loss, gradients and generation are those of the dense model, without N logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from ksub_ds import CodeTable, compress, positional_codes, replace_embeddings
from ksub_ds.model.causal_lm import KSubLlamaConfig, KSubLlamaForCausalLM
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.replacement import to_plain

N = 120
SIZE = {"vocab_size": N, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZE |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
FAMILIES = {
    "llama": ("llama", SIZE),
    "llama, untied": ("llama", SIZE | {"tie_word_embeddings": False, "pad_token_id": 0}),
    "mistral": ("mistral", SIZE | {"sliding_window": 6}),
    "qwen3": ("qwen3", SIZE | {"head_dim": 8, "pad_token_id": 119}),
    "gemma3": (
        "gemma3_text",
        SIZE | {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("gpt2", {"vocab_size": N, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
TABLE = CodeTable(np.random.default_rng(0).permutation(positional_codes(N, 3).codes), [5, 5, 5])


def plain_model(family):
    torch.manual_seed(0)
    name, fields = FAMILIES[family]
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if name == "gpt2" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields, **dropout)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def coded(family):
    model = replace_embeddings(plain_model(family), TABLE)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.decoder_embedding()}:
            for table in layer.tables:
                table *= 10  # logits that differ
    return model


def left_padded():
    ids = torch.randint(5, N - 1, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ids[1, :5] = 0
    return ids, mask


def to_tables(gradient, layer):
    """The gradients of the tables that a gradient of the N x d matrix means."""
    parts = gradient.split(layer.widths, dim=1)
    pairs = enumerate(zip(parts, layer.tables, strict=True))
    return [torch.zeros_like(table).index_add_(0, layer.codes[:, k].long(), part) for k, (part, table) in pairs]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_dense_model_in_float64(family):
    model = coded(family).double().train()
    plain = to_plain(model)
    ids, mask = left_padded()
    labels = torch.where(mask == 1, ids, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    logits = plain(ids, attention_mask=mask).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    name = model.embedding_name()
    theirs = dict(plain.named_parameters())
    wanted = {
        f"{name}.tables.{k}": each
        for k, each in enumerate(to_tables(theirs.pop(f"{name}.weight").grad, model.get_input_embeddings()))
    }
    if not plain.config.tie_word_embeddings:
        own = to_tables(theirs.pop("lm_head.weight").grad, model.decoder_embedding())
        wanted |= {f"lm_head.embedding.tables.{k}": each for k, each in enumerate(own)}
    wanted |= {name: each.grad for name, each in theirs.items()}
    ours = {name: each.grad for name, each in model.named_parameters()}
    assert ours.keys() == wanted.keys()
    for each, gradient in wanted.items():
        torch.testing.assert_close(ours[each], gradient, rtol=2e-5, atol=2e-6 * gradient.abs().max().item(), msg=each)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_a_mask_are_whole_sequences(family):
    model = coded(family).train()
    ids = torch.randint(5, N - 1, (3, 12), generator=torch.Generator().manual_seed(1))
    output = model(ids, labels=ids)
    assert output.past_key_values is None
    torch.testing.assert_close(output.loss, model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(model(ids, labels=ids).loss, output.loss)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20, "temperature": 0.8},
    ],
    ids=["greedy", "no cache", "beams", "sampling"],
)
def test_generation_is_token_for_token_that_of_the_dense_model(family, how):
    model = coded(family).double()
    plain = to_plain(model)
    ids, mask = left_padded()
    given = {"attention_mask": mask, "max_new_tokens": 14, "pad_token_id": 0, "eos_token_id": 3} | how
    found = []
    for each in (plain, model):
        torch.manual_seed(5)
        found.append(each.generate(ids, **given))
    assert torch.equal(*found) and found[0].shape[1] > ids.shape[1]


def test_generation_asks_for_the_logits_of_one_position(monkeypatch):
    model, seen = coded("llama"), []
    logits = SubEmbedding.logits
    monkeypatch.setattr(
        SubEmbedding, "logits", lambda self, *given: seen.append(given[0].shape) or logits(self, *given)
    )
    ids, mask = left_padded()
    model.generate(ids, attention_mask=mask, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    assert seen == [(3, 1, 32)] * 4


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements of any tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for each in torch.utils._pytree.tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.numel())
        return result


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("codes", ["positional", "shuffled"])
def test_training_makes_no_tensor_of_tokens_times_positions(codes, bias):
    table = positional_codes(30_000, 3)
    if codes == "shuffled":
        table = CodeTable(np.random.default_rng(0).permutation(table.codes), table.table_sizes)
    model = KSubLlamaForCausalLM(KSubLlamaConfig(**SIZE | {"vocab_size": 30_000}, decoder_bias=bias), table).train()
    ids = torch.randint(30_000, (4, 64))
    with LargestTensor() as watch:
        model(ids, labels=ids, loss_reduction="sum", output_correct=True).loss.backward()
        model.score_labels(input_ids=ids, labels=ids)
    assert watch.largest < 30_000 * ids.numel() / 8, "far below N x positions"
    with LargestTensor() as watch:
        LlamaForCausalLM(model.config)(ids, labels=ids).loss.backward()
    assert watch.largest >= 30_000 * ids.numel(), "the watch sees the logits of a plain model"


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_and_auto_classes(family, tmp_path):
    model, plain_class = coded(family), type(plain_model(family))
    ids, mask = left_padded()
    expected = model(ids, attention_mask=mask).logits
    assert not any(N in each.shape for each in model.parameters()), "no N x d left"
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(model) and torch.equal(again(ids, attention_mask=mask).logits, expected)
    plain = to_plain(model)
    assert type(plain) is plain_class
    plain.save_pretrained(tmp_path / "plain")
    read = plain_class.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(read(ids, attention_mask=mask).logits, expected)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        plain_class.from_pretrained(tmp_path / "ours")

    # The bare network, and a head put on it again.
    bare = AutoModel.from_pretrained(tmp_path / "ours").eval()
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(states) == 3 and torch.equal(bare(ids, attention_mask=mask).last_hidden_state, states[-1])
    bare.save_pretrained(tmp_path / "bare")
    headed = AutoModelForCausalLM.from_pretrained(tmp_path / "bare").eval()
    assert torch.equal(headed.decoder_embedding().codes, model.decoder_embedding().codes)
    if model.config.tie_word_embeddings:
        assert torch.equal(headed(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_tokens_and_other_codes(family):
    model = coded(family)
    ids, mask = left_padded()
    before = model(ids, attention_mask=mask).logits
    model.resize_token_embeddings(N + 5)
    after = model(ids, attention_mask=mask).logits
    assert after.shape[-1] == model.config.vocab_size == N + 5 and torch.equal(after[..., :N], before)
    assert model(torch.full((1, 3), N + 4), labels=torch.full((1, 3), N + 4)).loss.isfinite()
    fewer = replace_embeddings(model, positional_codes(N, 2))
    assert type(fewer) is type(model) and fewer(ids, labels=ids).loss.isfinite()
    assert fewer.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("family", [family for family in FAMILIES if "gpt2" not in family])
def test_in_bf16_the_rotary_frequencies_stay_float32(family, tmp_path):
    """As transformers loads a model: rounded, they give wrong angles at late positions."""
    plain_model(family).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = frequencies(loaded)
    ours = replace_embeddings(loaded, TABLE, mixing=True)
    assert {each.dtype for each in wanted.values()} == {torch.float32} and ours.dtype == torch.bfloat16
    for each in (ours, to_plain(ours)):
        found = frequencies(each)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        stored = [value for value in each.state_dict().values() if value.is_floating_point()]
        assert {value.dtype for value in stored} == {torch.bfloat16}


def frequencies(model):
    return {name: value for name, value in model.named_buffers() if "inv_freq" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_a_token_is_the_plain_model(family):
    plain = plain_model(family)
    ids, mask = left_padded()
    same = compress(plain, positional_codes(N, 1))
    torch.testing.assert_close(same(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_input_is_scaled_as_transformers_scales_it(dtype):
    model = coded("gemma3").to(dtype)
    ids, _ = left_padded()
    assert torch.equal(model.get_input_embeddings()(ids), to_plain(model).get_input_embeddings()(ids))


def test_a_bias_per_token(tmp_path):
    model = KSubLlamaForCausalLM(KSubLlamaConfig(**SIZE, decoder_bias=True), TABLE).eval()
    ids, _ = left_padded()
    without = model(ids).logits
    with torch.no_grad():
        model.decoder_bias.copy_(torch.randn(N))
    logits = model(ids).logits
    torch.testing.assert_close(logits, without + model.decoder_bias)
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, logits)
    model.resize_token_embeddings(N + 1)
    torch.testing.assert_close(model.decoder_bias[N], model.decoder_bias[:N].mean())
    with pytest.raises(ValueError, match=r"bias per token .* has no plain form"):
        to_plain(model)


def test_what_evaluation_returns():
    model = coded("llama")
    ids, mask = left_padded()
    labels = torch.where(mask == 1, ids, -100)
    best = model(ids, attention_mask=mask).logits[:, :-1].argmax(2)
    output = model(ids, attention_mask=mask, labels=labels, output_correct=True, output_predictions=True)
    assert output.logits is None and output.past_key_values is None
    wanted = torch.full_like(ids, -100)
    wanted[:, 1:] = torch.where(labels[:, 1:] == -100, -100, best)
    assert torch.equal(output["predictions"], wanted)
    assert output["correct"] == (best == labels[:, 1:]).sum()
    total = model(ids, attention_mask=mask, labels=labels, loss_reduction="sum").loss
    scaled = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(7))
    torch.testing.assert_close(scaled.loss, total / 7)
    assert torch.equal(scaled["predictions"], wanted)
    logits = model(ids).logits
    each, mask = torch.tensor([[0, 2], [1, 1], [3, 0]]), torch.zeros(ids.shape, dtype=torch.bool)
    mask[1, 2] = True
    for keep, expected in (
        (2, logits[:, -2:]),
        (torch.tensor([1, 3]), logits[:, [1, 3]]),
        (each, logits[torch.arange(3)[:, None], each]),
        (mask, logits[mask]),
    ):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected)
    assert model(ids, return_dict=False)[0].shape == (3, 12, N)
    with pytest.raises(ValueError, match="needs labels"):
        model(ids, output_predictions=True)


def test_the_trainer_learns_the_same_however_a_step_is_cut(tmp_path):
    rows = [
        {"input_ids": row, "labels": row}
        for row in torch.randint(N, (8, 12), generator=torch.Generator().manual_seed(3))
    ]
    for row in rows[:4]:
        row["labels"] = torch.where(torch.arange(12) < 9, -100, row["labels"])  # steps of unequal halves

    def trained(batch_size, model):
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch_size, gradient_accumulation_steps=8 // batch_size,
            max_steps=1, report_to=[], save_strategy="no", use_cpu=True, optim="sgd", learning_rate=0.5,
            disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        return dict(model.named_parameters())

    whole, halves = trained(8, coded("llama")), trained(4, coded("llama"))
    torch.testing.assert_close(halves, whole)
    theirs = trained(4, to_plain(coded("llama")))  # as transformers trains the plain model
    torch.testing.assert_close(
        halves["model.layers.0.mlp.up_proj.weight"], theirs["model.layers.0.mlp.up_proj.weight"], rtol=1e-3, atol=1e-4
    )


def test_what_cannot_be_done_is_refused():
    config = AutoConfig.for_model("gemma3_text", **FAMILIES["gemma3"][1], final_logit_softcapping=30.0)
    with pytest.raises(ValueError, match="tanh of a sum of table scores does not factor"):
        replace_embeddings(AutoModelForCausalLM.from_config(config), TABLE)
    config = AutoConfig.for_model("gemma3_text", **FAMILIES["gemma3"][1], use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="use_bidirectional_attention makes it no causal model"):
        replace_embeddings(AutoModel.from_config(config), TABLE)
    config = AutoConfig.for_model("gpt2", **FAMILIES["gpt2"][1], add_cross_attention=True)
    with pytest.raises(ValueError, match="with cross-attention"):
        replace_embeddings(GPT2LMHeadModel(config), TABLE)


def test_a_large_padding_id_builds_no_row_for_each_id_below():
    with LargestTensor() as watch:
        model = KSubLlamaForCausalLM(
            KSubLlamaConfig(**SIZE | {"vocab_size": 8000}, pad_token_id=7999), positional_codes(8000, 3)
        )
    assert model.get_input_embeddings().padding_idx == model.generation_config.pad_token_id == 7999
    assert watch.largest < 8000 * 32
