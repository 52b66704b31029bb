"""DPM-Solver++ for the reverse SDE."""

import math

import equinox as eqx

from . import multistep
from .semilinear import decay, kept, root
from .solver import AbstractSemilinearSolver, whole


class DPMSolverSDE(AbstractSemilinearSolver):
    """SDE-DPM-Solver++ of order 1 or 2 (2M), one network evaluation a step.

    Lu et al. 2022, "DPM-Solver++", eq. 18 and appendix D.5, for every stochasticity l
    of `sample`: with x0_hat constant over a step the SDE is solved exactly,

        y1 = a1 x0 + tau1 exp(-l^2 h) z + tau1 sqrt(1 - exp(-2 l^2 h)) noise,

    and order 2 adds the paper's weight for the change of x0_hat. At 0 it is
    `DPMSolverPP`; at 1 it follows the reverse SDE of Anderson.
    """

    points: int = eqx.field(static=True)

    family = math.inf

    def __init__(self, order=2):
        """`order` 1 or 2."""
        self.points = whole("the order of DPMSolverSDE", order, 1, 2)

    def start(self, term, here, there, y):
        """No prediction is known."""
        return multistep.empty(1, y, here)

    def advance(self, term, here, there, y, state):
        """One evaluation, one step."""
        x0, z = term.posterior_means(here, y)
        (a1, tau1), (shrink, gain) = (there.a, there.tau), decay(here, there)
        keep, lost, fresh = kept(shrink, term.stochasticity), gain, None
        if term.stochasticity is not None:
            lost, fresh = 1 - shrink * keep, root(1 - keep**2)
        y1 = a1 * x0 + tau1 * keep * z
        if self.points == 2:
            ratio = multistep.growth(state, here, there)
            y1 = y1 + 0.5 * ratio * a1 * lost * (x0 - state.values[0])
        if fresh is not None:
            y1 = y1 + tau1 * fresh * term.normal()
        return y1, None, multistep.after(state, x0, here)
