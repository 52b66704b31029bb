"""The flows of models, in coordinates and on a clock that suit a solver.

For data of standard deviation s every path is a rotation from data to noise:

    scale(t) = hypot(sigma, alpha s),   xi(t) = arctan(sigma / (alpha s))          (1)
    u = x / scale = cos(xi) x0 / s + sin(xi) z                                     (2)
    du/dxi = cos(xi) z_hat - sin(xi) x0_hat / s                                    (3)

(3) is the probability flow. u has unit size, xi runs over at most [0, pi/2], nothing is
divided by alpha or sigma, and on N(0, s^2 I) the right-hand side and its divergence are
zero: a solver sees only by how much the data are not Gaussian. Read from data to noise,
the reverse process of stochasticity lambda has on the same clock the drift

    cos(xi) z_hat - sin(xi) x0_hat / s + lambda^2 z_hat / cos(xi)                  (4)

Where alpha, sigma or s are arrays, every coordinate has an angle of its own, and moves
by (3) times dxi_i / dxi. The clock xi is that of the mean noise level r = alpha / sigma
(`path.level`, h = log1p(r)) and of the root mean square of s:

    dxi / dt = -h' s (1 + r) / (1 + (r s)^2)                                       (5)

On an interpolant the flow is dx/dt = b(t, x), in x and t.
"""

import math
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..models.denoiser import AbstractDenoiser
from ..models.model import AbstractModel, Points
from ..models.velocity import AbstractVelocityModel
from ..processes.path import AbstractPath, NoiseInverse, basis_of, noise_slope
from ..solvers.grids import check_grid
from ..typing import PyTree, Scalar, ScalarLike, float_array, is_traced


class Angle(eqx.Module):
    """The map between the times of `path` and the angle xi, for data of size `size`."""

    path: AbstractPath
    inverse: NoiseInverse
    size: Float[Array, "..."]

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

    def local(self, xi: ScalarLike) -> tuple:
        """(cos(xi_i), sin(xi_i), dxi_i / dxi) in every coordinate."""
        t = self.time(xi)
        alpha, sigma = self.path.scales(t)
        if alpha.ndim == 0 and self.size.ndim == 0:
            return jnp.cos(xi), jnp.sin(xi), 1.0
        fall, scale, whole = noise_slope(self.path, t), self.scale(t), self._whole
        slope = self.size * fall * (alpha + sigma) / scale**2
        ratio = jnp.cos(xi) / (whole * jnp.sin(xi))
        level = jnp.mean(fall) * whole * (1 + ratio)
        rate = slope * sigma * (1 + (ratio * whole) ** 2) / level  # (5)
        return alpha * self.size / scale, sigma / scale, rate


class AngleFlow(eqx.Module):
    """Equation (3), or (4) with `stochasticity`, of a denoiser on batches."""

    denoiser: AbstractDenoiser
    angle: Angle
    cond: PyTree = None
    stochasticity: Scalar | None = None

    process = property(lambda self: self.denoiser.path)

    def __call__(self, c: Scalar, u: Points) -> Points:
        """du/dxi at the angle c: one evaluation of the denoiser."""
        t = self.angle.time(c)
        x0, z = self.denoiser.posterior_means(t, self.angle.scale(t) * u, self.cond)
        cos, sin, rate = self.angle.local(c)
        flow = cos * z - sin / self.angle.size * x0
        if self.stochasticity is not None:
            flow = flow + self.stochasticity**2 / cos * z
        return rate * flow

    def grid(self, grid):
        """Any grid of a path, checked."""
        return check_grid(grid, self.process)

    def clock(self, t):
        """The angle."""
        return self.angle(t)

    def enter(self, x, t):
        """x / scale, in the basis of the path."""
        return basis_of(self.process).coordinates(x) / self.angle.scale(t)

    def leave(self, u, first, last, log_prior):
        """(x at `last`, log p(x) + log |dx / du|, the latter relative to `first`)."""
        path, shape, scale = self.process, u.shape[1:], self.angle.scale(last)
        x = basis_of(path).data(u * scale)
        if log_prior is None:
            sigma, density = path.sigma(last), jax.vmap(path.noise.log_prob)
            log_p = density(u * scale / sigma) - _log_det(sigma, shape)  # pyright: ignore[reportOptionalOperand]
            log_p = log_p + basis_of(path).log_det(shape)
        else:
            log_p = jax.vmap(log_prior)(x)
        return x, log_p + _log_det(scale / self.angle.scale(first), shape)

    def score(self, c, u, slope):
        """grad log p(u) of Gaussian noise: -z_hat / sin(xi) = -(u + F cot(xi))."""
        if not self.process.noise.gaussian:
            return None
        cos, sin, rate = self.angle.local(c)
        return -(u + slope / rate * cos / sin)


