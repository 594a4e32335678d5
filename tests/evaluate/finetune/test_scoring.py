"""Batches that are scored: every row once, none larger than asked for."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.evaluate.finetune.scoring import scoring_batches


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 700))
def test_every_row_is_scored_once(count: int) -> None:
    lengths = np.random.default_rng(count).integers(4, 128, count)
    batches = list(scoring_batches(lengths, 512))
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= 512 for rows in batches)
