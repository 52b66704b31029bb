"""Inverse problems as guidance: four methods, four assumptions on x0 given x_t.

If x0 given x_t had the mean x0_hat and the covariance C, and A were linear, then

    E[x0 | x_t, y] = x0_hat + K A' (A C A' + std^2)^-1 (y - A x0_hat)               (1)

with K = C. The true covariance is sigma^2 / alpha J, with the Jacobian J of x0_hat in
x_t (Tweedie). Methods differ in C and K alone:

    method   K                  C                  exact for Gaussian data
    DPS      sigma^2/alpha J'   0                  no
    PiGDM    sigma^2/alpha J'   r_t^2              of covariance s^2 I
    TMPD     sigma^2/alpha J'   sigma^2/alpha J'   yes
    DDNM     r_t^2              r_t^2              of covariance s^2 I

r_t^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2). For an A that is not linear, A' and the A
of the brackets are its derivatives at x0_hat (Gauss and Newton).
"""

import abc
from collections.abc import Callable
from typing import ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ...models.denoiser import AbstractDenoiser
from ...processes.path import basis_of, batched
from ...sampling.sample import sample
from ...typing import Scalar, ScalarLike, float_array, number
from ..guidance import (
    AbstractGuidance,
    carried,
    check_gaussian,
    finite,
    moved,
    noise_gain,
    off_noise,
    remaining_variance,
)
from .linear import check_linear, conjugate_gradients, inner
from .measurement import Measurement
from .method import AbstractMethod


class AbstractGuided(AbstractMethod):
    """A method that is a guidance: a denoiser from a denoiser and a measurement.

    **Arguments** of all of them, by their names:
    - `weight`: of the shift of x0_hat; 1.
    - `solver`, `stochasticity`: as in `sample`; its default solver, and 0.
    """

    differentiates: eqx.AbstractClassVar[bool]  # K is sigma^2/alpha J', else r_t^2
    isotropic: eqx.AbstractClassVar[bool]  # C is r_t^2, else K
    linear: ClassVar[bool] = False  # for linear operators only
    divides: ClassVar[bool] = True  # by the noise of the measurement
    sigma_data: eqx.AbstractVar[ScalarLike]
    weight: Scalar = finite(default=1.0, kw_only=True)
    solver: dfx.AbstractSolver | None = eqx.field(default=None, kw_only=True)
    stochasticity: Scalar = eqx.field(default=0.0, converter=float_array, kw_only=True)

    def guide(
        self, denoiser: AbstractDenoiser, measurement: Measurement
    ) -> "MeasurementGuided":
        """The denoiser of x0 given x_t and y, as this method has it."""
        if self.divides:
            measurement.check_noise(type(self).__name__)
        check_gaussian(denoiser.path)
        return MeasurementGuided(denoiser, measurement, self)

    def draw(self, key, denoiser, measurement, shape, options):
        """Draws by `sample` from the guided denoiser."""
        if self.linear:
            check_linear(measurement.operator, shape[1:], type(self).__name__)
        guided, own = self.guide(denoiser, measurement), options._asdict()
        own |= {"solver": self.solver, "stochasticity": self.stochasticity}
        return sample(key, guided, shape, **own)

    @abc.abstractmethod
    def solve(self, residual: Array, matrix: Callable, std: Scalar) -> Array:
        """(A C A' + std^2)^-1 of the residual; `matrix` is the product in brackets."""


