"""PEFT over our models: its defaults, embeddings that are trained as a whole, tokens that have no row."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, positional_codes
from ksub_ds.model.families import KSubModernBertConfig, KSubModernBertForMaskedLM

IDS = torch.arange(5, 29).reshape(2, 12)


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is optional: pip install peft")


def model(seed: int = 0) -> KSubRobertaForMaskedLM:
    torch.manual_seed(seed)
    return KSubRobertaForMaskedLM(KSubRobertaConfig.tiny(vocab_size=100), positional_codes(100, 3)).eval()


def trainable(adapted: Any) -> set[str]:
    return {name.split(".lora_")[0].split(".")[-1] for name, each in adapted.named_parameters() if each.requires_grad}


def test_lora_has_default_targets(peft: Any) -> None:
    assert trainable(peft.get_peft_model(model(), peft.LoraConfig())) == {"query", "value"}
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    modern = KSubModernBertForMaskedLM(KSubModernBertConfig(vocab_size=100, **small), positional_codes(100, 3))
    assert trainable(peft.get_peft_model(modern, peft.LoraConfig())) == {"Wqkv"}
    assert peft.get_peft_model(model(), peft.IA3Config()).base_model is not None


def test_a_trained_embedding_is_used_at_both_ends_and_comes_back(peft: Any, tmp_path: Path) -> None:
    adapted = peft.get_peft_model(model(), peft.LoraConfig(modules_to_save=["word_embeddings"]))
    layer = adapted.base_model.model.get_input_embeddings()
    assert all(table.requires_grad for table in layer.tables)
    with torch.no_grad():
        before = adapted(IDS).logits
        for table in layer.tables:
            table.zero_()
        after = adapted(IDS).logits
        assert after.std(dim=-1).max() < 1e-6 < before.std(dim=-1).max()  # the decoder reads the same tables
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(IDS).logits, before)
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(model(), tmp_path)
        torch.testing.assert_close(again(IDS).logits, after)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, after)


def test_a_token_has_no_row_of_its_own_to_train(peft: Any) -> None:
    with pytest.raises(AttributeError, match=r"no token has one to itself .*trainable_token_indices"):
        peft.get_peft_model(model(), peft.LoraConfig(trainable_token_indices=[5]))
