"""The variational lower bound on log p(x0), and its three terms.

With l = log(alpha^2 / sigma^2) and Gaussian noise (Kingma et al. 2021, "Variational
diffusion models", eq. 11 and 14, in continuous time)

    -log p(x0) <= KL(x_T | x0 || sigma_T z) + E[-log p(x0 | x_tmin)]
                  + 1/2 int E|z - z_hat|^2 dl                                      (1)
    KL = alpha_T^2 |x0|^2 / (2 sigma_T^2)                                          (2)

where p(x0 | x_tmin) = N(x0_hat, (sigma / alpha)^2 I), whose -log is that of the density
of the noise at z - z_hat, plus d log(sigma / alpha). With the exact denoiser (1) is an
equality, but for terms of the order of sigma(t_min)^2.
"""

import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..losses.per_sample import sample_keys
from ..models.denoiser import AbstractDenoiser
from ..models.model import Points, check_gaussian, conditions, floating_batch
from ..processes.path import basis_of, check_one_level, logsnr_span
from ..solvers.semilinear import root
from ..typing import PyTree, Seed, float_array, is_whole, random_key
from .coordinates import sum_per_sample


class Bound(eqx.Module):
    """A lower bound on log p(x0) in nats per sample, and its terms.

    value = -(prior + diffusion + reconstruction); the error is over the draws.
    """

    value: Float[Array, " batch"]
    standard_error: Float[Array, " batch"]
    prior: Float[Array, " batch"]
    diffusion: Float[Array, " batch"]
    reconstruction: Float[Array, " batch"]


def variational_bound(
    denoiser: AbstractDenoiser,
    x0: Points,
    *,
    key: Seed,
    draws: int = 32,
    uniform_in: Literal["logsnr", "t"] = "logsnr",
    cond: PyTree = None,
) -> Bound:
    """The bound (1) by Monte Carlo: 2 `draws` evaluations of the denoiser, no solve.

    It is differentiable; to learn a schedule take uniform_in="t". The integral starts
    at a log-SNR of -13.8 at the lowest.

    **Arguments:**
    - `denoiser`: any, on a path with Gaussian noise.
    - `x0`: floating-point data, (batch, ...).
    - `key`: a random key; the draws of sample i depend on (key, i).
    - `draws`: of time and noise for each sample, two in each of draws/2 strata; 32.
    - `uniform_in`: what the strata are equal in, "logsnr" or "t"; "logsnr".
    - `cond`: the condition, a pytree with leading axis batch; none.

    **Raises:** a ValueError for noise that is not Gaussian, and for wrong arguments.
    """
    x0 = floating_batch(x0, "variational_bound")
    cond = conditions(denoiser, cond, len(x0))
    check_gaussian(denoiser.path, "the bound is for", " Use log_likelihood.")
    check_one_level(denoiser.path, "variational_bound")
    if not is_whole(draws, 2) or draws % 2:
        raise ValueError(f"draws must be an even number >= 2, got {draws!r}.")
    if uniform_in not in ("logsnr", "t"):
        raise ValueError(f'uniform_in must be "logsnr" or "t", got {uniform_in!r}.')
    return _bound(random_key(key), denoiser, x0, cond, int(draws), uniform_in)


@eqx.filter_jit
def _bound(key, denoiser, x0, cond, draws, uniform_in):
    path, inverse = denoiser.path, denoiser.path.inverse()
    t_min, (batch, *shape) = float_array(path.t_min), x0.shape
    basis = basis_of(path)
    x0 = basis.coordinates(x0.astype(t_min.dtype))
    low, high = logsnr_span(path)  # at t_max and at t_min
    size = jax.lax.stop_gradient(denoiser.data_scale)
    t_max = jnp.minimum(float_array(path.t_max), inverse(jax.nn.softplus(low / 2)))

    def at(u):
        """The time of u in (0, 1), and |dl / du|."""
        if uniform_in == "logsnr":
            return inverse(jax.nn.softplus((low + (high - low) * u) / 2)), high - low
        t = t_min + (t_max - t_min) * u
        return t, -(t_max - t_min) * jax.jvp(path.logsnr, (t,), (jnp.ones_like(t),))[1]

    keys = sample_keys(key, jnp.arange(batch))

    def error(t, z):
        """|z - z_hat|^2 at times t (batch,), with less variance and the same mean."""
        alpha, sigma = jax.vmap(path.scales)(t)
        wide = (-1,) + (1,) * len(shape)
        x = alpha.reshape(wide) * x0 + sigma.reshape(wide) * z
        found = sum_per_sample((z - denoiser.eps(t, x, cond)) ** 2)
        # For Gaussian data z - z_hat has this share of |z|^2, whose mean is known.
        share = ((alpha * size) ** 2 / (sigma**2 + (alpha * size) ** 2)) ** 2
        return found - share * (sum_per_sample(z**2) - x0[0].size)

    def draw(j):
        own = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, j), 3))(keys)
        u = jax.vmap(lambda k: jax.random.uniform(k, (), x0.dtype))(own[:, 0])
        normal = jax.vmap(lambda k: jax.random.normal(k, shape, x0.dtype))
        z, z_min = normal(own[:, 1]), normal(own[:, 2])
        t, rate = jax.vmap(at)((j // 2 + u) / (draws // 2))
        start = jnp.broadcast_to(t_min, t.shape)
        return 0.5 * rate * error(t, z), 0.5 * error(start, z_min)

    diffusion, tail = jax.lax.map(draw, jnp.arange(draws))
    pairs = diffusion.reshape(draws // 2, 2, batch)
    variance = jnp.sum((pairs[:, 0] - pairs[:, 1]) ** 2, axis=0) / draws**2
    variance += jnp.var(tail, axis=0) / (draws - 1)
    diffusion = jnp.mean(diffusion, axis=0)
    ratio = path.sigma(t_min) / path.alpha(t_min)
    normaliser = x0[0].size * (0.5 * math.log(2 * math.pi) + jnp.log(ratio))
    reconstruction = jnp.mean(tail, axis=0) + normaliser
    prior = 0.5 * jnp.exp(low) * sum_per_sample(x0**2)
    reconstruction = reconstruction - basis.log_det(tuple(shape))
    value = -(prior + diffusion + reconstruction)
    return Bound(value, root(variance), prior, diffusion, reconstruction)
