"""Held-out loss and masked accuracy per language, against dense logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, positional_codes
from ksub_ds.corpus.batches import HeldOutBatches
from ksub_ds.corpus.masking import MaskingRule
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.pretrain import heldout_eval
from ksub_ds.pretrain.heldout_eval import evaluate, held_out_languages


@pytest.fixture(scope="module")
def dataset(tiny_shards: Path) -> ShardDataset:
    return ShardDataset.open(tiny_shards)


@pytest.fixture(scope="module")
def model(dataset: ShardDataset) -> KSubRobertaForMaskedLM:
    torch.manual_seed(0)
    size = dataset.manifest["tokenizer"]["vocab_size"]
    model = KSubRobertaForMaskedLM(KSubRobertaConfig.tiny(vocab_size=size), positional_codes(size, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.train()


def test_each_language_has_the_scores_of_its_dense_logits(
    dataset: ShardDataset, model: KSubRobertaForMaskedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = HeldOutBatches(dataset, 12, 0.15, batch_size=4)
    languages = held_out_languages(dataset)
    scores = evaluate(model, batches, languages)
    assert model.training and list(scores["languages"]) == languages
    sums = {language: np.zeros(3) for language in languages}
    model.eval()
    for language, batch in batches:
        inputs = {key: torch.from_numpy(array) for key, array in batch.items()}
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = model(**inputs).logits[labels != -100]
        targets = labels[labels != -100]
        loss = F.cross_entropy(logits.double(), targets, reduction="sum")
        sums[language] += [loss.item(), (logits.argmax(1) == targets).sum().item(), len(targets)]
    for language, (loss, correct, count) in (sums | {None: sum(sums.values())}).items():
        ours = scores if language is None else scores["languages"][language]
        assert ours["loss"] == pytest.approx(loss / count, rel=1e-6)
        assert ours["masked_accuracy"] == correct / count
        assert language is None or ours["count"] == count

    # Filled up to a fixed number of positions, as for a GPU: the same.
    seen = []

    def padded(batch: dict[str, np.ndarray], rule: MaskingRule, fixed_shapes: bool) -> dict[str, np.ndarray]:
        assert not fixed_shapes, "a CPU needs no fixed number"
        seen.append(inputs := model_inputs(batch, rule, True))
        return inputs

    model_inputs = heldout_eval.model_inputs
    monkeypatch.setattr(heldout_eval, "model_inputs", padded)
    again = evaluate(model.train(), batches, languages)
    assert all(len(inputs["targets"]) == 128 for inputs in seen)
    assert again["loss"] == pytest.approx(scores["loss"], rel=1e-6)
    assert again["masked_accuracy"] == scores["masked_accuracy"]
