"""The Sinkhorn divergence, on the device.

With the cost c_ij = |x_i - y_j|^2 and equal weights a_i = 1/n, b_j = 1/m,

    OT_eps(x, y) = min_P sum_ij P_ij c_ij + eps KL(P | a b^T)                       (1)
                 = max_{f,g} sum_i a_i f_i + sum_j b_j g_j
                   - eps sum_ij a_i b_j (exp((f_i + g_j - c_ij) / eps) - 1)         (2)
    S_eps(x, y) = OT_eps(x, y) - OT_eps(x, x) / 2 - OT_eps(y, y) / 2                (3)

(Feydy et al. 2019, "Interpolating between optimal transport and MMD using Sinkhorn
divergences", equations (1), (3), (8)). The best f for a given g is
f_i = -eps log sum_j b_j exp((g_j - c_ij) / eps). Both potentials move most of the way
to it at once (half in their equation (25)), so S is symmetric and S(x, x) = 0 at any
iteration, while eps falls geometrically from the largest cost (Schmitzer 2019). At a
maximum (2) does not change with f and g, so its gradient needs no derivative of the
loop. Means split off exactly: S(x + u, y + v) = S(x, y) + |u - v|^2 for centred sets.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Array, Bool, Int

from ..typing import Scalar, ScalarLike, is_traced
from .points import Points, device_pair

RELAXATION = 0.8
"""Any in (0, 1) converges: 1 would flip a common constant for ever, 1/2 is slower."""


class SinkhornDivergence(NamedTuple):
    """S_eps in (units of the data)^2, meaningless unless all problems `converged`.

    `iterations` is the largest of the three problems; `regularisation` is eps.
    """

    value: Scalar
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]
    regularisation: Scalar


def sinkhorn_divergence(
    x: Points,
    y: Points,
    *,
    regularisation: ScalarLike | None = None,
    tolerance: ScalarLike = 1e-3,
    max_iterations: int = 2000,
) -> SinkhornDivergence:
    """The debiased entropic transport cost S_eps of (3).

    S_eps goes from W_2^2 at eps = 0 to the squared distance of the means at eps =
    infinity, and is 0 only for equal distributions. Two sets of n points of one
    distribution are about c / n apart, where c grows as eps falls (Genevay et al. 2019,
    "Sample complexity of Sinkhorn divergences"): compare at one eps and one n.
    Differentiable once in `x` and `y`. float32 reaches eps = 2e-4 of the largest cost.

    **Arguments:**
    - `x`, `y`: two sets of points of one space; `y` is the reference.
    - `regularisation`: eps, in (units of the data)^2; default 0.05 of the mean squared
      distance between points of `y`.
    - `tolerance`: the mass of the plan that may be misplaced, default 1e-3.
    - `max_iterations`: after which `converged` is False, default 2000.

    **Returns:** `SinkhornDivergence`. Nothing raises on the device: read `converged`.
    """
    x, y = device_pair(x, y, "sinkhorn_divergence")
    known = regularisation is not None and not is_traced(regularisation)
    if known and not (eps := float(regularisation)) > 0:
        raise ValueError(
            f"regularisation must be > 0, got {eps:g}. For the exact distance take w2."
        )
    return _divergence(x, y, regularisation, tolerance, max_iterations)


@jax.jit
def _divergence(x, y, eps, tolerance, max_iterations) -> SinkhornDivergence:
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - x_mean, y - y_mean
    costs = _cost(x, y), _cost(x, x), _cost(y, y)
    if eps is None:
        eps = 0.05 * jax.lax.stop_gradient(costs[2]).mean()
    eps = jnp.asarray(eps, x.dtype)
    # One start for all three keeps S(x, x) at 0, where they are the same problem.
    start = jnp.max(jnp.stack([jax.lax.stop_gradient(c).max() for c in costs]))
    solved = (_solve(c, eps, start, tolerance, max_iterations) for c in costs)
    (xy, xx, yy), converged, iterations = zip(*solved, strict=True)
    value = jnp.sum((x_mean - y_mean) ** 2) + xy - (xx + yy) / 2
    converged, iterations = jnp.stack(converged).all(), jnp.stack(iterations).max()
    return SinkhornDivergence(value, converged, iterations, eps)


def _cost(x, y):
    # the fast matrix products of accelerators keep three digits
    cross = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * cross, 0.0)


def _solve(cost, eps, start, tolerance, max_iterations):
    """The value (2), whether it converged, and after how many iterations."""
    n, m = cost.shape
    fixed = jax.lax.stop_gradient(cost)

    def step(state):
        k, f, g, _ = state
        now = jnp.maximum(eps, start * 0.7**k)
        best_f = -now * (logsumexp((g - fixed) / now, axis=1) - jnp.log(m))
        best_g = -now * (logsumexp((f[:, None] - fixed) / now, axis=0) - jnp.log(n))
        move_f, move_g = best_f - f, best_g - g
        # The marginals of the plan against the weights: exp(-move / eps) is 1.
        misplaced = (abs(jnp.expm1(-move / eps)).mean() for move in (move_f, move_g))
        error = jnp.where(now > eps, jnp.inf, jnp.maximum(*misplaced))
        return k + 1, f + RELAXATION * move_f, g + RELAXATION * move_g, error

    def going_on(state):
        return (state[0] < max_iterations) & (state[3] >= tolerance)  # nan stops too

    zeros = jnp.zeros(n, cost.dtype), jnp.zeros(m, cost.dtype)
    state = (0, *zeros, jnp.asarray(jnp.inf, cost.dtype))
    k, f, g, error = jax.lax.while_loop(going_on, step, state)
    mass = jnp.exp((f[:, None] + g - cost) / eps).mean()
    return f.mean() + g.mean() - eps * (mass - 1), error < tolerance, k
