"""Laws of the noise z in x_t = alpha(t) x0 + sigma(t) z.

A law is sampled for one sample at a time; `log_prob` is a joint density over all the
coordinates of that sample, in nats.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Float

from .typing import RandomKey, Scalar, number


class AbstractBase(eqx.Module):
    """The law of z, for one sample of any shape."""

    gaussian: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def sample(
        self, key: RandomKey, shape: tuple[int, ...], dtype=None
    ) -> Float[Array, "..."]:
        """One draw of shape `shape`."""

    @abc.abstractmethod
    def log_prob(self, z: Float[Array, "..."]) -> Scalar | None:
        """The log-density of the whole of `z`, in nats; None where it is not known."""


class Gaussian(AbstractBase):
    """The standard normal law N(0, I)."""

    gaussian = True

    def sample(self, key, shape, dtype=None):
        """One draw of shape `shape`."""
        return jax.random.normal(key, shape, dtype or jnp.result_type(float))

    def log_prob(self, z):
        """The log-density of the whole of `z`, in nats."""
        return -0.5 * (jnp.sum(z**2) + z.size * jnp.log(2 * jnp.pi))


class StudentT(AbstractBase):
    """The multivariate Student law with `dof` degrees of freedom and unit scale.

    One chi-square is shared by all coordinates of a sample (Kotz and Nadarajah,
    "Multivariate t-distributions", 2004, eq. 1.1); its variance is dof / (dof - 2).
    """

    dof: Scalar = number(4.0)
    gaussian = False

    def sample(self, key, shape, dtype=None):
        """One draw of shape `shape`."""
        dtype = dtype or jnp.result_type(float)
        normal_key, chi_key = jax.random.split(key)
        chi2 = 2 * jax.random.gamma(chi_key, (self.dof / 2).astype(dtype), dtype=dtype)
        z = jax.random.normal(normal_key, shape, dtype)
        return z * jnp.sqrt(self.dof.astype(dtype) / chi2)

    def log_prob(self, z):
        """The log-density of the whole of `z`, in nats."""
        n, v = z.size, self.dof
        return (
            gammaln((v + n) / 2)
            - gammaln(v / 2)
            - 0.5 * n * jnp.log(v * jnp.pi)
            - 0.5 * (v + n) * jnp.log1p(jnp.sum(z**2) / v)
        )
