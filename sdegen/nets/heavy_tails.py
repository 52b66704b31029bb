"""A network for noise whose tails are heavy.

The inputs of `edm_inputs` are unbounded when the noise has no variance. m = |x|^2 / N
measures how far out such an input x is: a typical one has 1. What data and noise of
this level do not explain raises the noise level to s, in units of the data:

    s^2 = (sigma / alpha)^2 + S max(m - c, 0)^2 / m,
      S = (sigma / alpha)^2 + sigma_data^2
    x0_hat = sigma_data^2 / (s^2 + sigma_data^2) x / alpha
             + s sigma_data / sqrt(s^2 + sigma_data^2) F(x_in / sqrt(1 + m))       (1)

These are EDM's coefficients (Karras et al. 2022, table 1) at the level s. The error of
x0 is like (sigma sigma_data)^(1/2) for dof = 1, not sigma, so the loss needs the weight
alpha / sigma on x0 in place of EDM's.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from ..typing import DropoutKey, PyTree, Scalar, Time, number
from .network import Samples

_BULK = 4.0  # c in (1)


class HeavyTailed(eqx.Module):
    """Equation (1) around any network: predicts x0, from the inputs of `edm_inputs`.

    **Arguments:**
    - `network`: (time, x, cond) -> F, an array of the shape of x.
    - `sigma_data`: the standard deviation of the data, as in the denoiser, default 0.5.
      It is 1 in a denoiser without sigma_data, to which `fit` gives the data's units.
    """

    network: Any
    sigma_data: Scalar = number(0.5)

    def __call__(
        self, t: Time, x: Samples, cond: PyTree = None, *, key: DropoutKey | None = None
    ) -> Samples:
        """E[x0 given x_t]; arguments as in `AbstractNetwork.__call__`, x scaled."""
        random = {} if key is None else {"key": key}  # not every network takes one
        each = (-1,) + (1,) * (x.ndim - 1)
        m = jnp.mean(x**2, axis=tuple(range(1, x.ndim)), keepdims=True)
        level = jnp.exp(8 * t).reshape(each)
        data = self.sigma_data**2
        excess = jnp.maximum(m - _BULK, 0.0) ** 2 / jnp.maximum(m, _BULK)
        s2 = level + (level + data) * excess
        skip, out = data / (s2 + data), jnp.sqrt(s2 * data / (s2 + data))
        f = self.network(t, (x / jnp.sqrt(1 + m)).astype(x.dtype), cond, **random)
        return (skip * jnp.sqrt(level + data) * x + out * f).astype(x.dtype)
