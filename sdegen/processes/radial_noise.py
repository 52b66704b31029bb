"""Noise of a given radius in a uniform direction, for flows by Green's functions.

z = rho u with u uniform on the unit sphere of R^N. The distribution function of rho is
psi, increasing from psi(0) = 0 to psi(inf) = 1:

    rho = psi^-1(U),    U uniform on (0, 1)                                        (1)
    p(z) = psi'(|z|) / (S_N |z|^(N-1)),    S_N = 2 pi^(N/2) / Gamma(N/2)           (2)
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jax.typing import ArrayLike

from .noise import AbstractNoise

_REACH = 1e12  # radii are searched between 1 / reach and reach


def tanh_profile(r: ArrayLike):
    """psi = tanh r, written so that its derivative is precise at large r."""
    return -jnp.expm1(-2 * r) / (1 + jnp.exp(-2 * r))


def exponential_profile(r: ArrayLike):
    """psi = 1 - exp(-r)."""
    return -jnp.expm1(-r)


class Radial(AbstractNoise):
    """Equations (1) and (2), from psi alone.

    **Arguments:**
    - `psi`: a smooth function of one radius r > 0, default tanh.
    - `quantile`: the inverse of psi. By default it is found by bisection, where a
      radius in float32 is as precise as 1 - psi: give the formula for heavy tails.

    **Raises:** `ValueError` unless psi increases from 0 to 1.
    """

    psi: Callable = eqx.field(default=tanh_profile, static=True)
    quantile: Callable | None = eqx.field(default=None, static=True)
    gaussian = False

    def sample(self, key, shape, dtype=None):
        """One draw of shape `shape`."""
        dtype = dtype or jnp.result_type(float)
        radius_key, direction_key = jax.random.split(key)
        u = jax.random.uniform(radius_key, (), dtype, minval=jnp.finfo(dtype).tiny)
        quantile = self._invert if self.quantile is None else self.quantile
        direction = jax.random.normal(direction_key, shape, dtype)
        return quantile(u).astype(dtype) * direction / jnp.linalg.norm(direction)

    def log_prob(self, z):
        """The log-density of the whole of `z`, in nats, equation (2)."""
        n, square = z.size, jnp.sum(z**2)
        # The root's slope at 0 is infinite; the density is even there: its own is 0.
        r = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
        slope = jax.grad(self.psi)(r)
        sphere = np.log(2) + 0.5 * n * np.log(np.pi) - gammaln(n / 2)
        # On the line there is no division: no 0 log 0, nor its derivative.
        shell = (n - 1) * jnp.log(r) if n > 1 else 0.0
        return jnp.log(slope) - sphere - shell

    def _invert(self, u):
        """Equation (1) by bisection of log rho, to the last digit."""
        reach = jnp.asarray(np.log(_REACH), u.dtype)

        def halve(_, bracket):
            low, high = bracket
            middle = (low + high) / 2
            below = self.psi(jnp.exp(middle)) < u
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        steps = 2 + jnp.finfo(u.dtype).nmant
        low, high = jax.lax.fori_loop(0, steps, halve, (-reach, reach))
        return jnp.exp((low + high) / 2)

    def __check_init__(self):
        with jax.ensure_compile_time_eval():
            values = [float(self.psi(jnp.asarray(r))) for r in (0.0, 1.0, _REACH)]
        first, middle, last = values
        if not (abs(first) < 1e-6 < middle < last and abs(last - 1) < 1e-3):
            raise ValueError(
                "psi is the distribution function of a radius, increasing from psi(0) ="
                f" 0 to 1, got psi(0)={first:g}, psi(1)={middle:g} and "
                f"psi({_REACH:g})={last:g}."
            )
