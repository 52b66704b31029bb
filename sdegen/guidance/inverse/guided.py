"""Inverse problems as guidance: four methods, four beliefs about x0 given x_t.

If x0 given x_t had the mean x0_hat and the covariance C, and A were linear, then

    E[x0 | x_t, y] = x0_hat + K A' (A C A' + std^2)^-1 (y - A x0_hat)               (1)

with K = C. By Tweedie's formula the true covariance is sigma^2 / alpha J, J the
Jacobian of x0_hat in x_t; K = sigma^2 / alpha J' is what the gradient of a Gaussian
log-likelihood gives. Methods differ in C and K alone:

    method   K                  C                  exact for Gaussian data
    DPS      sigma^2/alpha J'   0                  no
    PiGDM    sigma^2/alpha J'   r_t^2              of covariance s^2 I
    TMPD     sigma^2/alpha J'   sigma^2/alpha J'   yes
    DDNM     r_t^2              r_t^2              of covariance s^2 I

r_t^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2). For an A that is not linear, A' and A in
the brackets are its derivatives at x0_hat (Gauss and Newton).
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp

from ...models.denoiser import AbstractDenoiser
from ...processes.path import basis_of, batched
from ...typing import Scalar, float_array, number
from ..guidance import (
    AbstractGuidance,
    carried,
    check_gaussian,
    check_weight,
    moved,
    noise_gain,
    off_noise,
)
from .linear import conjugate_gradients, inner
from .measurement import Measurement
from .method import AbstractGuided


class MeasurementGuided(AbstractGuidance):
    """Equation (1) with the K and the C of `rule`."""

    denoiser: AbstractDenoiser
    measurement: Measurement
    rule: AbstractGuided

    def posterior_means(self, t, x, cond=None):
        """(x0_hat, z_hat) of x0 given x_t and y."""
        t, path = float_array(t), self.path
        early, basis = off_noise(path, t), basis_of(path)

        def denoise(x):
            x0, z = self.denoiser.posterior_means(early, x, cond)
            return x0, z

        if self.rule.differentiates:
            x0, back, z = jax.vjp(denoise, x, has_aux=True)
            gain = noise_gain(path, early, x)
            spread = lambda u: (gain * back(u)[0]).astype(x.dtype)  # noqa: E731
        else:
            (x0, z), spread = denoise(x), None
        prior = _prior_variance(path, early, x, self.rule.sigma_data)
        residual = self.measurement.residual(basis.data(x0))
        _, forward = jax.linearize(lambda u: self.measurement.apply(basis.data(u)), x0)
        transpose = jax.linear_transpose(forward, x0)
        back_to_x0 = lambda u: transpose(u)[0]  # noqa: E731
        weights = self.rule.solve(
            residual, forward, back_to_x0, spread, prior, self.measurement.std
        )
        pulled = back_to_x0(weights.astype(x.dtype))
        shift = prior * pulled if spread is None else spread(pulled)
        shift = (self.rule.weight * shift).astype(x.dtype)
        return moved(path, t, carried(path, t, early, (x0, z), x), shift, x)


def _prior_variance(path, t, x, sigma_data):
    """r_t^2, shaped to multiply x."""

    def variance(t):
        alpha, sigma = path.scales(t)
        return (sigma_data * sigma) ** 2 / ((alpha * sigma_data) ** 2 + sigma**2)

    return batched(variance, t, x).astype(x.dtype)


def _guided(rule, denoiser, measurement):
    check_gaussian(denoiser.path)
    return MeasurementGuided(denoiser, measurement, rule)


class DPS(AbstractGuided):
    """Diffusion posterior sampling: the likelihood of the denoised point itself.

    Chung et al. 2023, eq. 16: (1) with C = 0. Far from the data it believes y far too
    much. With `normalise` the noise of y is at least the residual's own mean square,
    which is what their step size, divided by the norm of the residual, does: without
    it, a small std makes the equation stiffer than any grid. One vector-Jacobian
    product per evaluation.
    """

    weight: Scalar = number(1.0)
    normalise: bool = eqx.field(default=True, static=True)
    solver: dfx.AbstractSolver | None = None
    stochasticity: Scalar = number(0.0)

    differentiates = True
    linear = False
    sigma_data = 1.0

    def guide(self, denoiser, measurement):
        """The denoiser moved by the gradient of log p(y | x0_hat)."""
        measurement.check_noise("DPS")
        return _guided(self, denoiser, measurement)

    def solve(self, residual, forward, transpose, spread, prior, std):
        """The residual over the variance."""
        variance = std**2
        if self.normalise:
            size = residual[0].size
            variance = jnp.maximum(variance, inner(residual, residual) / size)
        return residual / variance

    def __check_init__(self):
        check_weight(self.weight)


class PiGDM(AbstractGuided):
    """Pseudo-inverse guidance: x0 given x_t is uncertain by r_t in every direction.

    Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems", eq.
    7 and 8, without their extra factor r_t^2. `sigma_data` is s in r_t; the inverse takes
    `iterations` of conjugate gradients in y, each one product with A and A'. One
    vector-Jacobian product of the network per evaluation.
    """

    sigma_data: Scalar = number(1.0)
    iterations: int = eqx.field(default=10, static=True)
    weight: Scalar = number(1.0)
    solver: dfx.AbstractSolver | None = None
    stochasticity: Scalar = number(0.0)

    differentiates = True
    linear = False

    def guide(self, denoiser, measurement):
        """The denoiser moved by (1)."""
        return _guided(self, denoiser, measurement)

    def solve(self, residual, forward, transpose, spread, prior, std):
        """(r_t^2 A A' + std^2)^-1 of the residual."""
        return _isotropic(self, residual, forward, transpose, prior, std)

    def __check_init__(self):
        check_weight(self.weight)


class TMPD(AbstractGuided):
    """Tweedie moment projection: the true covariance of x0 given x_t.

    Boys et al. 2024, "Tweedie moment projected diffusions for inverse problems", eq. 8
    and 9. The inverse takes `iterations` of conjugate gradients, each one product with
    the network's transposed Jacobian, which is never formed (as in Rozet et al. 2024);
    0 is their diagonal approximation, the row sums of A C A'. Vector-Jacobian products
    of the network per evaluation: iterations + 1, or 2.
    """

    iterations: int = eqx.field(default=5, static=True)
    weight: Scalar = number(1.0)
    solver: dfx.AbstractSolver | None = None
    stochasticity: Scalar = number(0.0)

    differentiates = True
    linear = False
    sigma_data = 1.0

    def guide(self, denoiser, measurement):
        """The denoiser moved by (1)."""
        measurement.check_noise("TMPD")
        return _guided(self, denoiser, measurement)

    def solve(self, residual, forward, transpose, spread, prior, std):
        """(A C A' + std^2)^-1 of the residual."""

        def matrix(u):
            return forward(spread(transpose(u))) + std**2 * u

        if self.iterations:
            return conjugate_gradients(matrix, residual, self.iterations)
        # Row sums of a covariance may be negative; its diagonal is not.
        return residual / jnp.maximum(matrix(jnp.ones_like(residual)), std**2)

    def __check_init__(self):
        check_weight(self.weight)


class DDNM(AbstractGuided):
    """Null-space model: what A sees is taken from y, the rest from the network.

    Wang et al. 2023, "Zero-shot image restoration using denoising diffusion null-space
    model", eq. 13: x0_hat + A^+ (y - A x0_hat); with noise the pseudo-inverse becomes
    the least-squares one of (1), by `iterations` of conjugate gradients. For linear A;
    no derivative of the network.
    """

    sigma_data: Scalar = number(1.0)
    iterations: int = eqx.field(default=10, static=True)
    weight: Scalar = number(1.0)
    solver: dfx.AbstractSolver | None = None
    stochasticity: Scalar = number(0.0)

    differentiates = False
    linear = True

    def guide(self, denoiser, measurement):
        """The denoiser with what A sees replaced."""
        return _guided(self, denoiser, measurement)

    def solve(self, residual, forward, transpose, spread, prior, std):
        """(r_t^2 A A' + std^2)^-1 of the residual."""
        return _isotropic(self, residual, forward, transpose, prior, std)

    def __check_init__(self):
        check_weight(self.weight)


def _isotropic(rule, residual, forward, transpose, prior, std):
    def matrix(u):
        return forward(prior * transpose(u)) + std**2 * u

    return conjugate_gradients(matrix, residual, rule.iterations)
