"""Distances between Gaussians, and the moments of a set of points.

    W_2^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))              (1)

(Dowson & Landau 1982; Bures 1969). With S_k = R_k^T R_k the same number is

    W_2^2 = |m1 - m2|^2 + min over orthogonal Q of ||R1 - Q R2||_F^2,  Q = U V^T    (2)

where R1 R2^T = U diag(s) V^T (Bhatia, Jain & Lim 2019, "On the Bures-Wasserstein
distance between positive definite matrices", theorem 1). In (2), a sum of squares,
nothing cancels, and covariances may be singular.

Moments of two sets merge exactly (Chan, Golub & LeVeque 1983):

    M = M1 + M2 + n1 n2 / (n1 + n2) d d^T,   d = m2 - m1                            (3)
"""

import dataclasses

import numpy as np
from jaxtyping import ArrayLike, Float, Shaped

from .points import Points, pair, points


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter sum (x - mean)(x - mean)^T of a set, in float64.

    `Moments.of(a) + Moments.of(b)` are the moments of both sets.
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, x: Points) -> "Moments":
        """The moments of the points `x`, all but their first axis flattened."""
        x = points(x, "x")
        mean = x.mean(axis=0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Moments") -> "Moments":
        if self.mean.shape != other.mean.shape:
            found = f"{len(self.mean)} and {len(other.mean)}"
            raise ValueError(f"moments merge within one space, got dimensions {found}.")
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + other.count / count * gap
        between = self.count * other.count / count * np.outer(gap, gap)  # (3)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def cov(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance, scatter / (count - 1)."""
        if self.count < 2:
            raise ValueError("a covariance needs 2 points or more, got 1. Draw more.")
        return self.scatter / (self.count - 1)


def gaussian_w2(
    mean1: Shaped[ArrayLike, "..."],
    cov1: Shaped[ArrayLike, "..."],
    mean2: Shaped[ArrayLike, "..."],
    cov2: Shaped[ArrayLike, "..."],
) -> float:
    """The 2-Wasserstein distance of two Gaussians by (2), in units of the data.

    **Arguments:**
    - `mean1`, `mean2`: (d,).
    - `cov1`, `cov2`: (d, d), possibly singular.
    """
    (m1, r1), (m2, r2) = _checked(mean1, cov1, "1"), _checked(mean2, cov2, "2")
    if len(m1) != len(m2):
        found = f"{m1.shape} and {m2.shape}"
        raise ValueError(f"expected Gaussians of one space, got means of {found}.")
    u, _, vt = np.linalg.svd(r1 @ r2.T)
    return float(np.sqrt(np.sum((m1 - m2) ** 2) + np.sum((r1 - u @ vt @ r2) ** 2)))


def fitted_gaussian_w2(x: Points, y: Points) -> float:
    """`gaussian_w2` of the means and covariances of two sets, in units of the data.

    A lower bound of W_2 (Gelbrich 1990) but for its bias, about 0.85 d / sqrt(n).

    **Arguments:**
    - `x`, `y`: two sets of two or more points of one space.
    """
    a, b = (Moments.of(points) for points in pair(x, y, least=2))
    return gaussian_w2(a.mean, a.cov, b.mean, b.cov)


def _checked(mean, cov, which):
    """The mean and a root R with R^T R = cov."""
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
        raise ValueError(
            f"mean{which} must have shape (d,) and cov{which} shape (d, d), got "
            f"{mean.shape} and {cov.shape}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"mean{which} and cov{which} must be finite, got nan or inf.")
    size = abs(cov).max()
    if abs(cov - cov.T).max() > 1e-5 * size:
        raise ValueError(f"cov{which} must be symmetric, got a matrix that is not.")
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    if values[0] < -1e-5 * size:
        raise ValueError(
            f"cov{which} must have no negative eigenvalue, got {values[0]:g}."
        )
    # Below this an eigenvalue is rounding, and its root would be 1e8 times larger.
    values = np.where(values > len(mean) * np.finfo(float).eps * size, values, 0.0)
    return mean, np.sqrt(values)[:, None] * vectors.T
