"""DPM-Solver-2 and DPM-Solver++: exponential integrators in the log-SNR."""

import equinox as eqx
import jax
import jax.numpy as jnp

from ..processes import prediction
from . import multistep
from .semilinear import ddim, decay
from .solver import AbstractSemilinearSolver, whole


class DPMSolver2(AbstractSemilinearSolver):
    """The single-step midpoint method in eps, order 2, two evaluations a step.

    Lu et al. 2022, "DPM-Solver", algorithm 1, with r1 = 1/2: half a step of lambda by
    DDIM, then the whole step with z_hat from there. From alpha = 0, where the whole
    step in eps does not exist, it is two steps of DDIM. For the flow only.
    """

    family = 0.0
    draws = False
    calls = 2
    calls_first = 0

    def order(self, terms):
        """The order of convergence."""
        return 2

    def start(self, term, here, there, y):
        """No state."""
        return None

    def advance(self, term, here, there, y, state):
        """Two evaluations, one step."""
        x0, z = term.posterior_means(here, y)
        middle = jax.nn.softplus((here.half_logsnr + there.half_logsnr) / 2)
        middle = term.node(jnp.clip(middle, here.clock, there.clock))
        x0_m, z_m = term.posterior_means(middle, ddim(middle, x0, z))
        shrink, gain = decay(here, there)
        rise = gain / jnp.where(shrink > 0, shrink, 1)  # exp(h) - 1
        if (
            here.clock.ndim
        ):  # coordinates meet their own middle a little earlier or later
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

    family = 0.0
    draws = False
    calls = 1
    calls_first = 0

    def __init__(self, order=2):
        """`order` 1, 2 or 3."""
        self.points = whole("the order of DPMSolverPP", order, 1, 3)

    def order(self, terms):
        """The order of convergence."""
        return self.points

    def start(self, term, here, there, y):
        """No prediction is known."""
        return multistep.empty(self.points - 1, y, here, False)

    def advance(self, term, here, there, y, state):
        """One evaluation, one step."""
        means = term.posterior_means(here, y)
        order = 1 if self.points == 2 else self.points
        earlier = state
        y1, state = multistep.predict(
            prediction.x0, jnp.ones(()), order, here, there, y, means, state
        )
        if self.points == 2:
            gain = decay(here, there)[1]
            rise = there.half_logsnr - here.half_logsnr
            before = here.half_logsnr - earlier.nodes[0]
            known = (earlier.step > 0) & (before > 0)
            ratio = jnp.where(known, rise / jnp.where(known, before, 1), 0)
            change = means[0] - earlier.values[0]
            y1 = y1 + 0.5 * ratio * there.a * gain * change
        return y1, None, state
