"""The Kolmogorov-Smirnov test of points on the line against a known distribution."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .points import Points, points


class KS(NamedTuple):
    """D = sup |F_n - F|, and the probability of a larger one if F is right."""

    statistic: float
    p_value: float


def ks(x: Points, cdf: Callable) -> KS:
    """The Kolmogorov-Smirnov statistic of points against a distribution function.

    Strong in the middle and weak in the tails (Kolmogorov 1933; the p value is of
    Simard & L'Ecuyer 2011).

    **Arguments:**
    - `x`: the points, (n,) or (n, 1).
    - `cdf`: maps an array of points to probabilities; must not be fitted to `x`.
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
