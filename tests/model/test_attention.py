"""Full rows reach torch's attention without a mask, so that it may take its flash kernel."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ksub_ds import positional_codes
from ksub_ds.model.families import KSubBertConfig, KSubDistilBertConfig, KSubElectraConfig
from ksub_ds.model.presets import fresh_model, preset_config

SIZES: dict[str, Any] = {"vocab_size": 90, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "roberta": preset_config("tiny", vocab_size=90),
    "bert": KSubBertConfig(**SIZES),
    "electra": KSubElectraConfig(**SIZES, embedding_size=24),
    "distilbert": KSubDistilBertConfig(vocab_size=90, dim=24, n_layers=2, n_heads=2),
    "modernbert": preset_config("small_modernbert", vocab_size=90, local_attention=32),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_full_rows_have_no_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[bool] = []
    attention = F.scaled_dot_product_attention

    def recorded(*arguments: Any, attn_mask: Any = None, **keywords: Any) -> Any:
        masks.append(attn_mask is not None)
        return attention(*arguments, attn_mask=attn_mask, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    model = fresh_model(CONFIGS[family], positional_codes(90, 2))
    assert model.config._attn_implementation == "sdpa", "transformers' choice"
    rows = torch.randint(5, 90, (2, 40))
    model(input_ids=rows, labels=rows)
    # Local attention is a mask where rows are longer than its window; the layers that see all have none.
    local = [kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or []]
    assert masks == (local or [False] * model.config.num_hidden_layers)
    masks.clear()
    padding = torch.ones_like(rows)
    padding[0, -3:] = 0
    model(input_ids=rows, labels=rows, attention_mask=padding)
    assert all(masks) and masks
