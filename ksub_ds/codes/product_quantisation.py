"""Product quantisation: codes for input embeddings, which need not be unique (Jégou et al., 2011).

Table k stands for a run of columns of the vectors; its codes come from k-means of these columns alone. So each of
dozens of tables is as good as it can be under its own rows, and the tables are the clusters' means: there is nothing
left to fit. A rotation before the cut (OPQ: Ge et al., 2013) spreads what varies evenly over the tables.

Weights say how much a token counts. Those of frequent tokens are worth most: their rows decide what a model reads.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ksub_ds.codes.blocks import LARGEST_NUMBER
from ksub_ds.codes.table import CodeTable, table_widths

SAMPLE = 32_768  # vectors that k-means and the rotation see; all are then assigned
LLOYD_ROUNDS = 8
ROTATION_ROUNDS = 6
NARROW = 6  # FAISS compares narrower vectors ten times as slowly, so these get columns of zeros


@dataclass(frozen=True)
class ProductQuantisation:
    """Codes with their tables.

    Attributes:
        table: the codes; they may repeat.
        rows: K arrays (M, d_k) float32, the means of what shares a code.
        rotation: (d, d) float32 orthogonal A, so that a vector is A · the concatenated rows; None for the identity.
    """

    table: CodeTable
    rows: list[np.ndarray]
    rotation: np.ndarray | None


def product_quantisation(
    vectors: np.ndarray,
    num_tables: int,
    table_size: int = 256,
    weights: np.ndarray | None = None,
    rotate: bool = False,
    seed: int = 0,
) -> ProductQuantisation:
    """Find codes and tables for vectors.

    Args:
        vectors: (N, d) float32.
        num_tables: K, at most d.
        table_size: M, at most N and 32,768.
        weights: (N,) how much each vector counts. [1]
        rotate: also find a rotation; it pays where d x d numbers are few beside N x K codes.
        seed: of k-means, and of the sample that it sees.

    Returns:
        Codes, tables and rotation.

    Raises:
        ValueError: K or M out of range, a vector with NaN or a number beyond 1e15, weights that are not
            finite, negative or all 0.
    """
    count, width = vectors.shape
    widths = table_widths(width, num_tables)
    most = min(count, SAMPLE)
    if not 1 <= table_size <= most:
        raise ValueError(f"tables of {table_size:,} rows: k-means sees {most:,} vectors and makes 1 to as many rows")
    weights = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (count,) or not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise ValueError(f"weights must be {count:,} numbers, finite, not negative, and not all 0")
    if not max(vectors.max(), -vectors.min()) <= LARGEST_NUMBER:  # FAISS ends the process where squares overflow
        raise ValueError(
            f"a vector has a number that is NaN or beyond {LARGEST_NUMBER:g}; train or fetch the model anew"
        )
    weights = weights / weights.max()  # of any scale: none leaves float32
    chosen, sample_weights = _sample(weights, seed)
    sample = np.ascontiguousarray(vectors[chosen], dtype=np.float32)
    rotation = _rotation(sample, sample_weights, widths) if rotate else None
    seen = sample if rotation is None else sample @ rotation
    first_rows = _on_all_cores(lambda part: _kmeans(part, table_size, sample_weights, seed), _columns(seen, widths))
    if rotation is not None:
        rotation, first_rows = _rotate_further(sample, sample_weights, rotation, first_rows)
    codes = np.empty((count, num_tables), dtype=np.int32)
    edges = np.cumsum((0, *widths))

    def assign(k: int) -> np.ndarray:
        columns = slice(edges[k], edges[k + 1])
        part = vectors[:, columns] if rotation is None else vectors @ rotation[:, columns]
        codes[:, k] = _nearest(part, first_rows[k])
        return _means(part, codes[:, k], weights, first_rows[k])

    rows = _on_all_cores(assign, range(num_tables))
    origin = {"algorithm": "product quantisation", "seed": str(seed), "embedding_dim": str(width)}
    return ProductQuantisation(CodeTable(codes, (table_size,) * num_tables, origin, unique=False), rows, rotation)


def _sample(weights: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the vectors that k-means sees: the heavier half by weight, the others by lot, standing for the rest."""
    if len(weights) <= SAMPLE:
        return np.arange(len(weights)), weights
    order = np.argsort(-weights, kind="stable")
    heavy, rest = order[: SAMPLE // 2], order[SAMPLE // 2 :]
    drawn = np.random.default_rng(seed).choice(rest, SAMPLE - len(heavy), replace=False)
    scale = weights[rest].sum() / max(weights[drawn].sum(), 1e-30)
    return np.concatenate([heavy, drawn]), np.concatenate([weights[heavy], weights[drawn] * scale])


def _columns(vectors: np.ndarray, widths: tuple[int, ...]) -> list[np.ndarray]:
    return np.split(vectors, np.cumsum(widths)[:-1], axis=1)


def _on_all_cores(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """Apply a function to each table on threads; within one, FAISS uses one thread, so their number changes nothing."""
    import faiss

    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, *arguments))


