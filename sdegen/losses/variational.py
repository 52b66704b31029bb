"""Training the noise schedule together with the network, by the bound on log p(x0).

With e(t) = |z - z_hat|^2 at t ~ U[t_min, t_max], T = t_max - t_min (Kingma et al. 2021,
"Variational diffusion models", eq. 11, 14, 17),

    -log p(x0) <= E[l] + prior + reconstruction,    l = T/2 gamma'(t) e(t)          (1)
    prior = alpha_T^2 |x0|^2 / (2 sigma_T^2)
    reconstruction = |z - z_hat|^2 / 2 + d log(sigma / alpha) + d/2 log(2 pi) at t_min

E[l] is an integral over gamma: of the schedule it sees the ends alone. The inside sets
the variance of l. So (appendix I.2) the network and the ends descend on (1), and the
inside on

    E[l^2] / E[l]^2                                                                 (2)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..processes.path import AbstractPath, batched
from ..processes.prediction import PosteriorMeans
from ..typing import AxisName, PyTree, Scalar, Seed, random_key
from .batch import Data, HasSchedule, check_model, draw_batch
from .per_sample import batch_index, draw_each, sample_keys
from .times import AbstractTimes, Uniform


def diffusion_term(
    denoiser: PosteriorMeans,
    t: Float[Array, " batch"],
    x0: Data,
    z: Data,
    cond: PyTree = None,
) -> Float[Array, " batch"]:
    """l of (1) at the given times and noise, in nats per sample; any path.

    **Arguments:**
    - `denoiser`: a model with a path and `eps`.
    - `t`: times, (batch,).
    - `x0`, `z`: data and noise, (batch, ...).
    - `cond`: a pytree of arrays with leading axis batch, or None.
    """
    path: AbstractPath = denoiser.path
    rate = jax.vmap(jax.grad(path.logsnr))(t)
    span = path.t_max - path.t_min
    return -0.5 * span * rate * _error(denoiser, t, x0, z, cond)


def vdm_loss(
    model: PyTree,
    key: Seed,
    x0: Data,
    cond: PyTree = None,
    *,
    times: AbstractTimes | None = None,
    axis_name: AxisName | None = None,
) -> Scalar:
    """The bound (1) on -log p(x0), in nats per coordinate.

    Its gradient is that of (1) in the network and in the ends of gamma, and that of (2)
    in the rest of gamma.

    **Arguments:**
    - `model`: a `VDM`.
    - `key`, `x0`, `cond`, `axis_name`: see `draw_batch`.
    - `times`: `Uniform()`, the default, stratified or not.

    **Raises:** ValueError for a model, data or times that do not fit.
    """
    check_model("vdm_loss", HasSchedule, model)
    if not isinstance(times, Uniform | None):
        raise ValueError(
            "the bound of vdm_loss is a mean over uniform times: times is Uniform(), "
            f"stratified or not, got {type(times).__name__}."
        )
    key = random_key(key)
    batch = draw_batch(model, key, x0, cond, times=times, axis_name=axis_name)
    t, z, cond = batch.t, batch.x1, batch.cond
    first_key = jax.random.split(key, 3)[2]  # which draw_batch gives to couplings
    keys = sample_keys(first_key, batch_index(len(x0), axis_name)[0])
    z_first = draw_each(jax.random.normal, keys, x0.shape[1:], x0.dtype)
    stop, (network, gamma) = jax.lax.stop_gradient, model.trained
    outside = eqx.tree_at(lambda g: g.ends, stop(gamma), gamma.ends)
    inside = eqx.tree_at(lambda g: g.ends, gamma, stop(gamma.ends))
    bound = model.with_trained((network, outside)).denoiser
    frozen = jax.tree.map(lambda a: stop(a) if eqx.is_array(a) else a, network)
    shape = model.with_trained((frozen, inside)).denoiser

    x0 = batch.x0
    l = diffusion_term(bound, t, x0, z, cond)
    prior = 0.5 * jnp.exp(bound.path.logsnr(bound.path.t_max)) * _square(x0)
    value = jnp.mean(l + prior + _first(bound, x0, z_first, cond))
    square = jnp.mean(diffusion_term(shape, t, x0, z, cond) ** 2)
    # (2) has the gradient of the rest of gamma, and adds nothing to the value.
    extra = square / jnp.mean(stop(l)) ** 2
    return value / x0[0].size + extra - stop(extra)


def _error(denoiser, t, x0, z, cond):
    """|z - z_hat|^2 of every sample."""
    path = denoiser.path
    alpha, sigma = batched(lambda t: (path.alpha(t), path.sigma(t)), t, x0)
    x_t = alpha.astype(x0.dtype) * x0 + sigma.astype(x0.dtype) * z
    return _square(z - denoiser.eps(t, x_t, cond))


def _square(x):
    """|x|^2 of every sample."""
    return jnp.sum(x**2, axis=tuple(range(1, x.ndim)))


def _first(denoiser, x0, z, cond):
    """The reconstruction term of (1)."""
    t = jnp.full(x0.shape[:1], denoiser.path.t_min)
    norming = 0.5 * (np.log(2 * np.pi) - denoiser.path.logsnr(denoiser.path.t_min))
    return 0.5 * _error(denoiser, t, x0, z, cond) + x0[0].size * norming
