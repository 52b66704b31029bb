"""Gaussian noise as a corruption: DDIM with any share of fresh noise, from any path.

    x_t = alpha x0 + sigma z                                                        (1)
    x_s = gamma x0_hat + kappa x_t + v^(1/2) z',                                    (2)
    kappa = (sigma_s^2 - v)^(1/2) / sigma_t,   gamma = alpha_s - alpha_t kappa      (3)
    v = eta^2 sigma_s^2 (1 - r^2),   r = (alpha_t / sigma_t) / (alpha_s / sigma_s)  (4)

(2) keeps the distribution of (1) because kappa^2 sigma_t^2 + v = sigma_s^2.
"""

import jax.numpy as jnp
from jaxtyping import Array

from ..processes.path import AbstractPath
from ..solvers.grids import CosineGrid
from ..solvers.semilinear import root
from ..typing import Scalar, ScalarLike, is_traced, number
from .corruption import AbstractCorruption


class Gaussian(AbstractCorruption):
    """The corruption of a path; the step is DDIM's, from t_max to t_min.

    Song, Meng and Ermon 2021, "Denoising diffusion implicit models", eq. 12 and 16. A
    denoiser on the path is a network for it.

    **Arguments:**
    - `path`: any; with eta > 0 its noise must be Gaussian.
    - `eta`: the share of fresh noise: 0 reuses the noise that x0_hat implies, 1 is the
      ancestral sampler; 0.
    """

    path: AbstractPath
    eta: Scalar = number(0.0)

    def __check_init__(self):
        if is_traced(self.eta):
            return
        if not 0 <= float(self.eta) <= 1:
            raise ValueError(
                f"eta is the share of fresh noise, 0 to 1, got {float(self.eta):g}."
            )
        if float(self.eta) > 0 and not self.path.noise.gaussian:
            raise ValueError(
                f"eta > 0 needs Gaussian noise, and {type(self.path).__name__} has "
                f"noise={type(self.path.noise).__name__}. Use eta=0."
            )

    def corrupt(self, key, t, x0):
        """Equation (1)."""
        z = self.path.noise.sample(key, x0.shape, x0.dtype)
        return self.path.alpha(t) * x0 + self.path.sigma(t) * z

    def coefficients(self, s: ScalarLike, t: ScalarLike) -> tuple[Array, Array, Array]:
        """(gamma, kappa, v^(1/2)) of the step (2) from t to s."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = map(self.path.scales, (s, t))
        ratio = (alpha_t * sigma_s) / (alpha_s * sigma_t)
        fresh = self.eta**2 * (1 - ratio) * (1 + ratio)
        kappa = sigma_s * root(1 - fresh) / sigma_t
        return alpha_s - alpha_t * kappa, kappa, sigma_s * root(fresh)

    def revert(self, key, s, t, x, prediction):
        """Equation (2)."""
        gamma, kappa, deviation = self.coefficients(s, t)
        z = self.path.noise.sample(key, x.shape, x.dtype)
        return gamma * prediction + kappa * x + deviation * z

    def error(self, t, x0, x, prediction):
        """The mean square of x0 - x0_hat."""
        return jnp.mean((x0 - prediction) ** 2)

    def prior(self, key, shape, dtype=None):
        """Noise of scale sigma(t_max)."""
        z = self.path.noise.sample(key, shape, dtype)
        return self.path.sigma(self.path.t_max) * z

    def times(self, steps, shape):
        """`sdegen.CosineGrid`, with 50 steps by default."""
        return CosineGrid(50 if steps is None else steps)(self.path)

    def training_time(self, u, shape):
        """Uniform between t_min and t_max."""
        return self.path.t_min + u * (self.path.t_max - self.path.t_min)
