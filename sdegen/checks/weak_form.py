"""The method of test functions: does p_t move as the equation says?

Fokker-Planck's equation tested with phi (its weak form; D = G G^T, s the score):

    d/dt E[phi(x_t)] = E[b . grad phi + 1/2 tr(C hess phi)].                       (1)

It must hold with the same p_t for three generators (b, C):

    the process itself          f,                                   D             (2)
    the probability flow        f - 1/2 (div D + D s),               0             (3)
    the family, stochasticity m f - 1/2 (1 - m^2) (div D + D s),     m^2 D         (4)

Here both sides are integrals over p_t on the line, which alpha and sigma give; in more
dimensions they are means over samples (`weak_form_samples`).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..processes.path import AbstractPath
from ..processes.sde import AbstractSDE
from ..typing import ScalarLike
from .report import Row, measured
from .tables import Case
from .test_data import LINE, Mixture, data

STOCHASTICITIES = {"Fokker-Planck": 1.0, "continuity": 0.0, "family 0.7": 0.7}
"""(2) and (3) are (4) with m = 1 and m = 0."""
_POINTS = np.linspace(-9, 9, 3001)  # in standard deviations
_TIMES = 16
RATIO = 1e-2
"""alpha / sigma where the times end."""


class Residuals(eqx.Module):
    """(1), left minus right, by generator and test function; the size of its terms."""

    value: Float[Array, "generators functions"]
    size: Float[Array, "generators functions"]


def residuals_on_a_line(
    path: AbstractPath,
    sde: AbstractSDE,
    data: Mixture,
    t: ScalarLike,
    xs: Float[Array, " points"],
    scale: ScalarLike = 1.0,
) -> Residuals:
    """(1) by the trapezoidal rule on even points `xs`, for the functions of `LINE`.

    The rule converges faster than any power for such integrands. `scale` stretches the
    test functions, phi(x / scale).
    """

    t = jnp.asarray(t, xs.dtype)
    scales = (path.alpha(t), path.sigma(t))
    return _on_a_line(data, scales, path.rates(t), _at(sde, t, xs), xs, scale)


def _at(sde, t, xs):
    """f, D and D' at points of the line."""

    def square(x):
        return jnp.reshape(sde.diffusion(t, x[None]), ()) ** 2

    f = jax.vmap(lambda x: sde.drift(t, x[None])[0])(xs)
    return f, *jax.vmap(jax.value_and_grad(square))(xs)


def _on_a_line(data, scales, rates, coefficients, xs, scale):
    def density(alpha, sigma):
        return jax.vmap(lambda x: jnp.exp(data.log_prob(x, alpha, sigma)))(xs)

    p, dp = jax.jvp(density, scales, rates)
    f, D, div = coefficients
    score = jax.vmap(lambda x: data.score(x, *scales))(xs)
    width = xs[1] - xs[0]

    def functions(x):
        return jnp.stack([phi(x / scale) for phi in LINE.values()])

    slopes = jax.jacfwd(functions)
    phi, slope, bend = (
        jax.vmap(v)(xs) for v in (functions, slopes, jax.jacfwd(slopes))
    )

    def of(m):
        b = f - 0.5 * (1 - m**2) * (div + D * score)
        drifting, spreading = -p * b, -0.5 * m**2 * p * D
        terms = (
            dp[:, None] * phi,
            drifting[:, None] * slope,
            spreading[:, None] * bend,
        )
        value = sum(jnp.sum(term, 0) for term in terms)
        size = sum(jnp.sum(jnp.abs(term), 0) for term in terms)
        return value * width, size * width

    return Residuals(*jax.vmap(of)(jnp.asarray(list(STOCHASTICITIES.values()))))


# What asks the process is a small program for each process; what follows from its
# numbers is another, the same for all.


@eqx.filter_jit
def _line_process(path, sde, ts):
    def at(t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        scale = jnp.sqrt(alpha**2 + sigma**2)
        xs = 1.5 * scale * _POINTS
        return (alpha, sigma), path.rates(t), _at(sde, t, xs), xs, scale

    return jax.vmap(at)(ts)


@eqx.filter_jit
def _line_terms(data, numbers):
    return jax.lax.map(lambda row: _on_a_line(data, *row), numbers)


def line_rows(case: Case) -> list[Row]:
    """(1) on the line, for the three generators."""
    ts = case.clock.even(_TIMES, RATIO)
    out = _line_terms(data(), _line_process(case.process, case.sde, jnp.asarray(ts)))
    found = np.abs(np.asarray(out.value)) / np.asarray(out.size)
    what = f"d/dt E phi = E L phi: {len(LINE)} phi, by quadrature on the line"
    return generator_rows(what, found, case.tol, ts, LINE)


def generator_rows(
    what: str,
    found: Float[np.ndarray, "times generators functions"],
    limit: float,
    ts: Float[np.ndarray, " times"],
    functions: dict,
    unit: str = "",
) -> list[Row]:
    """A row for each generator; a failure names the worst time and test function."""
    rows = []
    for i, generator in enumerate(STOCHASTICITIES):
        own, remark = np.where(np.isnan(found[:, i]), np.inf, found[:, i]), ""
        if not (found[:, i] <= limit).all():
            t, j = np.unravel_index(np.argmax(own), own.shape)
            remark = f"worst for phi = {list(functions)[j]} at t = {ts[t]:.4g}"
        size = np.max(found[:, i])
        rows.append(measured("weak form", generator, what, size, limit, unit, remark))
    return rows
