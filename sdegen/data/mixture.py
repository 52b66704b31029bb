"""Gaussian mixtures, whose density and denoiser are known exactly."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..models.denoiser import PosteriorMean
from ..processes.normaliser import Normaliser
from ..processes.path import AbstractPath, basis_of
from ..typing import Levels, Scalar, ScalarLike, Seed, float_array, random_key


class Mixture(eqx.Module):
    """A mixture of isotropic Gaussians in d dimensions, exact under every path.

    Under x_t = alpha x0 + sigma z component k is N(alpha mu_k, alpha^2 s_k^2 +
    sigma^2). Methods take a path, a scalar t and one sample x of shape (d,).

    **Arguments:**
    - `weights`, `means`, `stds`: of the components, (k,), (k, d) and (k,).
    """

    weights: Float[Array, " k"] = eqx.field(converter=float_array)
    means: Float[Array, "k d"] = eqx.field(converter=float_array)
    stds: Float[Array, " k"] = eqx.field(converter=float_array)

    def sample(self, key: Seed, n: int) -> Float[Array, "n d"]:
        """`n` draws of x0."""
        pick, noise = jax.random.split(random_key(key))
        k = jax.random.categorical(pick, jnp.log(self.weights), shape=(n,))
        z = jax.random.normal(noise, (n, self.means.shape[1]), self.means.dtype)
        return self.means[k] + self.stds[k, None] * z

    def joint(
        self, x: Float[Array, " d"], alpha: Levels, sigma: Levels
    ) -> tuple[Float[Array, " k"], Float[Array, "k ..."]]:
        """log p(k, x_t = x) of every component k, and its variance.

        `alpha` and `sigma` are numbers, or one for each coordinate.
        """
        variance = (alpha * self.stds[:, None]) ** 2 + sigma**2
        distance = jnp.sum((x - alpha * self.means) ** 2 / variance, axis=-1)
        norming = x.size * jnp.mean(jnp.log(2 * jnp.pi * variance), axis=-1)
        return jnp.log(self.weights) - 0.5 * (distance + norming), variance

    def log_prob(
        self, path: AbstractPath, t: ScalarLike, x: Float[Array, " d"]
    ) -> Scalar:
        """log p_t(x), in nats."""
        return jax.nn.logsumexp(self.joint(x, path.alpha(t), path.sigma(t))[0])

    def denoise(
        self, path: AbstractPath, t: ScalarLike, x: Float[Array, " d"]
    ) -> Float[Array, " d"]:
        """E[x0 given x_t = x]."""
        return self.posterior_mean(x, *path.scales(t))

    def posterior_mean(
        self, x: Float[Array, " d"], alpha: Levels, sigma: Levels
    ) -> Float[Array, " d"]:
        """E[x0 given alpha x0 + sigma z = x]."""
        log_joint, variance = self.joint(x, alpha, sigma)
        # Component k has the posterior mean (alpha s_k^2 x + sigma^2 mu_k) / variance.
        share = jax.nn.softmax(log_joint)[:, None] / variance
        slope = jnp.sum(share * self.stds[:, None] ** 2, axis=0)
        return alpha * slope * x + sigma**2 * jnp.sum(share * self.means, axis=0)

    def denoiser(self, path: AbstractPath) -> PosteriorMean:
        """The exact denoiser on `path`, to sample from without a network.

        With the units of a `Normaliser` u = (x0 - shift) / scale, and scale x_t + alpha
        shift is the path of x0 with the noise scale * sigma.
        """
        return PosteriorMean(_Exact(self, path), path)


class _Exact(eqx.Module):
    mixture: Mixture
    path: AbstractPath

    def __call__(self, t, x, cond):
        units = basis_of(self.path)

        def one(t, x):
            alpha, sigma = self.path.scales(t)
            if not isinstance(units, Normaliser):
                return self.mixture.posterior_mean(x, alpha, sigma).astype(x.dtype)
            x = units.scale * x + alpha * units.shift
            found = self.mixture.posterior_mean(x, alpha, units.scale * sigma)
            return units.coordinates(found).astype(x.dtype)

        return jax.vmap(one, (0 if t.ndim else None, 0))(t, x)


def ring(modes: int = 8, radius: float = 2.0, std: float = 0.1) -> Mixture:
    """Gaussians on a circle, with weights that rise from 1 to 2 around it.

    Equal weights would hide errors that a symmetry cancels.

    **Arguments:**
    - `modes`: the number of Gaussians, default 8.
    - `radius`: of the circle, default 2.
    - `std`: the standard deviation of each Gaussian, default 0.1.
    """
    angle = 2 * jnp.pi * jnp.arange(modes) / modes
    weights = 1 + jnp.arange(modes) / max(modes - 1, 1)
    means = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return Mixture(weights / weights.sum(), means, std * jnp.ones(modes))
