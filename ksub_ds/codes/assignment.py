"""Assign N points to M clusters at the least total cost, with cluster sizes that differ by at most one. Exact.

This is a transport problem. Its dual has one price per cluster: at the right prices every point goes to the cluster
where cost + price is least, and the sizes come out right. It is solved in two parts:

1. Prices (`balancing_prices`). In the smoothed dual a point is spread over the clusters by a softmax of
   -(cost + price) / temperature. Newton's method finds the prices at which every cluster gets N/M points, while the
   temperature falls: first on a sample, then on all points with the few clusters that are within reach of each. About
   one point in a hundred is then still in the wrong cluster.
2. Repair (`ResidualGraph`). Surplus points move along shortest paths of the residual graph until the sizes are right.
   Any prices give an optimum for the sizes they lead to, and moves along shortest paths preserve optimality; so the
   result is the optimum.

    costs   (N, M) float32     prices  (M,) float64     share  (N, M), or its entries within reach: each point's softmax
"""

import abc
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ksub_ds.codes.blocks import map_blocks, map_each
from ksub_ds.common.logging import Progress

SAMPLE = 32  # points per cluster that the first prices come from
SAMPLE_TEMPERATURES = (2.0, 0.3)  # in units of the typical gap between a point's two cheapest clusters
TEMPERATURES = (0.1, 0.03, 0.01)
NEWTON_STEPS = 6
ATTEMPTS = 6
LONGEST_STEP = 4.0  # temperatures
REACH = 20.0  # temperatures: clusters this much dearer than a point's cheapest play no part
TOLERANCE = 0.05  # of a size, in the smoothed problem,
TOLERATED = 20.0  # or this many points if they are fewer: repair moves a cluster's surplus point by point
TIE = 1e-7  # of the typical gap: differences of costs below this are ties, so that equal points move together