class MeasurementGuided(AbstractGuidance):
    """Equation (1) with the K and the C of `rule`."""

    denoiser: AbstractDenoiser
    measurement: Measurement
    rule: AbstractGuided

    def posterior_means(self, t, x, cond=None):
        """(x0_hat, z_hat) of x0 given x_t and y."""
        t, path, rule, measured = float_array(t), self.path, self.rule, self.measurement
        early, data = off_noise(path, t), basis_of(path).data
        variance = lambda t: remaining_variance(*path.scales(t), rule.sigma_data)  # noqa: E731
        prior = batched(variance, early, x).astype(x.dtype)
        gain = isotropic = lambda u: prior * u  # noqa: E731
        denoise = lambda x: tuple(self.denoiser.posterior_means(early, x, cond))  # noqa: E731
        if rule.differentiates:
            x0, back, z = jax.vjp(denoise, x, has_aux=True)
            slope = noise_gain(path, early, x)
            gain = lambda u: (slope * back(u)[0]).astype(x.dtype)  # noqa: E731
        else:
            x0, z = denoise(x)
        covariance = isotropic if rule.isotropic else gain
        _, forward = jax.linearize(lambda u: measured.apply(data(u)), x0)
        transpose = jax.linear_transpose(forward, x0)

        def matrix(u):
            return forward(covariance(transpose(u)[0])) + measured.std**2 * u

        weights = rule.solve(measured.residual(data(x0)), matrix, measured.std)
        shift = rule.weight * gain(transpose(weights.astype(x.dtype))[0])
        return moved(path, t, carried(path, t, (x0, z), x), shift, x)


class DPS(AbstractGuided):
    """Diffusion posterior sampling: the likelihood of the denoised point itself.

    Chung et al. 2023, "Diffusion posterior sampling for general noisy inverse
    problems", eq. 16. Far from the data it believes y too much. One product with J'.

    **Arguments:**
    - `normalise`: take at least the mean square of the residual for the noise of y, as
      their step size does; without it a small std makes the equation stiff; yes.
    """

    normalise: bool = eqx.field(default=True, static=True)
    differentiates = isotropic = True
    sigma_data = 1.0  # not used: C = 0

    def solve(self, residual, matrix, std):
        """The residual over the variance."""
        if not self.normalise:
            return residual / std**2
        mean_square = inner(residual, residual) / residual[0].size
        return residual / jnp.maximum(std**2, mean_square)


class AbstractIsotropic(AbstractGuided):
    """C = r_t^2: x0 given x_t is uncertain by r_t in every direction.

    **Arguments:**
    - `sigma_data`: s in r_t, the standard deviation of the data; 1.
    - `iterations`: of conjugate gradients in y, each one product with A and A'; 10.
    """

    sigma_data: Scalar = number(1.0)
    iterations: int = eqx.field(default=10, static=True)
    isotropic = True
    divides = False

    def solve(self, residual, matrix, std):
        """(r_t^2 A A' + std^2)^-1 of the residual."""
        return conjugate_gradients(matrix, residual, self.iterations)


class PiGDM(AbstractIsotropic):
    """Pseudo-inverse guidance.

    Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems", eq.
    7 and 8, without their extra factor r_t^2. One vector-Jacobian product per
    evaluation. Arguments as in `AbstractIsotropic`.
    """

    differentiates = True


class DDNM(AbstractIsotropic):
    """Null-space model: what A sees is taken from y, the rest from the network.

    Wang et al. 2023, "Zero-shot image restoration using denoising diffusion null-space
    model", eq. 13: x0_hat + A^+ (y - A x0_hat). For linear A; no derivative of the
    network. Arguments as in `AbstractIsotropic`.
    """

    differentiates = False
    linear = True


class TMPD(AbstractGuided):
    """Tweedie moment projection: the true covariance of x0 given x_t.

    Boys et al. 2024, "Tweedie moment projected diffusions for inverse problems", eq. 8
    and 9. Vector-Jacobian products of the network per evaluation: iterations + 1, or 2.

    **Arguments:**
    - `iterations`: of conjugate gradients, each one product with J' (Rozet et al.
      2024); 0 is their diagonal approximation, the row sums of A C A'; 5.
    """

    iterations: int = eqx.field(default=5, static=True)
    differentiates = True
    isotropic = False
    sigma_data = 1.0  # not used

    def solve(self, residual, matrix, std):
        """(A C A' + std^2)^-1 of the residual."""
        if self.iterations:
            return conjugate_gradients(matrix, residual, self.iterations)
        # Row sums of a covariance may be negative; its diagonal is not.
        return residual / jnp.maximum(matrix(jnp.ones_like(residual)), std**2)
