"""Balanced assignment: exact sizes, the least cost, ties, any first prices, any number of threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from ksub_ds.codes.assignment import balanced_assignment


def least_cost(costs: np.ndarray) -> float:
    """The optimum by the Hungarian algorithm: floor(N/M) places a cluster, N mod M single places for all."""
    count, clusters = costs.shape
    floor, extra = divmod(count, clusters)
    # One optional place per cluster; the clusters that leave theirs empty take a dummy row, which must
    # have no other choice.
    places = np.concatenate([np.repeat(np.arange(clusters), floor), np.arange(clusters)])
    wide = costs.astype(np.float64)[:, places]
    dummies = np.zeros((clusters - extra, len(places)))
    dummies[:, : floor * clusters] = 1e9
    full = np.concatenate([wide, dummies])
    rows, columns = linear_sum_assignment(full)
    return float(full[rows, columns].sum())


@given(st.integers(1, 120), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_assignment_is_the_optimum(count, clusters, seed, rounding):
    """With ties too: costs of few values."""
    costs = np.random.default_rng(seed).standard_normal((count, clusters)).astype(np.float32)
    if rounding:
        costs = np.round(costs / rounding).astype(np.float32)
    labels, prices = balanced_assignment(costs)
    sizes = np.bincount(labels, minlength=clusters)
    assert sizes.min() == count // clusters and sizes.max() == -(-count // clusters)
    total = costs[np.arange(count), labels].sum(dtype=np.float64)
    assert total == pytest.approx(least_cost(costs), abs=1e-4)
    priced = costs + prices
    assert (priced[np.arange(count), labels] - priced.min(axis=1)).max() < 1e-4


def test_assignment_from_bad_prices_and_on_two_threads_is_the_same():
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((20, 8))
    weight = 1 / np.arange(1, 21)  # points gather around centres of unequal weight
    points = centres[draw.choice(20, 20_000, p=weight / weight.sum())] + 0.3 * draw.standard_normal((20_000, 8))
    costs = np.square(points[:, None] - centres).sum(axis=2).astype(np.float32)
    labels, _ = balanced_assignment(costs)
    assert (balanced_assignment(costs, threads=2)[0] == labels).all()
    cost = costs[np.arange(len(costs)), labels].sum(dtype=np.float64)
    other, _ = balanced_assignment(costs, np.random.default_rng(0).standard_normal(20) * 5)
    assert costs[np.arange(len(costs)), other].sum(dtype=np.float64) == pytest.approx(cost, rel=1e-7)
