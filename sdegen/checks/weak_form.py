"""The method of test functions: does p_t move as the equation says?

Fokker-Planck's equation tested with phi (its weak form; D = G G^T, s the score):

    d/dt E[phi(x_t)] = E[b . grad phi + 1/2 tr(C hess phi)].                       (1)

It must hold with the same p_t for three generators (b, C):

    the process itself          f,                                   D             (2)
    the probability flow        f - 1/2 (div D + D s),               0             (3)
    the family, stochasticity m f - 1/2 (1 - m^2) (div D + D s),     m^2 D         (4)

On the line both sides are integrals over p_t, which alpha and sigma give. In more
dimensions, with x_t = alpha x0 + sigma z and the same draws of (x0, z) on both sides,

    R = grad phi . (alpha' x0 + sigma' z - b) - 1/2 tr(C hess phi)                 (5)

has mean zero; its mean over samples is judged by its standard error. There a test
function takes a few coordinates only, so that Hessians stay small.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..processes.sde import AbstractSDE, noise_depends_on_state
from ..typing import ScalarLike
from .report import Row, measured
from .tables import Case
from .test_data import COORDINATES, LINE, SPACE, Mixture, data

STOCHASTICITIES = {"Fokker-Planck": 1.0, "continuity": 0.0, "family 0.7": 0.7}
"""(2) and (3) are (4) with m = 1 and m = 0."""
_POINTS = np.linspace(-9, 9, 3001)  # in standard deviations
_TIMES, _FEW = 16, 6  # on the line, with samples
_BAR = 4.0  # standard errors
_RATIO = 1e-2  # alpha / sigma where the times end


class Residuals(eqx.Module):
    """(1), left minus right, by generator and test function; the size of its terms."""

    value: Float[Array, "generators functions"]
    size: Float[Array, "generators functions"]


def coefficients(
    sde: AbstractSDE, t: ScalarLike, xs: Float[Array, " points"]
) -> tuple[Array, Array, Array]:
    """f, D and D' at points of the line."""

    def square(x):
        return jnp.reshape(sde.diffusion(t, x[None]), ()) ** 2

    f = jax.vmap(lambda x: sde.drift(t, x[None])[0])(xs)
    return f, *jax.vmap(jax.value_and_grad(square))(xs)


def residuals(data: Mixture, scales, rates, coefficients, xs, scale) -> Residuals:
    """(1) by the trapezoidal rule on even points `xs`, for the functions of `LINE`.

    The rule converges faster than any power for such integrands. `scales` are alpha and
    sigma, `rates` their derivatives; `scale` stretches phi(x / scale).
    """

    def density(alpha, sigma):
        return jax.vmap(lambda x: jnp.exp(data.log_prob(x, alpha, sigma)))(xs)

    p, dp = jax.jvp(density, scales, rates)
    f, D, div = coefficients
    score = jax.vmap(lambda x: data.score(x, *scales))(xs)
    width = xs[1] - xs[0]

    def functions(x):
        return jnp.stack([phi(x / scale) for phi in LINE.values()])

    slopes = jax.jacfwd(functions)
    orders = (functions, slopes, jax.jacfwd(slopes))
    derivatives = jnp.stack([jax.vmap(v)(xs) for v in orders])
    total = functools.partial(jnp.einsum, "kx,kxi->i")

    def of(m):
        b = f - 0.5 * (1 - m**2) * (div + D * score)
        factors = width * jnp.stack([dp, -p * b, -0.5 * m**2 * p * D])
        return total(factors, derivatives), total(abs(factors), abs(derivatives))

    return Residuals(*jax.vmap(of)(jnp.asarray(list(STOCHASTICITIES.values()))))


# What asks the process is a small program for each process; what follows from its
# numbers is another, the same for all.


