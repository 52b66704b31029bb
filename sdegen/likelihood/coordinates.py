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

Where alpha, sigma or s are arrays, every coordinate has an angle of its own, and moves
by (3) times dxi_i / dxi. The clock xi is that of the mean noise level r = alpha / sigma
(`path.level`, h = log1p(r)) and of the root mean square of s:

    dxi / dt = -h' s (1 + r) / (1 + (r s)^2)                                       (5)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..models.denoiser import AbstractDenoiser
from ..processes.path import AbstractPath, NoiseInverse, noise_slope
from ..typing import PyTree, Scalar, ScalarLike, float_array


class Angle(eqx.Module):
    """The map between the times of `path` and the angle xi, for data of size `size`."""

    path: AbstractPath
    inverse: NoiseInverse
    size: Float[Array, "..."]

    def __init__(self, path: AbstractPath, size: ScalarLike | Float[Array, "..."]):
        self.path, self.inverse = path, path.inverse()
        self.size = float_array(size).astype(float_array(path.t_min).dtype)

    @property
    def _whole(self):
        """s of all coordinates together."""
        return jnp.sqrt(jnp.mean(self.size**2)) if self.size.ndim else self.size

    def __call__(self, t: ScalarLike) -> Scalar:
        """xi(t), equation (1)."""
        alpha, sigma = self.path.level(t)
        return jnp.arctan2(sigma, alpha * self._whole)

    def scale(self, t: ScalarLike) -> Float[Array, "..."]:
        """hypot(sigma, alpha s), equation (1)."""
        return jnp.hypot(self.path.sigma(t), self.path.alpha(t) * self.size)

    def time(self, xi: ScalarLike) -> Scalar:
        """The time t with angle xi."""
        # alpha / sigma; in floating point cos(pi / 2) may be a little below zero
        ratio = jnp.maximum(jnp.cos(xi), 0.0) / (self._whole * jnp.sin(xi))
        return self.inverse(jnp.log1p(ratio))

    def local(self, xi: ScalarLike):
        """(cos(xi_i), sin(xi_i), dxi_i / dxi) in every coordinate."""
        t = self.time(xi)
        alpha, sigma = self.path.scales(t)
        if alpha.ndim == 0 and self.size.ndim == 0:
            return jnp.cos(xi), jnp.sin(xi), 1.0
        scaled, scale = alpha * self.size, self.scale(t)
        slope = self.size * noise_slope(self.path, t) * (alpha + sigma) / scale**2
        ratio, whole = jnp.cos(xi) / (self._whole * jnp.sin(xi)), self._whole
        level = jnp.mean(noise_slope(self.path, t)) * whole * (1 + ratio)
        rate = slope * sigma * (1 + (ratio * whole) ** 2) / level  # (5)
        return scaled / scale, sigma / scale, rate


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
        x0, z = self.denoiser.posterior_means(t, self.angle.scale(t) * u, self.cond)
        cos, sin, rate = self.angle.local(xi)
        flow = cos * z - sin / self.angle.size * x0
        if self.stochasticity is not None:
            flow = flow + self.stochasticity**2 / cos * z
        return rate * flow


def sigma_data_of(denoiser: AbstractDenoiser) -> Array:
    """s in (1): the denoiser's `sigma_data`, or 0.5 where it has none."""
    size = getattr(denoiser, "sigma_data", None)
    return jax.lax.stop_gradient(float_array(0.5 if size is None else size))
