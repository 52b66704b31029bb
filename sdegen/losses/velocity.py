"""The regression on the velocity of an interpolant, with antithetic latent noise."""

from typing import Any

import jax
import jax.numpy as jnp

from ..typing import PyTree, Seed
from .batch import Data, HasVelocity, check_model, draw_batch
from .coupling.pairs import Loss, with_aux


def velocity_loss(
    model: PyTree,
    key: Seed,
    x0: Data,
    cond: PyTree = None,
    *,
    antithetic: bool = True,
    **options: Any,
) -> Loss:
    """Equation (2) of `sdegen.models.velocity` on a batch, per coordinate.

    **Arguments:**
    - `model`: a `VelocityModel`.
    - `key`, `x0`, `cond`, and the options `coupling`, `times`, `axis_name`: see
      `draw_batch`; `times` is a distribution that needs t_min and t_max alone.
    - `antithetic`: take z and -z in a pair; True. With False and the latent noise
      "bridge" the loss has an infinite variance.

    **Returns** and **raises** what `denoising_loss` does.
    """
    check_model("velocity_loss", HasVelocity, model)
    batch = draw_batch(model, key, x0, cond, **options)
    t, path, ends = batch.t, model.interpolant, (batch.x0, batch.x1)

    def miss(x, z):
        """z - z_hat, where there is a network for it."""
        if model.latent_network is None:
            return jnp.zeros_like(x)
        return z - model.latent(t, x, batch.cond)

    x, v = batch.x_t, batch.target
    b, square = model.velocity(t, x, batch.cond), miss(x, batch.z) ** 2
    if path.gamma(path.t_max) is None or not antithetic:
        return with_aux(jnp.mean((b - v) ** 2) + jnp.mean(square), batch.aux)
    x_, v_ = (
        jax.vmap(f)(t, *ends, -batch.z).astype(x.dtype)
        for f in (path.point, path.velocity)
    )
    b_, square_ = model.velocity(t, x_, batch.cond), miss(x_, -batch.z) ** 2
    mean, odd = (v + v_) / 2, (v - v_) / 2  # dI/dt and gamma' z
    loss = antithetic_square(b, b_, mean, odd) + (square + square_) / 2
    return with_aux(jnp.mean(loss), batch.aux)


def antithetic_square(b: Data, b_: Data, mean: Data, odd: Data) -> Data:
    """The squares of b(x_+-) - (mean +- odd), halved and added, less those of odd.

    What is left out is no function of b, and may be infinite where (b - b_) odd is not.
    """
    return ((b - mean) ** 2 + (b_ - mean) ** 2) / 2 - (b - b_) * odd
