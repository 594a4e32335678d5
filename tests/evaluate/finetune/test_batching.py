"""Batches of rows of about one length: every row once an epoch, next to nothing padded."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.evaluate.finetune.batching import scoring_batches, training_batches


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 700), st.integers(1, 40), st.integers(0, 3))
def test_every_row_once_an_epoch(count: int, size: int, epoch: int) -> None:
    lengths = np.random.default_rng(count).integers(4, 128, count)
    batches = training_batches(lengths, size, seed=0, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1) and len(batches) == -(-count // size)
    again = training_batches(lengths, size, seed=0, epoch=epoch)
    assert all((one == other).all() for one, other in zip(batches, again, strict=True))
    scoring = list(scoring_batches(lengths, 512))
    assert sorted(np.concatenate(scoring).tolist()) == list(range(count))
    assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= 512 for rows in scoring)


def test_little_is_padded_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).gamma(4, 12, 15_000).clip(6, 128).astype(int)  # about XNLI's
    batches = training_batches(lengths, 32, seed=0, epoch=0)
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert padded / lengths.sum() < 1.06
    other = training_batches(lengths, 32, seed=0, epoch=1)
    assert any((one != two).any() for one, two in zip(batches, other, strict=False) if len(one) == len(two))
