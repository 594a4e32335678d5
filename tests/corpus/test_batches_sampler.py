"""Sampling: a pure function of the step; each sequence once an epoch; smoothing that repeats evenly."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.common.errors import UserError
from ksub_ds.corpus import batches
from ksub_ds.corpus.batches import Sampler, language_quotas, permute

counts_of_languages = st.dictionaries(st.sampled_from(["ar", "en", "sw", "zh"]), st.integers(1, 60), min_size=1)


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Tests look at few samples; computing 32,768 at a time would be most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_BLOCK", 256)
        yield


def stream(sampler: Sampler, batch: int, steps: int) -> np.ndarray:
    return np.concatenate([sampler.samples(step, batch)[2] for step in range(steps)])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    values = np.arange(size)
    result = permute(values, np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert (np.sort(result) == values).all()


def test_permutations_look_random() -> None:
    size = 5000
    values = np.arange(size)
    results = [permute(values, np.full(size, size), np.full(size, key, dtype=np.uint64)) for key in (1, 2)]
    for result in results:
        assert abs(np.corrcoef(values, result)[0, 1]) < 0.05
        assert abs(np.corrcoef(result[1:], result[:-1])[0, 1]) < 0.05
        assert np.abs(np.diff(result)).mean() == pytest.approx(size / 3, rel=0.05)
    assert (results[0] == results[1]).sum() < 10


@settings(max_examples=40, deadline=None)
@given(counts_of_languages, st.integers(0, 100), st.integers(1, 50))
def test_every_sequence_once_an_epoch(counts: dict[str, int], seed: int, batch: int) -> None:
    sampler = Sampler(counts, 1.0, seed)
    total = sum(counts.values())
    assert sampler.epoch_size == total
    order = stream(sampler, batch, -(-2 * total // batch))
    for epoch in range(2):
        assert (np.sort(order[epoch * total : (epoch + 1) * total]) == np.arange(total)).all()
    if total > 20:
        assert (order[:total] != order[total : 2 * total]).any()  # shuffled anew


@settings(max_examples=30, deadline=None)
@given(counts_of_languages, st.floats(0.1, 1.0), st.integers(1, 40), st.integers(0, 50))
def test_a_step_is_a_function_of_its_number(counts: dict[str, int], alpha: float, batch: int, step: int) -> None:
    """Asked alone, out of order, or after others: the same. The batch size only cuts the stream."""
    used = Sampler(counts, alpha, 3)
    stream(used, 7, 5)
    fresh = Sampler(counts, alpha, 3)
    for one, other in zip(used.samples(step, batch), fresh.samples(step, batch), strict=True):
        assert (one == other).all()
    ones = np.concatenate([fresh.samples(step * batch + i, 1)[2] for i in range(batch)])
    assert (ones == fresh.samples(step, batch)[2]).all()
    epoch, draw, _ = fresh.samples(step, batch)
    assert (epoch * fresh.epoch_size + draw == step * batch + np.arange(batch)).all()


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stream(Sampler({"en": 50, "sw": 9}, 0.5, 1), 16, 20)
    monkeypatch.setattr(batches, "_BLOCK", 8)
    assert (stream(Sampler({"en": 50, "sw": 9}, 0.5, 1), 16, 20) == whole).all()


@settings(max_examples=40, deadline=None)
@given(counts_of_languages, st.floats(0.05, 0.95))
def test_smoothing_repeats_evenly(counts: dict[str, int], alpha: float) -> None:
    sampler = Sampler(counts, alpha, 5)
    total = sum(counts.values())
    seen = np.zeros(total, dtype=int)
    for _, _, sequences in [sampler.samples(epoch, total) for epoch in range(3)]:
        np.add.at(seen, sequences, 1)
    first = 0
    for language in sorted(counts):  # within a language no sequence is more than one use ahead of another
        part = seen[first : first + counts[language]]
        assert part.max() - part.min() <= 1
        first += counts[language]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=15), st.floats(0.01, 1.0))
def test_quotas(counts: list[int], alpha: float) -> None:
    sizes = np.array(counts)
    quotas = language_quotas(sizes, alpha)
    assert quotas.sum() == sizes.sum() and (quotas >= 1).all()
    exact = sizes**alpha / (sizes**alpha).sum() * sizes.sum()
    assert (np.abs(quotas - exact) <= len(counts)).all()


def test_quotas_by_hand() -> None:
    assert language_quotas(np.array([100, 400]), 0.5).tolist() == [167, 333]


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="alpha"):
        Sampler({"en": 3}, 0.0, 0)
    with pytest.raises(UserError, match="no sequences"):
        Sampler({"en": 0}, 1.0, 0)


def test_the_order_is_this() -> None:
    """A change here changes every run that is resumed: say so in the changelog."""
    assert Sampler({"en": 40, "sw": 5}, 1.0, 7).samples(3, 8)[2].tolist() == [24, 6, 29, 20, 26, 25, 14, 0]
    assert Sampler({"en": 40, "sw": 5}, 0.3, 7).samples(9, 8)[2].tolist() == [42, 40, 9, 27, 34, 40, 18, 1]
