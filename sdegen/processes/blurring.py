"""Diffusion in the frequencies of an image: the finest details fade first."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..typing import Scalar, ScalarLike, float_array
from .basis import DCT, AbstractBasis, Standard, laplacian
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

    frequencies: Float[Array, "..."]
    blur: Scalar
    floor: Scalar
    t_min: Scalar
    t_max: Scalar
    noise: AbstractNoise
    basis: AbstractBasis

    def __init__(
        self,
        shape: tuple[int, ...] | None = None,
        *,
        blur: ScalarLike = 20.0,
        floor: ScalarLike = 1e-3,
        axes: tuple[int, ...] = (-3, -2),
        t_min: ScalarLike = 1e-3,
        t_max: ScalarLike = 1.0,
        noise: AbstractNoise | None = None,
    ):
        if shape is not None and len(shape) < -min(axes):
            raise ValueError(
                f"Blurring blurs the axes {axes} of one sample, got the shape "
                f"{tuple(shape)}. Give axes=(-1,) for a signal of shape (length,)."
            )
        lam = np.zeros(()) if shape is None else laplacian(tuple(shape), axes)
        self.frequencies = float_array(lam)
        self.blur, self.floor = float_array(blur), float_array(floor)
        self.t_min, self.t_max = float_array(t_min), float_array(t_max)
        self.noise = Gaussian() if noise is None else noise
        self.basis = Standard() if shape is None else DCT(tuple(axes))

    def alpha(self, t):
        """cos(pi t / 2) d(t), an array over the frequencies."""
        tau = (self.blur * jnp.sin(jnp.pi * t / 2) ** 2) ** 2 / 2
        fade = (1 - self.floor) * jnp.exp(-self.frequencies * tau) + self.floor
        return jnp.sin(jnp.pi * (1 - t) / 2) * fade  # relatively exact near t = 1

    def sigma(self, t):
        """sin(pi t / 2)."""
        return jnp.sin(jnp.pi * t / 2)
