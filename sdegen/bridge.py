"""Schroedinger bridges: the noisy way from one law to another that is nearest to
Brownian motion.

    x_t = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) z,    0 <= t <= 1              (1)
    up(t, x)   = E[(x1 - x_t) / (1 - t) given x_t = x]                             (2)
    down(t, x) = E[(x0 - x_t) / t given x_t = x]

Given its ends a path is a Brownian bridge, (1). dx = up dt + sigma dw from x0, and
dx = down dt + sigma dw with t falling from x1, both have the law of (1) at every time,
and are one Markov process; it is the Schroedinger bridge if the coupling of the ends is
the entropic one of regularisation 2 sigma^2 on |x0 - x1|^2 (Leonard 2014). Two ways to
get that coupling:

    minibatch   EntropicOT(2 sigma^2) (Tong et al. 2024, "Simulation-free Schroedinger
                bridges via score and flow matching");
    fitting     learn (2), let the ends that its process joins be the next coupling, and
                again: iterative Markovian fitting (Shi et al. 2023, "Diffusion
                Schroedinger bridge matching"; Peluchetti 2023), which is `reflow` with
                `stochasticity=1`, up and down in turn. sigma = 0 is rectified flow.

From both drifts follow the velocity of the flow, (up - down) / 2, and the score, (up +
down) / sigma^2, so that the noise of sampling is chosen after training, as for any
track:

    dx = (-+ v + lambda^2 (up + down) / 2) ds + lambda sigma dw                    (3)

on the clock s of the direction; lambda = 1 is the bridge, in one network call.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import AbstractBase, Gaussian
from .coupling.pairs import Loss, independent, noted
from .generator import AbstractGenerator
from .processes.interpolant import StochasticInterpolant
from .solvers.pinned import PinnedEuler
from .typing import AxisName, PyTree, RandomKey, Scalar, ScalarLike, Time, number
from .velocity import antithetic_square, call_network, drawn, equation


class SchroedingerBridge(AbstractGenerator):
    """Two networks with the bridge whose drifts they predict; `fit`, `sample` take it.

    **Arguments:** `network`, a pair of callable pytrees (time, x, cond) -> drift on
    batches, (down, up); `sigma`, the scale of the Brownian motion, in units of the data
    over the unit of time; `base`, the law of x1: noise, or `Empirical(other_data)`.

    `sample(..., stochasticity=1)` is the bridge, from x1 to x0; without a
    stochasticity it is the flow with the same laws at all times. `Upward(model, base)`
    goes the other way. Train it by `loss=bridge_loss`.
    """

    noisy_solver: ClassVar = PinnedEuler
    network: Any
    sigma: Scalar = number(1.0)
    base: AbstractBase = eqx.field(default_factory=Gaussian)

    @property
    def track(self) -> StochasticInterpolant:
        """Equation (1)."""
        return StochasticInterpolant(self.sigma, base=self.base)

    def down(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """The drift towards x0 on a batch, t of shape () or (batch,)."""
        return call_network(self.network[0], t, x, cond)

    def up(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """The drift towards x1 on a batch."""
        return call_network(self.network[1], t, x, cond)

    def velocity(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """dx/dt of the flow on a batch."""
        return (self.up(t, x, cond) - self.down(t, x, cond)) / 2

    def score(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """The gradient of log p_t at x."""
        return (self.up(t, x, cond) + self.down(t, x, cond)) / self.sigma**2

    def reversal(
        self,
        t: Time,
        x: Float[Array, "batch ..."],
        cond: PyTree,
        strength: ScalarLike,
        up: bool,
    ) -> Float[Array, "batch ..."]:
        """The drift of (3) in one direction; for `strength` 1 one network is called."""
        along, against = (self.up, self.down) if up else (self.down, self.up)
        share = (1 - strength**2) / 2

        def both(x):
            return (1 - share) * along(t, x, cond) - share * against(t, x, cond)

        return jax.lax.cond(share == 0, lambda x: along(t, x, cond), both, x)

    def noise(self, t: ScalarLike) -> Scalar:
        """sigma, at any time."""
        return self.sigma

    def start(self, key, shape, dtype=None):
        """A draw of x1."""
        return self.base.sample(key, shape, dtype)

    def backward(self, stochasticity, cond=None):
        """The flow, for None, or equation (3), down to the data."""
        return equation(self, stochasticity, cond)

    def data(self, state):
        """The state."""
        return state

    def __check_init__(self):
        if self.network is None:  # a shell, as training makes them
            return
        if not isinstance(self.network, tuple) or len(self.network) != 2:
            raise ValueError(
                "a bridge has two networks, network=(down, up), the drifts towards x0 "
                f"and x1, got {type(self.network).__name__}."
            )


def bridge_loss(
    model: SchroedingerBridge,
    key: RandomKey,
    x0: Float[Array, "batch ..."],
    cond: PyTree = None,
    *,
    coupling: Callable = independent,
    times: Any = None,
    axis_name: AxisName | None = None,
) -> Loss:
    """The regression of both networks on (2): `fit(model, data, loss=bridge_loss)`.

    Per coordinate, on z and -z in a pair, less the part of the noise that no network
    can change: its variance is finite up to the ends, where (2) is not. Arguments as
    for `velocity_loss`.
    """
    t, pairs, z = drawn(
        model.track,
        key,
        x0,
        cond,
        coupling=coupling,
        times=times,
        axis_name=axis_name,
    )
    x0, x1, cond = pairs.x0, pairs.x1, pairs.cond
    point = jax.vmap(model.track.point)
    x, x_ = (point(t, x0, x1, w).astype(x0.dtype) for w in (z, -z))
    t_ = t.reshape(-1, *[1] * (x0.ndim - 1))
    to_x0 = -model.sigma * jnp.sqrt((1 - t_) / t_) * z
    to_x1 = -model.sigma * jnp.sqrt(t_ / (1 - t_)) * z
    down = antithetic_square(
        model.down(t, x, cond), model.down(t, x_, cond), x0 - x1, to_x0
    )
    up = antithetic_square(model.up(t, x, cond), model.up(t, x_, cond), x1 - x0, to_x1)
    return noted(jnp.mean(down + up).astype(x0.dtype), pairs.notes)
