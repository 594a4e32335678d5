"""Prices of the clusters at which nearly every point finds its place: the smoothed dual of the transport problem.

A point is spread over clusters by a softmax of -(cost + price) / temperature, and Newton's method looks for the
prices at which every cluster gets N/M points, while the temperature falls: first on a sample, then on all points with
the few clusters that are within reach of each.

    costs   (N, M) float32     prices  (M,) float64     share  how a point is spread over its clusters
"""

import abc

import numpy as np

from ksub_ds.codes.blocks import map_blocks

SAMPLE = 32  # points per cluster that the first prices come from
SAMPLE_TEMPERATURES = (2.0, 0.3)  # in units of the typical gap between a point's two cheapest clusters
TEMPERATURES = (0.1, 0.03, 0.01)
NEWTON_STEPS = 6
ATTEMPTS = 6
LONGEST_STEP = 4.0  # temperatures
REACH = 20.0  # temperatures: clusters this much dearer than a point's cheapest play no part
TOLERANCE = 0.05  # of a size, in the smoothed problem,
TOLERATED = 20.0  # or this many points if they are fewer: repair moves a cluster's surplus point by point


def typical_gap(sample: np.ndarray) -> float:
    """How much dearer a point's second cluster is than its first: the unit of temperatures."""
    two = np.partition(sample, 1, axis=1)[:, :2]
    return float(np.median(two[:, 1] - two[:, 0])) or float(np.ptp(sample)) or 1.0


def balancing_prices(costs: np.ndarray, prices: np.ndarray | None, threads: int) -> tuple[np.ndarray, float]:
    """Prices (M,) at which all but about a per cent of the points are in place, and the unit they are measured in."""
    count, clusters = costs.shape
    sample = costs[:: max(1, count // (SAMPLE * clusters))]
    unit = typical_gap(sample)
    everywhere = Everywhere(sample)
    prices = np.zeros(clusters) if prices is None else prices
    for temperature in SAMPLE_TEMPERATURES:
        prices, _ = everywhere.balance(prices, temperature * unit, 0.1, LONGEST_STEP)
    stages = [(costs, temperature) for temperature in TEMPERATURES]
    if count > 16 * SAMPLE * clusters:  # steps on all points are dear: go far on a larger sample first
        middle = costs[:: count // (8 * SAMPLE * clusters)]
        stages = [(middle, 3 * TEMPERATURES[0]), (middle, TEMPERATURES[0]), *stages[1:]]
    tolerance = min(TOLERANCE, TOLERATED * clusters / count)
    for some, temperature in stages:
        for attempt in range(ATTEMPTS):  # a cluster that stands apart needs far steps to find its last points
            near = WithinReach(some, prices, REACH * 2**attempt * temperature * unit, threads)
            prices, wrong = near.balance(prices, temperature * unit, tolerance, LONGEST_STEP * 2**attempt)
            if wrong < tolerance:
                break
    return prices, unit


class SmoothedDual(abc.ABC):
    """Points spread over clusters by a softmax of -(cost + price) / temperature."""

    target: float  # N / M

    @abc.abstractmethod
    def spread(self, prices: np.ndarray, temperature: float) -> np.ndarray:
        """Share of each point in each of its clusters."""

    @abc.abstractmethod
    def sizes(self, share: np.ndarray) -> np.ndarray:
        """(M,) sums of the shares."""

    @abc.abstractmethod
    def overlap(self, share: np.ndarray) -> np.ndarray:
        """(M, M) share' share."""

    def balance(
        self, prices: np.ndarray, temperature: float, tolerance: float, longest: float
    ) -> tuple[np.ndarray, float]:
        """Newton steps until no size is off by more than `tolerance` of it; prices, and the last such share."""
        for _ in range(NEWTON_STEPS):
            share = self.spread(prices, temperature)
            sizes = self.sizes(share)
            off = np.abs(sizes - self.target) / self.target
            wrong = float(off.max())
            if wrong < tolerance:
                break
            if off.mean() > 0.4:  # far away the quadratic model is of no use: Sinkhorn's step
                step = np.log(np.maximum(sizes, 1e-3 * self.target) / self.target)
            else:  # a constant added to all prices changes nothing: the small term makes the matrix regular
                curvature = np.diag(sizes + 1e-3 * self.target) - self.overlap(share)
                step = np.clip(np.linalg.solve(curvature, sizes - self.target), -longest, longest)
            prices = prices + temperature * step
        return prices, wrong


class Everywhere(SmoothedDual):
    """Every point may go to every cluster."""

    def __init__(self, costs: np.ndarray):
        self.costs = costs
        self.target = len(costs) / costs.shape[1]

    def spread(self, prices: np.ndarray, temperature: float) -> np.ndarray:
        share = self.costs + prices.astype(np.float32)
        share -= share.min(axis=1, keepdims=True)
        share *= np.float32(-1 / temperature)
        np.maximum(share, -30, out=share)  # no denormal numbers: they make everything ten times slower
        np.exp(share, out=share)
        share /= share.sum(axis=1, keepdims=True)
        return share

    def sizes(self, share: np.ndarray) -> np.ndarray:
        return share.sum(axis=0, dtype=np.float64)

    def overlap(self, share: np.ndarray) -> np.ndarray:
        return share.T @ share


class WithinReach(SmoothedDual):
    """Every point may go to the clusters within `reach` of its cheapest one; flattened, point after point."""

    def __init__(self, costs: np.ndarray, prices: np.ndarray, reach: float, threads: int):
        count, self.clusters = costs.shape

        def of_block(block: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            priced = costs[block] + prices.astype(np.float32)
            flat = np.flatnonzero(priced <= priced.min(axis=1, keepdims=True) + np.float32(reach))
            point, cluster = np.divmod(flat, self.clusters)
            return np.bincount(point, minlength=len(priced)), cluster, costs[block].ravel()[flat]

        lengths, clusters, values = zip(*map_blocks(of_block, count, threads), strict=True)
        self.lengths = np.concatenate(lengths)
        self.cluster = np.concatenate(clusters)
        self.cost = np.concatenate(values).astype(np.float64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.target = count / self.clusters

    def spread(self, prices: np.ndarray, temperature: float) -> np.ndarray:
        share = (self.cost + prices[self.cluster]) / -temperature
        share -= np.repeat(np.maximum.reduceat(share, self.starts[:-1]), self.lengths)
        np.exp(share, out=share)
        share /= np.repeat(np.add.reduceat(share, self.starts[:-1]), self.lengths)
        return share

    def sizes(self, share: np.ndarray) -> np.ndarray:
        return np.bincount(self.cluster, share, self.clusters)

    def overlap(self, share: np.ndarray) -> np.ndarray:
        from scipy.sparse import csr_matrix

        kept = share > 1e-4
        starts = np.concatenate([[0], np.cumsum(kept)])[self.starts]
        shape = (len(self.lengths), self.clusters)
        spread = csr_matrix((share[kept], self.cluster[kept], starts), shape=shape)
        return (spread.T @ spread).toarray()
