"""Training the noise schedule together with the network, by the bound on log p(x0).

With e(t) = |z - z_hat|^2 at t ~ U[t_min, t_max], T = t_max - t_min (Kingma et al. 2021,
"Variational diffusion models", eq. 11, 14, 17),

    -log p(x0) <= E[l] + prior + reconstruction,    l = T/2 gamma'(t) e(t)          (1)
    prior = alpha_T^2 |x0|^2 / (2 sigma_T^2)
    reconstruction = |z - z_hat|^2 / 2 + d log(sigma / alpha) + d/2 log(2 pi) at t_min

l is half of the likelihood weight g^2 = gamma' sigma^2 on the score's square error, e /
sigma^2. E[l] is an integral over gamma: of the schedule it sees the ends alone. The
inside sets the variance of l. So (appendix I.2) the network and the ends descend on
(1), and the inside on

    E[l^2] / E[l]^2,                                                                (2)

which is least where gamma' is inversely proportional to the root mean square of e.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..processes.path import AbstractPath
from ..processes.prediction import PosteriorMeans
from ..typing import AxisName, PyTree, RandomKey, Scalar
from .times import Uniform


def diffusion_term(
    denoiser: PosteriorMeans,
    t: Float[Array, " batch"],
    x0: Float[Array, "batch ..."],
    z: Float[Array, "batch ..."],
    cond: PyTree = None,
) -> Float[Array, " batch"]:
    """l of (1) at the given times and noise, in nats per sample; any path."""
    path: AbstractPath = denoiser.path
    rate = jax.vmap(jax.grad(path.logsnr))(t)
    span = path.t_max - path.t_min
    return -0.5 * span * rate * _error(denoiser, t, x0, z, cond)


def vdm_loss(
    model: PyTree,
    key: RandomKey,
    x0: Float[Array, "batch ..."],
    cond: PyTree = None,
    *,
    axis_name: AxisName | None = None,
) -> Scalar:
    """The bound (1) on -log p(x0), nats per coordinate; times are stratified.

    Its gradient is that of (1) in the network and in the ends of gamma, and that of (2)
    in the rest of gamma; three calls of the network. Arguments as of `denoising_loss`.
    """
    if x0.ndim < 2 or not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(
            "vdm_loss takes floating-point data of shape (batch, ...) with at least "
            f"two axes, got {x0.dtype} of shape {x0.shape}."
        )
    index, total = jnp.arange(x0.shape[0]), x0.shape[0]
    if axis_name is not None:
        index = index + total * jax.lax.axis_index(axis_name)
        total = total * jax.lax.axis_size(axis_name)
    time_key, *noise_keys = jax.random.split(key, 3)
    z, z_first = (
        jax.vmap(
            lambda i, k=k: jax.random.normal(
                jax.random.fold_in(k, i), x0.shape[1:], x0.dtype
            )
        )(index)
        for k in noise_keys
    )
    stop, (network, gamma) = jax.lax.stop_gradient, model.trained
    outside = eqx.tree_at(lambda g: g.ends, stop(gamma), gamma.ends)
    inside = eqx.tree_at(lambda g: g.ends, gamma, stop(gamma.ends))
    bound = model.with_trained((network, outside)).denoiser
    shape = model.with_trained((_frozen(network), inside)).denoiser
    t = Uniform().draw(time_key, bound.path, index, total, x0.dtype)

    l = diffusion_term(bound, t, x0, z, cond)
    value = jnp.mean(l + _prior(bound.path, x0) + _first(bound, x0, z_first, cond))
    square = jnp.mean(diffusion_term(shape, t, x0, z, cond) ** 2)
    # (2) has the gradient of the rest of gamma, and adds nothing to the value.
    extra = square / jnp.mean(stop(l)) ** 2
    return value / x0[0].size + extra - stop(extra)


def _frozen(tree):
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def _error(denoiser, t, x0, z, cond):
    """|z - z_hat|^2 of every sample."""
    alpha, sigma = (
        jax.vmap(f)(t).reshape((-1,) + (1,) * (x0.ndim - 1)).astype(x0.dtype)
        for f in (denoiser.path.alpha, denoiser.path.sigma)
    )
    found = denoiser.eps(t, alpha * x0 + sigma * z, cond)
    return jnp.sum((z - found) ** 2, axis=tuple(range(1, x0.ndim)))


def _prior(path, x0):
    square = jnp.sum(x0**2, axis=tuple(range(1, x0.ndim)))
    return 0.5 * jnp.exp(path.logsnr(path.t_max)) * square


def _first(denoiser, x0, z, cond):
    """The reconstruction term of (1)."""
    t = jnp.full(x0.shape[:1], denoiser.path.t_min)
    norming = 0.5 * (np.log(2 * np.pi) - denoiser.path.logsnr(denoiser.path.t_min))
    return 0.5 * _error(denoiser, t, x0, z, cond) + x0[0].size * norming
