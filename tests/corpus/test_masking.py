"""Masking: RoBERTa's shares, keyed by sequence alone, special tokens untouched."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.corpus.masking import (
    IGNORE,
    MaskingRule,
    mask_tokens,
    masked_positions,
    padded_count,
    sequence_keys,
)

RULE = MaskingRule(0.15, mask_id=999, special_ids=(0, 1, 2, 3, 999), vocab_size=1000)


def random_rows(rows: int, length: int = 512) -> np.ndarray:
    ids = np.random.default_rng(0).integers(4, 999, (rows, length)).astype(np.int32)
    ids[:, 0], ids[:, -1] = 0, 2
    return ids


def keys_of(count: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return sequence_keys(seed, np.full(count, epoch), np.arange(count))


def test_shares() -> None:
    ids = random_rows(2000)
    inputs, labels = mask_tokens(ids, keys_of(2000), RULE)
    chosen = labels != IGNORE
    ordinary = ~np.isin(ids, RULE.special_ids)
    count = chosen.sum()
    assert inputs.dtype == labels.dtype == np.int64
    # Five standard deviations of a binomial with a million tries.
    assert chosen[ordinary].mean() == pytest.approx(0.15, abs=5 * (0.15 * 0.85 / ordinary.sum()) ** 0.5)
    assert not chosen[~ordinary].any()
    assert (labels[chosen] == ids[chosen]).all() and (inputs[~chosen] == ids[~chosen]).all()
    masked, kept = inputs[chosen] == 999, inputs[chosen] == ids[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=5 * (0.16 / count) ** 0.5)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 995, abs=5 * (0.09 / count) ** 0.5)
    random = inputs[chosen][~masked & ~kept]
    assert not np.isin(random, RULE.special_ids).any()
    counts = np.bincount(random, minlength=1000)[4:999]
    assert counts.min() > 0  # every ordinary token comes up; about 15 times each
    assert counts.max() < 45
    # Positions are alike, and independent of their neighbours.
    by_position = chosen[:, 1:-1].mean(axis=0)
    assert by_position.std() == pytest.approx((0.15 * 0.85 / 2000) ** 0.5, rel=0.2)
    assert (chosen[:, 1:-2] & chosen[:, 2:-1]).mean() == pytest.approx(0.15**2, rel=0.05)


@settings(max_examples=50)
@given(st.integers(1, 20), st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True))
def test_a_sequence_is_masked_alike_in_any_batch(count: int, picked: list[int]) -> None:
    ids, keys = random_rows(20, 33), keys_of(20)
    whole = mask_tokens(ids, keys, RULE)
    part = mask_tokens(ids[picked], keys[picked], RULE)
    assert all((a[picked] == b).all() for a, b in zip(whole, part, strict=True))


def test_keys_differ_by_seed_epoch_and_draw() -> None:
    keys = [keys_of(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(np.unique(np.concatenate(keys))) == 9000
    first, second = (mask_tokens(random_rows(50), keys, RULE)[1] != IGNORE for keys in (keys_of(50), keys_of(50, 0, 1)))
    assert (first & second).mean() == pytest.approx(0.15**2, rel=0.2)  # another epoch, another mask


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_other_probabilities(probability: float, share: float) -> None:
    ids = random_rows(40)
    rule = MaskingRule(probability, RULE.mask_id, RULE.special_ids, RULE.vocab_size)
    labels = mask_tokens(ids, keys_of(40), rule)[1]
    assert (labels[:, 1:-1] != IGNORE).mean() == pytest.approx(share, abs=0.02)


def test_the_masks_are_these() -> None:
    """A change here changes every run that is resumed: say so in the changelog."""
    inputs, labels = mask_tokens(np.arange(256, dtype=np.int32).reshape(4, 64), keys_of(4, seed=7), RULE)
    digest = hashlib.sha256(inputs.astype("<i8").tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "945e75795c962a8e"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.floats(0, 1), st.one_of(st.none(), st.integers(0, 300)), st.data())
def test_positions_and_targets_are_the_labels(rows: int, length: int, share: float, count: int | None, data) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    labels = np.where(draw.random((rows, length)) < share, draw.integers(0, 1000, (rows, length)), IGNORE)
    labels = labels.astype(data.draw(st.sampled_from([np.int32, np.int64])))
    positions, targets = masked_positions(labels, count)
    masked = int((labels != IGNORE).sum())
    assert positions.dtype == targets.dtype == np.int64 and positions.shape == targets.shape
    if count is None:
        assert len(positions) == masked
    elif masked <= count:
        assert len(positions) == count
    else:
        assert len(positions) % 128 == 0 and 0 <= len(positions) - masked < 128
    back = np.full(labels.size, IGNORE)
    back[positions[:masked]] = targets[:masked]
    assert (back.reshape(labels.shape) == labels).all() and (np.diff(positions[:masked]) > 0).all()
    assert (positions[masked:] == 0).all() and (targets[masked:] == IGNORE).all()


def test_the_padded_count_holds_the_positions_of_nearly_every_batch() -> None:
    assert padded_count(64 * 512, 0.15) == 5248  # 4915.2 + 4 * 64.6 = 5173.7
    assert padded_count(8, 0.15) == padded_count(8, 1.0) == 128 and padded_count(8, 0.0) == 0
    assert padded_count(1000, 0.99) == 1024  # never more than there are tokens, rounded up
    drawn = np.random.default_rng(0).binomial(2048, 0.15, 100_000)
    assert (drawn > padded_count(2048, 0.15)).mean() < 1e-4