def balanced_assignment(
    costs: np.ndarray, prices: np.ndarray | None = None, threads: int = 1, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Assign points at the least total cost, with floor(N/M) or ceil(N/M) of them in every cluster.

    Args:
        costs: (N, M) finite float32.
        prices: (M,) of a similar problem, to start from.
        threads: does not change the result.
        progress: shows which temperature is reached, and how many points are in the wrong cluster after that.

    Returns:
        labels (N,) and optimal prices (M,): no point finds cost + price less elsewhere.
    """
    count, clusters = costs.shape
    if clusters == 1:
        return np.zeros(count, dtype=np.int64), np.zeros(1)
    prices, unit = balancing_prices(costs, prices, threads, progress)
    return ResidualGraph(costs, prices, TIE * unit, threads).solve(progress)


def typical_gap(sample: np.ndarray) -> float:
    """Return the median cost difference of a point's two cheapest clusters: the unit of temperatures."""
    two = np.partition(sample, 1, axis=1)[:, :2]
    return float(np.median(two[:, 1] - two[:, 0])) or float(np.ptp(sample)) or 1.0


def balancing_prices(
    costs: np.ndarray, prices: np.ndarray | None, threads: int, progress: Progress | None = None
) -> tuple[np.ndarray, float]:
    """Find prices at which about 99 % of the points are in the right cluster.

    Args:
        costs: (N, M).
        prices: (M,) to start from. [zeros]
        threads: does not change the result.
        progress: shows the temperature.

    Returns:
        Prices (M,) and the typical gap, the unit that temperatures and ties are measured in.
    """
    count, clusters = costs.shape
    sample = costs[:: max(1, count // (SAMPLE * clusters))]
    unit = typical_gap(sample)
    dense = DenseDual(sample)
    prices = np.zeros(clusters) if prices is None else prices
    for temperature in SAMPLE_TEMPERATURES:
        prices, _ = dense.balance(prices, temperature * unit, 0.1, LONGEST_STEP)
    stages = [(costs, temperature) for temperature in TEMPERATURES]
    if count > 16 * SAMPLE * clusters:  # steps on all points are slow: take the long ones on a larger sample
        middle = costs[:: count // (8 * SAMPLE * clusters)]
        stages = [(middle, 3 * TEMPERATURES[0]), (middle, TEMPERATURES[0]), *stages[1:]]
    tolerance = min(TOLERANCE, TOLERATED * clusters / count)
    for some, temperature in stages:
        for attempt in range(ATTEMPTS):  # an isolated cluster needs long steps to find its last points
            near = SparseDual(some, prices, REACH * 2**attempt * temperature * unit, threads)
            prices, wrong = near.balance(prices, temperature * unit, tolerance, LONGEST_STEP * 2**attempt)
            if progress:
                progress.advance(0, temperature=temperature, points=f"{len(some):,}")
            if wrong < tolerance:
                break
    return prices, unit


class SmoothedDual(abc.ABC):
    """Points spread over clusters by a softmax of -(cost + price) / temperature.

    Subclasses choose the clusters that a point may go to, and with them the layout of `share` (typed Any).

    Attributes:
        target: N / M, the size every cluster should have.
    """

    target: float

    @abc.abstractmethod
    def spread(self, prices: np.ndarray, temperature: float) -> Any:
        """Return the share of each point in each of its clusters."""

    @abc.abstractmethod
    def sizes(self, share: Any) -> np.ndarray:
        """Return the sums of the shares of each cluster, (M,)."""

    @abc.abstractmethod
    def overlap(self, share: Any) -> np.ndarray:
        """Return share' share, (M, M)."""

    def balance(
        self, prices: np.ndarray, temperature: float, tolerance: float, longest: float
    ) -> tuple[np.ndarray, float]:
        """Take Newton steps until no size is off by more than a fraction `tolerance` of the target.

        Args:
            prices: (M,) to start from.
            temperature: of the softmax, in units of cost.
            tolerance: largest relative error of a size that is accepted.
            longest: bound of a step, in temperatures.

        Returns:
            Prices (M,) and the largest relative error of a size.
        """
        for _ in range(NEWTON_STEPS):
            share = self.spread(prices, temperature)
            sizes = self.sizes(share)
            off = np.abs(sizes - self.target) / self.target
            wrong = float(off.max())
            if wrong < tolerance:
                break
            if off.mean() > 0.4:  # the quadratic model is wrong this far away: take Sinkhorn's step
                step = np.log(np.maximum(sizes, 1e-3 * self.target) / self.target)
            else:  # a constant added to all prices changes nothing: the small term makes the matrix regular
                curvature = np.diag(sizes + 1e-3 * self.target) - self.overlap(share)
                step = np.clip(np.linalg.solve(curvature, sizes - self.target), -longest, longest)
            prices = prices + temperature * step
        return prices, wrong


class DenseDual(SmoothedDual):
    """Every point may go to every cluster; `share` is (N, M)."""

    def __init__(self, costs: np.ndarray):
        self.costs = costs
        self.target = len(costs) / costs.shape[1]

    def spread(self, prices: np.ndarray, temperature: float) -> np.ndarray:
        """Return the share of each point in each cluster, (N, M) float32."""
        share = self.costs + prices.astype(np.float32)
        share -= share.min(axis=1, keepdims=True)
        share *= np.float32(-1 / temperature)
        np.maximum(share, -30, out=share)  # no denormal numbers: they make everything ten times slower
        np.exp(share, out=share)
        share /= share.sum(axis=1, keepdims=True)
        return share

    def sizes(self, share: np.ndarray) -> np.ndarray:
        """Return the sums of the shares of each cluster, (M,)."""
        return share.sum(axis=0, dtype=np.float64)

    def overlap(self, share: np.ndarray) -> np.ndarray:
        """Return share' share, (M, M)."""
        return share.T @ share


@dataclass(frozen=True)
class NearClusters:
    """The clusters within reach of each point of a block: flat, point after point.

    Attributes:
        cluster: of each pair of a point and a cluster.
        cost: of each pair, float64.
        lengths: pairs of each point.
        starts: the first pair of each point, and the number of all.
    """

    cluster: np.ndarray
    cost: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray

    def spread(self, prices: np.ndarray, temperature: float) -> np.ndarray:
        """Return the share of each point in each of its clusters, flat."""
        share = (self.cost + prices[self.cluster]) / -temperature
        share -= np.repeat(np.maximum.reduceat(share, self.starts[:-1]), self.lengths)
        np.exp(share, out=share)
        share /= np.repeat(np.add.reduceat(share, self.starts[:-1]), self.lengths)
        return share

    def overlap(self, share: np.ndarray, clusters: int) -> np.ndarray:
        """Return share' share, (M, M), without shares below 1e-4."""
        from scipy.sparse import csr_matrix

        kept = share > 1e-4
        starts = np.concatenate([[0], np.cumsum(kept)])[self.starts]
        spread = csr_matrix((share[kept], self.cluster[kept], starts), shape=(len(self.lengths), clusters))
        return (spread.T @ spread).toarray()


class SparseDual(SmoothedDual):
    """Every point may go to the clusters within `reach` of its cheapest one; `share` is a list, block after block.

    Args:
        costs: (N, M) float32.
        prices: (M,) that are added to the costs.
        reach: how much more than a point's least cost + price still is near.
        threads: does not change the result.
    """

    def __init__(self, costs: np.ndarray, prices: np.ndarray, reach: float, threads: int):
        count, self.clusters = costs.shape
        self.threads, self.target = threads, count / self.clusters

        def of_block(block: slice) -> NearClusters:
            priced = costs[block] + prices.astype(np.float32)
            flat = np.flatnonzero(priced <= priced.min(axis=1, keepdims=True) + np.float32(reach))
            point, cluster = np.divmod(flat, self.clusters)
            lengths = np.bincount(point, minlength=len(priced))
            starts = np.concatenate([[0], np.cumsum(lengths)])
            return NearClusters(cluster, costs[block].ravel()[flat].astype(np.float64), lengths, starts)

        self.near = list(map_blocks(of_block, count, threads))

    def spread(self, prices: np.ndarray, temperature: float) -> list[np.ndarray]:
        """Return the share of each point in each of its clusters, flat, for each block."""
        return list(map_each(lambda near: near.spread(prices, temperature), self.threads, self.near))

    def sizes(self, share: list[np.ndarray]) -> np.ndarray:
        """Return the sums of the shares of each cluster, (M,)."""
        pairs = zip(self.near, share, strict=True)
        return np.sum([np.bincount(near.cluster, part, self.clusters) for near, part in pairs], axis=0)

    def overlap(self, share: list[np.ndarray]) -> np.ndarray:
        """Return share' share, (M, M), without shares below 1e-4."""
        total = np.zeros((self.clusters, self.clusters))
        for part in map_each(lambda near, part: near.overlap(part, self.clusters), self.threads, self.near, share):
            total += part
        return total


class ResidualGraph:
    """The residual graph of an assignment, solved by successive shortest paths.

    Nodes are the clusters 0..M-1 and one more, the pool M. An arc a -> b costs what the cheapest move of a point from
    a to b costs: arcs[b, a] is the least of costs[i, b] - costs[i, a] over points i of a. Points travel from clusters
    with too many to clusters with too few, along many paths a round. Arcs are float64: in float32 the graph gets
    negative cycles.

    N mod M clusters get one point more, whichever is cheapest: the pool takes one point from each of those.

    Args:
        costs: (N, M) float32.
        prices: (M,) close to optimal ones; each point begins at its cheapest cluster under them.
        tie: costs that differ by no more count as equal.
        threads: does not change the result.
    """

    def __init__(self, costs: np.ndarray, prices: np.ndarray, tie: float, threads: int):
        self.costs, self.tie, self.slack = costs, tie, tie
        count, self.pool = costs.shape
        self.floor, pooled = divmod(count, self.pool)
        single = prices.astype(np.float32)
        blocks = map_blocks(lambda block: (costs[block] + single).argmin(axis=1), count, threads)
        self.labels = np.concatenate(list(blocks))
        sizes = np.bincount(self.labels, minlength=self.pool)
        # The clusters of the highest prices give a point to the pool, whose price then keeps this optimal.
        self.gives = np.zeros(self.pool, dtype=bool)
        self.gives[np.argsort(-prices, kind="stable")[:pooled]] = True
        self.excess = np.append(sizes - self.floor - self.gives, 0)
        self.prices = np.append(prices, prices[self.gives].min() if pooled else prices.max())
        self.arcs = np.full((self.pool + 1, self.pool + 1), np.inf)
        order = np.argsort(self.labels, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(sizes)])

        def arcs_of(cluster: int) -> np.ndarray:
            rows = costs[order[bounds[cluster] : bounds[cluster + 1]]]
            own = rows[:, cluster, None].astype(np.float64)
            return (rows - own).min(axis=0) if len(rows) else np.full(self.pool, np.inf)

        for cluster in range(self.pool):
            self.arcs[: self.pool, cluster] = arcs_of(cluster)
        self._set_pool_arcs()

    def _set_pool_arcs(self) -> None:
        self.arcs[self.pool, : self.pool] = np.where(self.gives, np.inf, 0.0)
        self.arcs[: self.pool, self.pool] = np.where(self.gives, 0.0, np.inf)

    def solve(self, progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Move points until every size is right; return labels (N,) and prices (M,)."""
        while (self.excess > 0).any():
            if progress:
                progress.advance(0, to_move=f"{self.excess[self.excess > 0].sum():,}")
            distance, previous = self._shortest_paths(np.where(self.excess > 0, -self.prices, np.inf))
            sinks = np.flatnonzero(self.excess < 0)
            nearest = np.argsort((distance + self.prices)[sinks], kind="stable")
            self.prices = -distance
            self._moved: dict[int, int] = {}  # point -> where it came from
            if sum(self._send(sink, previous) for sink in sinks[nearest]):
                self._update_arcs()
            else:  # moves within the tie tolerance have closed a negative cycle: raise the tolerance
                self.slack *= 10
        return self.labels, self.prices[: self.pool]

    def _shortest_paths(self, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run Bellman-Ford from every node at its given distance, all arcs of a sweep at once."""
        previous = np.full(len(distance), -1)
        nodes = np.arange(len(distance))
        for _ in nodes:
            through = self.arcs + distance
            best = through.argmin(axis=1)
            reached = through[nodes, best]
            better = reached < distance - self.slack
            if not better.any():
                break
            distance = np.where(better, reached, distance)
            previous = np.where(better, best, previous)
        return distance, previous

    def _send(self, sink: int, previous: np.ndarray) -> int:
        """Send as many points as possible down the shortest path to `sink`; return how many."""
        path = [int(sink)]
        while previous[path[-1]] >= 0 and len(path) <= len(previous):
            path.append(int(previous[path[-1]]))
        source = path[-1]
        amount = min(self.excess[source], -self.excess[sink])
        if amount <= 0 or len(path) > len(previous):
            return 0
        moves: list[tuple[int, int, list[int] | None]] = []
        for target, origin in itertools.pairwise(path):
            if self.pool in (origin, target):
                cluster = min(origin, target)
                amount = min(amount, int(self.gives[cluster] == (origin == self.pool)))
                moves.append((origin, target, None))
                continue
            members = np.flatnonzero(self.labels == origin)
            extra = self.costs[members, target].astype(np.float64) - self.costs[members, origin]
            near = members[extra <= self.arcs[target, origin] + self.tie]
            free = [i for i in near if i not in self._moved]
            moves.append((origin, target, free))
            amount = min(amount, len(free))
        if amount <= 0:
            return 0
        for origin, target, points in moves:
            if points is None:
                self.gives[min(origin, target)] = target == self.pool
                continue
            for point in points[:amount]:
                self._moved[point] = origin
                self.labels[point] = target
        self.excess[source] -= amount
        self.excess[sink] += amount
        return int(amount)

    def _update_arcs(self) -> None:
        points = np.array(list(self._moved), dtype=np.int64)
        origins = np.array(list(self._moved.values()), dtype=np.int64)
        inner = self.arcs[: self.pool, : self.pool]
        rows = self.costs[points].astype(np.float64)
        for origin in np.unique(origins):
            left = rows[origins == origin]
            stale = np.flatnonzero((left - left[:, origin, None] <= inner[:, origin]).any(axis=0))
            members = np.flatnonzero(self.labels == origin)
            fresh = self.costs[np.ix_(members, stale)] - self.costs[members, origin, None].astype(np.float64)
            inner[stale, origin] = fresh.min(axis=0, initial=np.inf)
        arrived = rows - rows[np.arange(len(points)), self.labels[points], None]
        np.minimum.at(inner.T, self.labels[points], arrived)
        self._set_pool_arcs()
