"""The Gaussian steps of the ancestral sampler, for any path, with their densities.

From t to s < t, with z_hat = (x_t - alpha_t x0_hat) / sigma_t,

    x_s = alpha_s x0_hat + sqrt(sigma_s^2 - v) z_hat + sqrt(v) xi,                  (1)
    v = eta^2 sigma_s^2 (1 - exp(-2 h)),   h the growth of log(alpha / sigma)       (2)

(Song, Meng and Ermon 2021, "Denoising diffusion implicit models", eq. 12 and 16): eta =
1 is DDPM's posterior. A shift S of x0_hat, at the same x_t, moves the mean by

    k S,   k = alpha_s - sqrt(sigma_s^2 - v) alpha_t / sigma_t                      (3)

so x0 adds k^2 Var[x0 | x_t] to v, if that is known (Bao et al. 2022, "Analytic-DPM").
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..processes.path import AbstractPath
from ..solvers.ddim import Variance
from ..solvers.semilinear import Node, decay, root
from ..typing import ScalarLike


class Transition(eqx.Module):
    """The coefficients of (1), numbers or one for each coordinate, from t to s."""

    data: Float[Array, "..."]  # of x0_hat
    noise: Float[Array, "..."]  # of z_hat
    fresh: Float[Array, "..."]  # of xi
    pull: Float[Array, "..."]  # k in (3)

    def __init__(
        self, path, t: ScalarLike, s, eta: ScalarLike, variance: Variance | None = None
    ):
        (a0, s0), (a1, s1) = path.scales(t), path.scales(s)
        shrink, gain = decay(Node.at(path, t), Node.at(path, s))
        share = eta**2 * gain * (1 + shrink)  # v / sigma_s^2
        self.data, self.noise = a1, s1 * root(1 - share)
        self.pull = a1 - self.noise * a0 / s0
        fresh = s1**2 * share
        if variance is not None:
            alpha, sigma = path.level(t)
            fresh = fresh + self.pull**2 * variance(jnp.log1p(alpha / sigma))
        self.fresh = root(fresh)

    def __call__(self, x0: Array, z: Array, xi: Array) -> Array:
        """x_s of equation (1)."""
        return (self.data * x0 + self.noise * z + self.fresh * xi).astype(x0.dtype)


def renoise(path: AbstractPath, s: ScalarLike, t: ScalarLike) -> tuple[Array, Array]:
    """(k, d) of the forward step x_t = k x_s + d xi, from s back to t > s."""
    (a0, s0), (a1, s1) = path.scales(t), path.scales(s)
    k = a0 / a1
    return k, root(s0**2 - (k * s1) ** 2)


def draws(keys: Array, shape: tuple[int, ...], path: AbstractPath, dtype=None) -> Array:
    """One draw of the noise for each key."""
    return jax.vmap(lambda k: path.noise.sample(k, shape, dtype))(keys)
