"""The data of the checks: a skewed mixture of Gaussians, and test functions.

Under x_t = alpha x0 + sigma z component k keeps its weight w_k and becomes

    N(alpha mu_k e, v_k I),    v_k = alpha^2 s_k^2 + sigma^2,                      (1)
    score = sum_k r_k(x) (alpha mu_k e - x) / v_k,    r_k the responsibilities,    (2)

for a fixed vector e with unequal entries, of the shape of a sample. The mixture is
skewed and e is lopsided on purpose: symmetric data do not show an error of sign.

A *test function* phi is smooth and, but for the moments, bounded. A wrong coefficient
changes d/dt E[phi(x_t)] for some phi; phi = x alone does not show the diffusion.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from ..data import mixture
from ..processes.path import AbstractPath
from ..typing import RandomKey, Scalar, ScalarLike

PROBES = np.array([0.05, 0.12, 0.20, 0.42, 0.60, 0.80, 0.95])
"""Probabilities whose quantiles are followed; none at 0.30, between the two modes."""
ATOMS, ATOM_WEIGHTS = np.array([-1.5, 0.2, 1.0]), np.array([0.25, 0.45, 0.3])
"""Data at points, where noise or interpolant is not that of a mixture."""


class Mixture(eqx.Module):
    """Equations (1) and (2), for a sample of any shape; `cdf` and `quantile` in 1-D."""

    weights: Float[Array, " k"]
    means: Float[Array, " k"]
    stds: Float[Array, " k"]

    def along(self, shape: tuple[int, ...]) -> mixture.Mixture:
        """The mixture of flat samples, its means along e."""
        means = self.means[:, None] * lopsided(shape).ravel()
        return mixture.Mixture(self.weights, means, self.stds)

    def log_prob(
        self, x: Float[Array, "..."], alpha: ScalarLike = 1.0, sigma: ScalarLike = 0.0
    ) -> Scalar:
        """log p_t(x), in nats, for one sample."""
        return jax.nn.logsumexp(self.along(x.shape).joint(x.ravel(), alpha, sigma)[0])

    def score(
        self, x: Float[Array, "..."], alpha: ScalarLike = 1.0, sigma: ScalarLike = 0.0
    ) -> Float[Array, "..."]:
        """The gradient of `log_prob`, equation (2)."""
        flat = self.along(x.shape)
        joint, v = flat.joint(x.ravel(), alpha, sigma)
        share = jax.nn.softmax(joint)[:, None] / v
        pull = jnp.sum(share * (alpha * flat.means - x.ravel()), axis=0)
        return pull.reshape(x.shape)

    def cdf(
        self, x: Float[Array, " n"], alpha: ScalarLike = 1.0, sigma: ScalarLike = 0.0
    ) -> Float[Array, " n"]:
        """The distribution function, in 1-D."""
        v = (alpha * self.stds) ** 2 + sigma**2
        return norm.cdf(x[:, None], alpha * self.means, jnp.sqrt(v)) @ self.weights

    def quantile(
        self, q: Float[Array, " n"], alpha: ScalarLike = 1.0, sigma: ScalarLike = 0.0
    ) -> Float[Array, " n"]:
        """The x with cdf(x) = q, by bisection."""
        reach = jnp.full_like(q, 20) * (jnp.abs(jnp.asarray(alpha)) + sigma)
        return bisect(lambda x: self.cdf(x, alpha, sigma) < q, -reach, reach, 80)

    def sample(
        self, key: RandomKey, n: int, shape: tuple[int, ...]
    ) -> Float[Array, "n ..."]:
        """`n` draws of x0."""
        return self.along(shape).sample(key, n).reshape(n, *shape)

    def moments(self) -> tuple[Scalar, Scalar]:
        """Mean and variance, in 1-D."""
        mean = self.weights @ self.means
        return mean, self.weights @ (self.means**2 + self.stds**2) - mean**2

    def standardised(self) -> "Mixture":
        """The same mixture with mean 0 and variance 1, in 1-D."""
        mean, var = self.moments()
        scale = jnp.sqrt(var)
        return Mixture(self.weights, (self.means - mean) / scale, self.stds / scale)


def bisect(below: Callable, low: Array, high: Array, steps: int) -> Array:
    """The points between low and high where the rising `below(x)` becomes false."""

    def halve(ends, _):
        (low, high), middle = ends, (ends[0] + ends[1]) / 2
        left = below(middle)
        return (jnp.where(left, middle, low), jnp.where(left, high, middle)), None

    ends, _ = jax.lax.scan(halve, (low, high), length=steps)
    return (ends[0] + ends[1]) / 2


def data() -> Mixture:
    """Two modes of unequal weight and width: mean 0.25, variance 1.51."""
    return Mixture(*map(jnp.asarray, ([0.3, 0.7], [-1.5, 1.0], [0.3, 0.5])))


def lopsided(shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The vector e of (1): cos 0, cos 1, cos 2, ..."""
    return jnp.cos(jnp.arange(np.prod(shape, dtype=int))).reshape(shape)


class PathScore(eqx.Module):
    """The score of `data` under a path."""

    path: AbstractPath

    def __call__(self, t: ScalarLike, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The score at time t, for one sample."""
        return data().score(x, self.path.alpha(t), self.path.sigma(t))


LINE = {
    "x": lambda y: y,
    "x^2": lambda y: y**2,
    "sin 2x": lambda y: jnp.sin(2 * y),
    "exp(-x^2)": lambda y: jnp.exp(-(y**2)),
}
"""Test functions on the line."""

COORDINATES = 3  # of a sample, which test functions see


def _tilted(y):
    return jnp.sum(jnp.asarray([1.0, 0.5, -0.3])[: len(y)] * y)


SPACE = {
    "a.x": _tilted,
    "a.x^2": lambda y: _tilted(y**2),
    "sin(2 a.x)": lambda y: jnp.sin(2 * _tilted(y)),
    "exp(-|x|^2)": lambda y: jnp.exp(-jnp.sum(y**2)),
    "x_1 x_d exp(-|x|^2/2)": lambda y: y[0] * y[-1] * jnp.exp(-jnp.sum(y**2) / 2),
    "sin(x_1) cos(2 x_d)": lambda y: jnp.sin(y[0]) * jnp.cos(2 * y[-1]),
}
"""Test functions of a few coordinates, y of shape (k,)."""
