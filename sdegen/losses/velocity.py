"""The regression on the velocity of an interpolant, with antithetic latent noise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..processes.interpolant import AbstractInterpolant
from ..typing import (
    AxisName,
    PyTree,
    RandomKey,
)
from .coupling.pairs import Loss, Pairs, couple, independent, with_aux
from .times import Uniform


def velocity_loss(
    model: PyTree,
    key: RandomKey,
    x0: Float[Array, "batch ..."],
    cond: PyTree = None,
    *,
    coupling: Callable = independent,
    times: Any = None,
    antithetic: bool = True,
    axis_name: AxisName | None = None,
) -> Loss:
    """Equation (2) on a batch, per coordinate: `fit(model, data, loss=velocity_loss)`.

    **Arguments:** `x0`, data of shape (batch, ...); `cond`, as in `denoising_loss`;
    `coupling`, of x0 and the x1 drawn from the track's base, see `sdegen.coupling`;
    `times`, a law of `sdegen.times` that needs t_min and t_max alone (default:
    uniform); `antithetic`, False takes one z for each sample, and with `bridge` the
    loss then has an infinite variance; `axis_name`, see `denoising_loss`.
    """
    t, pairs, z = drawn(
        model.interpolant,
        key,
        x0,
        cond,
        coupling=coupling,
        times=times,
        axis_name=axis_name,
    )
    interpolant, x0, x1, cond = model.interpolant, pairs.x0, pairs.x1, pairs.cond
    pair = model.latent_network is not None

    def see(z):
        """(its velocity, b, z - z_hat) of the batch."""
        x = jax.vmap(interpolant.point)(t, x0, x1, z).astype(x0.dtype)
        v = jax.vmap(interpolant.velocity)(t, x0, x1, z).astype(x0.dtype)
        miss = z - model.latent(t, x, cond) if pair else jnp.zeros_like(x)
        return v, model.velocity(t, x, cond), miss

    v, b, miss = see(z)
    if interpolant.gamma(interpolant.t_max) is None or not antithetic:
        return with_aux(jnp.mean((b - v) ** 2) + jnp.mean(miss**2), pairs.aux)
    v_, b_, miss_ = see(-z)
    mean, odd = (v + v_) / 2, (v - v_) / 2  # dI/dt and gamma' z
    loss = antithetic_square(b, b_, mean, odd) + (miss**2 + miss_**2) / 2
    return with_aux(jnp.mean(loss), pairs.aux)


def antithetic_square(
    b: Array, b_: Array, mean: Array, odd: Array
) -> Float[Array, "batch ..."]:
    """The squares of b(x_+-) - (mean +- odd), halved and added, less those of odd.

    What is left out is no function of b, and may be infinite where (b - b_) odd is not:
    equation (2).
    """
    return ((b - mean) ** 2 + (b_ - mean) ** 2) / 2 - (b - b_) * odd


def drawn(
    interpolant: AbstractInterpolant,
    key: RandomKey,
    x0: Float[Array, "batch ..."],
    cond: PyTree,
    *,
    coupling: Callable,
    times: Any,
    axis_name: AxisName | None,
) -> tuple[Float[Array, " batch"], Pairs, Float[Array, "batch ..."]]:
    """(times, pairs of ends, latent noise) of a batch, the same on any mesh."""
    if x0.ndim < 2:
        raise ValueError(
            "the loss of a track takes a batch of data of shape (batch, ...) with at "
            f"least one axis per sample, got shape {x0.shape}. Use x0[:, None] for 1-D "
            "data."
        )
    dtype = jnp.promote_types(x0.dtype, jnp.float32)
    index, total = jnp.arange(x0.shape[0]), x0.shape[0]
    if axis_name is not None:
        index = index + total * jax.lax.axis_index(axis_name)
        total = total * jax.lax.axis_size(axis_name)
    time_key, end_key, noise_key, pair_key = jax.random.split(key, 4)
    # Stratified, and inside (0, 1): at the ends gamma' may be infinite.
    u = (jax.random.uniform(time_key, (), dtype) + index) / total
    eps = jnp.finfo(dtype).eps
    u = jnp.clip(u.astype(dtype), eps, 1 - eps)
    t = (Uniform() if times is None else times).quantile(interpolant, u)

    def each(key, draw):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        return jax.vmap(lambda k: draw(k, x0.shape[1:], x0.dtype))(keys)

    x1 = each(end_key, interpolant.noise.sample)
    pairs = couple(coupling, pair_key, x0, x1, cond, axis_name=axis_name)
    return t, pairs, each(noise_key, jax.random.normal)