@eqx.filter_jit
def _line_process(path, sde, ts):
    def at(t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        scale = jnp.sqrt(alpha**2 + sigma**2)
        xs = 1.5 * scale * _POINTS
        return (alpha, sigma), path.rates(t), coefficients(sde, t, xs), xs, scale

    return jax.vmap(at)(ts)


@eqx.filter_jit
def _line_terms(data, numbers):
    return jax.lax.map(lambda row: residuals(data, *row), numbers)


def line_rows(case: Case) -> list[Row]:
    """(1) on the line, for the three generators."""
    ts = case.clock.even(_TIMES, _RATIO)
    out = _line_terms(data(), _line_process(case.process, case.sde, jnp.asarray(ts)))
    found = np.abs(np.asarray(out.value)) / np.asarray(out.size)
    what = f"d/dt E phi = E L phi: {len(LINE)} phi, by quadrature on the line"
    return _rows(what, found, case.tol, ts, LINE)


def _rows(what, found, limit, ts, functions, unit=""):
    """A row for each generator; `found` is over times, generators and functions."""
    rows = []
    for generator, own in zip(STOCHASTICITIES, np.swapaxes(found, 0, 1), strict=True):
        worst, remark = np.max(own), ""
        if not worst <= limit:
            t, j = np.unravel_index(np.argmax(own), own.shape)
            remark = f"worst for phi = {list(functions)[j]} at t = {ts[t]:.4g}"
        rows.append(measured("weak form", generator, what, worst, limit, unit, remark))
    return rows


@eqx.filter_jit
def _draw(key, shape, samples):
    data_key, noise_key = jax.random.split(key)
    x0 = data().sample(data_key, samples, shape)
    return x0, jax.random.normal(noise_key, x0.shape)


def _picked(shape):
    """The coordinates that the test functions see."""
    size = np.prod(shape, dtype=int)
    return np.unique(np.linspace(0, size - 1, min(size, COORDINATES), dtype=int))


@eqx.filter_jit
def _space_process(path, sde, ts, x0, z):
    picked = _picked(x0.shape[1:])

    def at(t):
        alpha, sigma = path.alpha(t), path.sigma(t)

        def one(x0, z):
            x = alpha * x0 + sigma * z
            return sde.drift(t, x).ravel()[picked], *_noise(sde, t, x, picked)

        return (alpha, sigma), path.rates(t), jax.vmap(one)(x0, z)

    return jax.lax.map(at, ts)


@eqx.filter_jit
def _space_terms(data, numbers, x0, z):
    picked = _picked(x0.shape[1:])
    levels = jnp.asarray(list(STOCHASTICITIES.values()))

    def at(row):
        (alpha, sigma), (d_alpha, d_sigma), coefficients = row
        scale = jnp.sqrt(alpha**2 + sigma**2)

        def functions(y):
            return jnp.stack([phi(y / scale) for phi in SPACE.values()])

        slopes = jax.jacfwd(functions)

        def one(x0, z, f, D, div):
            x = alpha * x0 + sigma * z
            pull = div + D * data.score(x, alpha, sigma).ravel()[picked]
            velocity = (d_alpha * x0 + d_sigma * z).ravel()[picked]
            y = x.ravel()[picked]
            bend = jnp.diagonal(jax.jacfwd(slopes)(y), axis1=1, axis2=2)

            def of(m):
                b = f - 0.5 * (1 - m**2) * pull
                return slopes(y) @ (velocity - b) - 0.5 * m**2 * bend @ D

            return jax.vmap(of)(levels)

        r = jax.vmap(one)(x0, z, *coefficients)
        return r.mean(0), r.std(0) / np.sqrt(len(x0))

    return jax.lax.map(at, numbers)


def _noise(sde, t, x, picked):
    """D_ii and d_i D_ii for the coordinates i of `picked`; G is scalar or diagonal."""

    def square(x):
        return jnp.broadcast_to(sde.diffusion(t, x), x.shape).ravel() ** 2

    D = square(x)[picked]
    if not noise_depends_on_state(sde, t, x):
        return D, jnp.zeros_like(D)

    def slope(i):
        along = jnp.zeros(x.size).at[i].set(1.0).reshape(x.shape)
        return jax.jvp(square, (x,), (along,))[1][i]

    return D, jnp.stack([slope(i) for i in picked])


def space_rows(case: Case, shape: tuple[int, ...]) -> list[Row]:
    """(5) by samples of the given shape, in standard errors.

    What is beyond the bar is drawn again with other numbers: chance, unlike a mistake,
    does not come twice.
    """
    ts = case.clock.even(_FEW, _RATIO)
    for seed in jax.random.split(case.key):
        x0, z = _draw(seed, shape, case.samples)
        numbers = _space_process(case.process, case.sde, jnp.asarray(ts), x0, z)
        mean, error = map(np.asarray, _space_terms(data(), numbers, x0, z))
        # Where both sides agree sample by sample there is no error to divide by.
        tiny = np.finfo(float).tiny + 1e-12 * np.abs(error).max()
        found = np.abs(mean) / (error + tiny)
        if (found <= _BAR).all():
            break
    what = f"d/dt E phi = E L phi: {len(SPACE)} phi, by samples {shape}"
    return _rows(what, found, _BAR, ts, SPACE, "SE")
