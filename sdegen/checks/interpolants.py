"""Interpolants: x at t_min and t_max, and a flow between two known distributions.

With x0 and x1 discrete, x0 = a_i with weight w_i and x1 = b_j with v_j, x_t on the line
is a mixture of Gaussians N(I_ij, gamma^2), I_ij = I(t, a_i, b_j), so

    F_t(x) = sum_ij w_i v_j Phi((x - I_ij) / gamma)                                (1)
    b(t, x) = E[dx_t/dt | x_t = x]

where dx_t/dt, given (i, j), is I_ij' + gamma' (x - I_ij) / gamma. The flow of b keeps
(1).
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from ..processes.interpolant import AbstractInterpolant
from .report import Row, measured, skipped
from .reversal import FLOW_BAR
from .tables import Case
from .test_data import ATOM_WEIGHTS, ATOMS, PROBES, bisect

_OTHER = 8  # points b_j
_INSIDE = (0.02, 0.98)  # of the range of t: at t_min and t_max p_t is of points


class _Flow(eqx.Module):
    """Equation (1) and b, for all pairs (a_i, b_j) with weights w_i v_j."""

    interpolant: AbstractInterpolant
    a: jax.Array
    b: jax.Array
    weights: jax.Array

    def parts(self, t):
        """(I_ij, gamma), and their derivatives in t."""

        def both(t):
            pair = lambda a, b: self.interpolant.interpolate(t, a[None], b[None])[0]  # noqa: E731
            return jax.vmap(pair)(self.a, self.b), self.interpolant.gamma(t)

        return jax.jvp(both, (t,), (jnp.ones_like(t),))

    def cdf(self, t, x):
        """F_t at x, (n,)."""
        mean, gamma = self.parts(t)[0]
        return norm.cdf((x[:, None] - mean) / gamma) @ self.weights

    def __call__(self, t, x, args):
        """b(t, x) at x, (n,)."""
        (mean, gamma), (slope, rate) = self.parts(t)
        unit = (x[:, None] - mean) / gamma
        share = jax.nn.softmax(-0.5 * unit**2 + jnp.log(self.weights), axis=1)
        return jnp.sum(share * (slope + rate * unit), axis=1)


@eqx.filter_jit
def _carry(flow, high, low, probes):
    """F at t near t_min of points whose F at t near t_max is `probes`."""
    reach = jnp.full(probes.shape, 1e3)
    start = bisect(lambda x: flow.cdf(high, x) < probes, -reach, reach, 60)
    control = dfx.PIDController(rtol=1e-8, atol=1e-8)
    term, times = dfx.ODETerm(flow), (high, low, None)
    options = {"stepsize_controller": control, "throw": False}
    solved = dfx.diffeqsolve(term, dfx.Tsit5(), *times, start, **options)
    return flow.cdf(low, solved.ys[-1])


def check_interpolant(case: Case) -> list[Row]:
    """The rows of an interpolant; `case.tol` is what its two ends may miss."""
    interpolant, shape, rows = case.process, case.shape, []
    one_key, z_key, other_key = jax.random.split(case.key, 3)
    size = (2,) if shape is None else shape
    low, high = interpolant.t_min, interpolant.t_max
    x1 = interpolant.noise.sample(one_key, size, low.dtype)
    x0, z = jnp.ones(size) * 0.7, jax.random.normal(z_key, size)
    if "finite" in case.parts:
        for what, t, end in (("t_min is x0", low, x0), ("t_max is x1", high, x1)):
            gap = jnp.max(jnp.abs(interpolant.point(t, x0, x1, z) - end))
            # A range that starts a little after 0 is that much away from x0.
            bar = max(case.tol, 3 * float(low) if t is low else case.tol) * 10
            rows.append(measured("finite", "end", f"the point at {what}", gap, bar))
        ts = low + (high - low) * jnp.linspace(0.01, 0.99, 33)
        speeds = jax.vmap(lambda t: interpolant.velocity(t, x0, x1, z))(ts)
        bad = jnp.sum(~jnp.isfinite(speeds))
        rows.append(measured("finite", "finite", "the velocity, all times", bad, 0))
    if "reversal" in case.parts:
        what, why = "known points are carried to the data by the exact flow", ""
        if interpolant.gamma(high) is None:
            why = "without latent noise two sets of points have no flow"
        elif shape not in (None, (1,)):
            why = "this row is for one coordinate, shape (1,)"
        if why:
            return [*rows, skipped("reversal", "flow", what, why)]
        keys = jax.random.split(other_key, _OTHER)
        draw = jax.vmap(lambda k: interpolant.noise.sample(k, (1,), low.dtype)[0])
        pairs = jnp.repeat(ATOMS, _OTHER), jnp.tile(draw(keys), len(ATOMS))
        weights = jnp.repeat(ATOM_WEIGHTS / _OTHER, _OTHER)
        flow, probes = _Flow(interpolant, *pairs, weights), jnp.asarray(PROBES)
        start, stop = (low + (high - low) * s for s in _INSIDE[::-1])
        gap = jnp.max(jnp.abs(_carry(flow, start, stop, probes) - probes))
        rows.append(measured("reversal", "flow", what, gap, FLOW_BAR))
    return rows
