"""Straight paths from data (t = 0) to noise (t = 1).

Papers of this family run time the other way; v here is minus theirs at 1 - t.
"""

import equinox as eqx
import jax.numpy as jnp

from ..typing import Scalar, number
from .noise import AbstractNoise, Box, Gaussian
from .path import AbstractPath
from .sde import AbstractLinearSDE


class AbstractStraight(AbstractPath):
    """alpha = 1 - t, sigma = t."""

    def alpha(self, t):
        """1 - t."""
        return 1 - t

    def sigma(self, t):
        """t."""
        return 1.0 * t

    def closed_inverse(self, h):
        """t = tau."""
        return jnp.exp(-h)


class FlowMatching(AbstractStraight, AbstractLinearSDE):
    """alpha = 1 - t, sigma = sigma_min + (1 - sigma_min) t: the optimal-transport path.

    Lipman et al. 2023, "Flow matching for generative modeling", eq. 20-22.

    **Arguments:**
    - `sigma_min`: the noise at t = 0, default 1e-3.
    """

    sigma_min: Scalar = number(1e-3)
    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)

    def sigma(self, t):
        """sigma_min + (1 - sigma_min) t."""
        return self.sigma_min + (1 - self.sigma_min) * t

    def closed_inverse(self, h):
        """From alpha / sigma = exp(h) - 1, a linear equation for t."""
        ratio = jnp.expm1(h)
        return (1 - ratio * self.sigma_min) / (1 + ratio * (1 - self.sigma_min))


class RectifiedFlow(AbstractStraight, AbstractLinearSDE):
    """alpha = 1 - t, sigma = t, from t_min = 1e-3, as in the authors' code.

    Liu et al. 2023, "Flow straight and fast", eq. 1.
    """

    t_min: Scalar = number(1e-3)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)


class StraightFlow(AbstractStraight):
    """alpha = 1 - t, sigma = t from any noise, default `Box()`.

    Su 2022, "Constructing diffusion ODEs by characteristics".
    """

    t_min: Scalar = number(1e-3)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Box)
