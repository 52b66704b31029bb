"""Sampling a denoiser: the probability flow, and every reverse SDE, of any path.

A path x = alpha x0 + sigma z becomes, with y = x / (alpha + sigma) and the flow time
tau = sigma / (alpha + sigma), the rectified flow y = (1 - tau) x0 + tau z. There

    dy = (z_hat - x0_hat) dtau                                                      (1)

is the probability flow of every path, and Euler's method on it is DDIM (Song et al.
2021, "Denoising diffusion implicit models"). The clock is u = 1 - tau, which rises. The
stochastic family with the same marginals is regular in the clock l = log(alpha /
sigma), where g^2 |dt| = 2 sigma^2 dl, with stochasticity lambda:

    dy = tau [(1 - tau)(x0_hat - z_hat) - lambda^2 z_hat] dl
         + lambda tau sqrt(2) dW                                                    (2)

The solvers of `sdegen.solvers` see (1) and (2) as one `SemilinearTerm`, in the clock c
= -log tau. On a fixed grid what depends on time alone is a table made outside the loop.
"""

from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..processes import prediction
from ..processes.path import LOGSNR_FLOOR, basis_of, check_sample, noise_slope
from ..solvers.adams import ExponentialAdams
from ..solvers.grids import (
    Adaptive,
    CosineGrid,
    FlowTimeGrid,
    LogSNRGrid,
    check_grid,
    whole_steps,
    without_data,
)
from ..solvers.semilinear import Node, SemilinearTerm
from ..solvers.solve import brownian_path, check_solver
from ..solvers.solver import AbstractSemilinearSolver
from ..solvers.sscs import BackwardTerm
from ..solvers.unipc import UniPC
from ..typing import PyTree, float_array, is_traced
from .model import check_gaussian
from .problem import AbstractProblem, Table


class _PathProblem(AbstractProblem):
    """Equation (1), or (2), of a denoiser, from t_max to t_min."""

    denoiser: Any  # an AbstractDenoiser
    solver: Any  # of Diffrax, or one of `sdegen.solvers`
    grid: Any
    stochasticity: Any  # a number, or None for the flow
    denoise: bool = eqx.field(static=True)
    draws_start: ClassVar = True

    @property
    def semilinear(self):
        return isinstance(self.solver, AbstractSemilinearSolver)

    def table(self):
        path = self.denoiser.path
        if self.adaptive is not None:
            ts = jnp.stack([float_array(path.t_max), float_array(path.t_min)])
        else:
            ts = self.grid(path) if callable(self.grid) else self.grid
            steps = len(ts) - 1
            if self.semilinear and self.solver.steps not in (None, steps):
                raise ValueError(
                    f"the weights of this {type(self.solver).__name__} were learned "
                    f"for {self.solver.steps} steps, got a grid of {steps} steps. Use "
                    "the grid that they were learned with."
                )
        if self.semilinear:
            known = self.denoiser.coefficients
            # In a loop of scalars, which compiles in a third of the time of vectors.
            nodes = jax.lax.map(lambda t: Node.at(path, t, known(t)), ts)
            c = nodes.clock
            rows = (nodes, self.solver.rows(nodes))
            return Table(c.mean(tuple(range(1, c.ndim))), ts, rows)
        alpha, sigma = jax.vmap(path.level)(ts)
        if self.stochasticity is None:
            clock, times = alpha / (alpha + sigma), ts
        else:
            # Nodes below the floor become one: steps of length zero change nothing.
            l, floor = jnp.log(alpha) - jnp.log(sigma), LOGSNR_FLOOR / 2
            clock = jnp.maximum(l, floor)
            first = path.inverse()(jax.nn.softplus(jnp.asarray(floor, l.dtype)))
            times = jnp.where(l < floor, first, ts)
        rows = jax.lax.map(lambda now: self._row(*now), (times, clock))
        return Table(clock, ts, rows)

    def start(self, table, key, shape):
        noise = self.denoiser.path.noise.sample(key, shape, table.clock.dtype)
        return self._nodes(table).tau[0] * noise

    def _nodes(self, table):
        return table.rows[0] if self.semilinear else table.rows

    def encode(self, table, x):
        path = self.denoiser.path
        return basis_of(path).coordinates(x) / sum(path.scales(table.times[0]))

    def equation(self, table, keys, cond, shape, refinable):
        denoiser, inverse = self.denoiser, self.denoiser.path.inverse()
        level, brownian = self.stochasticity, None
        if not self.semilinear:
            field = _Field(self, inverse, cond)
            return field, None if level is None else field.noise
        if level is not None or self.solver.draws:
            brownian = brownian_path(table.clock, keys, shape, refinable=refinable)
        return SemilinearTerm(denoiser, inverse, cond, level, brownian), None

    def times(self, clock):
        inverse = self.denoiser.path.inverse()
        return jax.vmap(lambda u: inverse(self._c(u)))(clock)

    def decode(self, t, y):
        path = self.denoiser.path
        return basis_of(path).data(sum(path.scales(t)) * y)

    def finish(self, table, y, cond):
        x = self._nodes(table).scale[-1] * y
        if self.denoise:
            last = jax.tree.map(lambda a: a[-1], self._nodes(table).known)
            x = self.denoiser.means_from(last, x, cond)[0]
        return basis_of(self.denoiser.path).data(x), int(self.denoise)

    def _c(self, u):
        """-log tau at a point of the clock."""
        if self.semilinear:
            return u
        return -jnp.log1p(-u) if self.stochasticity is None else jax.nn.softplus(u)

    def _row(self, t, u):
        """What (1) or (2) needs at the time t, where the clock is u."""
        path, flow = self.denoiser.path, self.stochasticity is None
        alpha, sigma = path.scales(t)
        scale = alpha + sigma
        tau, rate = sigma / scale, jnp.ones_like(u)
        if alpha.ndim:  # every coordinate has a clock of its own
            slope = noise_slope(path, t)
            if flow:
                rate = jnp.exp(self._c(u)) * sigma / scale * slope / jnp.mean(slope)
            else:
                rate = slope / jnp.mean(slope) * jax.nn.sigmoid(u) / (1 - tau)
        elif not flow:
            tau = jax.nn.sigmoid(-u)
        return _Row(self.denoiser.coefficients(t), scale, tau, rate)


