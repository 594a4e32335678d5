"""Rows of pairs among the batches: exact shares, rank-free, positions that start again, and nothing else moved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.batches import HeldOutBatches, PairSettings, Sampler, TrainingBatches
from ksub_ds.corpus.masking import IGNORE
from ksub_ds.corpus.shards.dataset import ShardDataset

SIZE = 12


@pytest.fixture(scope="module")
def dataset(pair_shards: Path) -> ShardDataset:
    return ShardDataset.open(pair_shards)


def batches_of(dataset: ShardDataset, share: float, **more: Any) -> TrainingBatches:
    return TrainingBatches(dataset, SIZE, 0.7, 1, 0.15, PairSettings(share, **more))


def restore(batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.where(batch["labels"] == IGNORE, batch["input_ids"], batch["labels"])


def which_are_pairs(dataset: ShardDataset, batch: dict[str, np.ndarray]) -> np.ndarray:
    known = {tuple(row) for pair in dataset.pairs for row in dataset.rows("train", pair).tolist()}
    return np.array([tuple(row) in known for row in restore(batch).tolist()])


def test_share_0_is_the_stream_without_pairs(dataset: ShardDataset, tiny_shards: Path) -> None:
    without = TrainingBatches(ShardDataset.open(tiny_shards), SIZE, 0.7, 1, 0.15)
    for step in (0, 7, 1000):
        one, two = without.batch(step, 0, SIZE), batches_of(dataset, 0.0).batch(step, 0, SIZE)
        assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)
    # Recorded before there were pairs: the stream of a run that began then goes on.
    assert Sampler({"en": 40, "sw": 5}, 0.3, 7).samples(9, 8)[2].tolist() == [42, 40, 9, 27, 34, 40, 18, 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 6]), st.sampled_from([0.001, 0.25, 1 / 3, 0.9, 1.0]))
def test_ranks_share_one_global_batch(dataset: ShardDataset, step: int, ranks: int, share: float) -> None:
    whole = batches_of(dataset, share).batch(step, 0, SIZE)
    part = SIZE // ranks
    parts = [batches_of(dataset, share).batch(step, rank * part, (rank + 1) * part) for rank in range(ranks)]
    for key in ("input_ids", "labels", "position_ids"):
        assert (np.concatenate([each[key] for each in parts]) == whole[key]).all()
    assert abs(which_are_pairs(dataset, whole).sum() - share * SIZE) <= 1


@pytest.mark.parametrize("share", [0.25, 0.4, 1.0])
def test_every_row_once_an_epoch_of_its_kind(dataset: ShardDataset, share: float) -> None:
    batches = TrainingBatches(dataset, SIZE, 1.0, 5, 0.15, PairSettings(share))
    total = sum(dataset.num_sequences("train", pair) for pair in dataset.pairs)
    steps = int(total / share / SIZE) + 2
    made = [batches.batch(step, 0, SIZE) for step in range(steps)]
    pairs, others = [], []
    for batch in made:
        for row, is_pair in zip(restore(batch).tolist(), which_are_pairs(dataset, batch), strict=True):
            (pairs if is_pair else others).append(tuple(row))
    rows = [tuple(row) for pair in dataset.pairs for row in dataset.rows("train", pair).tolist()]
    assert sorted(pairs[:total]) == sorted(rows)
    assert len(pairs) == int(steps * SIZE * share)
    # The other rows come in the order that they have without pairs.
    alone = TrainingBatches(dataset, SIZE, 1.0, 5, 0.15)
    stream = np.concatenate([restore(alone.batch(step, 0, SIZE)) for step in range(steps)]).tolist()
    assert others == list(map(tuple, stream[: len(others)]))


def test_both_sides_are_masked_and_positions_start_again(dataset: ShardDataset) -> None:
    batches = batches_of(dataset, 0.5, first_position=2)
    tokenizer = dataset.manifest["tokenizer"]
    sides = np.zeros(2)
    for step in range(20):
        batch = batches.batch(step, 0, SIZE)
        rows, is_pair = restore(batch), which_are_pairs(dataset, batch)
        for row, places, labels, pair in zip(rows, batch["position_ids"], batch["labels"], is_pair, strict=True):
            real = row != tokenizer["pad_id"]
            assert (places[~real] == 1).all()  # RoBERTa's position of padding
            if not pair:
                assert (places[real] == np.arange(2, 2 + real.sum())).all()
                continue
            second = next(i for i in range(1, len(row)) if row[i] == row[i - 1] == tokenizer["eos_id"])
            end = second + 1 + int(np.argmax(row[second + 1 :] == tokenizer["eos_id"]))
            assert (places[:second] == np.arange(2, 2 + second)).all()
            assert (places[second : end + 1] == np.arange(2, 3 + end - second)).all()
            sides += (labels[:second] != IGNORE).sum(), (labels[second:end] != IGNORE).sum()
    assert (sides > 50).all()
    assert "position_ids" not in batches_of(dataset, 0.5, reset_positions=False).batch(0, 0, SIZE)


def test_held_out_pairs(dataset: ShardDataset) -> None:
    alone = list(HeldOutBatches(dataset, 5, 0.15, batch_size=4))
    batches = list(HeldOutBatches(dataset, 5, 0.15, batch_size=4, pairs=PairSettings(0.1, first_position=2)))
    assert {name for name, _ in alone} == set(dataset.languages)
    assert {name for name, _ in batches} == {*dataset.languages, *dataset.pairs}
    for (language, one), (same, two) in zip(alone, batches, strict=False):
        assert language == same and all((one[key] == two[key]).all() for key in one)
    for pair in dataset.pairs:
        restored = np.concatenate([restore(batch) for name, batch in batches if name == pair])
        assert {*map(tuple, restored.tolist())} <= {*map(tuple, dataset.rows("validation", pair).tolist())}


def test_no_pairs_is_refused(tiny_shards: Path) -> None:
    with pytest.raises(UserError, match="holds no pairs"):
        batches_of(ShardDataset.open(tiny_shards), 0.5)
