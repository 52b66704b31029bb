"""Any Ito process, from its two coefficients."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from ..typing import PyTree, Scalar, ScalarLike, float_array
from .noise import AbstractNoise, Gaussian
from .path import check_times
from .sde import AbstractSDE, both


class CustomSDE(AbstractSDE):
    """dx = drift(t, x, params) dt + diffusion(t, x, params) dw, an Ito process.

    **Arguments:**
    - `drift`, `diffusion`: functions of (t, x, params) for one sample, as in
      `AbstractSDE`. Default: f = -1/2 g^2 x + g g' with g^2 = 1 + sin(x)^2 in each
      coordinate, whose noise depends on the state and which keeps N(0, I).
    - `params`: any pytree of numbers, default None.
    """

    _drift: Callable = eqx.field(static=True)
    _diffusion: Callable = eqx.field(static=True)
    params: PyTree
    t_min: Scalar
    t_max: Scalar
    noise: AbstractNoise

    def __init__(
        self,
        drift: Callable | None = None,
        diffusion: Callable | None = None,
        params: PyTree = None,
        *,
        t_min: ScalarLike = 0.0,
        t_max: ScalarLike = 4.0,
        noise: AbstractNoise | None = None,
    ):
        names = "drift(t, x, params) and diffusion(t, x, params)"
        self._drift, self._diffusion = both(self, (drift, diffusion), _SINE, names)
        self.params = jax.tree.map(float_array, params)
        self.t_min, self.t_max = float_array(t_min), float_array(t_max)
        self.noise = Gaussian() if noise is None else noise

    def drift(self, t, x):
        """f(t, x), as the user wrote it."""
        return jnp.asarray(self._drift(t, x, self.params))

    def diffusion(self, t, x):
        """G(t, x), as the user wrote it."""
        return jnp.asarray(self._diffusion(t, x, self.params))

    def __check_init__(self):
        check_times(self)


_SINE = (
    lambda t, x, params: -0.5 * (1 + jnp.sin(x) ** 2) * x + jnp.sin(x) * jnp.cos(x),
    lambda t, x, params: jnp.sqrt(1 + jnp.sin(x) ** 2),
)
