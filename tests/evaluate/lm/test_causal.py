"""Scores of windows against float64 softmaxes of whole rows, for heads of many kinds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from ksub_ds.common.errors import UserError
from ksub_ds.evaluate.lm import causal
from ksub_ds.evaluate.lm.causal import CausalScorer, check_causal
from ksub_ds.evaluate.lm.tokens import windows

TOKENS = 61
SMALL = {"vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WITH_FFN = {**SMALL, "intermediate_size": 24}
CONFIGS = {
    "llama": LlamaConfig(**WITH_FFN, num_key_value_heads=1),
    "gpt2": GPT2Config(vocab_size=TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "soft-capped": Gemma2Config(**WITH_FFN, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5),
    "scaled": GraniteConfig(**WITH_FFN, num_key_value_heads=1, logits_scaling=3.0),
    "other name of the head": GPTNeoXConfig(**WITH_FFN),
    "recurrent": MambaConfig(vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4),
}


def saved(config: Any, folder: Path) -> Any:
    """A model with random weights large enough that soft caps and scales show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def expected(model: Any, document: np.ndarray, window: int, context: int) -> float:
    """Whole rows through the whole model, and the softmax in float64."""
    total = 0.0
    for part in windows(len(document), window, context):
        logits = model(torch.from_numpy(document[part.begin : part.end])[None]).logits[0].double()
        for token in range(part.first, part.end + 1):
            total -= float(torch.log_softmax(logits[token - 1 - part.begin], dim=0)[document[token]])
    return total


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("apart", [True, False])
def test_sums_are_those_of_float64(kind: str, apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(CONFIGS[kind], tmp_path)
    monkeypatch.setitem(causal.BLOCK_NUMBERS, "cpu", 5 * TOKENS)  # five rows of logits at a time
    scorer = CausalScorer(str(tmp_path), "fp32", torch.device("cpu"))
    assert scorer._has_head_apart, "the check at opening finds the head"
    scorer._has_head_apart = apart
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, TOKENS, length) for length in (2, 9, 40)]
    parts = [(number, part) for number, ids in enumerate(documents) for part in windows(len(ids), 16, 4)]
    found = scorer.nats(documents, parts)
    sums = [sum(found[i] for i, (number, _) in enumerate(parts) if number == document) for document in range(3)]
    # The network is in float32; Mamba's recurrence loses most in it, on some processors.
    tolerance = 2e-5 if kind == "recurrent" else 2e-6
    assert sums == pytest.approx([expected(model, ids, 16, 4) for ids in documents], rel=tolerance)


def test_logits_of_a_batch_are_never_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(CONFIGS["llama"], tmp_path)
    monkeypatch.setitem(causal.BLOCK_NUMBERS, "cpu", 7 * TOKENS)
    scorer = CausalScorer(str(tmp_path), "fp32", torch.device("cpu"))
    rows: list[int] = []
    scorer._model.lm_head.register_forward_hook(lambda module, given, made: rows.append(made.numel() // TOKENS))
    ids = np.arange(40) % TOKENS
    scorer.nats([ids, ids], [(number, part) for number in (0, 1) for part in windows(40, 32, 8)])
    assert max(rows) == 7 and sum(rows) == 2 * 39


def test_bf16_is_near_and_the_head_stays_float32(tmp_path: Path) -> None:
    saved(CONFIGS["llama"], tmp_path)
    ids = np.arange(30) % TOKENS
    parts = [(0, part) for part in windows(30, 32, 8)]
    one, other = (CausalScorer(str(tmp_path), each, torch.device("cpu")) for each in ("fp32", "bf16"))
    types = []
    other._model.lm_head.register_forward_hook(lambda module, given, made: types.append(made.dtype))
    assert other.nats([ids], parts) == pytest.approx(one.nats([ids], parts), rel=0.05)
    assert not np.array_equal(other.nats([ids], parts), one.nats([ids], parts))
    assert set(types) == {torch.float32}


def test_models_without_a_probability_of_text_are_refused(tmp_path: Path) -> None:
    tiny = {"vocab_size": TOKENS, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    bert = BertConfig(**WITH_FFN)
    for model, message in (
        (BertForMaskedLM(bert), "is a masked language model or its encoder (bert)"),
        (T5ForConditionalGeneration(T5Config(**tiny)), "is an encoder-decoder (t5)"),
        (
            XLNetLMHeadModel(XLNetConfig(vocab_size=TOKENS, d_model=16, n_layer=1, n_head=2, d_inner=16)),
            "is a model that transformers has no causal form of (xlnet)",
        ),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        with pytest.raises(UserError) as error:
            check_causal(str(folder))
        assert message in str(error.value) and "give a causal model" in str(error.value)
    decoder = BertConfig(**WITH_FFN, is_decoder=True)
    AutoModelForCausalLM.from_config(decoder).save_pretrained(tmp_path / "decoder")
    assert check_causal(str(tmp_path / "decoder")).is_decoder


def test_absent_weights_are_refused(tmp_path: Path) -> None:
    model = saved(CONFIGS["llama"], tmp_path)
    model.model.save_pretrained(tmp_path, state_dict={"embed_tokens.weight": model.model.embed_tokens.weight})
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="weights are absent, for example"):
        CausalScorer(str(tmp_path), "fp32", torch.device("cpu"))
