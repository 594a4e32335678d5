"""From prices that are nearly right to the optimum: successive shortest paths between clusters.

An arc a -> b of the residual graph costs what the cheapest move of a point from a to b costs. Points travel along
shortest paths from clusters with too many to clusters with too few, many paths a round. Any prices give an optimum for
the sizes they lead to, and moves along shortest paths keep it one; so when the sizes are right, the result is the
optimum. This part is float64: in float32 the graph gets negative cycles.

N mod M clusters get one point more, whichever is cheapest: the graph has one more node, a pool that takes one point
from each of those.
"""

import itertools

import numpy as np

from ksub_ds.codes.blocks import map_blocks


class Repair:
    """Successive shortest paths on the clusters 0..M-1 and the pool M.

    arcs[b, a] is the cost of the arc a -> b: the least of costs[i, b] - costs[i, a] over points i of a.
    """

    def __init__(self, costs: np.ndarray, prices: np.ndarray, tie: float, threads: int):
        self.costs, self.tie, self.slack = costs, tie, tie
        count, self.pool = costs.shape
        self.floor, pooled = divmod(count, self.pool)
        single = prices.astype(np.float32)
        blocks = map_blocks(lambda block: (costs[block] + single).argmin(axis=1), count, threads)
        self.labels = np.concatenate(list(blocks))
        sizes = np.bincount(self.labels, minlength=self.pool)
        # The dearest clusters give a point to the pool: with the pool's price between, that is optimal too.
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

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Move points until every size is right; labels and prices."""
        while (self.excess > 0).any():
            distance, previous = self._shortest_paths(np.where(self.excess > 0, -self.prices, np.inf))
            sinks = np.flatnonzero(self.excess < 0)
            nearest = np.argsort((distance + self.prices)[sinks], kind="stable")
            self.prices = -distance
            self._moved: dict[int, int] = {}  # point -> where it came from
            if sum([self._send(sink, previous) for sink in sinks[nearest]]):
                self._update_arcs()
            else:  # moves of nearly least cost have closed a circle that pays: see only what is larger
                self.slack *= 10
        return self.labels, self.prices[: self.pool]

    def _shortest_paths(self, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bellman and Ford, from every node at its given distance; all arcs of a sweep at once."""
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
        """Send as many points as possible down the shortest path to `sink`; how many."""
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
