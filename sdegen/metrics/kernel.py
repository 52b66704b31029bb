"""Distances from averages over pairs of points, on the host in float64.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)                                   (1)
    energy = 2 E|x - y| - E|x - x'| - E|y - y'|                                     (2)

(2) is (1) with k = -|a - b| (Sejdinovic et al. 2013). Averages are over distinct
points, so both estimates are unbiased. For two sets of one distribution their mean is 0
and their standard deviation of the order 1 / n, so they may be negative. n^2 time.
"""

import numpy as np

from .points import Points, blocks, pair


def mmd2(x: Points, y: Points, *, bandwidth: float | int | None = None) -> float:
    """The squared maximum mean discrepancy (1) for k = exp(-|a - b|^2 / (2 h^2)).

    Without unit, between 0 and 2 but for noise (Gretton et al. 2012, lemma 6).

    **Arguments:**
    - `x`, `y`: two sets of points of one space; `y` is the reference.
    - `bandwidth`: h, in units of the data; default the median distance between points
      of `y`. It decides which differences count: compare values of one h.
    """
    x, y = pair(x, y, least=2)
    if bandwidth is None:
        from scipy.spatial.distance import pdist

        bandwidth = float(np.median(pdist(y)))
    if not bandwidth > 0:
        raise ValueError(
            f"mmd2 needs a bandwidth > 0, got {bandwidth:g}. The default, the median "
            "distance between points of y, is 0 when most of them are equal."
        )

    def kernel(a, b):
        return sum(
            np.exp(-d / (2 * bandwidth**2)).sum() for d in blocks(a, b, "sqeuclidean")
        )

    return _discrepancy(x, y, kernel, own=1)


def energy_distance(x: Points, y: Points) -> float:
    """The energy distance (2), in units of the data, on the line 2 int (F - G)^2.

    0 in the mean only for equal distributions (Székely & Rizzo 2013, "Energy
    statistics: a class of statistics based on distances").

    **Arguments:**
    - `x`, `y`: two sets of points of one space.
    """
    x, y = pair(x, y, least=2)
    return _discrepancy(x, y, lambda a, b: -sum(d.sum() for d in blocks(a, b)), own=0)


def _discrepancy(x, y, kernel, own) -> float:
    """(1), with `kernel` the sum of k over all pairs and `own` = k(a, a), left out."""
    n, m = len(x), len(y)
    xx = (kernel(x, x) - n * own) / (n * (n - 1))
    yy = (kernel(y, y) - m * own) / (m * (m - 1))
    return float(xx + yy - 2 * kernel(x, y) / (n * m))
