"""Tracks from data to another end, with nothing assumed of their form.

    x_t = I(t, x0, x1) + gamma(t) z,    z ~ N(0, I), t = t_min at x0               (1)
    v_t(x0, x1, z) = dI/dt + gamma'(t) z                                           (2)
    b(t, x) = E[v_t given x_t = x],    E[z given x_t = x] = -gamma score           (3)

The flow dx/dt = b(t, x) has the law of x_t at every time, whatever I, gamma and the
coupling of x0 and x1 are (Lipman et al. 2023, theorem 1; Albergo, Boffi and
Vanden-Eijnden 2023, "Stochastic interpolants", theorem 6). A path alpha x0 + sigma z is
the track with I = alpha x0 + sigma x1, and has better coordinates: use it where it
does. I need not be invertible, nor x1 be noise.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import AbstractBase
from .typing import Scalar, ScalarLike, float_array, is_traced


class AbstractTrack(eqx.Module):
    """Equation (1), for one sample and a scalar time.

    A subclass writes I as `interpolate` and the scale of the latent noise as `gamma`.
    `base` is the law of x1, `t_max` the time at which x_t is what sampling starts from,
    I(t_max, 0, x1) + gamma(t_max) z.
    """

    t_min: eqx.AbstractVar[Scalar]
    t_max: eqx.AbstractVar[Scalar]
    base: eqx.AbstractVar[AbstractBase]

    @abc.abstractmethod
    def interpolate(
        self, t: ScalarLike, x0: Float[Array, "..."], x1: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """I(t, x0, x1), of the shape of both ends."""

    @abc.abstractmethod
    def gamma(self, t: ScalarLike) -> Scalar | None:
        """The scale of the latent noise; None where the track has none."""

    def point(
        self,
        t: ScalarLike,
        x0: Float[Array, "..."],
        x1: Float[Array, "..."],
        z: Float[Array, "..."] | float = 0.0,
    ) -> Float[Array, "..."]:
        """x_t, equation (1)."""
        t = float_array(t)
        gamma = self.gamma(t)
        mean = self.interpolate(t, x0, x1)
        return mean if gamma is None else mean + gamma * z

    def velocity(
        self,
        t: ScalarLike,
        x0: Float[Array, "..."],
        x1: Float[Array, "..."],
        z: Float[Array, "..."] | float = 0.0,
    ) -> Float[Array, "..."]:
        """dx_t/dt along the track, equation (2)."""
        t = float_array(t)
        move = lambda t: self.point(t, x0, x1, z)  # noqa: E731
        return jax.jvp(move, (t,), (jnp.ones_like(t),))[1]

    def __check_init__(self):
        if is_traced((self.t_min, self.t_max)):
            return
        t_min, t_max = float(self.t_min), float(self.t_max)
        if not 0 <= t_min < t_max:
            raise ValueError(
                f"{type(self).__name__} needs 0 <= t_min < t_max, got t_min={t_min:g} "
                f"and t_max={t_max:g}. t=0 is data and t rises to the other end."
            )
