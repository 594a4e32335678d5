"""Batches: the same global batch on any number of ranks, and held-out batches that never change."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.corpus.batches import HeldOutBatches, TrainingBatches
from ksub_ds.corpus.masking import IGNORE
from ksub_ds.corpus.shards.dataset import ShardDataset


@pytest.fixture(scope="module")
def dataset(tiny_shards: Path) -> ShardDataset:
    return ShardDataset.open(tiny_shards)


def restore(batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.where(batch["labels"] == IGNORE, batch["input_ids"], batch["labels"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 200), st.sampled_from([1, 2, 3, 6]), st.sampled_from([0.3, 1.0]))
def test_ranks_share_one_global_batch(dataset: ShardDataset, step: int, ranks: int, alpha: float) -> None:
    """The step may cross the edge of an epoch."""
    whole = TrainingBatches(dataset, 12, alpha, seed=1, mlm_probability=0.15).batch(step, 0, 12)
    share = 12 // ranks
    parts = [
        TrainingBatches(dataset, 12, alpha, seed=1, mlm_probability=0.15).batch(step, rank * share, (rank + 1) * share)
        for rank in range(ranks)
    ]
    for key in ("input_ids", "labels"):
        assert (np.concatenate([part[key] for part in parts]) == whole[key]).all()


def test_an_epoch_holds_every_row_once(dataset: ShardDataset) -> None:
    batches = TrainingBatches(dataset, 8, 1.0, seed=3, mlm_probability=0.15)
    steps = -(-batches.sampler.epoch_size // 8)
    seen = np.concatenate([restore(batches.batch(step, 0, 8)) for step in range(steps)])[: batches.sampler.epoch_size]
    rows = np.concatenate([dataset.rows("train", language) for language in dataset.languages])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, rows.tolist()))


def test_padding_is_masked_out_and_never_predicted(dataset: ShardDataset) -> None:
    batches = TrainingBatches(dataset, dataset.num_sequences("train", "en") * 2, 1.0, seed=0, mlm_probability=0.9)
    batch = batches.batch(0, 0, batches.global_batch_size)
    padding = restore(batch) == dataset.manifest["tokenizer"]["pad_id"]
    assert padding.any()
    assert (batch["attention_mask"] == ~padding).all() and (batch["labels"][padding] == IGNORE).all()
    padded = padding.any(axis=1)
    some = int(np.flatnonzero(~padded)[0])
    assert "attention_mask" not in batches.batch(0, some, some + 1)


def test_held_out_masks_are_fixed(dataset: ShardDataset) -> None:
    batches = list(HeldOutBatches(dataset, 10, 0.15, batch_size=4))
    again = list(HeldOutBatches(dataset, 10, 0.15, batch_size=4))
    assert len(batches) == len(HeldOutBatches(dataset, 10, 0.15, batch_size=4))
    for (language, one), (same, two) in zip(batches, again, strict=True):
        assert language == same and all((one[key] == two[key]).all() for key in one)
    assert {language for language, _ in batches} == {"el", "en", "tr"}
    counts = {lang: sum(len(b["labels"]) for language, b in batches if language == lang) for lang in ("el", "en", "tr")}
    assert counts == {lang: min(10, dataset.num_sequences("validation", lang)) for lang in counts}
    # Taking all of a language takes each row once.
    rows = dataset.rows("validation", "en")
    seen = np.concatenate([restore(b) for language, b in HeldOutBatches(dataset, 10**6, 0.15) if language == "en"])
    assert (seen == rows).all()
