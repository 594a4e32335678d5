"""The cheapest assignment of N points to M clusters whose sizes differ by at most one. Exact.

This is a transport problem. Its dual has one price per cluster: given the right prices, every point goes to the
cluster where cost + price is least, and the sizes come out right. So prices are found first (prices.py, the smoothed
dual), which leaves about a per cent of the points in the wrong place, and these are moved along shortest paths
(repair.py) until the sizes are right and the cost is the least there is.
"""

import numpy as np

from ksub_ds.codes.prices import balancing_prices
from ksub_ds.codes.repair import Repair

TIE = 1e-7  # of the typical gap: differences of costs below this are ties, so that equal points move together


def balanced_assignment(
    costs: np.ndarray, prices: np.ndarray | None = None, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Least total cost with floor(N/M) or ceil(N/M) points in every cluster.

    Args:
        costs: (N, M) finite float32.
        prices: (M,) of a similar problem, to start from.
        threads: does not change the result.

    Returns:
        labels (N,) and optimal prices (M,): no point finds cost + price less elsewhere.
    """
    count, clusters = costs.shape
    if clusters == 1:
        return np.zeros(count, dtype=np.int64), np.zeros(1)
    prices, unit = balancing_prices(costs, prices, threads)
    return Repair(costs, prices, TIE * unit, threads).run()
