"""Data of a few points, whose denoiser is exact under noise of any known law."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import sdegen
from sdegen.models.denoiser import PosteriorMean

CORNERS = np.array([(1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)])
SHARES = np.array([0.1, 0.2, 0.3, 0.4])
"""Unequal on purpose: equal weights hide errors of the field."""


class Atoms(eqx.Module):
    """E[x0 | x_t] by the weights w_k q((x - alpha a_k) / sigma), q the base's law.

    `power` raises q to a power: a wrong exponent, where it is not 1.
    """

    path: sdegen.AbstractPath
    points: jax.Array = eqx.field(
        default_factory=lambda: CORNERS, converter=jnp.asarray
    )
    weights: jax.Array = eqx.field(
        default_factory=lambda: SHARES, converter=jnp.asarray
    )
    power: jax.Array = eqx.field(default=1.0, converter=jnp.asarray)

    def log_joint(self, t, x):
        """log of weight times likelihood, (batch, atoms)."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        z = (x[:, None] - alpha * self.points) / sigma
        log_q = jax.vmap(jax.vmap(self.path.noise.log_prob))(z)
        return jnp.log(self.weights) + self.power * log_q

    def __call__(self, t, x, cond):
        return jax.nn.softmax(self.log_joint(t, x), axis=-1) @ self.points

    def denoiser(self):
        return PosteriorMean(self, self.path)


def basins(x, points=CORNERS):
    """The share of samples nearest to each point, and their distances to it."""
    gaps = np.linalg.norm(np.asarray(x)[:, None] - points, axis=-1)
    return np.bincount(gaps.argmin(1), minlength=len(points)) / len(x), gaps.min(1)


def bar(n):
    """What shares of n samples may miss by: 4 standard errors and the prior's rest."""
    return 4 * np.sqrt(SHARES * (1 - SHARES) / n) + 0.004
