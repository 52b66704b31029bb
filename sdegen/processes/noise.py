"""Distributions of the noise z in x_t = alpha(t) x0 + sigma(t) z."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betaln, gammaln
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ..typing import RandomKey, Scalar, float_array, is_traced, number

_REACH = 1e12  # radii of `Radial` are searched between 1 / reach and reach


class AbstractNoise(eqx.Module):
    """The distribution of z; `gaussian` says whether it is N(0, I).

    **Arguments** of the methods:
    - `key`: the random key.
    - `shape`, `dtype`: of the draw; the dtype is JAX's floating-point type by default.
    - `z`: one sample.
    """

    gaussian: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def sample(
        self, key: RandomKey, shape: tuple[int, ...], dtype=None
    ) -> Float[Array, "..."]:
        """One draw."""

    @abc.abstractmethod
    def log_prob(self, z: Float[Array, "..."]) -> Scalar | None:
        """The joint log-density of all coordinates of `z` in nats; None if unknown."""


class Gaussian(AbstractNoise):
    """The standard normal distribution N(0, I)."""

    gaussian = True

    def sample(self, key, shape, dtype=None):
        """One draw of shape `shape`."""
        return jax.random.normal(key, shape, dtype or jnp.result_type(float))

    def log_prob(self, z):
        """The log-density of the whole of `z`, in nats."""
        return -0.5 * (jnp.sum(z**2) + z.size * jnp.log(2 * jnp.pi))


class StudentT(AbstractNoise):
    """The multivariate Student distribution of unit scale: variance dof / (dof - 2).

    One chi-square is shared by all coordinates of a sample (Kotz and Nadarajah 2004,
    "Multivariate t-distributions", eq. 1.1).

    **Arguments:**
    - `dof`: degrees of freedom, default 4.
    """

    dof: Scalar = number(4.0)
    gaussian = False

    def sample(self, key, shape, dtype=None):
        """One draw of shape `shape`."""
        dtype = dtype or jnp.result_type(float)
        normal_key, chi_key = jax.random.split(key)
        dof = self.dof.astype(dtype)
        # in logarithms: for few degrees of freedom chi^2 / 2 may be below any float
        half_chi2 = jax.random.loggamma(chi_key, dof / 2, dtype=dtype)
        z = jax.random.normal(normal_key, shape, dtype)
        return z * jnp.exp(0.5 * (jnp.log(dof / 2) - half_chi2))

    def log_prob(self, z):
        """The log-density of the whole of `z`, in nats."""
        n, v = z.size, self.dof
        # log Gamma((v + n) / 2) - log Gamma(v / 2), whose difference float32 loses
        gammas = gammaln(n / 2) - betaln(v / 2, n / 2)
        norming = gammas - 0.5 * n * jnp.log(v * jnp.pi)
        return norming - 0.5 * (v + n) * jnp.log1p(jnp.sum(z**2) / v)


class Box(AbstractNoise):
    """The uniform distribution in every coordinate.

    **Arguments:**
    - `low`, `high`: the bounds, numbers or arrays that broadcast against a sample,
      defaults -1 and 1.
    """

    low: Float[Array, "..."] = number(-1.0)
    high: Float[Array, "..."] = number(1.0)
    gaussian = False

    def sample(self, key, shape, dtype=None):
        """One draw of shape `shape`."""
        dtype = dtype or jnp.result_type(float)
        low, high = self.low.astype(dtype), self.high.astype(dtype)
        return low + (high - low) * jax.random.uniform(key, shape, dtype)

    def log_prob(self, z):
        """The log-density of the whole of `z`, in nats."""
        inside = jnp.all((z >= self.low) & (z <= self.high))
        widths = jnp.broadcast_to(jnp.log(self.high - self.low), z.shape)
        return jnp.where(inside, -jnp.sum(widths), -jnp.inf)

    def __check_init__(self):
        if not is_traced(self) and not bool(jnp.all(self.low < self.high)):
            ends = f"low={self.low} and high={self.high}"
            raise ValueError(f"Box needs low < high in every coordinate, got {ends}.")


class Empirical(AbstractNoise):
    """The distribution of a data set: a draw is one of its rows.

    **Arguments:**
    - `rows`: the data, (n, ...).
    """

    rows: Float[Array, "n ..."] = eqx.field(converter=float_array)
    gaussian = False

    def sample(self, key, shape, dtype=None):
        """One row, which must have the shape `shape`."""
        if self.rows.shape[1:] != tuple(shape):
            raise ValueError(
                f"the rows of this data set have the shape {self.rows.shape[1:]}, got "
                f"a request for {tuple(shape)}. Both ends need samples of one shape."
            )
        row = self.rows[jax.random.randint(key, (), 0, len(self.rows))]
        return row if dtype is None else row.astype(dtype)

    def log_prob(self, z):
        """None: a finite set of points has no density."""
        return None


def tanh_profile(r: ArrayLike):
    """psi = tanh r, written so that its derivative is precise at large r."""
    return -jnp.expm1(-2 * r) / (1 + jnp.exp(-2 * r))


class Radial(AbstractNoise):
    """A radius of any distribution in a uniform direction.

    z = rho u with u uniform on the unit sphere of R^N:

        rho = psi^-1(U),    U uniform on (0, 1)                                    (1)
        p(z) = psi'(|z|) / (S_N |z|^(N-1)),    S_N = 2 pi^(N/2) / Gamma(N/2)       (2)

    **Arguments:**
    - `psi`: the distribution function of rho, smooth; default tanh.
    - `quantile`: its inverse; by default found by bisection, as precise as 1 - psi in
      float32: give the formula for heavy tails.

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
