"""Diffusion in the frequencies of an image: the finest details fade first."""

import equinox as eqx
import jax.numpy as jnp

from ..typing import Scalar, number
from .basis import DCT, PIXELS, laplacian
from .noise import AbstractNoise, Gaussian
from .sde import AbstractLinearSDE


class Blurring(AbstractLinearSDE):
    """alpha = cos(pi t / 2) d(t), sigma = sin(pi t / 2), in the cosine transform, with

        d = (1 - floor) exp(-lambda tau) + floor,   tau = (blur sin^2(pi t / 2))^2 / 2.

    exp(-lambda tau) is the heat equation after a blur of `blur` sin^2(pi t / 2) pixels,
    for the eigenvalue lambda of the Laplacian. Hoogeboom and Salimans 2023, "Blurring
    diffusion models", eq. 16 to 21.

    **Arguments:**
    - `shape`: of one sample, (height, width, channels) for an image; None, the default,
      for a single coordinate of frequency 0: the process `Cosine`.
    - `blur`: the standard deviation of the blur at t = 1, in pixels, default 20.
    - `floor`: the part of every frequency that is not blurred, so that alpha does not
      vanish before t_max; default 1e-3.
    - `axes`: the axes that are space, counted from the end, default (-3, -2).
    """

    shape: tuple[int, ...] | None = eqx.field(default=None, static=True)
    blur: Scalar = number(20.0)
    floor: Scalar = number(1e-3)
    axes: tuple[int, ...] = eqx.field(default=(-3, -2), static=True)
    t_min: Scalar = number(1e-3)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)

    def __check_init__(self):
        if self.shape is not None and len(self.shape) < -min(self.axes):
            raise ValueError(
                f"Blurring blurs the axes {self.axes} of one sample, got the shape "
                f"{self.shape}. Give axes=(-1,) for a signal of shape (length,)."
            )

    @property
    def basis(self):
        """The cosine transform of the axes."""
        return PIXELS if self.shape is None else DCT(self.axes)

    def alpha(self, t):
        """cos(pi t / 2) d(t), an array over the frequencies."""
        tau = (self.blur * jnp.sin(jnp.pi * t / 2) ** 2) ** 2 / 2
        lam = 0.0 if self.shape is None else laplacian(self.shape, self.axes)
        lam = jnp.asarray(lam, jnp.result_type(tau))
        fade = (1 - self.floor) * jnp.exp(-lam * tau) + self.floor
        return jnp.sin(jnp.pi * (1 - t) / 2) * fade  # relatively exact near t = 1

    def sigma(self, t):
        """sin(pi t / 2)."""
        return jnp.sin(jnp.pi * t / 2)
