"""Sampling in the whole state of a process with auxiliary rows.

A denoiser on an `AbstractBlockSDE` is sampled as any other in the coordinates of data.
Here it moves the state itself, positions and velocities, by (1) or the flow:

    du = [-F u + (1 + lambda^2)/2 G G^T score(u)] |dt| + lambda G dw,
    score(u) = -S^-1 (u - a E[x0 given the statistic of u])                        (1)
"""

from typing import Any

import equinox as eqx

from ..processes.momentum import AbstractBlockSDE
from ..processes.reverse import clock_of_time, time_of_clock
from ..typing import PyTree
from .denoiser import AbstractDenoiser
from .generator import AbstractGenerator, backward_of
from .model import of_one


class StateScore(eqx.Module):
    """The score of one state, (t, u) -> array, from a denoiser of the statistic."""

    denoiser: AbstractDenoiser
    cond: PyTree = None

    def __call__(self, t, u):
        """The score of the law of u_t, equation (1)."""
        process: Any = self.denoiser.path
        x0 = of_one(self.denoiser, t, process.statistic(t, u), self.cond)
        return process.score(t, u, x0)


class Augmented(AbstractGenerator):
    """The reverse dynamics of `denoiser.path` in its state, equation (1).

    For `sample`, with any Diffrax solver or with `sdegen.solvers.SSCS`. It starts from
    the law of the state at t_max of data that are 0 (Dockhorn et al. 2022, "Score-based
    generative modeling with critically-damped Langevin diffusion", eq. 6).

    **Arguments:**
    - `denoiser`: on a process with auxiliary rows, such as `sdegen.CLD()`.
    """

    denoiser: AbstractDenoiser

    def start(self, key, shape, dtype=None):
        """A draw of the state at t_max."""
        return self.denoiser.path.prior(key, shape, dtype)  # pyright: ignore[reportAttributeAccessIssue]

    def backward(self, stochasticity, cond=None):
        """The reverse SDE of the state, or its flow."""
        score = StateScore(self.denoiser, cond)
        return backward_of(self.denoiser.path, score, stochasticity)

    def time(self, s):
        """The time of the process at clock s."""
        return time_of_clock(self.denoiser.path, s)

    def clock_of(self, t):
        """The clock at time t."""
        return clock_of_time(self.denoiser.path, t)

    def data(self, state):
        """Row 0 of the state."""
        return state[0]

    def __check_init__(self):
        given = self.denoiser
        path = given.path if isinstance(given, AbstractDenoiser) else given
        if not isinstance(path, AbstractBlockSDE):
            raise ValueError(
                "Augmented needs a denoiser on a process with auxiliary rows, such as "
                f"Denoiser(network, sdegen.CLD()), got one on {type(path).__name__}, "
                "which `sample` takes as it is."
            )
