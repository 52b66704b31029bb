"""A noise schedule that is trained.

    -logsnr(t) = gamma(t) = gamma_0 + (gamma_1 - gamma_0) (h(t) - h(0)) / (h(1) - h(0))
    h(t) = t + sum_j a_j sigmoid(b_j (t - c_j)),    a_j, b_j > 0                    (1)
    alpha^2 = sigmoid(-gamma),    sigma^2 = sigmoid(gamma),    0 <= t <= 1          (2)

Kingma et al. 2021, "Variational diffusion models", eq. 2 and 3 and appendix H.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..typing import Scalar, ScalarLike, float_array, number
from .noise import AbstractNoise, Gaussian
from .sde import AbstractLinearSDE

_STEPS = 32


def _before_softplus(value):
    """`_STEPS` times what softplus maps to `value`."""
    return number((math.log(math.expm1(value)),) * _STEPS)


class Gamma(eqx.Module):
    """The monotone function (1); all its arrays are meant to be trained.

    **Arguments:**
    - `ends`: (gamma_0, gamma_1), default (-13.3, 6.5); at the paper's 5 the signal that
      is left would be 8 % of the noise.
    - `heights`, `slopes`: a and b before softplus, (32,), by default 0.1 / 32 and 8.
    - `places`: c, (32,), by default even over (0, 1).
    """

    ends: Float[Array, "2"] = number((-13.3, 6.5))
    heights: Float[Array, " steps"] = _before_softplus(0.1 / _STEPS)
    slopes: Float[Array, " steps"] = _before_softplus(_STEPS / 4)
    places: Float[Array, " steps"] = number(
        tuple((i + 0.5) / _STEPS for i in range(_STEPS))
    )

    def __call__(self, t: ScalarLike) -> Scalar:
        """gamma(t)."""
        t = float_array(t)
        part = self._rise(t) / self._rise(jnp.ones_like(t))
        return self.ends[0] + (self.ends[1] - self.ends[0]) * part

    def _rise(self, t):
        """h(t) - h(0)."""
        a, b = jax.nn.softplus(self.heights), jax.nn.softplus(self.slopes)
        steps = jax.nn.sigmoid(b * (t - self.places)) - jax.nn.sigmoid(-b * self.places)
        return t + a @ steps


class LearnedSchedule(AbstractLinearSDE):
    """Variance preserving, with the monotone log-SNR -gamma(t), equations (1) and (2).

    `VDM` trains it with the network.

    **Arguments:**
    - `gamma`: minus the log-SNR; the default is nearly linear.
    """

    gamma: Gamma = eqx.field(default_factory=Gamma)
    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)

    def alpha(self, t):
        """sqrt(sigmoid(-gamma))."""
        return jnp.exp(0.5 * jax.nn.log_sigmoid(-self.gamma(t)))

    def sigma(self, t):
        """sqrt(sigmoid(gamma))."""
        return jnp.exp(0.5 * jax.nn.log_sigmoid(self.gamma(t)))
