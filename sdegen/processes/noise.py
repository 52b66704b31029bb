"""Distributions of the noise z in x_t = alpha(t) x0 + sigma(t) z.

Both methods are for one sample of any shape; `log_prob` is a joint density over all of
its coordinates.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import betaln, gammaln
from jaxtyping import Array, Float

from ..typing import RandomKey, Scalar, float_array, is_traced, number


class AbstractNoise(eqx.Module):
    """The distribution of z; `gaussian` says whether it is N(0, I)."""

    gaussian: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def sample(
        self, key: RandomKey, shape: tuple[int, ...], dtype=None
    ) -> Float[Array, "..."]:
        """One draw.

        **Arguments:**
        - `key`: the random key.
        - `shape`: of the draw.
        - `dtype`: of the draw, default JAX's floating-point type.
        """

    @abc.abstractmethod
    def log_prob(self, z: Float[Array, "..."]) -> Scalar | None:
        """The log-density of `z` in nats, -inf outside of the support; None if unknown.

        **Arguments:**
        - `z`: one sample.
        """


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
        # In logarithms: for few degrees of freedom chi^2 / 2 may be below any float.
        half_chi2 = jax.random.loggamma(chi_key, dof / 2, dtype=dtype)
        z = jax.random.normal(normal_key, shape, dtype)
        return z * jnp.exp(0.5 * (jnp.log(dof / 2) - half_chi2))

    def log_prob(self, z):
        """The log-density of the whole of `z`, in nats."""
        n, v = z.size, self.dof
        # log Gamma((v + n) / 2) - log Gamma(v / 2), without their difference, which
        # float32 loses for many degrees of freedom.
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
        if is_traced(self) or bool(jnp.all(self.low < self.high)):
            return
        raise ValueError(
            f"Box needs low < high in every coordinate, got low={self.low} and high="
            f"{self.high}."
        )


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
