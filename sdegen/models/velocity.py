"""Networks that learn the velocity of an interpolant, and the equations they drive.

    x_t = I(t, x0, x1) + gamma z,    b = E[dI/dt + gamma' z | x_t]                 (1)
    L = 1/2 sum_+- |b(x_+-) - dI/dt|^2 - gamma' (b(x_+) - b(x_-)) . z              (2)
      + 1/2 sum_+- |z_hat(x_+-) -+ z|^2,    x_+- = I +- gamma z

(2) is the regression on (1) with z and -z in a pair, less the term |gamma' z|^2 that no
network can change, so its variance is finite where gamma' is not (Albergo, Boffi and
Vanden-Eijnden 2023, "Stochastic interpolants", section 6.1). From the score, -z_hat /
gamma, follows a process of any noise level eps(t) >= 0 with the same marginals (theorem
8 there), on the clock s from 0 at t_max to 1 at t_min, T = t_max - t_min:

    dx = T (-b + eps score) ds + sqrt(2 eps T) dw,    eps = lambda^2 gamma^2 / T
       = (-T b - lambda^2 gamma z_hat) ds + sqrt(2) lambda gamma dw                (3)

lambda is the stochasticity; eps vanishes at the ends, where the score is 0 / 0.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..losses.velocity import velocity_loss
from ..processes.interpolant import AbstractInterpolant
from ..processes.noise import AbstractNoise, Gaussian
from ..processes.path import batched
from ..processes.sde import AbstractSDE
from ..typing import PyTree, Scalar, ScalarLike, Time, float_array, number
from .generator import AbstractGenerator
from .model import Points, call_network, of_one


class AbstractVelocityModel(AbstractGenerator):
    """A model with a velocity, b in (1), and the equation (3), on an interpolant."""

    interpolant: eqx.AbstractVar[AbstractInterpolant]

    @abc.abstractmethod
    def velocity(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """dx/dt of the flow on a batch, t of shape () or (batch,)."""

    @abc.abstractmethod
    def reversal(
        self, t: Time, x: Points, cond: PyTree, stochasticity: ScalarLike, up: bool
    ) -> Points:
        """The drift of (3) on its clock, towards the data, or with `up` away."""

    @abc.abstractmethod
    def noise_scale(self, t: ScalarLike) -> Scalar:
        """The noise of (3) on its clock at time t, for lambda = 1."""

    def backward(self, stochasticity, cond=None):
        """The flow, for None, or equation (3)."""
        return equation(self, stochasticity, cond)

    def time(self, s):
        """The time of the interpolant at clock s, from t_max to t_min."""
        path = self.interpolant
        return path.t_max + (path.t_min - path.t_max) * s

    def clock_of(self, t):
        """The clock at time t."""
        path = self.interpolant
        return (path.t_max - t) / (path.t_max - path.t_min)


class VelocityModel(AbstractVelocityModel):
    """A network with the interpolant whose velocity it predicts.

    **Arguments:**
    - `network`: a callable pytree (time, x, cond) -> b on batches.
    - `interpolant`: the `AbstractInterpolant` whose velocity b is.
    - `latent_network`: the same for E[z given x_t], for stochastic sampling; none.
    """

    network: Any
    interpolant: AbstractInterpolant
    latent_network: Any = None

    loss = velocity_loss  # pyright: ignore[reportAssignmentType]

    @property
    def trainable(self):
        """The network, and that of the latent noise if there is one."""
        return ("network", *([] if self.latent_network is None else ["latent_network"]))

    def velocity(self, t, x, cond=None):
        """b(t, x) on a batch."""
        return call_network(self.network, t, x, cond)

    def latent(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """E[z given x_t] on a batch."""
        if self.latent_network is None:
            raise ValueError(
                "the noise of this model is unknown: give it a latent_network for E[z "
                "given x_t], or sample with stochasticity=0."
            )
        return call_network(self.latent_network, t, x, cond)

    def score(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """The gradient of log p_t at x, between the ends."""
        gamma = batched(self.interpolant.gamma, float_array(t), x)
        return -self.latent(t, x, cond) / gamma

    def start(self, key, shape, dtype=None):
        """x at t_max, with x0 = 0."""
        path, (end_key, latent_key) = self.interpolant, jax.random.split(key)
        x1 = path.noise.sample(end_key, shape, dtype)
        z = jax.random.normal(latent_key, shape, x1.dtype)
        return path.point(path.t_max, jnp.zeros_like(x1), x1, z).astype(x1.dtype)

    def noise_scale(self, t):
        """sqrt(2) gamma."""
        return jnp.sqrt(2.0) * self.interpolant.gamma(t)  # pyright: ignore[reportOperatorIssue]

    def reversal(self, t, x, cond, stochasticity, up):
        """The drift of (3) on a batch."""
        span = self.interpolant.t_max - self.interpolant.t_min
        z, v = self.latent(t, x, cond), span * self.velocity(t, x, cond)
        pull = batched(self.interpolant.gamma, float_array(t), x) * z
        return (v if up else -v) - stochasticity**2 * pull

    def __check_init__(self):
        if isinstance(self.network, tuple):
            raise ValueError(
                "VelocityModel takes one network for the velocity, and one as "
                f"latent_network for the noise, got a tuple of {len(self.network)}."
            )
        path = self.interpolant
        if self.latent_network is not None and path.gamma(path.t_max) is None:
            raise ValueError(
                f"{type(path).__name__} has no latent noise: a latent_network has "
                "nothing to learn, leave it out."
            )


class Forward(AbstractGenerator):
    """The same process from the data to the other end, x1.

    `sample(key, Forward(model, Empirical(x0)), shape)`, or with `start=x0`.

    **Arguments:**
    - `model`: a `VelocityModel` or a `SchroedingerBridge`.
    - `noise`: the distribution of x0, from which it starts without `start`.
    """

    model: AbstractVelocityModel
    noise: AbstractNoise

    noisy_solver = property(lambda self: self.model.noisy_solver)

    def time(self, s):
        """The time of the interpolant at clock s, from t_min to t_max."""
        return self.model.time(1 - s)

    def clock_of(self, t):
        """The clock at time t."""
        return 1 - self.model.clock_of(t)

    def start(self, key, shape, dtype=None):
        """A draw of x0."""
        return self.noise.sample(key, shape, dtype)

    def backward(self, stochasticity, cond=None):
        """The flow, for None, or the process of this noise, from t_min to t_max."""
        return equation(self.model, stochasticity, cond, up=True)


def equation(model, stochasticity, cond, up: bool = False) -> Callable | AbstractSDE:
    """The flow (for None), or (3); `up`, away from the data."""
    flow = _Flow(model, cond, up)
    return flow if stochasticity is None else _Process(flow, stochasticity)


class _Flow(eqx.Module):
    """(3) with lambda = 0, for one sample."""

    model: AbstractVelocityModel
    cond: PyTree
    up: bool = eqx.field(static=True)

    def time(self, s):
        """(t, T) at clock s."""
        path = self.model.interpolant
        span = path.t_max - path.t_min
        return path.t_min + span * s if self.up else path.t_max - span * s, span

    def __call__(self, s, x):
        t, span = self.time(s)
        v = span * of_one(self.model.velocity, t, x, self.cond)
        return v if self.up else -v


class _Process(AbstractSDE):
    """Equation (3), for one sample."""

    flow: _Flow
    stochasticity: Scalar
    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)

    def drift(self, t, x):
        flow, (time, _) = self.flow, self.flow.time(t)
        more = flow.cond, self.stochasticity, flow.up
        return of_one(flow.model.reversal, time, x, *more)

    def diffusion(self, t, x):
        return self.stochasticity * self.flow.model.noise_scale(self.flow.time(t)[0])
