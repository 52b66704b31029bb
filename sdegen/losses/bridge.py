"""The loss of both drifts of a Schroedinger bridge."""

from typing import Any

import jax
import jax.numpy as jnp

from ..typing import PyTree, Seed
from .batch import Data, HasDrifts, bridge_noise, check_model, draw_batch
from .coupling.pairs import Loss, with_aux
from .velocity import antithetic_square


def bridge_loss(
    model: PyTree, key: Seed, x0: Data, cond: PyTree = None, **options: Any
) -> Loss:
    """The regression of both networks on (2) of `sdegen.models.bridge`, per coordinate.

    On z and -z in a pair, less the part of the noise that no network can change: its
    variance is finite up to the ends, where (2) is not.

    **Arguments:**
    - `model`: a `SchroedingerBridge`.
    - `key`, `x0`, `cond`, and the options `coupling`, `times`, `axis_name`: as for
      `velocity_loss`.

    **Returns** and **raises** what `denoising_loss` does.
    """
    check_model("bridge_loss", HasDrifts, model)
    batch = draw_batch(model, key, x0, cond, **options)
    t, x, x0, x1, z, cond = batch.t, batch.x_t, batch.x0, batch.x1, batch.z, batch.cond
    x_ = jax.vmap(model.interpolant.point)(t, x0, x1, -z).astype(x0.dtype)
    to_x0, to_x1 = bridge_noise(model.sigma, t, z)
    gap = x0 - x1  # pyright: ignore[reportOperatorIssue]
    down = antithetic_square(
        model.down(t, x, cond), model.down(t, x_, cond), gap, to_x0
    )
    up = antithetic_square(model.up(t, x, cond), model.up(t, x_, cond), -gap, to_x1)
    return with_aux(jnp.mean(down + up).astype(x0.dtype), batch.aux)
