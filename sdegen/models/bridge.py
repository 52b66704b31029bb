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

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float

from ..losses.bridge import bridge_loss
from ..processes.interpolant import StochasticInterpolant
from ..processes.noise import AbstractNoise, Gaussian
from ..solvers.pinned_euler import PinnedEuler
from ..typing import PyTree, Scalar, ScalarLike, Time, number
from .model import call_network
from .velocity import AbstractVelocityModel


class SchroedingerBridge(AbstractVelocityModel):
    """Two networks with the bridge whose drifts they predict; `fit`, `sample` take it.

    **Arguments:**

    - `down_network`, `up_network`: callable pytrees (time, x, cond) -> drift on
      batches, the drifts towards x0 and towards x1.
    - `sigma`: the scale of the Brownian motion, in units of the data over the root of
      the unit of time; 1.
    - `noise`: the distribution of x1, noise or `Empirical(other_data)`; `Gaussian()`.

    `sample(..., stochasticity=1)` is the bridge, from x1 to x0; without a
    stochasticity it is the flow with the same laws at all times. `Forward(model, base)`
    goes the other way.
    """

    down_network: Any
    up_network: Any
    sigma: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)

    @property
    def noisy_solver(self):
        """Its noise vanishes at the end: no step of its own blurs the data."""
        return PinnedEuler

    @property
    def trainable(self):
        """Both networks."""
        return ("down_network", "up_network")

    def loss(self, key, x0, cond=None, *, axis_name=None):
        """`bridge_loss` with its defaults."""
        return bridge_loss(self, key, x0, cond, axis_name=axis_name)

    @property
    def interpolant(self) -> StochasticInterpolant:
        """Equation (1)."""
        return StochasticInterpolant(self.sigma, noise=self.noise)

    def down(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """The drift towards x0 on a batch, t of shape () or (batch,)."""
        return call_network(self.down_network, t, x, cond)

    def up(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """The drift towards x1 on a batch."""
        return call_network(self.up_network, t, x, cond)

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

    def reversal(self, t, x, cond, stochasticity, up):
        """The drift of (3); one network is called if stochasticity is 1."""
        along, against = (self.up, self.down) if up else (self.down, self.up)
        share = (1 - stochasticity**2) / 2

        def both(x):
            return (1 - share) * along(t, x, cond) - share * against(t, x, cond)

        return jax.lax.cond(share == 0, lambda x: along(t, x, cond), both, x)

    def noise_scale(self, t: ScalarLike) -> Scalar:
        """sigma, at any time."""
        return self.sigma

    def start(self, key, shape, dtype=None):
        """A draw of x1."""
        return self.noise.sample(key, shape, dtype)
