"""The loss of both drifts of a Schroedinger bridge."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..typing import AxisName, PyTree, RandomKey
from .coupling.pairs import Loss, independent, with_aux
from .velocity import antithetic_square, drawn


def bridge_loss(
    model: PyTree,
    key: RandomKey,
    x0: Float[Array, "batch ..."],
    cond: PyTree = None,
    *,
    coupling: Callable = independent,
    times: Any = None,
    axis_name: AxisName | None = None,
) -> Loss:
    """The regression of both networks on (2): `fit(model, data, loss=bridge_loss)`.

    Per coordinate, on z and -z in a pair, less the part of the noise that no network
    can change: its variance is finite up to the ends, where (2) is not. Arguments as
    for `velocity_loss`.
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
    x0, x1, cond = pairs.x0, pairs.x1, pairs.cond
    point = jax.vmap(model.interpolant.point)
    x, x_ = (point(t, x0, x1, w).astype(x0.dtype) for w in (z, -z))
    t_ = t.reshape(-1, *[1] * (x0.ndim - 1))
    to_x0 = -model.sigma * jnp.sqrt((1 - t_) / t_) * z
    to_x1 = -model.sigma * jnp.sqrt(t_ / (1 - t_)) * z
    down = antithetic_square(
        model.down(t, x, cond), model.down(t, x_, cond), x0 - x1, to_x0
    )
    up = antithetic_square(model.up(t, x, cond), model.up(t, x_, cond), x1 - x0, to_x1)
    return with_aux(jnp.mean(down + up).astype(x0.dtype), pairs.aux)