def _log_det(scale, shape):
    """The sum of log(scale) over the coordinates of a sample."""
    log = jnp.log(scale)
    return jnp.sum(jnp.broadcast_to(log, shape)) if log.ndim else math.prod(shape) * log


class _InterpolantFlow(eqx.Module):
    """dx/dt = b(t, x) of a model on an interpolant, in x and t themselves."""

    model: AbstractVelocityModel
    cond: PyTree = None

    process = property(lambda self: self.model.interpolant)

    def __call__(self, c, u):
        return self.model.velocity(c, u, self.cond)

    def grid(self, grid):
        clock = self.model.steps(grid, jnp.result_type(float))
        return jax.vmap(self.model.time)(clock)

    def clock(self, t):
        return float_array(t)

    def enter(self, x, t):
        return x

    def leave(self, u, first, last, log_prior):
        return u, jax.vmap(log_prior or self.process.noise.log_prob)(u)

    def score(self, c, u, slope):
        return None  # how x0 and x1 were coupled in training is not known


Flow: TypeAlias = AngleFlow | _InterpolantFlow


def flow_of(model: AbstractModel, cond: PyTree, what: str) -> Flow:
    """The flow of a model; a sentence, in the name of `what`, where it has none."""
    if isinstance(model, AbstractDenoiser):
        return AngleFlow(model, angle_of(model), cond)
    if isinstance(model, AbstractVelocityModel):
        return _InterpolantFlow(model, cond)
    raise ValueError(
        f"{what} needs the velocity of a flow from data to noise, as of a denoiser or "
        f"an AbstractVelocityModel; {type(model).__name__} declares none. Of Augmented "
        "take its denoiser, of Forward its model."
    )


def check_end(flow: Flow, shape: tuple[int, ...]) -> None:
    """Refuse a flow whose end, for such a sample, has no density that is known."""
    process = flow.process
    name, noise = type(process).__name__, type(process.noise).__name__
    if jax.eval_shape(process.noise.log_prob, jnp.zeros(shape)) is None:
        raise ValueError(
            f"the noise of {name}, {noise}, has no known density, so neither have its "
            "samples. Give log_prior, the log-density of x at t_max for one sample."
        )
    if isinstance(process, AbstractPath) or is_traced(process):
        return
    with jax.ensure_compile_time_eval():
        t, zero, unit = process.t_max, jnp.zeros(shape), jnp.ones(shape)
        ends = [process.point(t, zero, unit, z) - unit for z in (zero, unit)]
        gap = float(jnp.max(jnp.abs(jnp.stack(ends))))
    if not gap < 1e-3:
        raise ValueError(
            f"sampling starts from x at t_max = {float(t):g}, which must be x1 for its "
            f"density to be that of {noise}; on this {name} it is another, or has "
            "latent noise. Take a t_max where it is x1, or give log_prior."
        )


def sum_per_sample(x: Points) -> Float[Array, " batch"]:
    """The sum over all axes but the first."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def unit_vectors(shape, dtype) -> Float[Array, "d 1 ..."]:
    """The standard basis of samples of a shape, each a batch of one."""
    size = math.prod(shape)
    return jnp.eye(size, dtype=dtype).reshape(size, 1, *shape)


def angle_of(denoiser: AbstractDenoiser) -> Angle:
    """The angle for the data of a denoiser."""
    path, size = denoiser.path, jax.lax.stop_gradient(denoiser.data_scale)
    size = float_array(size).astype(float_array(path.t_min).dtype)
    return Angle(path, path.inverse(), size)
