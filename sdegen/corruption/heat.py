"""Inverse heat dissipation: images are blurred to a constant and sharpened again.

x_t = blur(x0, w_k) + sigma z,    t = k / K,  w_0 = 0, w_1 .. w_K log-spaced    (1)
f(t, x_t) ~ blur(x0, w_(k-1)) - x_t                                             (2)
x_s = x_t + f + delta z,          s = (k - 1) / K, no noise at s = 0            (3)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..typing import Scalar, ScalarLike, is_traced, number
from .corruption import AbstractCorruption, corrupted_example, data_field, equal_steps
from .degradations import dissipate


class HeatDissipation(AbstractCorruption):
    """The network predicts the step f of (2), not x0; the chain has `levels` steps.

    Rissanen, Heinonen and Solin 2023, "Generative modelling with inverse heat
    dissipation", eq. 6 to 9 and algorithms 1 and 2. delta > noise adds the variety that
    a blurred start lacks.

    **Arguments:**
    - `levels`: K, the number of steps; 200.
    - `sigma_min`, `sigma_max`: w_1 and w_K in pixels; 0.5 and 24 (32 x 32 images).
    - `noise`, `delta`: of training and of a step, in units of the data; 0.01, 0.0125.
    - `axes`: those of height and width; (-3, -2).
    - `examples`: the training data, from which, blurred, the chain starts; none.
    """

    levels: int = eqx.field(default=200, static=True)
    sigma_min: Scalar = number(0.5)
    sigma_max: Scalar = number(24.0)
    noise: Scalar = number(0.01)
    delta: Scalar = number(0.0125)
    axes: tuple[int, ...] = eqx.field(default=(-3, -2), static=True)
    examples: Array | None = data_field()

    def __check_init__(self):
        if self.levels < 2:
            raise ValueError(f"HeatDissipation needs levels >= 2, got {self.levels}.")
        if is_traced((self.sigma_min, self.sigma_max)):
            return
        if not 0 < float(self.sigma_min) < float(self.sigma_max):
            raise ValueError(
                "HeatDissipation needs 0 < sigma_min < sigma_max, in pixels, got "
                f"{float(self.sigma_min):g} and {float(self.sigma_max):g}."
            )

    def width(self, level: ScalarLike) -> Scalar:
        """w_k, the width of the blur at level k."""
        share = (level - 1) / (self.levels - 1)
        width = self.sigma_min * (self.sigma_max / self.sigma_min) ** share
        return jnp.where(jnp.asarray(level) > 0, width, 0.0)

    def blurred(self, level: ScalarLike, x0: Array) -> Array:
        """x0 at level k, without noise."""
        return dissipate(x0, self.width(level), self.axes)

    def corrupt(self, key, t, x0):
        """Equation (1)."""
        z = jax.random.normal(key, x0.shape, x0.dtype)
        return self.blurred(jnp.round(t * self.levels), x0) + self.noise * z

    def revert(self, key, s, t, x, prediction):
        """Equation (3)."""
        z = jax.random.normal(key, x.shape, x.dtype)
        return x + prediction + jnp.where(s > 0, self.delta, 0.0) * z

    def error(self, t, x0, x, prediction):
        """The mean square of the error of (2)."""
        before = self.blurred(jnp.round(t * self.levels) - 1, x0)
        return jnp.mean((before - (x + prediction)) ** 2)

    def prior(self, key, shape, dtype=None):
        """One of the examples at the last level."""
        return corrupted_example(key, self, self.examples, shape, dtype)

    def times(self, steps, shape):
        """The levels."""
        if steps not in (None, self.levels):
            raise ValueError(
                f"this HeatDissipation has a chain of {self.levels} levels, got "
                f"steps={steps}. Train one with that many."
            )
        return equal_steps(steps, self.levels)

    def training_time(self, u, shape):
        """Uniform over the levels."""
        return jnp.ceil(u * self.levels) / self.levels
