"""The Kolmogorov-Smirnov test of points on the line against a known law.

D = sup_x |F_n(x) - F(x)|                                                       (1)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Shaped

from .points import points


class KS(NamedTuple):
    """D of (1), and the probability of a larger one if F is the law."""

    statistic: float
    p_value: float


def ks(x: Shaped[ArrayLike, "n ..."], cdf: Callable) -> KS:
    """The Kolmogorov-Smirnov statistic of `x`, (n,) or (n, 1), against `cdf`.

    `cdf` maps an array of points to probabilities, and must not be fitted to `x`. D has
    no unit. For n points of the law itself it is about 0.87 / sqrt(n), and the p value
    (Simard & L'Ecuyer 2011) is uniform: under 1e-3 says
    that the law is another one. It is strong in the middle and weak in the tails. The
    time of a sort (Kolmogorov 1933).
    """
    rows = points(x, "x")
    if rows.shape[1] != 1:
        raise ValueError(
            f"ks needs points on the line, shape (n,) or (n, 1), got {np.shape(x)}. "
            "Test one coordinate, or one projection."
        )

    def checked(z):
        p = np.asarray(cdf(z), np.float64)
        ordered = p.shape == z.shape and (np.diff(p[np.argsort(z)]) >= -1e-6).all()
        if not ordered or p.min() < -1e-6 or p.max() > 1 + 1e-6:
            raise ValueError(
                "cdf must map points to as many probabilities that rise from 0 to 1, "
                f"got shape {p.shape} for {z.shape} and a range of "
                f"[{p.min(initial=np.inf):g}, {p.max(initial=-np.inf):g}]."
            )
        return np.clip(p, 0, 1)

    from scipy.stats import kstest  # a second to import

    result = kstest(rows[:, 0], checked)
    return KS(float(result.statistic), float(result.pvalue))
