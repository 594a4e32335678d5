"""Algorithm 2 of the paper: clustered allocation, so that tokens with similar vectors share codes.

    level 1        all tokens are split by k-means into M_1 clusters: f_1
    level k < K    every group of tokens with equal f_1 .. f_(k-1) is split again: f_k
    level K        inside each group (a leaf) tokens get distinct codes of the last table

In balanced clustering the cluster sizes of every split differ by at most one, so that all leaves fit the last table.
The paper's naive k-means leaves the sizes free; then the last table is as long as the largest leaf.

Beyond the paper: the number of a cluster, and the code of a token in its leaf, are chosen so that they carry meaning
(alignment.py). `last_level="random", align=False` is the paper's own form. With `axes` the vectors are cut to their
leading principal axes first, where those that a few hundred rows can follow stand out.

Groups below level 1 are independent: they run in parallel over processes, and over the ranks of mpirun. Each is
computed on one thread from a seed of its own, so the codes are the same bit for bit on any number of processes.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from ksub_ds.codes.alignment import LARGEST_FIT, match_to_codebook, number_groups, refine
from ksub_ds.codes.blocks import BLOCK_ROWS
from ksub_ds.codes.kmeans import ITERATIONS, Clustering, as_matrix, balanced_kmeans, free_kmeans, one_thread
from ksub_ds.codes.table import CodeTable, reserve_special_tokens
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import Progress, get_logger
from ksub_ds.common.mpi import mpi_communicator

SMALL = 2e9  # N * D * M; below this, starting processes takes longer than the work
LEVEL_1_BYTES = 30  # of memory for a distance of the first level, at most, as measured
LIBRARIES = 0.4e9  # bytes of memory that the program takes without any vectors


def clustered_codes(
    embeddings: Any,
    num_tables: int,
    table_size: int,
    balanced: bool = True,
    last_level: Literal["matched", "random"] = "matched",
    align: bool = True,
    seed: int = 0,
    special_ids: Sequence[int] = (),
    workers: int | None = None,
    table_sizes: Sequence[int] | None = None,
    axes: int | None = None,
    iterations: int = ITERATIONS,
) -> CodeTable:
    """Cluster tokens into codes by Algorithm 2. Under mpirun every rank calls this, with the same arguments.

    Args:
        embeddings: (N, D) one vector per token; an array or a tensor.
        num_tables: K >= 2.
        table_size: M, rows of every table.
        balanced: equal cluster sizes; otherwise naive k-means, and the last table gets as many rows as
            the largest leaf has tokens.
        last_level: "matched" to one codebook of the residuals of the other tables, or "random" as in the paper.
        align: number the clusters of all groups alike.
        seed: of k-means and of random last codes.
        special_ids: tokens that get a row of their own in every table (see `reserve_special_tokens`).
        workers: processes; does not change the result. [one per core, for large N]
        table_sizes: M_1 ... M_K, instead of `table_size` for each.
        axes: cluster in so many principal axes of the vectors. [all D]
        iterations: of balanced k-means, at most.

    Returns:
        The codes of N tokens; every code is unique.

    Raises:
        UserError: a vector that is not finite, impossible sizes, or a leaf larger than the last table.
    """
    _check_settings(last_level, seed, axes=axes, iterations=iterations, workers=workers)
    vectors = as_matrix(embeddings)
    sizes = _checked_sizes((table_size,) * num_tables if table_sizes is None else table_sizes, num_tables)
    special = _checked_special_ids(special_ids, len(vectors))
    if special:
        vectors = np.delete(vectors, special, axis=0)
    if balanced:
        _check_leaves(len(vectors), sizes)
    whole = vectors
    if axes is not None and axes < vectors.shape[1]:
        vectors = _leading_axes(vectors, axes)
    workers = _default_workers(vectors, sizes) if workers is None else workers
    needed = memory_needed(vectors, sizes) + (0 if vectors is whole else whole.nbytes)
    get_logger().info(
        f"clustering {len(vectors):,} vectors of {vectors.shape[1]:,} numbers in tables of "
        f"{' '.join(map(str, sizes))} rows: needs about {needed / 1e9:.1f} GB of memory"
    )

    rounds = iterations if balanced else None
    levels, inertias = _split_levels(vectors, sizes[:-1], rounds, align, seed, workers)
    leaves = number_groups(levels)
    largest = int(np.bincount(leaves).max())
    if not balanced:
        sizes = (*sizes[:-1], largest)
    codes = np.column_stack([levels, _last_codes(vectors, leaves, sizes[-1], last_level, seed)])
    if (align and num_tables > 2) or last_level == "matched":
        codes = _refined(vectors, codes, sizes, align, last_level == "matched")

    metadata = {
        "algorithm": "clustered, balanced" if balanced else "clustered, naive k-means",
        "seed": str(seed),
        "last_level": last_level,
        "align": str(align).lower(),
        "largest_leaf": str(largest),
        "group_sizes": "; ".join(_describe_sizes(codes[:, : level + 1]) for level in range(num_tables - 1)),
        "inertia": " ".join(f"{inertia:.6g}" for inertia in inertias),
    }
    if vectors is not whole:
        metadata["axes"] = str(axes)
    table = CodeTable(codes, sizes, metadata)
    return reserve_special_tokens(table, special) if special else table


def _check_settings(last_level: str, seed: int, **counts: int | None) -> None:
    """Check what does not depend on the vectors.

    Args:
        last_level: a way to give out the last codes.
        seed: of k-means.
        counts: numbers that are at least 1, by their names; None is a default.

    Raises:
        UserError: one is out of its range.
    """
    if last_level not in ("matched", "random"):
        raise UserError(f"last_level {last_level!r}: must be 'matched' or 'random'")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed}: must lie in 0..{2**32 - 1}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name} {count}: must be at least 1")


def _checked_sizes(table_sizes: Sequence[int], num_tables: int) -> tuple[int, ...]:
    """Return M_1 ... M_K.

    Raises:
        UserError: fewer than two tables, or not a size for each.
    """
    if num_tables < 2:
        raise UserError(f"num_tables {num_tables}: clustering needs at least 2 (1 is the plain embedding)")
    sizes = tuple(int(size) for size in table_sizes)
    if len(sizes) != num_tables or min(sizes) < 1:
        raise UserError(f"table sizes {sizes}: must be {num_tables} positive integers")
    return sizes


def _checked_special_ids(special_ids: Sequence[int], count: int) -> list[int]:
    """Return the ids of special tokens in order, each once.

    Raises:
        UserError: one is not an id, or no other token is left.
    """
    special = sorted(set(special_ids))
    if special and not (special[0] >= 0 and special[-1] < count):
        raise UserError(f"special ids {special} must lie in [0, {count})")
    if len(special) >= count:
        raise UserError(f"all {count} tokens are special: none are left to cluster")
    return special


def _leading_axes(vectors: np.ndarray, count: int) -> np.ndarray:
    """Return the coordinates of vectors in their leading principal axes, (N, count) float32."""
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    scatter = np.zeros((vectors.shape[1],) * 2)
    found = np.empty((len(vectors), count), dtype=np.float32)
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(vectors), BLOCK_ROWS)]
    scale = max(float(np.abs(vectors[block] - mean).max()) for block in blocks) or 1.0  # squares may leave float32
    with one_thread():
        for block in blocks:
            centred = (vectors[block] - mean) / np.float32(scale)
            scatter += centred.T @ centred
        basis = np.linalg.eigh(scatter)[1][:, : -count - 1 : -1].astype(np.float32)
        for block in blocks:
            np.matmul(vectors[block] - mean, basis, out=found[block])
    return found


def _split_levels(
    vectors: np.ndarray, sizes: tuple[int, ...], iterations: int | None, align: bool, seed: int, workers: int
) -> tuple[np.ndarray, list[float]]:
    """Return the codes of all tables but the last, (N, K - 1), and the inertia of each level.

    Args:
        vectors: (N, D).
        sizes: M_1 ... M_(K-1).
        iterations: of balanced k-means; None for clusters of free sizes.
        align: number the clusters of all groups alike.
        seed: of k-means.
        workers: processes.
    """
    codes = np.zeros((len(vectors), len(sizes)), dtype=np.int64)
    inertias = []
    for level, size in enumerate(sizes):
        codes[:, level], inertia = _split(vectors, codes[:, :level], size, iterations, seed, workers)
        inertias.append(inertia)
        if align and level:
            codes[:, level] = _align(vectors, codes[:, : level + 1], size, seed)
    return codes, inertias


def _refined(vectors: np.ndarray, codes: np.ndarray, sizes: tuple[int, ...], align: bool, matched: bool) -> np.ndarray:
    """Refine codes, unless the tables are too large for a fit."""
    if sum(sizes) > LARGEST_FIT:
        get_logger().info(
            f"codes are not refined: all tables have {sum(sizes):,} rows together, a fit takes at most {LARGEST_FIT:,}"
        )
        return codes
    return refine(_centred(vectors), codes, sizes, align, matched)


def memory_needed(vectors: np.ndarray, sizes: tuple[int, ...]) -> float:
    """Return the bytes that clustering needs at its peak, the vectors included, in this process.

    Besides the vectors there are two matrices of their size at most (the centred ones, and residuals), and in the
    first level the distances to all centroids with the shares of the points in them.
    """
    return 3.0 * vectors.nbytes + LEVEL_1_BYTES * len(vectors) * sizes[0] + LIBRARIES


def _check_leaves(count: int, sizes: tuple[int, ...]) -> None:
    """Check that the last table has room for the balanced leaves, whose size is known beforehand.

    Raises:
        UserError: it has not.
    """
    leaf = count
    for size in sizes[:-1]:
        leaf = -(-leaf // size)
    if leaf > sizes[-1]:
        shape = " x ".join(map(str, sizes[:-1]))
        raise UserError(
            f"{count:,} tokens in {shape} clusters make leaves of {leaf:,} tokens, but the last table has "
            f"{sizes[-1]:,} rows; give larger table sizes"
        )


def _default_workers(vectors: np.ndarray, sizes: tuple[int, ...]) -> int:
    if len(sizes) < 3 or vectors.size * max(sizes) < SMALL:
        return 1
    return len(os.sched_getaffinity(0))


def _describe_sizes(prefixes: np.ndarray) -> str:
    sizes = np.bincount(number_groups(prefixes))
    return f"{len(sizes):,} of {sizes.min():,} to {sizes.max():,}"


def _split(
    vectors: np.ndarray, prefixes: np.ndarray, num_clusters: int, iterations: int | None, seed: int, workers: int
) -> tuple[np.ndarray, float]:
    """Cluster every group of one level; return labels (N,) and the inertia of all groups together."""
    level = prefixes.shape[1]
    groups = number_groups(prefixes)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(groups))[:-1])
    communicator = mpi_communicator()
    rank, ranks = (communicator.Get_rank(), communicator.Get_size()) if communicator else (0, 1)
    mine = range(rank, len(members), ranks)
    # A single group is all vectors, in their order: no copy of them is made.
    tasks = (
        (vectors if len(members) == 1 else vectors[members[g]], num_clusters, iterations, _seed(seed, level, g))
        for g in mine
    )
    total = None if len(members) == 1 else len(mine)
    found = {}
    with Progress(total, "iterations" if total is None else "groups", f"level {level + 1}") as progress:
        if len(members) == 1:
            threads = len(os.sched_getaffinity(0))
            results = iter([_cluster(*task, threads=threads, progress=progress) for task in tasks])
        else:
            results = _parallel(tasks, workers)
        for g, (labels, inertia) in zip(mine, results, strict=True):
            found[g] = (labels, inertia)
            if total is not None:
                progress.advance()
    if communicator:
        for part in communicator.allgather(found):
            found.update(part)
    labels = np.empty(len(vectors), dtype=np.int64)
    for g, rows in enumerate(members):
        labels[rows] = found[g][0]
    return labels, sum(found[g][1] for g in range(len(members)))


def _seed(seed: int, level: int, group: int) -> int:
    """Return a 31-bit seed for one group, the same in whichever process computes it."""
    return int(np.random.SeedSequence([seed, level, group]).generate_state(1)[0] >> 1)


def _cluster(
    vectors: np.ndarray,
    num_clusters: int,
    iterations: int | None,
    seed: int,
    threads: int = 1,
    progress: Progress | None = None,
) -> tuple[np.ndarray, float]:
    """Cluster one group by balanced k-means, or without `iterations` by the free one; return labels and inertia."""
    clustering: Clustering
    if iterations is None:
        clustering = free_kmeans(vectors, num_clusters, seed)
    else:
        clustering = balanced_kmeans(vectors, num_clusters, seed, None, iterations, threads, progress)
    return clustering.labels, clustering.inertia


def _parallel(tasks: Iterator[tuple], workers: int) -> Iterator[tuple[np.ndarray, float]]:
    """Cluster in several processes; joblib's need no `if __name__ == "__main__"` in the caller.

    Yields:
        Labels and inertia, in the order of the tasks.
    """
    if workers == 1:
        for task in tasks:
            yield _cluster(*task)
        return
    from joblib import Parallel, delayed, parallel_config

    with parallel_config(backend="loky", inner_max_num_threads=1):
        pool = Parallel(n_jobs=workers, max_nbytes=None, return_as="generator")
        yield from pool(delayed(_cluster)(*task) for task in tasks)


def _align(vectors: np.ndarray, prefixes: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
    """Renumber the codes of a level in each group by the direction from the group's mean; return them, (N,)."""
    parents = number_groups(prefixes[:, :-1])
    clusters = number_groups(prefixes)
    sizes = np.bincount(clusters)
    parent_of = np.zeros(len(sizes), dtype=np.int64)
    parent_of[clusters] = parents
    directions = _group_means(vectors, clusters) - _group_means(vectors, parents)[parent_of]
    return match_to_codebook(directions, parent_of, num_rows, _seed(seed, prefixes.shape[1], 0), sizes)[clusters]


def _last_codes(vectors: np.ndarray, leaves: np.ndarray, num_rows: int, last_level: str, seed: int) -> np.ndarray:
    """Return last codes (N,) that are distinct in every leaf."""
    if last_level == "matched":
        residuals = _group_means(vectors, leaves)[leaves]
        np.subtract(vectors, residuals, out=residuals)
        return match_to_codebook(residuals, leaves, num_rows, _seed(seed, 0, 1))
    draw = np.random.default_rng(np.random.SeedSequence([seed, 0, 2]))
    codes = np.empty(len(leaves), dtype=np.int64)
    order = np.argsort(leaves, kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(leaves))[:-1]):
        codes[rows] = draw.permutation(num_rows)[: len(rows)]
    return codes


def _group_means(vectors: np.ndarray, groups: np.ndarray) -> np.ndarray:
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.add.reduceat(vectors[order], starts, axis=0) / sizes[:, None].astype(np.float32)


def _centred(vectors: np.ndarray) -> np.ndarray:
    return vectors - vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
