"""The symmetric splitting sampler of Langevin diffusions, on the state.

The reverse process of a linear SDE of a state, with stochasticity lambda,

    du = [-F u + w G G^T score(u)] |dt| + lambda G dw,    w = (1 + lambda^2) / 2,  (1)

is split by the score -R^-1 u of its stationary law N(0, R), F R + R F^T + G G^T = 0:

    A:  du = (-F - w G G^T R^-1) u |dt| + lambda G dw,                             (2)
    B:  du = w G G^T (score(u) + R^-1 u) |dt|.                                     (3)

A is a linear SDE, whose step is known (`processes.momentum.transition`); B is small
near the noise, where the score is that of R. A step is half of A, the whole of B, and
half of A.
"""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..processes.momentum import (
    AbstractBlockSDE,
    column,
    lower,
    mix,
    transition,
    transition_nodes,
)
from ..processes.reverse import ProbabilityFlow, ReverseSDE
from ..typing import PyTree, Scalar, is_traced
from .semilinear import AbstractDriftTerm
from .solver import unwrapped


class BackwardTerm(AbstractDriftTerm):
    """A reversed process on a batch, whole: for a solver that takes it apart.

    `process(cond)` is the `ReverseSDE` or the `ProbabilityFlow` of one sample;
    `brownian` has increments with Levy areas, None for the flow. As a plain Diffrax
    term it is the drift.
    """

    process: Callable
    cond: PyTree = None
    brownian: dfx.AbstractBrownianPath | None = None

    def parts(self) -> ReverseSDE | ProbabilityFlow:
        """The process of the first sample: what does not depend on the sample."""
        return self.process(jax.tree.map(lambda c: c[0], self.cond))

    def score(
        self, t: Scalar, u: Float[Array, "batch k ..."]
    ) -> Float[Array, "batch k ..."]:
        """The score of each state: one network evaluation."""
        return jax.vmap(lambda u, c: self.process(c).score(t, u))(u, self.cond)

    def vf(self, t, y, args):
        """The drift of each sample."""

        def one(y, c):
            process = self.process(c)
            drift = getattr(process, "drift", process)
            return drift(t, y)

        return jax.vmap(one)(y, self.cond)


class SSCS(dfx.AbstractItoSolver):
    """Half of (2) exactly, Euler's step of (3), half of (2) exactly.

    Dockhorn et al. 2022, "Score-based generative modeling with critically-damped
    Langevin diffusion", algorithm 1, for any block SDE with a stationary law and any
    stochasticity; the paper's is 1. One evaluation a step. The splitting is symmetric,
    of weak order 2, but Euler's step of (3) is of order 1: `midpoint` takes two
    evaluations for it and makes the whole of order 2.
    """

    midpoint: bool = eqx.field(default=False, static=True)

    term_structure = BackwardTerm
    interpolation_cls = dfx.LocalLinearInterpolation

    def order(self, terms):
        """The order of convergence of the flow."""
        return 1 + self.midpoint

    def strong_order(self, terms):
        """The strong order for the additive noise of the reverse SDE."""
        return 1

    @property
    def calls(self) -> int:
        """Network evaluations of one step."""
        return 1 + self.midpoint

    def check(self, process: Any) -> None:
        """Refuse a process that has no linear part to split off."""
        sde = getattr(process, "sde", None)
        if not isinstance(sde, AbstractBlockSDE):
            raise ValueError(
                "SSCS splits the reverse of a linear SDE on a state, as Augmented("
                f"denoiser) has it, got {type(sde or process).__name__}. Take a solver "
                "of Diffrax."
            )
        if is_traced(sde):
            return
        with jax.ensure_compile_time_eval():
            law = np.asarray(stationary(sde))
        if not (np.isfinite(law).all() and np.linalg.eigvalsh(law).min() > 0):
            raise ValueError(
                f"SSCS needs a stationary law of {type(sde).__name__}, and with its F "
                "and G at t_max there is none: F has an eigenvalue whose real part is "
                "not below 0, or noise does not reach every row. Take a solver of "
                "Diffrax, such as Euler() or Heun()."
            )

    def init(self, terms, t0, t1, y0, args):
        """The inverse of R."""
        return jnp.linalg.inv(stationary(unwrapped(terms).parts().sde))

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step, as Diffrax asks for it."""
        term, precision = unwrapped(terms), solver_state
        process = term.parts()
        sde, noisy = process.sde, term.brownian is not None
        stochasticity = process.stochasticity if noisy else jnp.zeros((), t0.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        weight = (1 + stochasticity**2) / 2
        start, half, stop = (process.time(c) for c in (t0, (t0 + t1) / 2, t1))
        one = two = None
        if noisy:
            area = term.brownian.evaluate(t0, t1, use_levy=True)
            length = jnp.sqrt(area.dt)
            one, two = area.W / length, area.H / length * np.sqrt(12.0)

        def linear(u, before, after, z):
            """A from the time `before` to the time `after`, equation (2)."""
            span = before - after

            def coefficients(r):
                t = before - span * r
                g = sde.noise_scale(t)  # pyright: ignore[reportAttributeAccessIssue]
                pull = weight * g[:, None] ** 2 * precision
                noise = jnp.sqrt(span) * stochasticity * g
                return -span * (sde.matrix(t) + pull), noise  # pyright: ignore[reportAttributeAccessIssue]

            nodes = transition_nodes(t0.dtype)  # pyright: ignore[reportAttributeAccessIssue]
            move, rows = transition(*jax.vmap(coefficients)(nodes))
            u = jax.vmap(mix, (None, 0))(move, u)
            if z is None:
                return u
            return u + jax.vmap(mix, (None, 0))(lower(rows), z.astype(u.dtype))

        def rest(u):
            """The slope of B over the whole step, with F and G of its middle, (3)."""
            g = sde.noise_scale(half)  # pyright: ignore[reportAttributeAccessIssue]
            pull = term.score(half, u) + jax.vmap(mix, (None, 0))(precision, u)
            return (start - stop) * weight * column(g, u.ndim - 1) ** 2 * pull

        u = linear(y0, start, half, one)
        slope = rest(u)
        if self.midpoint:
            slope = rest(u + slope / 2)
        y1 = linear(u + slope.astype(u.dtype), half, stop, two)
        return y1, None, {"y0": y0, "y1": y1}, solver_state, dfx.RESULTS.successful

    def func(self, terms, t0, y0, args):
        """The drift."""
        return unwrapped(terms).vf(t0, y0, args)


def stationary(sde: AbstractBlockSDE) -> Float[Array, "k k"]:
    """R with F R + R F^T + G G^T = 0, for F and G at t_max."""
    f, g = sde.matrix(sde.t_max), sde.noise_scale(sde.t_max)
    one = jnp.eye(len(g), dtype=f.dtype)
    system = jnp.kron(f, one) + jnp.kron(one, f)
    r = jnp.linalg.solve(system, -jnp.diag(g**2).ravel()).reshape(f.shape)
    return (r + r.T) / 2
