"""Laws of a radius in a uniform direction: the noise of Green's functions.

z = rho u with u uniform on the unit sphere of R^N, and the law of rho is given by its
distribution function psi, increasing from psi(0) = 0 to psi(inf) = 1:

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

_REACH = 1e12  # radii looked for lie between 1 / reach and reach


def tanh_law(r: ArrayLike):
    """psi = tanh r; written so that its derivative is precise far out."""
    return -jnp.expm1(-2 * r) / (1 + jnp.exp(-2 * r))


def exponential_law(r: ArrayLike):
    """psi = 1 - exp(-r)."""
    return -jnp.expm1(-r)


class Radial(AbstractNoise):
    """Equations (1) and (2), from psi alone.

    **Arguments:** `psi`, a smooth function of one radius r > 0, such as `jnp.tanh`;
    `quantile`, its inverse, if there is a formula for it: otherwise it is found by
    bisection, in which a draw in float32 knows its radius as well as psi tells it from
    1 (heavy tails want the formula).
    """

    psi: Callable = eqx.field(default=tanh_law, static=True)
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
        # The root's slope at 0 is infinite; the law is even there, so its own is 0.
        r = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
        slope = jax.grad(self.psi)(r)
        sphere = np.log(2) + 0.5 * n * np.log(np.pi) - gammaln(n / 2)
        # On the line nothing is divided by: no 0 log 0, nor its derivative.
        shell = (n - 1) * jnp.log(r) if n > 1 else 0.0
        return jnp.log(slope) - sphere - shell

    def _invert(self, u):
        """Equation (1) by bisection of log rho, to the last digit."""
        reach = jnp.asarray(np.log(_REACH), u.dtype)

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            below = self.psi(jnp.exp(middle)) < u
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        steps = 2 + jnp.finfo(u.dtype).nmant
        low, high = jax.lax.fori_loop(0, steps, halve, (-reach, reach))
        return jnp.exp((low + high) / 2)

    def __check_init__(self):
        with jax.ensure_compile_time_eval():
            ends = [float(self.psi(jnp.asarray(r))) for r in (0.0, 1.0, _REACH)]
        if not (abs(ends[0]) < 1e-6 < ends[1] < ends[2] and abs(ends[2] - 1) < 1e-3):
            raise ValueError(
                "psi is the distribution function of a radius, increasing from psi(0) ="
                f" 0 to 1, got psi(0)={ends[0]:g}, psi(1)={ends[1]:g} and "
                f"psi({_REACH:g})={ends[2]:g}."
            )
