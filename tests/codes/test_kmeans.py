"""Balanced k-means: exact sizes, duplicates, determinism, the oracle's inertia."""

from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.codes import kmeans
from ksub_ds.codes.kmeans import balanced_kmeans, free_kmeans
from ksub_ds.common.errors import UserError


def mixture(count: int, width: int, seed: int, duplicates: float = 0.0) -> np.ndarray:
    """Vectors around points of unequal weight, some of them equal."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((20, width))
    weight = 1 / np.arange(1, 21)
    vectors = centres[draw.choice(20, count, p=weight / weight.sum())] + 0.3 * draw.standard_normal((count, width))
    return vectors[np.where(draw.random(count) < duplicates, 0, np.arange(count))].astype(np.float32)


def assert_balanced(labels: np.ndarray, count: int, clusters: int) -> None:
    sizes = np.bincount(labels, minlength=clusters)
    assert len(labels) == count and len(sizes) == clusters
    assert sizes.min() == count // clusters and sizes.max() == -(-count // clusters)


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 9), st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_sizes_range_and_determinism(count, clusters, width, seed, duplicates):
    vectors = mixture(count, width, seed, duplicates)
    found = balanced_kmeans(vectors, clusters, seed)
    assert_balanced(found.labels, count, clusters)
    again = balanced_kmeans(vectors, clusters, seed)
    assert (found.labels == again.labels).all() and found.inertia == again.inertia
    exact = sum(
        np.square(vectors[found.labels == j] - vectors[found.labels == j].mean(axis=0, dtype=np.float64)).sum()
        for j in np.unique(found.labels)
    )
    assert found.inertia == pytest.approx(exact, rel=1e-3, abs=1e-4 * max(1.0, float(np.square(vectors).sum())))


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30, 1e-30])
def test_constant_vectors(value):
    found = balanced_kmeans(np.full((1000, 5), value), 30)
    assert_balanced(found.labels, 1000, 30)


def test_vectors_far_from_the_origin_cluster_as_near_it():
    vectors = mixture(600, 6, 3)
    near, far = balanced_kmeans(vectors, 10), balanced_kmeans(vectors.astype(np.float64) + 300, 10)
    assert far.inertia == pytest.approx(near.inertia, rel=0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_what_is_not_finite_is_refused_by_row(bad):
    vectors = np.zeros((50, 3))
    vectors[17, 1] = bad
    with pytest.raises(UserError, match="row 17"):
        balanced_kmeans(vectors, 4)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,)])
def test_what_is_not_a_matrix_is_refused(shape):
    with pytest.raises(UserError, match="matrix"):
        balanced_kmeans(np.zeros(shape), 2)


def test_threads_change_nothing():
    vectors = mixture(9000, 16, 4)  # two blocks
    one, two = (balanced_kmeans(vectors, 25, threads=threads) for threads in (1, 2))
    assert (one.labels == two.labels).all() and one.inertia == two.inertia


def test_iterating_with_balanced_sizes_beats_balancing_once():
    vectors = mixture(3000, 16, 5)
    free = free_kmeans(vectors, 20, seed=0)
    once = balanced_kmeans(vectors, 20, initial=free.centroids, iterations=1)
    assert free.inertia < balanced_kmeans(vectors, 20, initial=free.centroids).inertia < 0.97 * once.inertia


def test_against_k_means_constrained():
    """Its inertia from these first centroids, recorded from version 0.9.1, which needs another protobuf than ours."""
    vectors = mixture(600, 12, 6)
    start = np.stack([vectors[first::12].mean(axis=0) for first in range(12)])
    found = balanced_kmeans(vectors, 12, initial=start, iterations=50)
    assert_balanced(found.labels, 600, 12)
    assert found.inertia <= 1.003 * 2027.852


class Resources:
    """Stands in for faiss-gpu's, which no CPU build has."""

    def setTempMemory(self, size: int) -> None:
        assert 0 < size < 2**30


def as_gpu_build(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Make faiss look like faiss-gpu, whose functions compute on the CPU; returns the sizes of what they are given."""
    calls: list[tuple[int, ...]] = []

    def pairwise_distance_gpu(resources: Resources, xq: Any, xb: Any, D: Any) -> None:
        assert xq.flags.c_contiguous and xb.flags.c_contiguous and D.flags.c_contiguous and D.dtype == np.float32
        assert D.shape == (len(xq), len(xb)) and D.base is not None, "a part of the whole result"
        calls.append((len(xq), len(xb)))
        D[:] = faiss.pairwise_distances(xq, xb)

    def index_cpu_to_gpu(resources: Resources, number: int, index: Any) -> Any:
        calls.append((number,))
        return index

    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss, "pairwise_distance_gpu", pairwise_distance_gpu)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", index_cpu_to_gpu, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 4)
    monkeypatch.setattr(kmeans, "GPU_WORK", 600 * 10 * 6)
    return calls


def test_distances_on_a_gpu_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = mixture(600, 6, 3)
    expected = balanced_kmeans(vectors, 10)
    calls = as_gpu_build(monkeypatch)
    monkeypatch.setattr(kmeans, "driver_shows_gpu", lambda: True)
    monkeypatch.setattr(kmeans, "GPU_BLOCK_BYTES", 4 * 10 * 250)
    found = balanced_kmeans(vectors, 10)
    assert calls[:4] == [(0,), (250, 10), (250, 10), (100, 10)], "one GPU of four, and never all rows at once"
    assert (found.labels == expected.labels).all() and found.inertia == pytest.approx(expected.inertia)
    calls.clear()
    balanced_kmeans(vectors[:599], 10)
    assert not calls, "a small problem stays on the CPU, whichever process computes it"


def test_faiss_gpu_where_no_gpu_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver faiss-gpu's own question for GPUs ends the process: it must not be asked."""
    if kmeans.driver_shows_gpu():
        pytest.skip("this machine has a GPU")
    vectors = mixture(600, 6, 3)
    expected = balanced_kmeans(vectors, 10)
    calls = as_gpu_build(monkeypatch)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: pytest.fail("faiss-gpu would end the process"))
    told: list[str] = []
    monkeypatch.setattr(kmeans.get_logger(), "info", told.append)
    assert (balanced_kmeans(vectors, 10).labels == expected.labels).all() and not calls
    assert "FAISS could use a GPU, but none is visible: it computes on the CPU" in told
