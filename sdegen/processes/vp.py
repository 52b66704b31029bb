"""Variance-preserving processes: the data shrink as the noise grows.

B(t) = int_0^t beta = beta_min t + (beta_max - beta_min) t^2 / 2,  0 <= t <= 1  (1)
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..typing import Levels, Scalar, float_array, is_traced, is_whole, number
from .noise import AbstractNoise, Gaussian
from .sde import AbstractLinearSDE


class AbstractVP(AbstractLinearSDE):
    """dx = -beta(t)/2 x dt + g dw with a linear beta: alpha^2 = exp(-B).

    **Arguments:**
    - `beta_min`, `beta_max`: beta at t = 0 and 1, defaults 0.1 and 20.
    """

    beta_min: Scalar = number(0.1)
    beta_max: Scalar = number(20.0)
    t_min: Scalar = number(1e-3)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)

    def integrated_beta(self, t: Levels) -> Array:
        """B(t), equation (1)."""
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def alpha(self, t):
        """exp(-B/2)."""
        return jnp.exp(-0.5 * self.integrated_beta(t))


class VP(AbstractVP):
    """dx = -beta/2 x dt + sqrt(beta) dw: alpha^2 = exp(-B), sigma^2 = 1 - exp(-B).

    Song et al. 2021, "Score-based generative modeling through SDEs", eq. 11 and 33.
    """

    def sigma(self, t):
        """sqrt(1 - exp(-B))."""
        return jnp.sqrt(-jnp.expm1(-self.integrated_beta(t)))

    def closed_inverse(self, h):
        """From alpha / sigma = exp(h) - 1: B, and the root of (1)."""
        ratio = jnp.minimum(jnp.expm1(h) ** -2, jnp.finfo(h.dtype).max)  # pyright: ignore[reportAttributeAccessIssue]
        b = jnp.log1p(ratio)
        slope = 2 * (self.beta_max - self.beta_min)
        return 2 * b / (self.beta_min + jnp.sqrt(self.beta_min**2 + slope * b))


class SubVP(AbstractVP):
    """The sub-VP process: alpha as in VP, sigma = 1 - exp(-B), a standard deviation.

    Song et al. 2021, "Score-based generative modeling through SDEs", eq. 15 and 29.
    """

    def sigma(self, t):
        """1 - exp(-B)."""
        return -jnp.expm1(-self.integrated_beta(t))


class Cosine(AbstractLinearSDE):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Nichol and Dhariwal 2021, "Improved denoising diffusion probabilistic models", eq.
    17, without its offset; Hoogeboom et al. 2023, "simple diffusion", eq. 4.
    """

    t_min: Scalar = number(1e-3)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)

    def alpha(self, t):
        """cos(pi t / 2), written so that it is relatively exact near t = 1."""
        return jnp.sin(0.5 * jnp.pi * (1 - t))

    def sigma(self, t):
        """sin(pi t / 2)."""
        return jnp.sin(0.5 * jnp.pi * t)

    def closed_inverse(self, h):
        """arctan(sigma / alpha) 2 / pi."""
        return 2 / jnp.pi * jnp.arctan2(jnp.ones_like(h), jnp.expm1(h))


