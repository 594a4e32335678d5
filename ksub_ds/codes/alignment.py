"""Number clusters and last codes so that equal codes mean similar things in every group.

Algorithm 2 leaves two things arbitrary: the numbering of the clusters inside a group, and the last codes in a leaf.
All groups share one table per level, so a numbering in which equal codes point in similar directions lets one row
serve all of them. Both are the same problem: within a group every item needs a row of its own, and the row should be
close to the item's residual, what the other tables leave of it.

    codebook   (M, D) rows that all groups share
    item       a token, or a cluster of tokens with its mean and its size

The measure is the share of the variance of the vectors that K tables, summed, can explain under the codes (each
table D wide, fitted by least squares): 1 would be the vectors themselves.
"""

import itertools

import numpy as np

from ksub_ds.codes.blocks import BLOCK_ROWS
from ksub_ds.codes.kmeans import free_kmeans, one_thread, training_sample
from ksub_ds.common.logging import Progress

ROUNDS = 4  # updates of the codebook after its first centroids
REFINEMENTS = 2  # of each level, against the residuals of the other tables
LARGEST_FIT = 8_192  # rows of all tables together, at most, for an exact fit


def match_to_codebook(
    vectors: np.ndarray, groups: np.ndarray, num_rows: int, seed: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Fit one codebook to all items, and in each group assign the items to distinct rows of it.

    Args:
        vectors: (n, D) float32, one per item: its difference from the mean of its group.
        groups: (n,) the group of each item; no group has more than `num_rows` items.
        num_rows: M, rows of the codebook.
        seed: of the k-means that gives the first codebook.
        weights: (n,) number of tokens in each item. [1]

    Returns:
        (n,) rows in [0, num_rows), distinct within a group.
    """
    weights = np.ones(len(vectors)) if weights is None else weights
    codebook = free_kmeans(training_sample(vectors, num_rows), num_rows, seed).centroids
    rows = np.zeros(len(vectors), dtype=np.int64)
    with Progress(ROUNDS, "rounds", f"matching {len(vectors):,} codes to a codebook") as progress:
        for _ in range(ROUNDS):
            before, rows = rows, distinct_rows(vectors, groups, codebook, weights)
            progress.advance()
            if (rows == before).all():
                break
            total = np.bincount(rows, weights, num_rows)
            used = total > 0
            codebook[used] = _sums(vectors, rows, num_rows, weights)[used] / total[used, None]
    return rows


def distinct_rows(vectors: np.ndarray, groups: np.ndarray, codebook: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Assign the items of each group to distinct rows at the least weighted squared distance (Hungarian algorithm).

    Args:
        vectors: (n, D).
        groups: (n,) group of each item; none may have more items than there are rows.
        codebook: (R, D).
        weights: (n,) of each item's squared distance.

    Returns:
        (n,) rows in [0, R), distinct within a group.
    """
    from scipy.optimize import linear_sum_assignment

    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order], prepend=-1, append=-1))
    norms = np.square(codebook, dtype=np.float64).sum(axis=1)
    rows = np.empty(len(vectors), dtype=np.int64)
    with one_thread():
        for start, stop in itertools.pairwise(bounds):
            items = order[start:stop]
            costs = (norms - 2.0 * (vectors[items] @ codebook.T)) * weights[items, None]
            rows[items] = linear_sum_assignment(costs)[1]
    return rows


def refine(
    vectors: np.ndarray, codes: np.ndarray, table_sizes: tuple[int, ...], align: bool, match_last: bool
) -> np.ndarray:
    """Renumber the levels in turn against the residuals of the other tables; every step explains more.

    The clusters do not change: the codes of level k are permuted inside each group of equal (f_1 .. f_(k-1)).

    Args:
        vectors: (N, D) float32 of mean 0.
        codes: (N, K), unique.
        table_sizes: M_1 ... M_K.
        align: whether levels 2..K-1 may be renumbered.
        match_last: whether the last level may be.

    Returns:
        (N, K) codes, unique.
    """
    last = codes.shape[1] - 1
    levels = [k for k in range(1, last + 1) if (match_last if k == last else align)]
    with Progress(REFINEMENTS * len(levels), "levels", "refining the codes") as progress:
        for k in REFINEMENTS * levels:
            tables = fit_tables(vectors, codes, table_sizes)
            items, groups = _items(codes, k)
            sizes = np.bincount(items)
            others = [(tables[j], codes[:, j]) for j in range(last + 1) if j != k]
            means = _mean_residuals(vectors, others, items, sizes)
            codes = codes.copy()
            codes[:, k] = distinct_rows(means, groups, tables[k], sizes.astype(np.float64))[items]
            progress.advance()
    return codes


