"""Balanced clustering by OR-tools and by k-means-constrained, in the environment that benchmarks/clustering.py makes.

    VENV/bin/python benchmarks/clustering_oracle.py assignment INPUT.npz OUTPUT.npz
    VENV/bin/python benchmarks/clustering_oracle.py kmeans INPUT.npz OUTPUT.npz

Imports nothing of ksub_ds: OR-tools needs an older protobuf than the project has. INPUT holds `costs` (N, M), or
`vectors` (N, D) and first centroids `start` (M, D); OUTPUT gets `seconds`, `labels` (N,) and, for kmeans, `inertia`.
"""

import sys
import time
from typing import Any

import numpy as np


def assignment(costs: np.ndarray) -> dict[str, Any]:
    """One balanced assignment by min-cost flow, as k-means-constrained calls it: costs as integers of ample range."""
    from ortools.graph.python import min_cost_flow

    begin = time.perf_counter()
    count, clusters = costs.shape
    floor, extra = divmod(count, clusters)
    flow = min_cost_flow.SimpleMinCostFlow()
    points, nodes, sink = np.arange(count), count + np.arange(clusters), count + clusters
    unit = (costs.astype(np.float64) * (1e7 / np.abs(costs).max())).astype(np.int64)
    arcs = flow.add_arcs_with_capacity_and_unit_cost(
        np.repeat(points, clusters), np.tile(nodes, count), np.ones(costs.size, np.int64), unit.ravel()
    )
    ones = np.ones(clusters, np.int64)
    flow.add_arcs_with_capacity_and_unit_cost(nodes, np.full(clusters, sink), ones, 0 * ones)
    supplies = np.concatenate([np.ones(count), np.full(clusters, -floor), [-extra]]).astype(np.int64)
    flow.set_nodes_supplies(np.arange(count + clusters + 1), supplies)
    assert flow.solve() == flow.OPTIMAL
    labels = flow.flows(arcs).reshape(count, clusters).argmax(axis=1)
    return {"seconds": time.perf_counter() - begin, "labels": labels}


def kmeans(vectors: np.ndarray, start: np.ndarray) -> dict[str, Any]:
    """Balanced k-means from given centroids, at most 15 iterations, on one thread."""
    from k_means_constrained import KMeansConstrained

    count, clusters = len(vectors), len(start)
    begin = time.perf_counter()
    found = KMeansConstrained(
        clusters,
        size_min=count // clusters,
        size_max=-(-count // clusters),
        init=start,
        n_init=1,
        max_iter=15,
        n_jobs=1,
        random_state=0,
    ).fit(vectors)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "labels": found.labels_, "inertia": float(found.inertia_)}


if __name__ == "__main__":
    task, source, target = sys.argv[1:]
    with np.load(source, allow_pickle=False) as given:
        np.savez(target, **{"assignment": assignment, "kmeans": kmeans}[task](**given))
