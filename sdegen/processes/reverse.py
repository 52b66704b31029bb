"""Time reversals of an SDE that keep its marginals.

For dx = f dt + G dw with D = G G^T, these reverse-time processes have the same
marginals for any lambda >= 0, on a clock s that rises as t falls, r = -dt/ds > 0
(Anderson 1982 for lambda = 1; the probability flow of Song et al. 2021 for 0):

    dx = r [-f + (1 + lambda^2)/2 (div D + D score)] ds + lambda sqrt(r) G dw      (1)

(div D)_i = sum_j d_j D_ij is zero unless G depends on x. The clock keeps the relative
precision of small times in float32:

    t(s) = t_min + (t_max - t_min) expm1(k (1 - s)) / expm1(k),    k = 7           (2)
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..typing import Scalar, ScalarLike, is_traced, number
from .path import AbstractPath
from .sde import AbstractSDE, noise_depends_on_state

_CLOCK = 7.0  # k in (2)


def _divergence(sde: AbstractSDE, t, x):
    """(div D)_i = sum_j d_j D_ij for scalar or diagonal G; 0 where G ignores x."""
    if not noise_depends_on_state(sde, t, x):
        return jnp.zeros_like(x)

    def square(x):
        return sde.diffusion(t, x) ** 2

    if square(x).ndim == 0:
        return jax.grad(square)(x)
    jacobian = jax.jacfwd(square)(x).reshape(x.size, x.size)
    return jnp.diagonal(jacobian).reshape(x.shape)


def clock_of_time(sde: AbstractSDE, t: ScalarLike) -> Scalar:
    """s(t), the inverse of (2)."""
    part = (t - sde.t_min) / (sde.t_max - sde.t_min)
    return 1 - jnp.log1p(part * np.expm1(_CLOCK)) / _CLOCK


def time_of_clock(sde: AbstractSDE, s: ScalarLike) -> Scalar:
    """t(s), equation (2)."""
    return _time(sde, s)[0]


def _time(sde, s):
    """(t, -dt/ds) at clock s."""
    scale = (sde.t_max - sde.t_min) / np.expm1(_CLOCK)
    t = sde.t_min + scale * jnp.expm1(_CLOCK * (1 - s))
    return t, scale * _CLOCK * jnp.exp(_CLOCK * (1 - s))


class AbstractReversal(eqx.Module):
    """Equation (1), s from 0 (noise) to 1 (data); for `sde`, `score` see `reverse`."""

    sde: AbstractSDE
    score: Callable

    def time(self, s: ScalarLike) -> Scalar:
        """The time t of the forward process at clock s, equation (2)."""
        return time_of_clock(self.sde, s)

    def move(self, s: ScalarLike, x: Array, weight: ScalarLike) -> Array:
        """The factor of ds in (1), with `weight` in place of (1 + lambda^2)/2."""
        t, rate = _time(self.sde, s)
        g = self.sde.diffusion(t, x)
        if g.ndim and g.shape != x.shape:
            raise ValueError(
                "diffusion must return a scalar or an array of the shape of x, "
                f"{x.shape}, got {g.shape}: noise cannot mix coordinates here."
            )
        pull = _divergence(self.sde, t, x) + g**2 * self.score(t, x)
        return rate * (-self.sde.drift(t, x) + weight * pull)

    def __check_init__(self):
        sde = self.sde
        if not isinstance(sde, AbstractPath) or is_traced(sde):
            return
        with jax.ensure_compile_time_eval():
            alpha = sde.alpha(sde.t_max)
        if (np.asarray(alpha) == 0).any():
            raise ValueError(
                f"{type(sde).__name__} has alpha = 0 at t_max={float(sde.t_max):g}, "
                "where its drift is infinite. Give it a smaller t_max (0.999), or use "
                "`sample`, which does not need it."
            )


class ReverseSDE(AbstractReversal, AbstractSDE):
    """Equation (1), made by `reverse`."""

    stochasticity: Scalar = number()
    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)

    @property
    def noise(self):
        """The noise of the forward process."""
        return self.sde.noise

    def drift(self, t, x):
        """The drift of (1), in the clock s, here called t."""
        return self.move(t, x, 0.5 * (1 + self.stochasticity**2))

    def diffusion(self, t, x):
        """The noise of (1), in the clock s, here called t."""
        time, rate = _time(self.sde, t)
        return self.stochasticity * jnp.sqrt(rate) * self.sde.diffusion(time, x)

    def __check_init__(self):
        if not is_traced(self.stochasticity) and not float(self.stochasticity) >= 0:
            raise ValueError(
                "stochasticity must be >= 0 (0 is the flow, 1 Anderson's reverse SDE), "
                f"got {float(self.stochasticity):g}."
            )


class ProbabilityFlow(AbstractReversal):
    """Equation (1) with lambda = 0, made by `probability_flow`, for `ODETerm`."""

    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)

    def __call__(self, s, x, args=None):
        """dx/ds."""
        return self.move(s, x, 0.5)


def reverse(
    sde: AbstractSDE, score: Callable, stochasticity: ScalarLike = 1.0
) -> ReverseSDE:
    """The reverse-time SDE with the marginals of `sde`, equation (1).

    **Arguments:**
    - `sde`: the forward process.
    - `score`: (t, x) -> the score of x_t for one sample and a scalar t, for example
      `denoiser.sample_score`.
    - `stochasticity`: lambda in (1), default 1, which is Anderson's.

    **Raises:** `ValueError` for a negative stochasticity, or alpha = 0 at t_max.
    """
    return ReverseSDE(sde, score, stochasticity)


def probability_flow(sde: AbstractSDE, score: Callable) -> ProbabilityFlow:
    """The ODE with the marginals of `sde`, from noise to data: (1) with lambda 0.

    Arguments as for `reverse`.
    """
    return ProbabilityFlow(sde, score)
