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
section 3). For n real and m fake points of one distribution E density = 1 and, as
all orders of distances are equally likely,

    E coverage = 1 - (n - 1)...(n - k) / ((n + m - 1)...(n + m - k)).               (5)
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Shaped

from .points import blocks, pair


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density, about 1 at its best but without a bound; coverage, in [0, 1]."""

    density: float
    coverage: float


def nearest(x: Shaped[ArrayLike, "n ..."], y: Shaped[ArrayLike, "m ..."]) -> float:
    """The mean distance from each point of `x` to its nearest of `y`.

    Not a distance of distributions: 0 says that `x` copies points of `y`, and it falls
    with the size of `y` like m^(-1/d). n m time.

    **Arguments:**
    - `x`, `y`: two sets of points of one space.

    **Returns:** the distance, in the units of the data.
    """
    x, y = pair(x, y)
    return float(np.concatenate([d.min(axis=1) for d in blocks(x, y)]).mean())


def precision_recall(
    real: Shaped[ArrayLike, "n ..."], fake: Shaped[ArrayLike, "m ..."], k: int = 3
) -> PrecisionRecall:
    """Improved precision (1) and recall (2) of points, or of features.

    Both depend on n, m, k and the dimension, are below 1 for two sets of one
    distribution, and one outlier with a large ball changes them: compare with two real
    sets of the same sizes. (n + m)^2 time.

    **Arguments:**
    - `real`, `fake`: two sets of points of one space.
    - `k`: of the k-th nearest neighbour, default 3.

    **Returns:** `PrecisionRecall`, without unit.
    """
    real, fake = _sets(real, fake, k)
    precision, recall = _inside(real, fake, k), _inside(fake, real, k)
    return PrecisionRecall(float(precision.mean()), float(recall.mean()))


def density_coverage(
    real: Shaped[ArrayLike, "n ..."], fake: Shaped[ArrayLike, "m ..."], k: int = 5
) -> DensityCoverage:
    """Density (3) and coverage (4) of points, or of features.

    Density has mean 1 for two sets of one distribution, in any dimension; coverage has
    the mean (5), about 1 - 2^-k for n = m. Balls are around real points only, so fake
    outliers change little. (n + m)^2 time.

    **Arguments:**
    - `real`, `fake`: two sets of points of one space.
    - `k`: of the k-th nearest neighbour, default 5.

    **Returns:** `DensityCoverage`, without unit.
    """
    real, fake = _sets(real, fake, k)
    inside = _counts(real, fake, k)
    return DensityCoverage(
        float(inside.sum() / (k * len(fake))), float((inside > 0).mean())
    )


def _sets(real, fake, k):
    real, fake = pair(real, fake, ("real", "fake"), least=2)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            "k must be at least 1 and less than the number of points in either set, "
            f"got k = {k} with {len(real)} real and {len(fake)} fake points."
        )
    return real, fake


def _radii(x, k):
    """The distance to the k-th nearest other point; index 0 is the point itself."""
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for d in blocks(x, x)])


def _inside(centres, x, k) -> np.ndarray:
    """Whether each point of `x` lies in a ball around some centre."""
    radii = _radii(centres, k)
    return np.concatenate([(d <= radii).any(axis=1) for d in blocks(x, centres)])


def _counts(centres, x, k):
    """How many points of `x` lie in the ball around each centre."""
    radii = _radii(centres, k)
    return np.sum([(d <= radii).sum(axis=0) for d in blocks(x, centres)], axis=0)