class _Row(NamedTuple):
    """What the denoiser has prepared, alpha + sigma, tau, d local clock / d clock."""

    known: PyTree
    scale: Array
    tau: Array
    rate: Array


class _Field(eqx.Module):
    """The right-hand side of (1) in the clock u, or of (2) in the clock l."""

    problem: _PathProblem
    inverse: Any  # -log tau -> time
    cond: PyTree

    def __call__(self, u, y, args):
        row, stochasticity = self._row(u, args), self.problem.stochasticity
        x0, z = self.problem.denoiser.means_from(row.known, row.scale * y, self.cond)
        if stochasticity is None:
            return row.rate * (x0 - z)
        pull = (1 - row.tau) * (x0 - z) - stochasticity.astype(u.dtype) ** 2 * z
        return row.rate * row.tau * pull

    def noise(self, l, y, args):
        row, stochasticity = self._row(l, args), self.problem.stochasticity
        scale = stochasticity.astype(l.dtype) * row.tau
        return scale * jnp.sqrt(2 * row.rate).astype(l.dtype)

    def _row(self, u, args):
        if args is not None:
            return args.row(u)
        return self.problem._row(self.inverse(self.problem._c(u)), u)


def path_problem(
    denoiser, shape, *, solver, grid, stochasticity, denoise, refinable
) -> AbstractProblem:
    """The problem of a denoiser; arguments as of `AbstractModel.problem`."""
    path, flow = denoiser.path, stochasticity is None
    check_sample(path, shape[1:])
    if solver is None:
        solver = getattr(grid, "solver", None) or _default(grid, flow, denoiser)
    name = type(solver).__name__
    if getattr(solver, "term_structure", None) is BackwardTerm:
        raise ValueError(
            f"{name} moves a whole state, position and velocity: call sample(key, "
            "sdegen.Augmented(denoiser), shape, solver=...)."
        )
    check_solver(solver, isinstance(grid, Adaptive), not flow)
    semilinear = isinstance(solver, AbstractSemilinearSolver)
    known = not flow and not is_traced(stochasticity)
    if semilinear and known and float(stochasticity) > solver.family:
        raise ValueError(
            f"{name} takes a stochasticity from 0 to {solver.family:g}, got "
            f"{float(stochasticity):g}. DPMSolverSDE() and ERSDE() take any."
        )
    draws = semilinear and solver.draws
    if draws or not flow:
        advice = " Sample with stochasticity=0 and a solver that draws none."
        check_gaussian(path, "the reverse SDE needs", advice)
    if refinable and (flow or draws):
        reason = "draws its own" if draws else "solves the flow, which has none"
        raise ValueError(
            "refinable noise is that of the reverse SDE, stochasticity > 0; here "
            f"{name} {reason}."
        )
    if (steps := whole_steps(32 if grid is None else grid, "sample")) is not None:
        # Each in the clock that it is solved in, where equal steps serve it best.
        if semilinear and flow:
            grid = CosineGrid(steps, denoiser.overall_sigma_data)
        else:
            grid = (FlowTimeGrid if flow else LogSNRGrid)(steps)
    grid, to_data = without_data(grid, path)
    if denoise is None or to_data:
        denoise = to_data or getattr(grid, "denoise", False)
    grid = check_grid(grid, path)
    return _PathProblem(denoiser, solver, grid, stochasticity, denoise)


def _default(grid, flow, denoiser) -> dfx.AbstractSolver:
    if isinstance(grid, Adaptive):
        if flow:
            return ExponentialAdams(sigma_data=denoiser.overall_sigma_data)
        return dfx.ShARK()
    return UniPC(2, prediction=prediction.velocity) if flow else dfx.Heun()
