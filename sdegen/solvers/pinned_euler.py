"""Euler-Maruyama for a process that noise does not leave at its end.

On the clock s from 0 to 1 a Brownian bridge to y at s = 1 is

    dx = (y - x) / (1 - s) ds + sigma dw,                                          (1)
    x_s' = x_s + (s' - s) (y - x_s) / (1 - s) + sigma sqrt((s' - s)(1 - s')/(1 - s)) w.

The second line is exact (Karatzas and Shreve 1991, section 5.6.B): the step of
Euler-Maruyama with noise smaller by sqrt((1 - s') / (1 - s)), none in the last step. So
with the drift of a Schroedinger bridge, the mean of (1) over its ends y, each step is
the exact one of a bridge to the mean end.
"""

from typing import ClassVar

import diffrax as dfx
import jax.numpy as jnp


class PinnedEuler(dfx.AbstractItoSolver):
    """One evaluation a step; the noise shrinks towards the end of the clock, s = 1.

    Exact, in any number of steps, where the end is one point. Else what the last steps
    leave out makes the error h log(1 / h) in the step h, against h of Euler-Maruyama,
    which blurs the data with the noise of its last step. Without noise it is Euler's
    method. For generators, whose clock runs from 0 to 1: a `SchroedingerBridge` takes
    it by default.
    """

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar = dfx.LocalLinearInterpolation
    calls: ClassVar[int] = 1

    def order(self, terms):
        """1, of the drift."""
        return 1

    def strong_order(self, terms):
        """1/2, in general."""
        return 0.5

    def init(self, terms, t0, t1, y0, args):
        """No state."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """Equation (1) over [t0, t1]."""
        shrink = jnp.sqrt(jnp.maximum(1 - t1, 0.0) / jnp.maximum(1 - t0, t1 - t0))
        parts = terms.terms if isinstance(terms, dfx.MultiTerm) else (terms,)
        y1 = y0
        for size, term in zip((1.0, shrink), parts, strict=False):
            y1 = y1 + size * term.vf_prod(t0, y0, args, term.contr(t0, t1))
        return y1, None, {"y0": y0, "y1": y1}, None, dfx.RESULTS.successful

    def func(self, terms, t0, y0, args):
        """The drift."""
        return terms.vf(t0, y0, args)
