"""Distances between two finite sets of points, computed exactly on the host in float64.

Sets have shape (n, ...); all but the first axis are flattened.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist


def _flat(x) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    return x.reshape(len(x), -1)


def w2(x, y) -> float:
    """The 2-Wasserstein distance of two sets of equal size, in the units of the data.

    sqrt of the mean squared distance under the best one-to-one matching (exact; n^3
    time). Two sets of one law are not at distance 0: compare with the floor between two
    real sets, which falls like n^(-1/d).
    """
    x, y = _flat(x), _flat(y)
    if x.shape != y.shape:
        raise ValueError(
            "w2 matches two sets of the same number of points in the same space, got "
            f"{x.shape} and {y.shape}. Draw equally many."
        )
    cost = cdist(x, y, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def mmd2(x, y, *, bandwidth: float | None = None) -> float:
    """The unbiased squared maximum mean discrepancy, k = exp(-|a - b|^2 / (2 h^2)).

    Its mean is 0 for two sets of one law, so it may be negative. `bandwidth` h defaults
    to the median distance between points of `y` (Gretton et al. 2012, lemma 6, section
    8).
    """
    x, y = _flat(x), _flat(y)
    xx, yy, xy = (cdist(a, b, "sqeuclidean") for a, b in ((x, x), (y, y), (x, y)))
    if bandwidth is None:
        bandwidth = float(np.sqrt(np.median(yy[np.triu_indices(len(y), 1)])))
    kxx, kyy, kxy = (np.exp(-d / (2 * bandwidth**2)) for d in (xx, yy, xy))
    n, m = len(x), len(y)
    within = (kxx.sum() - n) / (n * (n - 1)) + (kyy.sum() - m) / (m * (m - 1))
    return float(within - 2 * kxy.mean())


def nearest(x, y) -> float:
    """The mean distance from each point of `x` to its nearest point of `y`."""
    return float(cdist(_flat(x), _flat(y)).min(axis=1).mean())