def _mean_residuals(
    vectors: np.ndarray, others: list[tuple[np.ndarray, np.ndarray]], items: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Return the mean, over each item's tokens, of what the other tables leave of the vectors: (n, D) float32.

    Args:
        vectors: (N, D).
        others: the other tables with their codes (N,).
        items: (N,) the item of each token.
        sizes: (n,) tokens of each item.
    """
    single = len(sizes) == len(items)  # an item a token: sums in float64 would take twice the memory of the vectors
    sums = np.zeros((len(sizes), vectors.shape[1]), dtype=np.float32 if single else np.float64)
    for start in range(0, len(items), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        left = vectors[block] - sum(table[column[block]] for table, column in others)
        if single:
            sums[items[block]] = left
        else:
            touched, place = np.unique(items[block], return_inverse=True)
            sums[touched] += _sums(left, place, len(touched))
    if not single:
        sums /= sizes[:, None]
    return sums.astype(np.float32, copy=False)


def _items(codes: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the item of each token at a level, (N,), its prefix of level + 1 codes; and the group of each item."""
    items, parents = number_groups(codes[:, : level + 1]), number_groups(codes[:, :level])
    groups = np.empty(int(items.max()) + 1, dtype=np.int64)
    groups[items] = parents
    return items, groups


def number_groups(prefixes: np.ndarray) -> np.ndarray:
    """Number the groups of tokens with the same prefix of codes in the order of prefixes: (N,), one per token."""
    numbers = np.zeros(len(prefixes), dtype=np.int64)
    for column in prefixes.T:
        numbers = np.unique(numbers * (int(column.max()) + 1) + column, return_inverse=True)[1]
    return numbers


def fit_tables(vectors: np.ndarray, codes: np.ndarray, table_sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Fit K tables whose summed rows are nearest to the vectors, by exact least squares.

    Args:
        vectors: (N, D).
        codes: (N, K).
        table_sizes: M_1 ... M_K.

    Returns:
        K tables (M_k, D) float32.

    Raises:
        ValueError: more than 8,192 rows in all tables together.
    """
    solution, _ = _least_squares(vectors, codes, table_sizes)
    return np.split(solution.astype(np.float32), np.cumsum(table_sizes)[:-1])


def explained_share(vectors: np.ndarray, codes: np.ndarray, table_sizes: tuple[int, ...]) -> float:
    """Return the share of the vectors' variance that K full-width tables, summed, explain under the codes.

    Args:
        vectors: (N, D).
        codes: (N, K).
        table_sizes: M_1 ... M_K.

    Raises:
        ValueError: more than 8,192 rows in all tables together.
    """
    centred = vectors - vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    solution, projected = _least_squares(centred, codes, table_sizes)
    total = sum(
        np.square(centred[i : i + BLOCK_ROWS], dtype=np.float64).sum() for i in range(0, len(centred), BLOCK_ROWS)
    )
    return float((solution * projected).sum() / total) if total else 1.0


def _least_squares(
    vectors: np.ndarray, codes: np.ndarray, table_sizes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Solve (A'A) T = A'X, where A (N, sum of M_k) has a one for each code of a token.

    Returns:
        T and A'X.

    Raises:
        ValueError: more than LARGEST_FIT rows in all tables together.
    """
    from scipy.sparse import csr_matrix

    width = sum(table_sizes)
    if width > LARGEST_FIT:
        raise ValueError(f"all tables have {width:,} rows together; an exact fit takes at most {LARGEST_FIT:,}")
    columns = codes + np.concatenate([[0], np.cumsum(table_sizes)[:-1]])
    ones = csr_matrix(
        (np.ones(columns.size), columns.ravel(), np.arange(0, columns.size + 1, columns.shape[1])),
        shape=(len(codes), width),
    )
    projected = np.zeros((width, vectors.shape[1]))
    for start in range(0, len(codes), BLOCK_ROWS):
        projected += ones[start : start + BLOCK_ROWS].T @ vectors[start : start + BLOCK_ROWS]
    with one_thread():
        values, basis = np.linalg.eigh((ones.T @ ones).toarray())
        inverse = np.where(values > values[-1] * 1e-10, 1 / np.maximum(values, values[-1] * 1e-10), 0)
        return (basis * inverse) @ (basis.T @ projected), projected


def _sums(vectors: np.ndarray, rows: np.ndarray, num_rows: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the sums of the vectors of each row, (num_rows, D) float64."""
    from scipy.sparse import csr_matrix

    weights = np.ones(len(rows)) if weights is None else weights
    sums = np.zeros((num_rows, vectors.shape[1]))
    for start in range(0, len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        shape = (num_rows, len(rows[part]))
        sums += csr_matrix((weights[part], (rows[part], np.arange(shape[1]))), shape=shape) @ vectors[part]
    return sums
