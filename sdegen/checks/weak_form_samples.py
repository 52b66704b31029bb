"""The method of test functions by samples, in any number of dimensions.

With x_t = alpha x0 + sigma z and the same draws of (x0, z) on both sides,

    R = grad phi . (alpha' x0 + sigma' z - b) - 1/2 tr(C hess phi)                 (1)

has mean zero for each generator (b, C) of `weak_form`; its mean over samples is judged
by its standard error. A test function takes a few coordinates only, so that
Hessians stay small for samples of any shape.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..processes.sde import noise_depends_on_state
from .report import Row
from .tables import Case
from .test_data import COORDINATES, SPACE, data
from .weak_form import RATIO, STOCHASTICITIES, generator_rows

_TIMES = 6
_BAR = 4.0  # standard errors


@eqx.filter_jit
def _draw(key, shape, samples):
    data_key, noise_key = jax.random.split(key)
    x0 = data().sample(data_key, samples, shape)
    return x0, jax.random.normal(noise_key, x0.shape)


def _picked(shape):
    """The coordinates that the test functions see."""
    size = int(np.prod(shape, dtype=int))
    places = np.linspace(0, size - 1, min(size, COORDINATES))
    return np.unique(places.astype(int))


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
    """(1) by samples of the given shape, in standard errors.

    What is beyond the bar is drawn again with other numbers: chance, unlike a mistake,
    does not come twice.
    """
    ts = case.clock.even(_TIMES, RATIO)
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
    return generator_rows(what, found, _BAR, ts, SPACE, "SE")
