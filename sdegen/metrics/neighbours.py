"""Fidelity and variety of a set, from its nearest neighbours in another.

With B(x_i) the closed ball around the real point x_i up to its k-th nearest neighbour
among the other real points, and y_j the fake points,

    precision = the share of y_j in some B(x_i)                                     (1)
    recall    = the share of x_i in some B(y_j)                                     (2)

(Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing
generative models", equations (1) and (2)),

    density  = (1 / k) sum_i of the share of y_j in B(x_i)                          (3)
    coverage = the share of B(x_i) with some y_j in it                              (4)

(Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models",
section 3). For n real and m fake points of one distribution E density = 1 and

    E coverage = 1 - (n - 1)...(n - k) / ((n + m - 1)...(n + m - k)).               (5)
"""

from typing import NamedTuple

import numpy as np

from .points import Points, blocks, pair


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density, about 1 at its best but without a bound; coverage, in [0, 1]."""

    density: float
    coverage: float


def nearest(x: Points, y: Points) -> float:
    """The mean distance from each point of `x` to its nearest of `y`, in their units.

    Not a distance of distributions: 0 says that `x` copies points of `y`.

    **Arguments:**
    - `x`, `y`: two sets of points of one space.
    """
    x, y = pair(x, y)
    return float(np.concatenate([d.min(axis=1) for d in blocks(x, y)]).mean())


def precision_recall(real: Points, fake: Points, k: int = 3) -> PrecisionRecall:
    """Improved precision (1) and recall (2) of points, or of features.

    Both are below 1 for two sets of one distribution, and one outlier with a large ball
    changes them: compare with two real sets of the same sizes.

    **Arguments:**
    - `real`, `fake`: two sets of points of one space.
    - `k`: of the k-th nearest neighbour, default 3.
    """
    sets = _sets(real, fake, k)
    shares = (
        np.concatenate([inside.any(axis=1) for inside in _inside(*both, k)]).mean()
        for both in (sets, sets[::-1])
    )
    return PrecisionRecall(*map(float, shares))


def density_coverage(real: Points, fake: Points, k: int = 5) -> DensityCoverage:
    """Density (3) and coverage (4) of points, or of features.

    Balls are around real points only, so fake outliers change little.

    **Arguments:**
    - `real`, `fake`: two sets of points of one space.
    - `k`: of the k-th nearest neighbour, default 5.
    """
    real, fake = _sets(real, fake, k)
    counts = np.sum([inside.sum(axis=0) for inside in _inside(real, fake, k)], axis=0)
    density, coverage = counts.sum() / (k * len(fake)), (counts > 0).mean()
    return DensityCoverage(float(density), float(coverage))


def _sets(real, fake, k):
    real, fake = pair(real, fake, ("real", "fake"), least=2)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            "k must be at least 1 and less than the number of points in either set, "
            f"got k = {k} with {len(real)} real and {len(fake)} fake points."
        )
    return real, fake


def _inside(centres, x, k):
    """Which points of `x` lie in the ball around each centre, some rows at a time."""
    nearest = (np.partition(d, k, axis=1)[:, k] for d in blocks(centres, centres))
    radii = np.concatenate(list(nearest))  # index 0 is the point itself
    return (d <= radii for d in blocks(x, centres))
