"""Replacement and RePaint: what is known is written into x_t at every step.

With A' A a projection (a mask, or rows that are orthonormal), after every step to s

    x_s + A' (alpha_s y + sqrt(sigma_s^2 - alpha_s^2 std^2) z - A x_s)              (1)

(Song et al. 2021, appendix I.2). RePaint (Lugmayr et al. 2022, algorithm 1, with jumps
of one step) noises x_s back to t and steps again, `resamples` times in all, so that the
unknown part agrees with it. Neither is exact: the step itself does not depend on y.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from diffrax import RESULTS

from ...processes.path import basis_of, check_one_level, check_sample
from ...sampling.ancestral import Transition, draws, renoise
from ...sampling.drive import constrain, sample_keys
from ...solvers.solve import Solution, checked
from ...typing import Scalar, number
from ..particles import fixed_grid
from .linear import check_projection
from .method import AbstractMethod


class RePaint(AbstractMethod):
    """Equation (1) at every step of the ancestral sampler; 1 resample is replacement.

    The default grid is `LogSNRGrid(50)`; A must be linear with A A' A = A.

    **Arguments:**
    - `resamples`: evaluations of each step; 10.
    - `stochasticity`: DDIM's eta, from 0 to 1; 1.
    """

    resamples: int = eqx.field(default=10, static=True)
    stochasticity: Scalar = number(1.0)

    def __check_init__(self):
        if not (isinstance(self.resamples, int) and self.resamples >= 1):
            raise ValueError(f"resamples must be an int >= 1, got {self.resamples!r}.")

    def draw(self, key, denoiser, measurement, shape, options):
        """Draws in which A x0 is y up to its noise."""
        check_sample(denoiser.path, shape[1:])
        check_one_level(denoiser.path, "RePaint")
        check_projection(measurement.operator, shape[1:], "RePaint")
        start = options.start
        if start is not None and start.shape != shape:
            raise ValueError(f"start must have the shape {shape}, got {start.shape}.")
        grid = fixed_grid(options.grid, 50, denoiser.path, "RePaint")
        denoise = options.denoise
        if denoise is None:
            denoise = getattr(grid, "denoise", False)  # as the grid was learned
        options = options._replace(grid=grid, denoise=denoise)
        return _repaint(key, self, denoiser, measurement, shape, options)


@eqx.filter_jit
def _repaint(key, method, denoiser, measurement, shape, options):
    grid, cond, start, denoise, trajectory, sharding = options
    path, basis = denoiser.path, basis_of(denoiser.path)
    ts = jnp.asarray(grid(path) if callable(grid) else grid)
    keys, dtype = sample_keys(key, shape[0], sharding), ts.dtype
    whole = jax.ShapeDtypeStruct(shape, dtype)
    transpose = jax.linear_transpose(measurement.apply, whole)

    def noise(number):
        fold = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        return draws(fold, shape[1:], path, dtype)

    def known(x, s, z):
        alpha, sigma = path.scales(s)
        std = measurement.std / basis.unit
        left = jnp.sqrt(jnp.maximum(sigma**2 - (alpha * std) ** 2, 0))
        # A z has the noise of (1): what A sees of a sample's own noise.
        x, noisy = basis.data(x), basis.data(left * z)
        noisy = noisy - alpha * basis.data(jnp.zeros_like(z))  # where u is 0
        target = alpha * measurement.y + measurement.apply(noisy - x)
        return basis.coordinates(x + transpose(target.astype(dtype))[0]).astype(dtype)

    def step(x, now):
        t, s, number = now
        move = Transition(path, t, s, method.stochasticity)
        keep, more = renoise(path, s, t)

        def once(k, x):
            first = 3 * (number * method.resamples + k)
            back = keep * x + more * noise(first)  # from s to t, after the first time
            x = jnp.where(k > 0, back, x).astype(dtype)
            x = move(*denoiser.posterior_means(t, x, cond), noise(first + 1))
            return known(x, s, noise(first + 2))

        x = jax.lax.fori_loop(0, method.resamples, once, x)
        return x, x if trajectory else None

    if start is None:
        x = (path.sigma(ts[0]) * noise(2**31 - 1)).astype(dtype)
    else:
        x = constrain(basis.coordinates(start.astype(dtype)), sharding)
    now = (ts[:-1], ts[1:], jnp.arange(len(ts) - 1))
    end, frames = jax.lax.scan(step, x, now)
    if trajectory:
        frames = jax.vmap(basis.data)(jnp.concatenate([x[None], frames]))
    x = basis.data(denoiser(ts[-1], end, cond) if denoise else end)
    count = jnp.asarray((len(ts) - 1) * method.resamples + bool(denoise))
    result = checked(RESULTS.successful, x)
    return Solution(x, count, result, ts if trajectory else None, frames)
