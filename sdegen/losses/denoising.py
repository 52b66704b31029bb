"""One denoising loss for every path, prediction kind, weight, time draw and coupling.

    L = mean_i mean_coordinates w(t_i) |pred(t_i, x_i) - (a x0_i + b z_i)|^2,
    x_i = alpha x0_i + sigma z_i

Its minimiser is the conditional mean of the target given x_t, whatever the coupling:
score matching, denoising and flow matching are rows of the same regression (Vincent
2011; Lipman et al. 2023, theorem 2).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..processes.path import basis_of, batched, check_sample
from ..processes.prediction import PosteriorMeans
from ..typing import AxisName, PyTree, RandomKey
from . import weight as weights
from .coupling.pairs import Loss, PairedData, couple, independent, with_aux
from .times import AbstractTimes, Uniform


def denoising_loss(
    denoiser: PyTree,
    key: RandomKey,
    x0: Float[Array, "batch ..."],
    cond: PyTree = None,
    *,
    coupling: Callable = independent,
    times: AbstractTimes | None = None,
    weight: Callable = weights.uniform,
    exact: PosteriorMeans | None = None,
    axis_name: AxisName | None = None,
) -> Loss:
    """The mean weighted squared error per coordinate of the prediction, on a batch.

    **Arguments:** `x0`, data of shape (batch, ...); `cond`, a pytree of arrays with the
    same leading axis, or None; `coupling`, see `sdegen.coupling`; `times`, see
    `sdegen.times` (default: uniform, stratified); `weight`, see `sdegen.weight`;
    `exact`, a denoiser whose prediction is the target in place of that of the drawn x0
    and z: given the exact one (of a mixture, or of the data set) the loss is the score
    matching error alone, without the irreducible part that no network can remove, and
    is 0 for the exact prediction; `axis_name`, the mapped axis when the batch is one
    device's part under `jax.pmap` or `shard_map`: sample i of the whole batch then
    draws the same numbers as on one device.

    **Returns:** the loss; with a coupling that has `aux`, (loss, notes).
    """
    if x0.ndim < 2:
        raise ValueError(
            "denoising_loss takes a batch of data of shape (batch, ...) with at least "
            f"one axis per sample, got shape {x0.shape}. Use x0[:, None] for 1-D data."
        )
    if not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(
            f"denoising_loss takes floating-point data, got {x0.dtype}. Scale integer "
            "images to about [-1, 1] first."
        )
    if exact is not None and coupling is not independent:
        raise ValueError(
            "exact is the denoiser of data and noise that are independent: another "
            "coupling has another one. Take coupling=sdegen.coupling.independent."
        )
    path, times = denoiser.path, Uniform() if times is None else times
    check_sample(path, x0.shape[1:])
    index, total = jnp.arange(x0.shape[0]), x0.shape[0]
    if axis_name is not None:
        index = index + total * jax.lax.axis_index(axis_name)
        total = total * jax.lax.axis_size(axis_name)
    time_key, noise_key, pair_key = jax.random.split(key, 3)
    t = times.draw(time_key, path, index, total, x0.dtype)  # float32 at least
    keys = jax.vmap(jax.random.fold_in, (None, 0))(noise_key, index)
    z = jax.vmap(lambda k: path.noise.sample(k, x0.shape[1:], x0.dtype))(keys)
    basis = basis_of(path)
    if isinstance(cond, PairedData):
        cond = cond._replace(x1=basis.coordinates(cond.x1))
    x0 = basis.coordinates(x0)
    pairs = couple(coupling, pair_key, x0, z, cond, axis_name=axis_name)
    x0, z, cond = pairs.x0, pairs.x1, pairs.cond

    def coefficients(t):
        row = denoiser.prediction.row(path, t, denoiser.sigma_data)
        w = weight(path, t, denoiser.prediction, denoiser.sigma_data)
        return row, path.alpha(t), path.sigma(t), w

    (a, b), alpha, sigma, w = batched(coefficients, t, x0)
    x_t = (alpha * x0 + sigma * z).astype(x0.dtype)
    if exact is not None:
        x0, z = exact.posterior_means(t, x_t, cond)
    drop = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)  # apart from the noise
    error = denoiser.predict(t, x_t, cond, keys=drop) - (a * x0 + b * z)
    return with_aux(jnp.mean(w * error**2), pairs.aux)
