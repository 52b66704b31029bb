"""Stochastic interpolants: from one law to another, with noise on the way.

    x_t = a(t) x0 + b(t) x1 + c gamma(t) z,    0 <= t <= 1                         (1)

with a(0) = b(1) = 1, a(1) = b(0) = gamma(0) = gamma(1) = 0. Papers of this family run
time the other way.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp

from ..base import AbstractBase, Gaussian
from ..track import AbstractTrack
from ..typing import Scalar, ScalarLike, number


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
    """sin(pi t)^2: smooth at both ends."""
    return jnp.sin(jnp.pi * t) ** 2


class StochasticInterpolant(AbstractTrack):
    """Equation (1). Albergo, Boffi and Vanden-Eijnden 2023, "Stochastic interpolants: a
    unifying framework for flows and diffusions", definition 1 and section 4.

    **Arguments:** `base`, the law of x1: noise, or `Empirical(other_data)`; `weights`,
    t -> (a, b): `linear`, `trigonometric` or your own; `latent`, the function gamma:
    `bridge`, `bump`, your own, or None for flow matching between two laws; `strength`,
    c in (1): with `bridge`, gamma(t)^2 = c^2 t (1 - t).
    """

    strength: Scalar = number(1.0)
    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)
    base: AbstractBase = eqx.field(default_factory=Gaussian)
    weights: Callable = eqx.field(default=linear, static=True)
    latent: Callable | None = eqx.field(default=bridge, static=True)

    def interpolate(self, t, x0, x1):
        """a(t) x0 + b(t) x1."""
        a, b = self.weights(t)
        return a * x0 + b * x1

    def gamma(self, t):
        """c gamma(t), or None."""
        return None if self.latent is None else self.strength * self.latent(t)
