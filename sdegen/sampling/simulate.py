"""Running a process as it is written: any SDE, its reversal or its flow, on a batch."""

from typing import Any, ClassVar

import diffrax as dfx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..models.generator import batch_equation, check_ito, check_shape
from ..models.model import Points, floating_batch
from ..models.problem import AbstractProblem, Table
from ..processes.reverse import ProbabilityFlow
from ..processes.sde import AbstractSDE
from ..solvers.grids import Adaptive, whole_steps
from ..solvers.solve import Solution, check_solver
from ..typing import Seed, float_array, is_traced
from .drive import drive


def simulate(
    key: Seed,
    process: AbstractSDE | ProbabilityFlow,
    x: Points,
    *,
    solver: dfx.AbstractSolver | None = None,
    grid: Array | int | Adaptive = 1000,
    trajectory: bool = False,
) -> Solution:
    """Integrate `process` from t_min, where it is at `x`, to t_max.

    **Arguments:**
    - `key`: a typed random key, or a seed; sample i depends on (key, i) alone.
    - `process`: a forward SDE; or a `reverse` SDE or a `probability_flow`, whose clock
      rises from 0 (noise) to 1 (data).
    - `x`: the states at the start of the clock, data or noise, (batch, ...).
    - `solver`: any Diffrax solver; Euler for an SDE (Euler-Maruyama), Heun for a flow.
    - `grid`: a number of steps (1000), an array of rising times, or `Adaptive(...)`.
    - `trajectory`: keep the states on the way; no by default.

    **Returns:** a `Solution`; its `evaluations` count drift evaluations.
    """
    adaptive = grid if isinstance(grid, Adaptive) else None
    noisy = isinstance(process, AbstractSDE)
    if solver is None:
        solver = dfx.Euler() if noisy else dfx.Heun()
    check_solver(solver, adaptive is not None, noisy)
    if adaptive is not None:
        clock = jnp.stack([process.t_min, process.t_max])
    elif (count := whole_steps(grid, "simulate")) is not None:
        unit = jnp.arange(count + 1, dtype=process.t_min.dtype) / count
        clock = process.t_min + (process.t_max - process.t_min) * unit
    else:
        clock = float_array(grid)
        _check_clock(clock, process)
    x = floating_batch(x, "simulate")
    # For one sample, before a batch axis could hide a wrong shape.
    check_shape("drift(t, x)", process.drift if noisy else process, clock[0], x[0])
    if noisy:
        check_shape("diffusion(t, x)", process.diffusion, clock[0], x[0], scalar=True)
        check_ito(process, clock[0], x[0], solver)
    problem = _SimulationProblem(process, solver, (clock, adaptive))
    return drive(key, problem, x.shape, start=x, trajectory=trajectory)


def _check_clock(clock, process):
    known = not is_traced((clock, process.t_min, process.t_max))
    flat = clock.ndim == 1 and len(clock) > 1
    if not flat or (known and not (np.diff(clock) > 0).all()):
        raise ValueError(
            "grid must be a number of steps, Adaptive(...), or an array of strictly "
            f"rising times, got one that {'falls' if flat else f'is {clock.shape}'}: "
            "a reversed process has a rising clock too, from 0 to 1."
        )
    if not known:
        return
    values, low, high = np.asarray(clock), float(process.t_min), float(process.t_max)
    slack = 1e-6 * (high - low)
    if values[0] < low - slack or values[-1] > high + slack:
        raise ValueError(
            f"grid times must lie in [t_min, t_max] = [{low:g}, {high:g}] of "
            f"{type(process).__name__}, got {values[0]:g} to {values[-1]:g}."
        )


class _SimulationProblem(AbstractProblem):
    """A process on its own clock, from states that are given."""

    process: AbstractSDE | ProbabilityFlow
    solver: dfx.AbstractSolver
    grid: Any
    draws_start: ClassVar = False

    def table(self):
        return Table(self.grid[0], self.grid[0])

    @property
    def adaptive(self):
        return self.grid[1]

    def start(self, table, key, shape):  # for its shape alone
        return jnp.zeros(shape, table.clock.dtype)

    def equation(self, table, keys, cond, shape, refinable):
        noisy = isinstance(self.process, AbstractSDE)
        return batch_equation(lambda cond: self.process, cond, noisy)
