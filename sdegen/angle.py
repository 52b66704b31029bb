"""Coordinates in which noise stands still, and Gaussian data too.

For data of standard deviation s every path is a rotation from data to noise:

    scale(t) = hypot(sigma, alpha s),   xi(t) = arctan(sigma / (alpha s))          (1)
    u = x / scale = cos(xi) x0 / s + sin(xi) z                                     (2)
    du/dxi = cos(xi) z_hat - sin(xi) x0_hat / s                                    (3)

(3) is the probability flow. u has unit size, xi runs over at most [0, pi/2], nothing is
divided by alpha or sigma, and on N(0, s^2 I) the right-hand side is zero: what a solver
sees is only by how much the data are not Gaussian. The same holds for the divergence of
(3), so a likelihood computed here starts from the exact one of that Gaussian.

The reverse processes with noise of strength lambda have, in the same clock, the drift

    cos(xi) z_hat - sin(xi) x0_hat / s + lambda^2 z_hat / cos(xi)                  (4)

when it is read from data to noise (from noise to data its sign is the opposite).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .denoiser import AbstractDenoiser
from .path import AbstractPath, NoiseInverse
from .typing import PyTree, Scalar, ScalarLike, float_array


class Angle(eqx.Module):
    """The map between the times of `path` and the angle xi, for data of size `size`."""

    path: AbstractPath
    inverse: NoiseInverse
    size: Scalar

    def __init__(self, path: AbstractPath, size: ScalarLike):
        self.path, self.inverse = path, path.inverse()
        self.size = float_array(size).astype(float_array(path.t_min).dtype)

    def __call__(self, t: ScalarLike) -> Scalar:
        """xi(t), equation (1)."""
        return jnp.arctan2(self.path.sigma(t), self.path.alpha(t) * self.size)

    def scale(self, t: ScalarLike) -> Scalar:
        """hypot(sigma, alpha s), equation (1)."""
        return jnp.hypot(self.path.sigma(t), self.path.alpha(t) * self.size)

    def time(self, xi: ScalarLike) -> Scalar:
        """The time t with angle xi."""
        # alpha / sigma; in floating point cos(pi / 2) may be a little below zero
        ratio = jnp.maximum(jnp.cos(xi), 0.0) / (self.size * jnp.sin(xi))
        return self.inverse(jnp.log1p(ratio))


class AngleFlow(eqx.Module):
    """Equation (3), or (4) with `stochasticity`, of a denoiser on batches."""

    denoiser: AbstractDenoiser
    angle: Angle
    cond: PyTree = None
    stochasticity: Scalar | None = None

    def __call__(
        self, xi: Scalar, u: Float[Array, "batch ..."]
    ) -> Float[Array, "batch ..."]:
        """du/dxi at the angle xi: one network evaluation."""
        t = self.angle.time(xi)
        x0, z = self.denoiser.ends(t, self.angle.scale(t) * u, self.cond)
        cos, sin = jnp.cos(xi), jnp.sin(xi)
        flow = cos * z - sin / self.angle.size * x0
        if self.stochasticity is None:
            return flow
        return flow + self.stochasticity**2 / cos * z


def data_size(denoiser: AbstractDenoiser) -> Array:
    """s in (1): the denoiser's `sigma_data`, or 0.5 where it has none."""
    size = getattr(denoiser, "sigma_data", None)
    return jax.lax.stop_gradient(float_array(0.5 if size is None else size))
