"""Distances from averages over pairs of points: unbiased, on the host in float64.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)                                   (1)
    energy = 2 E|x - y| - E|x - x'| - E|y - y'|                                     (2)

Averages are over distinct points, so both estimates have no bias, and have mean 0 for
two sets of one distribution. (2) is (1) with the kernel -|a - b| (Sejdinovic et al.
2013).
"""

import numpy as np
from jaxtyping import ArrayLike, Shaped

from .points import blocks, pair


def mmd2(
    x: Shaped[ArrayLike, "n ..."],
    y: Shaped[ArrayLike, "m ..."],
    *,
    bandwidth: float | int | None = None,
) -> float:
    """The unbiased squared maximum mean discrepancy, k = exp(-|a - b|^2 / (2 h^2)).

    Its mean is 0 for two sets of one distribution, so it may be negative; its standard
    deviation is then of the order 1 / n. n^2 time (Gretton et al. 2012, lemma 6).

    **Arguments:**
    - `x`, `y`: two sets of points of one space; `y` is the reference.
    - `bandwidth`: h, in units of the data; default the median distance between points
      of `y`. It decides which differences count: compare values of one h.

    **Returns:** MMD^2, without unit, between 0 and 2 for distributions.
    """
    x, y = pair(x, y, least=2)
    if bandwidth is None:
        from scipy.spatial.distance import pdist

        bandwidth = float(np.median(pdist(y)))
    if not bandwidth > 0:
        raise ValueError(
            f"mmd2 needs a bandwidth > 0, got {bandwidth:g}. The default is the median "
            "distance between points of y, which is 0 when most of them are equal."
        )

    def kernel(a, b):
        return sum(
            np.exp(-d / (2 * bandwidth**2)).sum() for d in blocks(a, b, "sqeuclidean")
        )

    n, m = len(x), len(y)  # k(a, a) = 1 is left out
    within = (kernel(x, x) - n) / (n * (n - 1)) + (kernel(y, y) - m) / (m * (m - 1))
    return float(within - 2 * kernel(x, y) / (n * m))


def energy_distance(
    x: Shaped[ArrayLike, "n ..."], y: Shaped[ArrayLike, "m ..."]
) -> float:
    """The energy distance (2), which is 0 only for equal distributions.

    An unbiased U-statistic, which may be negative; for two sets of one distribution its
    mean is 0 and its standard deviation of the order 1 / n. A small difference counts
    squared. n^2 time (Székely & Rizzo 2013, "Energy statistics: a class of statistics
    based on distances"; on the line it is 2 int (F - G)^2).

    **Arguments:**
    - `x`, `y`: two sets of points of one space.

    **Returns:** the distance, in the units of the data.
    """
    x, y = pair(x, y, least=2)

    def total(a, b):
        return sum(d.sum() for d in blocks(a, b))

    n, m = len(x), len(y)
    within = total(x, x) / (n * (n - 1)) + total(y, y) / (m * (m - 1))
    return float(2 * total(x, y) / (n * m) - within)