class DDPM(AbstractLinearSDE):
    """The chain of T steps with variances `betas`, as a process on 0 <= t <= 1.

    alpha^2 = alpha_bar at t = i / T and log-linear between; sigma^2 = 1 - alpha^2.
    Ho et al. 2020, "Denoising diffusion probabilistic models", eq. 4. Where the last
    variance is 1 (see `zero_terminal_snr`), alpha is linear in the last step.

    **Arguments:**
    - `betas`: the variances, (T,); default the paper's 1000 from 1e-4 to 0.02. See
      `respaced_betas` for fewer steps of the same process.
    - `t_min`, `t_max`, `noise`: see `AbstractSDE`; t_min is 1 / T, the first step.
    """

    betas: Float[Array, " steps"]
    t_min: Scalar
    t_max: Scalar
    noise: AbstractNoise

    def __init__(self, betas=None, *, t_min=None, t_max=1.0, noise=None):
        betas = np.linspace(1e-4, 0.02, 1000) if betas is None else betas
        self.betas = float_array(betas)
        if self.betas.ndim != 1 or len(self.betas) < 2:
            raise ValueError(
                "DDPM needs the variances beta_1 .. beta_T as one array of length T >= "
                f"2, got an array of shape {self.betas.shape}."
            )
        low, high = self.betas.min(), self.betas[:-1].max()
        if not is_traced(high) and not (
            0 < float(low) <= float(high) < 1 and float(self.betas[-1]) <= 1
        ):
            raise ValueError(
                "DDPM needs variances between 0 and 1, got betas between "
                f"{float(low):g} and {float(self.betas.max()):g}. Only the last may be "
                "1. For fewer steps of a known chain use respaced_betas(betas, steps)."
            )
        self.t_min = float_array(1 / len(self.betas) if t_min is None else t_min)
        self.t_max = float_array(t_max)
        if not is_traced(self.t_max) and float(self.t_max) > 1:
            raise ValueError(
                f"DDPM's chain ends at t = 1 (step T), got t_max={float(self.t_max):g}."
            )
        self.noise = Gaussian() if noise is None else noise

    def _before_and_last(self, t):
        """(log alpha_bar, tail): alpha is exp(log alpha_bar / 2) tail.

        The tail is 1, but in a last step with beta = 1 it falls from 1 to 0.
        """
        # The slope is log(1 - beta) itself; a difference of two sums would round it.
        steps, ends = len(self.betas), self.betas >= 1
        log_ratio = jnp.log1p(-jnp.where(ends, 0.0, self.betas))
        before = jnp.pad(jnp.cumsum(log_ratio)[:-1], (1, 0))
        i = jnp.clip(jnp.floor(t * steps).astype(int), 0, steps - 1)
        share = t * steps - i
        return before[i] + share * log_ratio[i], jnp.where(ends[i], 1 - share, 1.0)

    def alpha(self, t):
        """sqrt(alpha_bar)."""
        log_alpha_bar, tail = self._before_and_last(t)
        return jnp.exp(0.5 * log_alpha_bar) * tail

    def sigma(self, t):
        """sqrt(1 - alpha_bar)."""
        log_alpha_bar, tail = self._before_and_last(t)
        lost = jnp.exp(log_alpha_bar) * (1 - tail) * (1 + tail)
        return jnp.sqrt(lost - jnp.expm1(log_alpha_bar))


def respaced_betas(betas: Array | np.ndarray, steps: int) -> Float[np.ndarray, " new"]:
    """The variances of fewer steps of the same chain, for `DDPM`.

    alpha_bar of step k is that of step k T / `steps` (rounded) of the longer chain, so
    the last one and the process between stay what they are (Nichol and Dhariwal 2021,
    "Improved denoising diffusion probabilistic models", eq. 19).

    **Arguments:**
    - `betas`: the variances, (T,), each above 0 and less than 1, the last at most 1.
    - `steps`: how many remain, 2 to T.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not (is_whole(steps, 2) and steps <= len(betas)):
        raise ValueError(
            "respaced_betas takes the variances, (T,), and a number of steps from 2 to "
            f"T, got {steps!r} and an array of shape {betas.shape}."
        )
    alpha_bar = np.append(1.0, np.cumprod(1 - betas))
    kept = alpha_bar[np.rint(np.arange(steps + 1) * len(betas) / steps).astype(int)]
    return 1 - kept[1:] / kept[:-1]


def zero_terminal_snr(betas: Array | np.ndarray) -> Float[np.ndarray, " steps"]:
    """The variances, rescaled so that the last step leaves nothing of the data.

    sqrt(alpha_bar) is shifted to 0 at the end and scaled to keep its first value (Lin
    et al. 2024, "Common diffusion noise schedules and sample steps are flawed",
    algorithm 1). The last variance is 1. There eps says nothing about x0: train on the
    prediction v.

    **Arguments:**
    - `betas`: the variances of a chain for `DDPM`, (T,).
    """
    alpha = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    ratio = np.append(alpha[:1], alpha[1:] / alpha[:-1])
    return 1 - ratio**2
