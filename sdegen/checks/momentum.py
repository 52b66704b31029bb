"""Is a linear SDE of a state (`sdegen.processes.momentum`) what it says it is?

Its moments a and L against its F and G, in units of the noise: with A = L^-1 F L and
H = L^-1 G,

    L^-1 a' = L^-1 F a,    L^-1 L' + (L^-1 L')^T = A + A^T + H H^T,                (1)

relative to the size of the terms; and the moments at the start of every cell of a grid,
moved by F and G alone, against those at its end. Then (alpha, sigma) as a path,
simulated states, and the data brought back by the flow and the reverse SDE with the
exact score; row 0 must be

    x_t = a_0 x0 + |L_0| z                                                         (2)
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..processes import momentum
from ..processes.momentum import AbstractBlockSDE, lower, solve_lower
from ..processes.reverse import reverse
from ..sampling.simulate import simulate
from . import moments, reversal
from .report import Row, measured, worst
from .tables import Case
from .test_data import data

_TIMES = 96
_STEPS = 600  # of Euler and Maruyama's method, forward
_BACK = 300  # of Heun's method: the error of Euler's flow is above that of samples
_RATIO = 1e-3
_BAR = 5.0  # standard errors
_BIAS = 0.02  # of Euler and Maruyama's method, in units of the spread
_EQUATIONS = {
    "mean": "a' = F a",
    "covariance": "S' = F S + S F^T + G G^T",
    "integrals": "a and S moved by F and G alone, from time to time",
}


class _Score(eqx.Module):
    """The exact score of the state for the mixture as data."""

    process: AbstractBlockSDE

    def __call__(self, t, u):
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        y = self.process.statistic(t, u)
        x0 = (y + sigma**2 * data().score(y, alpha, sigma)) / alpha
        return self.process.score(t, u, x0)


def check_momentum(case: Case) -> list[Row]:
    """The rows of a block SDE."""
    process, clock, rows = case.process, case.clock, []
    if "finite" in case.parts:
        ends, inside, _ = moments.moment_tables(clock, process, (1,))
        rows += moments.end_rows(ends, inside)
        rise = np.max(np.diff(np.log(inside.alpha) - np.log(inside.sigma)))
        what = "log-SNR of the statistic, its largest rise"
        rows.append(measured("finite", "log-SNR", what, rise, 0.0))
    if "moments" in case.parts:
        found = _moments(process, jnp.asarray(clock.even(_TIMES, _RATIO)))
        for (name, what), value in zip(_EQUATIONS.items(), found, strict=True):
            rows.append(measured("moments", name, what, value, case.tol))
    if "weak form" in case.parts:
        rows.append(_forward(case))
    if "reversal" in case.parts:
        rows += _back(case)
    if "terminal" in case.parts:
        rows += reversal.terminal_rows(clock, process)
    return rows


@eqx.filter_jit
def _moments(process, ts):
    """The largest residuals of (1), and of the moments moved over each cell."""

    def at(t):
        (a, factor), (a_dot, factor_dot) = jax.jvp(
            process.moments, (t,), (jnp.ones_like(t),)
        )
        f, g = process.matrix(t), process.noise_scale(t)
        left, right = (solve_lower(factor, v) for v in (a_dot, f @ a))
        size = jnp.max(jnp.abs(left)) + jnp.max(jnp.abs(right))
        mean = jnp.max(jnp.abs(left - right)) / size
        w = solve_lower(factor, factor_dot)
        inner, noise = (solve_lower(factor, v) for v in (f @ factor, jnp.diag(g)))
        gap = w + w.T - inner - inner.T - noise @ noise.T
        size = 2 * jnp.max(jnp.abs(inner)) + jnp.max(noise**2)
        return mean, jnp.max(jnp.abs(gap)) / size

    def cell(start, stop):
        (a, factor), (b, wanted) = process.moments(start), process.moments(stop)
        span, nodes = stop - start, momentum.transition_nodes(ts.dtype)
        inside = start + span * nodes
        f, g = (jax.vmap(h)(inside) for h in (process.matrix, process.noise_scale))
        move, noise = momentum.transition(span * f, jnp.sqrt(span) * g)
        moved = lower(jnp.concatenate([(move @ factor).T, noise]))
        first, goal = (solve_lower(wanted, v) for v in (move @ a, b))
        mean = jnp.max(jnp.abs(first - goal)) / jnp.max(jnp.abs(goal))
        spread = solve_lower(wanted, moved) - jnp.eye(len(a))
        return jnp.maximum(mean, jnp.max(jnp.abs(spread)))

    # Two cells for every time: the quadrature is exact where F is of order one in each.
    fine = jnp.sort(jnp.concatenate([ts, (ts[1:] + ts[:-1]) / 2]))
    fine = jnp.where(jnp.diff(fine, append=fine[-1:] + 1) > 0, fine, fine + 1e-12)
    values = (*jax.vmap(at)(ts), jax.vmap(cell)(fine[:-1], fine[1:]))
    return [jnp.max(jnp.where(jnp.isnan(v), jnp.inf, v)) for v in values]


@eqx.filter_jit
def _states(key, process, t, samples):
    x0 = data().sample(key, samples, (1,))
    keys = jax.random.split(jax.random.fold_in(key, 1), samples)
    return jax.vmap(lambda k, x: process.corrupt(k, t, x))(keys, x0)


@eqx.filter_jit
def _moments_at(process, t):
    return process.moments(t)


def _forward(case):
    """Mean and covariance of simulated states at five times, in standard errors."""
    process, samples = case.process, case.samples
    start = _states(case.key, process, process.t_min, samples)
    solved = simulate(case.key, process, start, grid=_STEPS, trajectory=True)
    mean, var = map(float, data().moments())
    errors = {}
    for i in np.linspace(_STEPS // 20, _STEPS, 5).astype(int):
        t, u = solved.times[i], np.asarray(solved.trajectory[i])[..., 0]
        a, factor = (np.asarray(v) for v in _moments_at(process, t))
        cov = factor @ factor.T + var * np.outer(a, a)
        gap = u - mean * a
        products = (gap[:, :, None] * gap[:, None, :]).reshape(len(u), -1)
        values = np.concatenate([gap, products - cov.ravel()], 1)
        error = np.abs(values.mean(0)) * np.sqrt(len(u)) / values.std(0)
        errors[f"t = {float(t):.3g}"] = error.max()
    what = "mean and covariance of simulated states and of a x0 + L z"
    return worst("weak form", "forward", what, errors, _BAR + _BIAS * np.sqrt(samples))


def _back(case):
    """Equation (2) at t_min, after the flow and after the reverse SDE."""
    process, score = case.process, _Score(case.process)
    start = _states(case.key, process, process.t_max, case.samples)
    a, factor = _moments_at(process, process.t_min)
    scales = (a[0], jnp.sqrt(jnp.sum(factor[0] ** 2)))
    what, rows = "row 0 of the state is distributed as the data again (KS)", []
    for name, stochasticity in ((reversal.FLOW, 0.0), (reversal.SDE, 1.0)):
        back = reverse(process, score, stochasticity)  # a number: both are one program
        out = simulate(case.key, back, start, solver=dfx.Heun(), grid=_BACK).x[:, 0, 0]
        rows.append(reversal.ks_row("reversal", name, what, data().cdf(out, *scales)))
    return rows
