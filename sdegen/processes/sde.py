"""Ito processes, forward in time.

    dx = f(t, x) dt + G(t, x) dw                                                   (1)

A linear process has the path x_t = alpha x0 + sigma z with Gaussian z, from which its
coefficients follow by autodiff:

    f = (alpha' / alpha) x,    g^2 = 2 sigma (sigma' - sigma alpha' / alpha)       (2)
"""

import abc

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..typing import Scalar, ScalarLike, float_array
from .brownian import NoiseTerm
from .noise import AbstractNoise
from .path import AbstractPath

_TINY = 1e-30  # t = 0 stands for this time, where sigma' may be infinite but (2) is not


class AbstractSDE(eqx.Module):
    """A forward Ito process dx = f dt + G dw, for one sample and a scalar time.

    **Arguments** (of every subclass, with its own defaults):
    - `t_min`, `t_max`: the range of times; t = 0 is data and t rises to noise.
    - `noise`: the distribution of z in x_t = alpha x0 + sigma z, or, for a process
      without such a path, about that of x at t_max. Default `Gaussian()`.

    **Arguments** of the methods: `t`, the time, a scalar; `x`, the state of one sample.
    """

    t_min: eqx.AbstractVar[Scalar]
    t_max: eqx.AbstractVar[Scalar]
    noise: eqx.AbstractVar[AbstractNoise]

    @abc.abstractmethod
    def drift(self, t: ScalarLike, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """f(t, x), of the shape of x."""

    @abc.abstractmethod
    def diffusion(self, t: ScalarLike, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """G(t, x): a scalar, or one number per coordinate."""

    def terms(self, brownian: dfx.AbstractBrownianPath) -> dfx.MultiTerm:
        """The equation of one sample, driven by `brownian`, for Diffrax."""
        return dfx.MultiTerm(
            dfx.ODETerm(lambda t, x, args: self.drift(t, x)),
            NoiseTerm(lambda t, x, args: self.diffusion(t, x), brownian),
        )


class AbstractLinearSDE(AbstractPath, AbstractSDE):
    """A path with Gaussian noise, which is a linear SDE by equation (2)."""

    def drift(self, t, x):
        """f = (alpha' / alpha) x, equation (2)."""
        t = jnp.maximum(float_array(t), _TINY)
        return self.rates(t)[0] / self.alpha(t) * x

    def diffusion(self, t, x):
        """g(t), equation (2): a scalar, or one number for each coordinate."""
        t = jnp.maximum(float_array(t), _TINY)
        (da, ds), sigma = self.rates(t), self.sigma(t)
        g = jnp.sqrt(2 * sigma * (ds - sigma * da / self.alpha(t)))
        return jnp.broadcast_to(g, x.shape) if g.ndim else g

    def __check_init__(self):
        check_gaussian(self)


def check_gaussian(sde: AbstractSDE) -> None:
    """Refuse a linear SDE with noise of another kind."""
    if not sde.noise.gaussian:
        raise ValueError(
            f"{type(sde).__name__} is a linear SDE, whose noise is Gaussian, got noise="
            f"{type(sde.noise).__name__}. Subclass AbstractPath for other noise."
        )


def both(sde: AbstractSDE, given: tuple, default: tuple, names: str) -> tuple:
    """The two coefficients that are `given`, or `default` where both are None."""
    if (given[0] is None) != (given[1] is None):
        raise ValueError(
            f"{type(sde).__name__} needs both coefficients, {names}, got only one of "
            "them."
        )
    return default if given[0] is None else given


def noise_depends_on_state(sde: AbstractSDE, t: ScalarLike, x: Array) -> bool:
    """Whether G depends on x, from the structure of its derivative."""
    tangent = eqx.filter_jvp(
        lambda x: sde.diffusion(float_array(t), x), (x,), (jnp.ones_like(x),)
    )[1]
    return len(jax.tree.leaves(tangent)) > 0
