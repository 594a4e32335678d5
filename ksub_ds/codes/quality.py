"""Measures of how well codes fit the vectors they were made from: the report that `ksub codes inspect` shows.

The paper's requirement 2 (tokens of similar meaning share more codes than an arbitrary pair) is measured in two ways,
with vectors in place of meaning; and the cost of balance, against k-means with free sizes.
"""

import itertools
from typing import Any

import numpy as np

from ksub_ds.codes.alignment import LARGEST_FIT, explained_share, number_groups
from ksub_ds.codes.blocks import BLOCK_ROWS
from ksub_ds.codes.kmeans import as_matrix, free_kmeans, one_thread
from ksub_ds.codes.positional import positional_codes
from ksub_ds.codes.table import CodeTable

PAIRS, QUERIES, NEIGHBOURS, GROUPS = 100_000, 500, 10, 16


def measure_quality(vectors: Any, table: CodeTable, seed: int = 0) -> dict[str, Any]:
    """Measure how well a table fits the vectors it was made from.

    Args:
        vectors: (N, D), one per token.
        table: the codes of N tokens.
        seed: of the sampled pairs, queries and groups.

    Returns:
        A dictionary that JSON can hold.
        level_sizes, largest_leaf: tokens per group, by level.
        inertia_over_free: by level but the last, inertia over that of FAISS with sizes free, in sampled groups.
        rank_correlation: Spearman's, of the number of shared codes with L2 closeness over random pairs.
        neighbours_share, positional_neighbours_share: mean share of codes a token has in common with each
            of its 10 nearest neighbours, here and under positional codes.
        explained_variance, positional_explained_variance: see `explained_share`; absent for huge tables.
        The last four are absent for a single token.

    Raises:
        ValueError: the vectors and the table have different numbers of tokens.
    """
    matrix = as_matrix(vectors)
    if len(matrix) != table.num_tokens:
        raise ValueError(f"{len(matrix):,} vectors for a table of {table.num_tokens:,} tokens")
    draw = np.random.default_rng(seed)
    levels = [number_groups(table.codes[:, :k].astype(np.int64)) for k in range(table.num_tables)]
    group_sizes = [np.bincount(level) for level in levels[1:]]
    positional = positional_codes(table.num_tokens, table.num_tables)
    report: dict[str, Any] = {
        "level_sizes": [f"{sizes.min():,} to {sizes.max():,}" for sizes in group_sizes],
        "largest_leaf": int(group_sizes[-1].max()) if group_sizes else table.num_tokens,
        "inertia_over_free": [_inertia_ratio(matrix, *pair, draw) for pair in itertools.pairwise(levels)],
        "rank_correlation": _rank_correlation(matrix, table.codes, draw),
    }
    if len(matrix) == 1:
        return report  # nothing is near
    tokens, near = _nearest(matrix, draw)
    for name, codes in (("", table), ("positional_", positional)):
        report[f"{name}neighbours_share"] = float((codes.codes[tokens, None] == codes.codes[near]).mean())
        if sum(codes.table_sizes) <= LARGEST_FIT:
            report[f"{name}explained_variance"] = explained_share(matrix, codes.codes, codes.table_sizes)
    return report


def _inertia_ratio(matrix: np.ndarray, groups: np.ndarray, clusters: np.ndarray, draw: np.random.Generator) -> float:
    """Divide the inertia of the clusters of some groups by that of FAISS's k-means with as many clusters."""
    count = int(groups.max()) + 1
    ours = free = 0.0
    for group in draw.permutation(count)[:GROUPS]:
        rows = np.flatnonzero(groups == group)
        names, labels = np.unique(clusters[rows], return_inverse=True)
        order = np.argsort(labels, kind="stable")
        for members in np.split(rows[order], np.cumsum(np.bincount(labels))[:-1]):
            ours += len(members) * float(matrix[members].var(axis=0, dtype=np.float64).sum())
        points = matrix if count == 1 else matrix[rows]  # all rows: no copy of them is made
        free += free_kmeans(points, len(names), seed=0).inertia
    return ours / free if free else 1.0


def _rank_correlation(matrix: np.ndarray, codes: np.ndarray, draw: np.random.Generator) -> float:
    from scipy.stats import spearmanr

    pairs = draw.integers(len(matrix), size=(PAIRS, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    blocks = [pairs[start : start + BLOCK_ROWS] for start in range(0, len(pairs), BLOCK_ROWS)]
    distance = [np.square(matrix[block[:, 0]] - matrix[block[:, 1]]).sum(axis=1) for block in blocks]
    if not blocks:
        return 0.0
    closeness = -np.concatenate(distance)
    shared = (codes[pairs[:, 0]] == codes[pairs[:, 1]]).sum(axis=1)
    if np.ptp(shared) == 0 or np.ptp(closeness) == 0:
        return 0.0
    return float(spearmanr(shared, closeness).statistic)


def _nearest(matrix: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sample tokens (Q,) and find the nearest others of each, (Q, 10)."""
    import faiss

    tokens = draw.permutation(len(matrix))[:QUERIES]
    count = min(NEIGHBOURS, len(matrix) - 1)
    with one_thread():
        _, found = faiss.knn(matrix[tokens], matrix, count + 1)
    # A token is its own nearest neighbour, unless others are equal to it: drop it, or the last.
    keep = np.argsort(found == tokens[:, None], axis=1, kind="stable")[:, :count]
    return tokens, np.take_along_axis(found, np.sort(keep, axis=1), axis=1)
