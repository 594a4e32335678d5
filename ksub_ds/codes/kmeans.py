"""Balanced k-means: Lloyd's iterations in which every assignment has equal sizes, so the result has them too.

FAISS gives the first centroids (its own k-means, with free sizes) and the distances; large problems on a GPU, where
faiss-gpu is installed and one is there: the first that CUDA_VISIBLE_DEVICES shows.
Balancing once, after an unconstrained k-means, costs about 10 % of inertia; iterating with balanced sizes costs
1 to 3 %.

Vectors are first moved to mean 0 and scaled to a largest value of 1: float32 distances of vectors far from the origin
would lose their digits. The result is the same bit for bit on any number of threads: every block of rows is computed
on one thread, and sums are taken in the order of the blocks. A GPU rounds otherwise; whether it is used follows from
the size of a problem alone, so codes still do not depend on the number of processes.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ksub_ds.codes.assignment import balanced_assignment
from ksub_ds.codes.blocks import map_blocks
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import Progress, get_logger

ITERATIONS = 15
FIRST_ITERATIONS = 10  # of FAISS's k-means, for the first centroids
TRAINING_POINTS = 256  # per centroid, at most, that FAISS trains on
SMALLEST_GAIN = 5e-4  # of the inertia; an iteration that gains less is the last
# Products of numbers in one pass over the distances, from which on a GPU is worth its start. Level 1 of 250,002 vectors
# has 2e10, so one process asks the GPU; the thousands of small groups below stay on the CPU, in as many processes.
GPU_WORK = 2e9
GPU_BLOCK_BYTES = 2**28  # of points, and of their distances, on the GPU at a time


class Clustering(NamedTuple):
    """The result of a k-means.

    Attributes:
        labels: (N,) in [0, M).
        centroids: (M, D) float32; zeros where a cluster is empty.
        inertia: the sum of squared distances to the centroids.
    """

    labels: np.ndarray
    centroids: np.ndarray
    inertia: float


def as_matrix(vectors: Any) -> np.ndarray:
    """Convert vectors to a checked (N, D) float32 array.

    Args:
        vectors: an array, a torch tensor, or anything numpy converts to an array.

    Raises:
        UserError: not a matrix, or a value that is not finite; names the first such row.
    """
    if hasattr(vectors, "detach"):
        vectors = vectors.detach().float().cpu().numpy()
    with np.errstate(over="ignore"):
        matrix = np.ascontiguousarray(vectors, dtype=np.float32)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise UserError(f"vectors must be a non-empty (N, D) matrix, not of shape {matrix.shape}")
    for start in range(0, len(matrix), 1 << 14):
        finite = np.isfinite(matrix[start : start + (1 << 14)]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise UserError(f"row {row} of the vectors holds a value that is NaN or infinite in float32; remove it")
    return matrix


def balanced_kmeans(
    vectors: np.ndarray,
    num_clusters: int,
    seed: int = 0,
    initial: np.ndarray | None = None,
    iterations: int = ITERATIONS,
    threads: int = 1,
    progress: Progress | None = None,
) -> Clustering:
    """Split N vectors into M clusters of floor(N/M) or ceil(N/M) vectors that are close in L2.

    Args:
        vectors: (N, D), finite.
        num_clusters: M.
        seed: of FAISS's first centroids; the same seed gives the same result.
        initial: (M, D) first centroids to use instead.
        iterations: at most so many; an iteration that gains less than 0.05 % of the inertia is the last.
        threads: does not change the result.
        progress: advanced by every iteration.

    Raises:
        ValueError: `num_clusters` is less than 1.
        UserError: the vectors are not a finite matrix.
    """
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be at least 1, not {num_clusters}")
    points, mean, scale = _standardise(as_matrix(vectors))
    if len(points) <= num_clusters:
        labels = np.arange(len(points))
        return Clustering(labels, _means(np.asarray(vectors, np.float32), labels, num_clusters), 0.0)
    with one_thread():
        if initial is None:
            sample = training_sample(points, num_clusters)
            centroids = free_kmeans(sample, num_clusters, seed, FIRST_ITERATIONS).centroids
        else:
            centroids = ((initial - mean) / scale).astype(np.float32)
        distances = _Distances(points, num_clusters, threads)
        squares, inertia, prices = _sum_of_squares(points), np.inf, None
        for _ in range(iterations):
            labels, prices = balanced_assignment(distances.to(centroids), prices, threads, progress)
            centroids = _means(points, labels, num_clusters, threads)
            before, inertia = inertia, _inertia(squares, labels, centroids)
            if progress:
                progress.advance(inertia=f"{inertia * scale**2:.6g}")
            if inertia >= before * (1 - SMALLEST_GAIN):
                break
    return Clustering(labels, centroids * np.float32(scale) + mean, inertia * scale**2)


def free_kmeans(vectors: np.ndarray, num_clusters: int, seed: int, iterations: int = 25) -> Clustering:
    """Run FAISS's k-means, whose cluster sizes are free: the paper's naive k-means.

    It trains on at most 256 vectors per cluster.

    Args:
        vectors: (N, D) float32.
        num_clusters: M.
        seed: of FAISS's draws.
        iterations: rounds of k-means.
    """
    import faiss

    points, mean, scale = _standardise(vectors)
    if len(points) <= num_clusters:
        labels = np.arange(len(points))
        return Clustering(labels, _means(vectors, labels, num_clusters), 0.0)
    with one_thread():
        kmeans = faiss.Kmeans(
            points.shape[1],
            num_clusters,
            niter=iterations,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=TRAINING_POINTS,
        )
        resources = gpu_resources(len(points), num_clusters, points.shape[1])
        if resources is not None:  # one GPU: the option gpu=1 equals True, which means all of them
            kmeans.index = faiss.index_cpu_to_gpu(resources, 0, kmeans.index)
        kmeans.train(points)
        assert kmeans.centroids is not None, "trained just now"
        distance, labels = kmeans.index.search(points, 1)
    inertia = float(distance.sum(dtype=np.float64)) * scale**2
    centroids = np.asarray(kmeans.centroids)
    return Clustering(labels[:, 0], centroids * np.float32(scale) + mean, inertia)


def gpu_resources(num_points: int, num_clusters: int, width: int) -> Any:
    """Return what FAISS needs for a GPU; None where it has none, or the problem is not worth its start.

    Args:
        num_points: N.
        num_clusters: M.
        width: D.
    """
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or num_points * num_clusters * width < GPU_WORK:
        return None
    # Where a driver is missing, or too old, faiss-gpu's own get_num_gpus ends the process.
    if not driver_shows_gpu() or faiss.get_num_gpus() == 0:
        get_logger().info("FAISS could use a GPU, but none is visible: it computes on the CPU")
        return None
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(2 * GPU_BLOCK_BYTES)  # 1.5 GB, if one does not say
    return resources


def driver_shows_gpu() -> bool:
    """Return whether the CUDA driver is there and shows a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def training_sample(vectors: np.ndarray, num_clusters: int) -> np.ndarray:
    """Return every n-th vector, about as many as FAISS trains on."""
    return vectors[:: max(1, len(vectors) // (TRAINING_POINTS * num_clusters))]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit BLAS and OpenMP to one thread, because their results depend on the number of threads.

    Yields:
        Nothing; the limit holds inside the `with` block.
    """
    import faiss  # noqa: F401 - only libraries that are loaded are limited
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


def _standardise(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    points = vectors - mean
    scale = float(max(points.max(), -points.min())) or 1.0  # np.abs would be one more copy of the matrix
    points /= np.float32(scale)
    return points, mean, scale


class _Distances:
    """Squared L2 distances from all points to some centroids, (N, M) float32, by FAISS."""

    def __init__(self, points: np.ndarray, num_clusters: int, threads: int):
        self.points, self.threads = points, threads
        self.resources = gpu_resources(len(points), num_clusters, points.shape[1])
        if threads > 1 or self.resources:
            place = "a GPU" if self.resources else f"the CPU, {threads} threads"
            get_logger().info(f"balanced k-means of {len(points):,} vectors: FAISS computes distances on {place}")

    def to(self, centroids: np.ndarray) -> np.ndarray:
        import faiss

        costs = np.empty((len(self.points), len(centroids)), dtype=np.float32)
        if self.resources is not None:
            rows = max(1, GPU_BLOCK_BYTES // (4 * max(centroids.shape)))
            for start in range(0, len(costs), rows):
                block = slice(start, start + rows)
                faiss.pairwise_distance_gpu(self.resources, self.points[block], centroids, D=costs[block])
            return costs

        def of_block(block: slice) -> None:
            faiss.omp_set_num_threads(1)  # OpenMP keeps this number per thread
            costs[block] = faiss.pairwise_distances(self.points[block], centroids)

        list(map_blocks(of_block, len(costs), self.threads))
        return costs


def _means(points: np.ndarray, labels: np.ndarray, num_clusters: int, threads: int = 1) -> np.ndarray:
    """Return the means of the clusters, (M, D) float32; zeros where a cluster is empty."""
    from scipy.sparse import csc_matrix

    def of_block(block: slice) -> np.ndarray:
        count = block.stop - block.start
        columns = (np.ones(count, np.float32), labels[block], np.arange(count + 1))
        return csc_matrix(columns, shape=(num_clusters, count)) @ points[block]

    sums = np.zeros((num_clusters, points.shape[1]))
    for part in map_blocks(of_block, len(points), threads):
        sums += part
    sizes = np.bincount(labels, minlength=num_clusters)
    return (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)


def _sum_of_squares(points: np.ndarray) -> float:
    return float(sum(np.square(points[start : start + 8192]).sum(dtype=np.float64)
                     for start in range(0, len(points), 8192)))  # fmt: skip


def _inertia(squares: float, labels: np.ndarray, means: np.ndarray) -> float:
    """Compute the sum of squared distances to the means from the sum of squares of the points."""
    sizes = np.bincount(labels, minlength=len(means))
    return max(0.0, squares - float(sizes @ np.square(means, dtype=np.float64).sum(axis=1)))
