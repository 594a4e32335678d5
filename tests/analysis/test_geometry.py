"""The streaming estimators against brute force over pairs and against numpy, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.analysis.geometry import PrincipalAxesEstimator, SimilarityEstimator


def stream(estimator, types, states, size):
    for start in range(0, len(types), size):
        estimator.add(torch.from_numpy(types[start : start + size]), torch.from_numpy(states[start : start + size]))
    return estimator.result()


@settings(max_examples=40, deadline=None)
@given(
    types=st.lists(st.integers(0, 7), min_size=1, max_size=30),
    dim=st.integers(1, 6),
    size=st.integers(1, 31),
    centre=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_similarities_equal_all_pairs(brute_force, types, dim, size, centre, seed):
    draw = np.random.default_rng(seed)
    types = np.array(types)
    states = draw.standard_normal((len(types), dim)) * draw.uniform(0.01, 100, (len(types), 1)) + centre
    if seed % 5 == 0:
        states[0] = 0  # a vector without a direction: its cosines count as 0
    counts = np.bincount(types, minlength=10)
    found = stream(SimilarityEstimator(counts, dim), types, states, size)
    inter, intra = brute_force(types, states)
    assert found.types == (counts > 0).sum()
    assert found.repeated_types == (counts > 1).sum()
    for ours, truth in ((found.inter, inter), (found.intra, intra)):
        assert (ours is None) == (truth is None)
        if truth is not None:
            assert ours == pytest.approx(truth, abs=1e-12)


def test_similarities_at_250_thousand_tokens():
    """Every type of a large vocabulary, most of them twice, in a cone whose similarities are known beforehand."""
    draw = np.random.default_rng(0)
    count, dim = 250_000, 16
    types = draw.permutation(np.concatenate([np.arange(count), np.arange(0, count, 2)]))
    own = draw.standard_normal((count, dim))
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    states = own[types] + 1.0  # the direction of a type, and a common one
    found = stream(SimilarityEstimator(np.bincount(types), dim), types, states, 8_192)
    assert found.intra == pytest.approx(1, abs=1e-12)  # equal states
    units = states / np.linalg.norm(states, axis=1, keepdims=True)
    pairs = draw.integers(len(types), size=(2, 400_000))
    different = types[pairs[0]] != types[pairs[1]]
    weights = 1 / np.bincount(types)[types]  # so that drawn pairs weigh every type the same
    cosines = (units[pairs[0]] * units[pairs[1]]).sum(axis=1)
    drawn = np.average(cosines[different], weights=(weights[pairs[0]] * weights[pairs[1]])[different])
    assert found.inter == pytest.approx(drawn, abs=1e-3)


def test_a_state_that_does_not_come_is_noticed():
    estimator = SimilarityEstimator(np.array([2, 1]), 3)
    estimator.add(torch.tensor([0, 1]), torch.ones(2, 3))
    with pytest.raises(AssertionError, match="1 announced"):
        estimator.result()


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 60), dim=st.integers(3, 8), size=st.integers(1, 61), seed=st.integers(0, 99))
def test_principal_axes_equal_a_singular_value_decomposition(count, dim, size, seed):
    draw = np.random.default_rng(seed)
    states = draw.standard_normal((count, dim)) * 10.0 ** -np.arange(dim) + 1000  # far from 0: cancellation shows
    estimator = PrincipalAxesEstimator(dim)
    for start in range(0, count, size):
        estimator.add(torch.from_numpy(states[start : start + size]))
    axes = estimator.result()
    centred = states - states.mean(axis=0)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    variances = np.zeros(dim)
    variances[: len(values)] = values**2 / count
    assert axes.count == count
    assert axes.mean.numpy() == pytest.approx(states.mean(axis=0))
    assert axes.variances.numpy() == pytest.approx(variances, rel=1e-6, abs=1e-10)
    for p in (1, 2, 3):
        assert axes.explained(p) == pytest.approx(variances[:p].sum() / variances.sum(), abs=1e-9)
    points = axes.project(torch.from_numpy(states))
    for k in range(min(2, count - 1)):
        assert abs(points[:, k]) == pytest.approx(abs(centred @ vectors[k]), abs=1e-3)


def test_axes_of_equal_vectors_explain_nothing():
    estimator = PrincipalAxesEstimator(4)
    estimator.add(torch.ones(5, 4))
    assert estimator.result().explained(3) == 0


def test_the_same_cloud_turned_round_gets_the_same_picture():
    """An axis has no sign of its own; ours does, so that figures do not flip between runs."""
    states = torch.from_numpy(np.random.default_rng(1).standard_normal((50, 5)))
    found = []
    for turned in (states, -states, states.flip(0)):  # an eigenvector of one is one of the others, with any sign
        estimator = PrincipalAxesEstimator(5)
        estimator.add(turned)
        found.append(estimator.result().axes)
    for axes in found:
        assert axes.numpy() == pytest.approx(found[0].numpy(), abs=1e-9)
        assert (axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)) > 0).all()
