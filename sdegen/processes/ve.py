"""Variance-exploding processes: alpha = 1, and the noise alone grows."""

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.special import ndtri

from ..typing import Scalar, number
from .noise import AbstractNoise, Gaussian
from .path import AbstractPath
from .sde import AbstractLinearSDE


class VE(AbstractLinearSDE):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t, 0 <= t <= 1.

    Song et al. 2021, "Score-based generative modeling through SDEs", eq. 9 and 30. x_0
    carries noise of standard deviation sigma_min, as in the authors' code.

    **Arguments:**
    - `sigma_min`, `sigma_max`: the noise at t = 0 and 1, defaults 0.01 and 50.
    """

    sigma_min: Scalar = number(0.01)
    sigma_max: Scalar = number(50.0)
    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)

    def alpha(self, t):
        """1."""
        return jnp.ones_like(t)

    def sigma(self, t):
        """sigma_min (sigma_max / sigma_min)^t."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def closed_inverse(self, h):
        """From sigma = 1 / (exp(h) - 1)."""
        ratio = jnp.log(self.sigma_max / self.sigma_min)
        return -jnp.log(self.sigma_min * jnp.expm1(h)) / ratio


class AbstractNoiseTime(AbstractPath):
    """alpha = 1, sigma = t: time is the noise level."""

    def alpha(self, t):
        """1."""
        return jnp.ones_like(t)

    def sigma(self, t):
        """t."""
        return 1.0 * t

    def closed_inverse(self, h):
        """t = sigma."""
        return 1 / jnp.expm1(h)

    def training_time(self, u, sigma_data):
        """log(sigma / 2 sigma_data) is N(-1.2, 1.2^2), in [t_min, t_max].

        Karras et al. 2022, table 1, where sigma_data = 0.5.
        """
        sigma = 2 * sigma_data * jnp.exp(1.2 * (ndtri(u) - 1))
        return jnp.clip(sigma, self.t_min, self.t_max)


class EDM(AbstractNoiseTime, AbstractLinearSDE):
    """alpha = 1, sigma = t: time is the noise level.

    Karras et al. 2022, "Elucidating the design space of diffusion-based generative
    models", table 1.
    """

    t_min: Scalar = number(0.002)
    t_max: Scalar = number(80.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)
