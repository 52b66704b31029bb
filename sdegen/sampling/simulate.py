"""Running a process as it is written: any SDE, its reversal or its flow, on a batch."""

from typing import Any, ClassVar

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..models.generator import batch_equation, check_ito
from ..models.problem import AbstractProblem, Table
from ..processes.reverse import ProbabilityFlow
from ..processes.sde import AbstractSDE
from ..solvers.grids import Adaptive
from ..solvers.solve import Solution, check_solver
from ..typing import RandomKey, float_array, is_traced
from .drive import drive


def simulate(
    key: RandomKey,
    process: AbstractSDE | ProbabilityFlow,
    x: Float[Array, "batch ..."],
    *,
    solver: dfx.AbstractSolver | None = None,
    grid: Array | int | Adaptive = 1000,
    trajectory: bool = False,
) -> Solution:
    """Integrate `process` from t_min, where it is at `x`, to t_max.

    Sample i depends on (key, i) alone.

    **Arguments:**

    - `key`: a typed random key.
    - `process`: a forward SDE, for which `x` is data; or a `reverse` SDE or a
      `probability_flow`, whose clock rises from 0 (noise) to 1 (data), for which `x` is
      noise.
    - `x`: the states at the start of the clock, (batch, ...).
    - `solver`: any Diffrax solver. Default: Euler for an SDE (Euler-Maruyama, Ito),
      Heun for a flow.
    - `grid`: a number of equal steps of the clock (1000), an array of rising times, or
      `Adaptive(...)`.
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
    elif isinstance(grid, int | np.integer):
        if grid < 1:
            raise ValueError(f"simulate needs at least one step, got grid={grid}.")
        unit = jnp.arange(grid + 1, dtype=process.t_min.dtype) / grid
        clock = process.t_min + (process.t_max - process.t_min) * unit
    else:
        clock = float_array(grid)
        _check_clock(clock, process)
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            "simulate takes a floating-point batch of shape (batch, ...) with at least "
            f"two axes, got {x.dtype} of shape {x.shape}."
        )
    _check_shapes(process, clock[0], x[0])
    if noisy:
        check_ito(process, clock[0], x[0], solver)
    problem = SimulationProblem(process, solver, (clock, adaptive))
    return drive(key, problem, x.shape, start=x, trajectory=trajectory)


def _check_clock(clock, process):
    if clock.ndim != 1 or len(clock) < 2:
        raise ValueError(
            "grid must be a whole number of steps, an array of at least two rising "
            f"times, or Adaptive(...), got an array of shape {clock.shape}."
        )
    if is_traced((clock, process.t_min, process.t_max)):
        return
    values, low, high = np.asarray(clock), float(process.t_min), float(process.t_max)
    if not (np.diff(values) > 0).all():
        raise ValueError(
            "simulate needs a grid of strictly rising times, got one that falls: a "
            "reversed process has a rising clock too, from 0 to 1."
        )
    slack = 1e-6 * (high - low)
    if values[0] < low - slack or values[-1] > high + slack:
        raise ValueError(
            f"grid times must lie in [t_min, t_max] = [{low:g}, {high:g}] of "
            f"{type(process).__name__}, got {values[0]:g} to {values[-1]:g}."
        )


def _check_shapes(process, t, x):
    """The coefficients for one sample, before a batch axis could hide a wrong shape."""
    if isinstance(process, ProbabilityFlow):
        coefficients = {"drift": jax.eval_shape(process, t, x).shape}
    else:
        coefficients = {
            "drift": jax.eval_shape(process.drift, t, x).shape,
            "diffusion": jax.eval_shape(process.diffusion, t, x).shape,
        }
    for name, shape in coefficients.items():
        if shape != x.shape and not (name == "diffusion" and shape == ()):
            scalar = " or a scalar" if name == "diffusion" else ""
            raise ValueError(
                f"{name}(t, x) must return an array of the shape of one sample, "
                f"{x.shape}{scalar}, got {shape}."
            )


class SimulationProblem(AbstractProblem):
    """A process on its own clock, from states that are given."""

    process: AbstractSDE | ProbabilityFlow
    solver: dfx.AbstractSolver
    grid: Any
    draws_start: ClassVar = False

    def table(self):
        """The steps; the clock of a process is its time."""
        return Table(self.grid[0], self.grid[0])

    @property
    def adaptive(self):
        """The tolerances of adaptive steps, None for a fixed grid."""
        return self.grid[1]

    def start(self, table, key, shape):
        """Any state: it is only asked for its shape."""
        return jnp.zeros(shape, table.clock.dtype)

    def encode(self, table, x):
        """The states as they are given."""
        return x

    def equation(self, table, keys, cond, shape, refinable):
        """Drift and noise of the batch."""
        noisy = isinstance(self.process, AbstractSDE)
        return batch_equation(lambda cond: self.process, cond, noisy)

    def times(self, clock):
        """The clock."""
        return clock

    def decode(self, t, y):
        """The states."""
        return y
