"""Interpolants: paths between two distributions that a velocity model is trained on.

    x_t = I(t, x0, x1) + gamma(t) z,    z ~ N(0, I), t = t_min at x0               (1)
    v_t(x0, x1, z) = dI/dt + gamma'(t) z                                           (2)
    b(t, x) = E[v_t given x_t = x],    E[z given x_t = x] = -gamma score           (3)

The flow dx/dt = b(t, x) has the distribution of x_t at every time, whatever I, gamma
and the coupling of x0 and x1 are (Lipman et al. 2023, theorem 1; Albergo, Boffi and
Vanden-Eijnden 2023, "Stochastic interpolants", theorem 6). Where x1 is noise and I =
alpha x0 + sigma x1 prefer an `AbstractPath`, which has better coordinates. Papers of
this family run time the other way.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..typing import Scalar, ScalarLike, float_array, number
from .noise import AbstractNoise, Gaussian
from .path import check_times


class AbstractInterpolant(eqx.Module):
    """Equation (1), for one sample and a scalar time.

    A subclass writes I as `interpolate` and the scale of the latent noise as `gamma`.
    Sampling starts at t_max from I(t_max, 0, x1) + gamma(t_max) z, x1 from `noise`.

    **Arguments** of the methods:
    - `t`: the time, a scalar.
    - `x0`, `x1`, `z`: data, other data or noise, and latent noise, of one shape.
    """

    t_min: eqx.AbstractVar[Scalar]
    t_max: eqx.AbstractVar[Scalar]
    noise: eqx.AbstractVar[AbstractNoise]

    @abc.abstractmethod
    def interpolate(self, t: ScalarLike, x0: Array, x1: Array) -> Array:
        """I(t, x0, x1), of the shape of x0 and x1."""

    @abc.abstractmethod
    def gamma(self, t: ScalarLike) -> Scalar | None:
        """The scale of the latent noise; None where there is none."""

    def point(self, t: ScalarLike, x0: Array, x1: Array, z: Any = 0.0) -> Array:
        """x_t, equation (1)."""
        t = float_array(t)
        gamma, mean = self.gamma(t), self.interpolate(t, x0, x1)
        return mean if gamma is None else mean + gamma * z

    def velocity(self, t: ScalarLike, x0: Array, x1: Array, z: Any = 0.0) -> Array:
        """dx_t/dt for fixed x0, x1 and z, equation (2)."""
        t = float_array(t)
        return jax.jvp(lambda t: self.point(t, x0, x1, z), (t,), (jnp.ones_like(t),))[1]

    def __check_init__(self):
        check_times(self)


def linear(t: ScalarLike):
    """(a, b) = (1 - t, t)."""
    return 1 - t, t


def trigonometric(t: ScalarLike):
    """(a, b) = (cos(pi t / 2), sin(pi t / 2)): keeps the variance."""
    return jnp.sin(0.5 * jnp.pi * (1 - t)), jnp.sin(0.5 * jnp.pi * t)


def bridge(t: ScalarLike):
    """sqrt(t (1 - t)): the noise of a Brownian bridge."""
    return jnp.sqrt(t * (1 - t))


def bump(t: ScalarLike):
    """sin(pi t)^2: smooth at t = 0 and t = 1."""
    return jnp.sin(jnp.pi * t) ** 2


class StochasticInterpolant(AbstractInterpolant):
    """x_t = a(t) x0 + b(t) x1 + c gamma(t) z, 0 <= t <= 1.

    Albergo, Boffi and Vanden-Eijnden 2023, "Stochastic interpolants: a unifying
    framework for flows and diffusions", definition 1 and section 4.

    **Arguments:**
    - `scale`: c, default 1; with `bridge`, gamma(t)^2 = c^2 t (1 - t).
    - `t_min`, `t_max`: the range of times, defaults 0 and 1.
    - `noise`: the distribution of x1, default `Gaussian()`; `Empirical(other_data)` for
      flows between two data sets.
    - `weights`: t -> (a, b), from (1, 0) to (0, 1): `linear` (the default),
      `trigonometric` or your own.
    - `latent`: the function gamma, 0 at both ends: `bridge` (the default), `bump`, your
      own, or None for flow matching.
    """

    scale: Scalar = number(1.0)
    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)
    weights: Callable = eqx.field(default=linear, static=True)
    latent: Callable | None = eqx.field(default=bridge, static=True)

    def interpolate(self, t, x0, x1):
        """a(t) x0 + b(t) x1."""
        a, b = self.weights(t)
        return a * x0 + b * x1

    def gamma(self, t):
        """c gamma(t), or None."""
        return None if self.latent is None else self.scale * self.latent(t)
