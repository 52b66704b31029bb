"""Schroedinger bridges: the way from one law to another nearest to Brownian motion.

    x_t = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) z,    0 <= t <= 1              (1)
    up(t, x)   = E[(x1 - x_t) / (1 - t) given x_t = x]                             (2)
    down(t, x) = E[(x0 - x_t) / t given x_t = x]

Given its ends a path is a Brownian bridge, (1). dx = up dt + sigma dw from x0, and
dx = down dt + sigma dw with t falling from x1, are one Markov process with the law of
(1) at every time; it is the Schroedinger bridge if the coupling of the ends is the
entropic one of regularisation 2 sigma^2 on |x0 - x1|^2 (Leonard 2014). Two ways to it:

    minibatch   EntropicOT(2 sigma^2) (Tong et al. 2024, "Simulation-free Schroedinger
                bridges via score and flow matching");
    fitting     learn (2), let the ends that its process joins be the next coupling, and
                again (Shi et al. 2023, "Diffusion Schroedinger bridge matching";
                Peluchetti 2023): `reflow` with `stochasticity=1`, up and down in turn.

With the velocity v = (up - down) / 2 and the score (up + down) / sigma^2,

    dx = (-+ v + lambda^2 (up + down) / 2) ds + lambda sigma dw                    (3)

on the clock s of the direction; lambda = 1 is the bridge, in one network call.
"""

from typing import Any

import equinox as eqx
import jax

from ..losses.bridge import bridge_loss
from ..processes.interpolant import StochasticInterpolant
from ..processes.noise import AbstractNoise, Gaussian
from ..solvers.pinned_euler import PinnedEuler
from ..typing import PyTree, Scalar, Time, number
from .model import Points, call_network
from .velocity import AbstractVelocityModel


class SchroedingerBridge(AbstractVelocityModel):
    """Two networks with the bridge whose drifts they predict.

    **Arguments:**
    - `down_network`, `up_network`: callable pytrees (time, x, cond) -> drift towards x0
      and towards x1, on batches.
    - `sigma`: the scale of the Brownian motion, in units of the data; 1.
    - `noise`: the distribution of x1, noise or `Empirical(other_data)`; `Gaussian()`.

    `sample(..., stochasticity=1)` is the bridge, from x1 to x0, and without it the flow
    with the same laws. `Forward(model, noise)` goes the other way.
    """

    down_network: Any
    up_network: Any
    sigma: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)

    trainable = ("down_network", "up_network")
    loss = bridge_loss  # pyright: ignore[reportAssignmentType]
    noisy_solver = PinnedEuler  # its noise vanishes at the end and blurs no data

    @property
    def interpolant(self) -> StochasticInterpolant:
        """Equation (1)."""
        return StochasticInterpolant(self.sigma, noise=self.noise)

    def down(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """The drift towards x0 on a batch, t of shape () or (batch,)."""
        return call_network(self.down_network, t, x, cond)

    def up(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """The drift towards x1 on a batch."""
        return call_network(self.up_network, t, x, cond)

    def velocity(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """dx/dt of the flow on a batch."""
        return (self.up(t, x, cond) - self.down(t, x, cond)) / 2

    def score(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """The gradient of log p_t at x."""
        return (self.up(t, x, cond) + self.down(t, x, cond)) / self.sigma**2

    def reversal(self, t, x, cond, stochasticity, up):
        """The drift of (3); one network is called if stochasticity is 1."""
        along, against = (self.up, self.down) if up else (self.down, self.up)
        share = (1 - stochasticity**2) / 2

        def both(x):
            return (1 - share) * along(t, x, cond) - share * against(t, x, cond)

        return jax.lax.cond(share == 0, lambda x: along(t, x, cond), both, x)

    def noise_scale(self, t):
        """sigma, at any time."""
        return self.sigma

    def start(self, key, shape, dtype=None):
        """A draw of x1."""
        return self.noise.sample(key, shape, dtype)
