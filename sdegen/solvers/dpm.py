"""DPM-Solver-2 and DPM-Solver++: exponential integrators in the log-SNR."""

import equinox as eqx
import jax
import jax.numpy as jnp

from ..processes import prediction
from . import multistep
from .deis import DEIS
from .semilinear import ddim, decay
from .solver import AbstractSemilinearSolver, whole


class DPMSolver2(AbstractSemilinearSolver):
    """The single-step midpoint method in eps, order 2, two evaluations a step.

    Lu et al. 2022, "DPM-Solver", algorithm 1, with r1 = 1/2: half a step of lambda by
    DDIM, then the whole step with z_hat from there. From alpha = 0, where the whole
    step in eps does not exist, it is two steps of DDIM. For the flow only.
    """

    points = 2
    calls = 2

    def advance(self, term, here, there, y, state):
        """Two evaluations, one step."""
        x0, z = term.posterior_means(here, y)
        middle = jax.nn.softplus((here.half_logsnr + there.half_logsnr) / 2)
        middle = term.node(jnp.clip(middle, here.clock, there.clock))
        x0_m, z_m = term.posterior_means(middle, ddim(middle, x0, z))
        shrink, gain = decay(here, there)
        rise = gain / jnp.where(shrink > 0, shrink, 1)  # exp(h) - 1
        if here.clock.ndim:  # coordinates meet their own middle earlier or later
            share = middle.half_logsnr - here.half_logsnr
            rise = rise * (there.half_logsnr - here.half_logsnr) / 2 / share
        whole_step = ddim(there, x0, z) - there.tau * rise * (z_m - z)
        return jnp.where(shrink > 0, whole_step, ddim(there, x0_m, z_m)), None, None


class DPMSolverPP(AbstractSemilinearSolver):
    """Multistep DPM-Solver++ of order 1, 2 or 3 in x0, one network evaluation a step.

    Lu et al. 2022, "DPM-Solver++", algorithm 2 (2M), with its weight h / (2 h_prev) for
    the difference of the last two x0_hat; order 3 (3M) has the exact integrals of the
    parabola through three. Order 1 is DDIM. Data that are one point come back exactly
    in any number of steps. For the flow only; `DPMSolverSDE` follows the reverse SDE.
    """

    points: int = eqx.field(static=True)

    def __init__(self, order=2):
        """`order` 1, 2 or 3."""
        self.points = whole("the order of DPMSolverPP", order, 1, 3)

    @property
    def _adams(self):
        return DEIS(self.points, prediction.x0)

    def rows(self, nodes):
        """The weights of each step of order 3."""
        return self._adams.rows(nodes) if self.points == 3 else None

    def start(self, term, here, there, y):
        """No prediction is known."""
        if self.points == 3:
            return self._adams.start(term, here, there, y)
        return multistep.empty(self.points - 1, y, here)

    def advance(self, term, here, there, y, state):
        """One evaluation, one step."""
        x0, z = term.posterior_means(here, y)
        if self.points == 3:
            y1, state = self._adams.predict(term.row, here, there, y, (x0, z), state)
            return y1, None, state
        y1 = ddim(there, x0, z)
        if self.points == 1:
            return y1, None, state
        ratio = multistep.growth(state, here, there)
        y1 = y1 + 0.5 * ratio * there.a * decay(here, there)[1] * (x0 - state.values[0])
        return y1, None, multistep.after(state, x0, here)
