"""Any degradation as a corruption, with or without a little noise.

    x_t = F_t(x0) + noise z                                                         (1)
    x_s = F_s(x0_hat) + keep (x_t - F_t(x0_hat)) + (1 - keep^2)^(1/2) noise z'      (2)

keep = 1 is the improved sampler of Bansal et al. 2022, "Cold diffusion", algorithm 2,
keep = 0 the naive one, algorithm 1. With noise, (2) keeps the distribution of (1) for
every keep. Neither is always better: the improved one keeps early mistakes to the end.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..typing import Scalar, is_traced, number
from .corruption import AbstractCorruption, corrupted_example, data_field, equal_steps


class Cold(AbstractCorruption):
    """A degradation `(t, x) -> F_t(x)` of one sample, F_0 the identity, t from 0 to 1.

    **Arguments:**
    - `degrade`: one of `Blur`, `Downsample`, `Inpaint` or a function.
    - `noise`: its standard deviation, in units of the data; none at s = 0; 0.
    - `keep`: 1 for the improved sampler, 0 for the naive one; 1.
    - `power`: 1 trains on the absolute error, as in the paper, 2 on its square; 1.
    - `examples`: data to start from, (n, ...); none.
    """

    degrade: Callable
    noise: Scalar = number(0.0)
    keep: Scalar = number(1.0)
    power: int = eqx.field(default=1, static=True)
    examples: Array | None = data_field()

    def __check_init__(self):
        if is_traced((self.noise, self.keep)):
            return
        noise, keep = float(self.noise), float(self.keep)
        if not (noise >= 0 and 0 <= keep <= 1):
            raise ValueError(
                "Cold needs noise >= 0 and keep from 0 (naive) to 1 (improved), got "
                f"{noise=:g} and {keep=:g}."
            )

    def corrupt(self, key, t, x0):
        """Equation (1)."""
        z = jax.random.normal(key, x0.shape, x0.dtype)
        return self.degrade(t, x0) + self.noise * z

    def revert(self, key, s, t, x, prediction):
        """Equation (2)."""
        rest = x - self.degrade(t, prediction)
        fresh = jnp.where(s > 0, self.noise * jnp.sqrt(1 - self.keep**2), 0.0)
        z = jax.random.normal(key, x.shape, x.dtype)
        return self.degrade(s, prediction) + self.keep * rest + fresh * z

    def error(self, t, x0, x, prediction):
        """The mean of |x0 - x0_hat| to the `power`."""
        return jnp.mean(abs(x0 - prediction) ** self.power)

    def prior(self, key, shape, dtype=None):
        """One of the examples at t = 1."""
        return corrupted_example(key, self, self.examples, shape, dtype)

    def times(self, steps, shape):
        """Equal steps, 50 by default."""
        return equal_steps(steps, 50)

    def training_time(self, u, shape):
        """Uniform."""
        return u
