"""ER-SDE: exponential multistep for a reverse SDE whose noise fades near the data."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from . import multistep
from .semilinear import integrals, root
from .solver import AbstractSemilinearSolver, whole


def fading(noise_level):
    """exp(r^0.3) + 10 at r = sigma / alpha: little noise where images take shape."""
    return jnp.exp(noise_level**0.3) + 10


class ERSDE(AbstractSemilinearSolver):
    """Extended reverse-time SDE of order 1 to 3, one network evaluation a step.

    Cui et al. 2023, "Elucidating the solution space of extended reverse-time SDE for
    diffusion models", eq. 12 to 17. Over a step from r0 to r1, r = sigma / alpha, the
    share q = g(r1) / g(r0) of the old noise is kept and the rest drawn anew; g is the
    paper's phi(r) / r (its best, "ER SDE 5", by default), and g(r) = r is
    `DPMSolverSDE`, the reverse SDE of Anderson. With the stochasticity l of `sample` q
    becomes q^(l^2), so that 0 is the flow. The polynomial through the last x0_hat is in
    the log-SNR, where the paper's is in r.
    """

    points: int = eqx.field(static=True)
    noise: Callable

    family = math.inf

    def __init__(self, order=3, noise=fading):
        """`noise` is g, a rising function of sigma / alpha."""
        self.points = whole("the order of ERSDE", order, 1, 3)
        self.noise = noise

    def start(self, term, here, there, y):
        """No prediction is known."""
        return multistep.empty(max(self.points - 1, 1), y, here)

    def advance(self, term, here, there, y, state):
        """One evaluation, one step."""
        x0, z = term.posterior_means(here, y)
        power = 0.0 if term.stochasticity is None else term.stochasticity**2
        a1, tau1 = there.a, there.tau
        start, stop = here.half_logsnr, there.half_logsnr

        def log_noise(lam):
            return power * jnp.log(self.noise(jnp.exp(-lam)))

        def density(lam):
            # d/dlambda of phi(r1) / phi(r), phi(r) = r g(r)^power, r = exp(-lambda)
            slope = jax.jvp(log_noise, (lam,), (jnp.ones_like(lam),))[1]
            return jnp.exp(lam - stop + log_noise(stop) - log_noise(lam)) * (1 - slope)

        keep = jnp.exp(log_noise(stop) - log_noise(start))
        # From alpha = 0, where g may be infinite, nothing of the old noise is kept.
        keep = jnp.where((here.a > 0) | (power == 0), keep, 0.0)
        y1 = a1 * x0 + tau1 * keep * z
        values = (x0, *state.values)
        nodes = jnp.concatenate([start[None], state.nodes])
        if self.points > 1:
            known = jnp.minimum(state.step + 1, self.points)
            weights = integrals(nodes[: self.points], known, start, stop, density)
            change = multistep.Combination(weights, None)
            y1 = y1 + a1 * change(values[: self.points])
        if term.stochasticity is not None:
            y1 = y1 + tau1 * root(1 - keep**2) * term.normal()
        length = len(state.values)
        state = multistep.History(state.step + 1, values[:length], nodes[:length], None)
        return y1, None, state
