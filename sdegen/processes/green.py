"""Flows from noise of any distribution: Green's functions, straight characteristics.

Mass at one point spreads with a radial distribution function psi_t(r) and the velocity
-(d_t psi / d_r psi) (x - x0) / r, so that dp/dt + div(p v) = 0 (Su 2022, "Constructing
diffusion ODEs by Green's functions"). If psi_t(r) = psi(r / t), the velocity is
(x - x0) / t for every psi, and

    x_t = x0 + t z,    z distributed as `Radial(psi)`                              (1)

Straight characteristics from data to any noise z (Su 2022, "Constructing diffusion ODEs
by characteristics") are

    x_t = (1 - t) x0 + t z                                                         (2)

Other psi_t, and characteristics that bend, are an `AbstractInterpolant`.
"""

import equinox as eqx
import jax.numpy as jnp

from ..typing import Scalar, number
from .noise import AbstractNoise, Box
from .path import AbstractPath
from .radial_noise import Radial


class GreenFlow(AbstractPath):
    """alpha = 1, sigma = t, equation (1), by default with psi = tanh(r / t).

    Poisson's kernel is `PoissonFlow(1)`, the heat kernel `EDM`.

    **Arguments:**
    - `t_min`, `t_max`: see `AbstractSDE`; defaults 1e-3 and 40.
    - `noise`: the distribution of z, default `Radial()`; for another psi, for example
      `Radial(lambda r: 1 - jnp.exp(-r))`.
    """

    t_min: Scalar = number(1e-3)
    t_max: Scalar = number(40.0)
    noise: AbstractNoise = eqx.field(default_factory=Radial)

    def alpha(self, t):
        """1."""
        return jnp.ones_like(t)

    def sigma(self, t):
        """t."""
        return 1.0 * t


class StraightFlow(AbstractPath):
    """alpha = 1 - t, sigma = t, equation (2). With Gaussian noise use `RectifiedFlow`.

    **Arguments:**
    - `t_min`, `t_max`: see `AbstractSDE`; defaults 1e-3 and 1.
    - `noise`: the distribution of z, default `Box()`.
    """

    t_min: Scalar = number(1e-3)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Box)

    def alpha(self, t):
        """1 - t."""
        return 1 - t

    def sigma(self, t):
        """t."""
        return 1.0 * t
