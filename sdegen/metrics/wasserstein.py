"""Exact optimal transport between two finite sets of points, on the host in float64.

For points x_i of weights a_i and y_j of weights b_j, and the cost c_ij = |x_i - y_j|^p,

    W_p^p = min over P >= 0, P 1 = a, P^T 1 = b of sum_ij P_ij c_ij                 (1)
          = max over f_i + g_j <= c_ij of sum_i a_i f_i + sum_j b_j g_j             (2)

(Kantorovich 1942; Villani 2003, "Topics in optimal transportation", theorem 1.3). On
the line, with F^-1 and G^-1 the quantile functions,

    W_p^p = int_0^1 |F^-1(q) - G^-1(q)|^p dq                                        (3)

(Villani 2003, theorem 2.18).
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from .._compat import need
from .points import Points, Weights, pair, weights


@dataclasses.dataclass(frozen=True, eq=False)
class Transport:
    """An optimal plan with its certificate: the potentials attain the same cost.

    `cost` is W_p^p in (units of the data)^p and `distance` W_p in units of the data.
    `plan` is P of (1); `f` and `g` are the potentials of (2), feasible at every pair
    of points, and determined up to a constant at best.
    """

    cost: float
    plan: Float[np.ndarray, "n m"]
    f: Float[np.ndarray, " n"]
    g: Float[np.ndarray, " m"]
    distance: float


def w1(
    x: Points, y: Points, *, x_weights: Weights = None, y_weights: Weights = None
) -> float:
    """The 1-Wasserstein (earth mover's) distance; all else is as for `w2`."""
    return _wasserstein(x, y, x_weights, y_weights, 1)


def w2(
    x: Points, y: Points, *, x_weights: Weights = None, y_weights: Weights = None
) -> float:
    """The 2-Wasserstein distance of two sets of points, in units of the data.

    Exact for the two sets. As an estimate for their distributions it is too large, by
    the order n^(-1/d) for d > 4 (Fournier & Guillin 2015, theorem 1). On the line (3)
    costs a sort. Otherwise equal numbers are matched (n^3 time at worst), and unequal
    numbers or weights need POT, `pip install 'sdegen[ot]'`.

    **Arguments:**
    - `x`, `y`: two sets of points of one space.
    - `x_weights`, `y_weights`: their masses, which sum to 1; default equal ones.
    """
    return _wasserstein(x, y, x_weights, y_weights, 2)


def transport(
    x: Points,
    y: Points,
    *,
    p: float | int = 2,
    x_weights: Weights = None,
    y_weights: Weights = None,
) -> Transport:
    """An optimal plan, its cost and its potentials, for the cost |x - y|^p.

    By the network simplex method of POT (Bonneel et al. 2011, "Displacement
    interpolation using Lagrangian mass transport"), `pip install 'sdegen[ot]'`.

    **Arguments:**
    - `x`, `y`: two sets of points of one space.
    - `p`: > 0, default 2. For p < 1 `distance` is `cost`, which is then the metric.
    - `x_weights`, `y_weights`: their masses, which sum to 1; default equal ones.

    **Raises:** RuntimeError if POT did not solve it.
    """
    if not p > 0:
        raise ValueError(f"the cost |x - y|^p needs p > 0, got p = {p}.")
    x, y = pair(x, y)
    a = weights(x_weights, len(x), "x_weights")
    b = weights(y_weights, len(y), "y_weights")
    cost = _cost(x, y, p)
    # The simplex method stops at an absolute tolerance, so small units would be wrong.
    scale = cost.max() or 1.0
    what = "exact transport between sets of different sizes, or with weights,"
    hint = "Without it, take sets of equal size."
    pot = need("ot", what, extra="ot", package="POT", hint=hint)
    plan, log = pot.emd(a, b, cost / scale, numItermax=10**9, log=True)
    if log["warning"] is not None:
        hint = "Check the weights and the range of the points."
        raise RuntimeError(f"POT did not solve this: {log['warning']} {hint}")
    # c-transforms from the points of y that carry weight: feasible everywhere, and at
    # least as good as what the solver returned, whose entries at weight 0 are free.
    f = (cost - scale * log["v"])[:, b > 0].min(axis=1)
    g = (cost - f[:, None]).min(axis=0)
    total = float(np.sum(plan * cost))
    return Transport(total, plan, f, g, total ** (1 / max(p, 1)))


def _wasserstein(x, y, x_weights, y_weights, p: int) -> float:
    rows, others = pair(x, y)
    if rows.shape[1] == 1:
        a = weights(x_weights, len(rows), "x_weights")
        b = weights(y_weights, len(others), "y_weights")
        return float(_line(rows[:, 0], others[:, 0], a, b, p) ** (1 / p))
    if x_weights is None and y_weights is None and len(rows) == len(others):
        from scipy.optimize import linear_sum_assignment

        cost = _cost(rows, others, p)
        return float(cost[linear_sum_assignment(cost)].mean() ** (1 / p))
    return transport(x, y, p=p, x_weights=x_weights, y_weights=y_weights).distance


def _line(x, y, a, b, p):
    """Equation (3): both quantile functions are constant between merged levels."""
    i, j = np.argsort(x), np.argsort(y)
    x_levels, y_levels = np.cumsum(a[i]), np.cumsum(b[j])
    levels = np.sort(np.concatenate([x_levels, y_levels]))

    def quantiles(z, z_levels):  # the last level is 1 up to rounding
        return z[np.minimum(np.searchsorted(z_levels, levels), len(z) - 1)]

    gaps = abs(quantiles(x[i], x_levels) - quantiles(y[j], y_levels))
    return np.sum(np.diff(levels, prepend=0.0) * gaps**p)


def _cost(x, y, p):
    from scipy.spatial.distance import cdist

    return cdist(x, y, "sqeuclidean") if p == 2 else cdist(x, y) ** p
