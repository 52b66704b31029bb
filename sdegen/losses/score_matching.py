"""Three losses for the score of an SDE that has no path; x_t is simulated for all.

With s the model's score, T the target of `paths` and sigma the scale of the noise,
per coordinate, at t:

    simulated   E |sigma (s - T)|^2                                                 (1)
    implicit    E |sigma s|^2 + 2 tr(sigma^2 ds/dx)                                 (2)
    sliced      E |sigma s|^2 + 2 v^T sigma (ds/dx) sigma v,    E v v^T = I         (3)

(2) is (1) without E |sigma T|^2, which no network changes, by partial integration
(Hyvarinen 2005, "Estimation of non-normalized statistical models by score matching",
theorem 1); (3) takes the trace by random projections (Song et al. 2020, "Sliced score
matching", eq. 8). All three have the same minimiser, the score. All are means over
coordinates, over samples, and over `draws` of the path's steps, one in each of as many
equal strata.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..typing import AxisName, PyTree, RandomKey, Scalar
from .simulated_paths import chain, targets


def simulated_score_loss(
    model: PyTree,
    key: RandomKey,
    x0: Float[Array, "batch ..."],
    cond: PyTree = None,
    *,
    draws: int = 8,
    axis_name: AxisName | None = None,
) -> Scalar:
    """Equation (1): regression on unbiased targets; no derivative of the network.

    **Arguments:** as of `denoising_loss`; `draws`, the steps of every simulated path at
    which the network is evaluated.
    """
    _, t, x, cond, target, sigma = _visited(
        model, key, x0, cond, draws, axis_name, with_targets=True
    )
    return jnp.mean((sigma * (model.score(t, x, cond) - target)) ** 2)


def implicit_score_loss(
    model: PyTree,
    key: RandomKey,
    x0: Float[Array, "batch ..."],
    cond: PyTree = None,
    *,
    draws: int = 8,
    axis_name: AxisName | None = None,
) -> Scalar:
    """Equation (2), the trace exact: one derivative per coordinate, forward mode."""
    _, t, x, cond, _, sigma = _visited(model, key, x0, cond, draws, axis_name)
    size = x[0].size
    units = jnp.eye(size, dtype=x.dtype).reshape(size, 1, *x.shape[1:])
    return _without_targets(model, t, x, cond, sigma, units)


def sliced_score_loss(
    model: PyTree,
    key: RandomKey,
    x0: Float[Array, "batch ..."],
    cond: PyTree = None,
    *,
    draws: int = 8,
    axis_name: AxisName | None = None,
) -> Scalar:
    """Equation (3), with one v of signs per state: for many coordinates."""
    keys, t, x, cond, _, sigma = _visited(model, key, x0, cond, draws, axis_name)
    v = jax.vmap(lambda k: jax.random.rademacher(k, (draws, *x.shape[1:]), x.dtype))
    return _without_targets(model, t, x, cond, sigma, v(keys).reshape(1, *x.shape))


def _without_targets(model, t, x, cond, sigma, directions):
    """(2) and (3): the sum over `directions` v of v^T sigma (ds/dx) sigma v."""

    def along(v):
        v = sigma * v
        score, slope = jax.jvp(lambda x: model.score(t, x, cond), (x,), (v,))
        return score, v * slope

    scores, slopes = jax.vmap(along, out_axes=(None, 0))(directions)
    return jnp.mean((sigma * scores) ** 2 + 2 * slopes.sum(0))


def _visited(model, key, x0, cond, draws, axis_name, with_targets=False):
    """Where the paths of `x0` were at `draws` steps each, samples first, flat."""
    if x0.ndim < 2 or not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(
            "a score loss takes floating-point data of shape (batch, ...) with at "
            f"least two axes, got {x0.dtype} of shape {x0.shape}."
        )
    ts = model.clock.astype(x0.dtype)
    steps, batch = len(ts) - 1, x0.shape[0]
    if not 1 <= draws <= steps:
        raise ValueError(f"draws must be 1 to {steps}, the steps, got {draws}.")
    index = jnp.arange(batch)
    if axis_name is not None:
        index = index + batch * jax.lax.axis_index(axis_name)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    path, pick, own = jax.vmap(lambda k: tuple(jax.random.split(k, 3)))(keys)
    xs = chain(model.sde, path, x0, ts)
    u = jax.vmap(lambda k: jax.random.uniform(k, (), x0.dtype))(pick)
    u = (jnp.arange(draws) + u[:, None]) / draws  # (batch, draws)
    k = jnp.minimum((u * steps).astype(int), steps - 1)

    def take(rows):
        """Rows k of every sample's own sequence, within one device."""
        own = jax.vmap(lambda row, k: row[k], (1, 0))(rows, k)
        return own.reshape(-1, *own.shape[2:])

    x, t, target = take(xs[1:]), ts[1:][k].reshape(-1), None
    if with_targets:
        found = targets(model.sde, ts, xs, model.weights)
        target = take(jax.lax.stop_gradient(found))
    cond = jax.tree.map(lambda c: jnp.repeat(c, draws, axis=0), cond)
    sigma = model.noise[1:][k].reshape(x.shape).astype(x.dtype)
    return own, t, x, cond, target, sigma
