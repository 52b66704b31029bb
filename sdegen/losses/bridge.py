"""The loss of both drifts of a Schroedinger bridge."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..typing import AxisName, PyTree, RandomKey
from .batch import HasDrifts, bridge_noise, check_model, draw_batch
from .coupling.pairs import Loss, independent, with_aux
from .times import AbstractTimes
from .velocity import antithetic_square


def bridge_loss(
    model: PyTree,
    key: RandomKey,
    x0: Float[Array, "batch ..."],
    cond: PyTree = None,
    *,
    coupling: Callable = independent,
    times: AbstractTimes | None = None,
    axis_name: AxisName | None = None,
) -> Loss:
    """The regression of both networks on (2) of `sdegen.models.bridge`, per coordinate.

    On z and -z in a pair, less the part of the noise that no network can change: its
    variance is finite up to the ends, where (2) is not.

    **Arguments:**

    - `model`: a `SchroedingerBridge`.
    - `key`, `x0`, `cond`, `coupling`, `times`, `axis_name`: as for `velocity_loss`.

    **Returns:** the loss; with a coupling that has `aux`, (loss, aux).

    **Raises:** ValueError for a model, data or a coupling that do not fit.
    """
    check_model("bridge_loss", HasDrifts, model)
    batch = draw_batch(
        model, key, x0, cond, coupling=coupling, times=times, axis_name=axis_name
    )
    t, x, cond = batch.t, batch.x_t, batch.cond
    x0, x1 = batch.x0, batch.x1
    x_ = jax.vmap(model.interpolant.point)(t, x0, x1, -batch.z).astype(x0.dtype)  # pyright: ignore[reportOptionalOperand]
    to_x0, to_x1 = bridge_noise(model.sigma, t, batch.z)
    gap = x0 - x1  # pyright: ignore[reportOperatorIssue]
    down = antithetic_square(
        model.down(t, x, cond), model.down(t, x_, cond), gap, to_x0
    )
    up = antithetic_square(model.up(t, x, cond), model.up(t, x_, cond), -gap, to_x1)
    return with_aux(jnp.mean(down + up).astype(x0.dtype), batch.aux)
