"""Guidance by a gradient: of a classifier, a score of agreement, any reward.

The denoised point moves by w sigma^2 / alpha G (Dhariwal and Nichol 2021, "Diffusion
models beat GANs", eq. 14, for any path):

    G = grad log p(c | x_t)                a classifier of noisy samples            (1)
    G = grad r(x0_hat(x_t))                a number of clean samples                (2)

(1) is exact for a conditional distribution, with w = 1. (2) takes r of the mean where
the mean of exp(r) would be exact; r may be a log p(c | x0), an agreement sim(x0, c)
(Liu et al. 2023, "More control for free!") or a negative energy.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from ..models.denoiser import AbstractDenoiser
from ..processes.path import basis_of
from ..typing import Scalar, float_array
from .guidance import (
    AbstractGuidance,
    Interval,
    carried,
    check_gaussian,
    finite,
    off_noise,
    per_sample,
    steered,
)


class ClassifierGuided(AbstractGuidance):
    """Equation (1), with a classifier that was trained on noisy samples.

    **Arguments:**
    - `denoiser`: it sees `cond` too, unless it is `Unconditional(denoiser)`.
    - `log_prob`: (t, x, cond) -> log p(cond | x_t) of each sample, (batch,), in nats,
      for x_t in data coordinates.
    - `weight`: w; 1.
    - `interval`: the noise levels where it acts; all.
    """

    denoiser: AbstractDenoiser
    log_prob: Callable
    weight: Scalar = finite(default=1.0)
    interval: Interval = eqx.field(default_factory=Interval)

    def posterior_means(self, t, x, cond=None):
        """(x0_hat, z_hat), moved by (1)."""
        t = float_array(t)
        early, basis = off_noise(self.path, t), basis_of(self.path)

        def total(x):
            value = self.log_prob(early, basis.data(x), cond)
            return jnp.sum(per_sample(value, len(x), "log_prob"))

        means = self.denoiser.posterior_means(t, x, cond)
        return steered(self, t, means, jax.grad(total)(x), x)

    def __check_init__(self):
        check_gaussian(self.path)


class RewardGuided(AbstractGuidance):
    """Equation (2), by one vector-Jacobian product of the network per evaluation.

    **Arguments:**
    - `reward`: (x0, cond) -> a number for each sample, (batch,), in nats.
    - `denoiser`, `weight`, `interval`: as in `ClassifierGuided`.
    """

    denoiser: AbstractDenoiser
    reward: Callable
    weight: Scalar = finite(default=1.0)
    interval: Interval = eqx.field(default_factory=Interval)

    def posterior_means(self, t, x, cond=None):
        """(x0_hat, z_hat), moved by (2)."""
        t = float_array(t)
        means, _, slope = rewarded(self.denoiser, self.reward, t, x, cond)
        return steered(self, t, means, slope, x)

    def __check_init__(self):
        check_gaussian(self.path)


def rewarded(denoiser, reward, t, x, cond):
    """(posterior means at x, r(x0_hat) of each sample, its gradient in x)."""
    path = denoiser.path

    def through(x):
        means = denoiser.posterior_means(off_noise(path, t), x, cond)
        value = reward(basis_of(path).data(means[0]), cond)
        return per_sample(value, len(x), "reward"), means

    value, back, means = jax.vjp(through, x, has_aux=True)
    return carried(path, t, means, x), value, back(jnp.ones_like(value))[0]
