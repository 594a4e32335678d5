"""Our causal models are scored by the loss that they sum themselves: equal to dense float64, without N logits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ksub_ds.codes.positional import positional_codes
from ksub_ds.evaluate.lm.causal import CausalScorer, check_causal
from ksub_ds.evaluate.lm.tokens import windows
from ksub_ds.model.causal_lm import KSubLlamaConfig, KSubLlamaForCausalLM
from ksub_ds.model.embedding import SubEmbedding

TOKENS = 61


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_sums_are_those_of_float64(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = KSubLlamaConfig(
        vocab_size=TOKENS, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = KSubLlamaForCausalLM(config, positional_codes(TOKENS, 3)).eval()
    for parameter in model.parameters():
        parameter.mul_(6)
    model.save_pretrained(tmp_path)
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, TOKENS, length) for length in (2, 9, 40)]
    parts = [(number, part) for number, ids in enumerate(documents) for part in windows(len(ids), 16, 4)]
    expected = []
    for number, part in parts:
        ids = documents[number]
        chances = torch.log_softmax(model(torch.from_numpy(ids[part.begin : part.end])[None]).logits[0].double(), -1)
        expected.append(-sum(float(chances[i - 1 - part.begin, ids[i]]) for i in range(part.first, part.end + 1)))

    def no_logits(*given: object) -> None:
        raise AssertionError("N logits are made")

    monkeypatch.setattr(SubEmbedding, "logits", no_logits)
    check_causal(str(tmp_path))
    found = CausalScorer(str(tmp_path), "fp32", torch.device("cpu")).nats(documents, parts)
    assert found == pytest.approx(expected, rel=2e-6)
