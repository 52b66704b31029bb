"""Three losses for the score of an SDE that has no path; x_t is simulated for all.

With s the model's score, T its target and sigma the scale of the noise at t:

    simulated   E |sigma (s - T)|^2                                                 (1)
    implicit    E |sigma s|^2 + 2 tr(sigma^2 ds/dx)                                 (2)
    sliced      E |sigma s|^2 + 2 v^T sigma (ds/dx) sigma v,    E v v^T = I         (3)

(2) is (1) without E |sigma T|^2, which no network changes, by partial integration
(Hyvarinen 2005, "Estimation of non-normalized statistical models by score matching",
theorem 1); (3) takes the trace by random projections (Song et al. 2020, "Sliced score
matching", eq. 8). All three are least for the score. They are means over coordinates,
samples, and `draws` of the path's steps.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..typing import PyTree, Scalar, Seed
from .batch import Data, HasScore, check_model, simulated_batch
from .per_sample import draw_each


def simulated_score_loss(
    model: PyTree, key: Seed, x0: Data, cond: PyTree = None, **options: Any
) -> Scalar:
    """Equation (1): regression on unbiased targets; no derivative of the network.

    **Arguments:**
    - `model`: a `ScoreModel`.
    - `key`, `x0`, `cond`, and of the options `axis_name`: see `draw_batch`.
    - `draws`: steps of every simulated path at which the network is evaluated; 8.

    **Raises:** ValueError for a model, data or draws that do not fit.
    """
    check_model("simulated_score_loss", HasScore, model)
    batch, sigma = simulated_batch(model, key, x0, cond, **options)
    error = model.score(batch.t, batch.x_t, batch.cond) - batch.target
    return jnp.mean((sigma * error) ** 2)


def implicit_score_loss(
    model: PyTree, key: Seed, x0: Data, cond: PyTree = None, **options: Any
) -> Scalar:
    """Equation (2), the trace exact: one derivative per coordinate, forward mode.

    The arguments are those of `simulated_score_loss`.
    """
    check_model("implicit_score_loss", HasScore, model)
    batch, sigma = simulated_batch(model, key, x0, cond, **options, with_targets=False)
    size, shape = batch.x_t[0].size, batch.x_t.shape[1:]
    units = jnp.eye(size, dtype=x0.dtype).reshape(size, 1, *shape)
    return _without_targets(model, batch, sigma, units)


def sliced_score_loss(
    model: PyTree, key: Seed, x0: Data, cond: PyTree = None, **options: Any
) -> Scalar:
    """Equation (3), with one v of signs per state: for many coordinates.

    The arguments are those of `simulated_score_loss`.
    """
    check_model("sliced_score_loss", HasScore, model)
    batch, sigma = simulated_batch(model, key, x0, cond, **options, with_targets=False)
    shape = (len(batch.x_t) // len(x0), *x0.shape[1:])
    v = draw_each(jax.random.rademacher, batch.keys, shape, x0.dtype)
    return _without_targets(model, batch, sigma, v.reshape(1, *batch.x_t.shape))


def _without_targets(model, batch, sigma, directions):
    """(2) and (3): the sum over `directions` v of v^T sigma (ds/dx) sigma v."""

    def along(v):
        v = sigma * v
        score = lambda x: model.score(batch.t, x, batch.cond)  # noqa: E731
        value, slope = jax.jvp(score, (batch.x_t,), (v,))
        return value, v * slope

    scores, slopes = jax.vmap(along, out_axes=(None, 0))(directions)
    return jnp.mean((sigma * scores) ** 2 + 2 * slopes.sum(0))