def _kmeans(points: np.ndarray, size: int, weights: np.ndarray, seed: int) -> np.ndarray:
    import faiss

    width = points.shape[1]
    points = _widened(points)
    kmeans = faiss.Kmeans(
        points.shape[1],
        size,
        niter=LLOYD_ROUNDS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    kmeans.train(points, weights=weights.astype(np.float32))
    return np.array(kmeans.centroids)[:, :width]


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    import faiss

    points, centres = _widened(points), _widened(centres)
    index = faiss.IndexFlatL2(centres.shape[1])
    index.add(centres)
    return index.search(points, 1)[1][:, 0]


def _widened(points: np.ndarray) -> np.ndarray:
    missing = max(0, NARROW - points.shape[1])
    return np.ascontiguousarray(np.pad(points, ((0, 0), (0, missing))), dtype=np.float32)


def _means(points: np.ndarray, codes: np.ndarray, weights: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Return the weighted mean of the points of each code, (M, width); where nothing has a code, the row of `empty`."""
    mass = np.bincount(codes, weights, len(empty))
    sums = [np.bincount(codes, weights * column, len(empty)) for column in points.T]
    means = np.stack(sums, axis=1) / np.maximum(mass, 1e-30)[:, None]
    return np.where(mass[:, None] > 0, means, empty).astype(np.float32)


def _rotation(sample: np.ndarray, weights: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """Return the principal axes, dealt out so that each table gets the same product of variances.

    That is the best rotation if the vectors are normally distributed.
    """
    mean = weights @ sample / weights.sum()
    centred = sample - mean.astype(np.float32)
    values, axes = np.linalg.eigh((centred * weights[:, None].astype(np.float32)).T @ centred)
    logs = np.log(np.maximum(values, 1e-12 * max(values[-1], 1e-30)))
    dealt: list[list[int]] = [[] for _ in widths]
    volume = np.zeros(len(widths))
    for axis in range(len(values) - 1, -1, -1):
        free = [k for k, width in enumerate(widths) if len(dealt[k]) < width]
        k = min(free, key=lambda k: volume[k])
        dealt[k].append(axis)
        volume[k] += logs[axis] - logs[0]
    return axes[:, [axis for part in dealt for axis in part]].astype(np.float32)


def _rotate_further(
    sample: np.ndarray, weights: np.ndarray, rotation: np.ndarray, tables: list[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Take codes and means under the rotation, and the rotation under these, in turn."""
    widths = tuple(table.shape[1] for table in tables)
    weighted = sample * weights[:, None].astype(np.float32)
    for _ in range(ROTATION_ROUNDS):
        parts = _columns(sample @ rotation, widths)
        moved = _on_all_cores(lambda part, rows: _moved(part, rows, weights), parts, tables)
        tables = [rows for rows, _ in moved]
        left, _, right = np.linalg.svd(weighted.T @ np.concatenate([points for _, points in moved], axis=1))
        rotation = left @ right
    return rotation, tables


def _moved(part: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows as means of the points that are nearest to them, and for each point its row."""
    codes = _nearest(part, rows)
    rows = _means(part, codes, weights, rows)
    return rows, rows[codes]
