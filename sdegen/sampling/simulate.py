"""Running a process as it is written: any SDE, its reversal or its flow, on a batch."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..processes.reverse import ProbabilityFlow
from ..processes.sde import AbstractSDE, noise_depends_on_state
from ..solvers.grids import Adaptive
from ..solvers.solve import Solution, check_solver, checked, evaluations, solve
from ..typing import RandomKey, float_array, is_traced


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

    For a forward SDE `x` is data; for a `reverse` SDE or a `probability_flow`, whose
    clock rises from 0 (noise) to 1 (data), `x` is noise. Sample i depends on (key, i)
    only.

    **Arguments:** `x`, (batch, ...); `solver`, any Diffrax solver (default Euler, which
    for an SDE is Euler-Maruyama, Ito); `grid`, a number of equal steps of the clock, an
    array of rising times, or `Adaptive(...)`; `trajectory`, keep the states on the way.

    **Returns:** a `Solution`; its `evaluations` count drift evaluations.
    """
    solver = dfx.Euler() if solver is None else solver
    adaptive = grid if isinstance(grid, Adaptive) else None
    noisy = isinstance(process, AbstractSDE)
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
    if noisy and noise_depends_on_state(process, clock[0], x[0]):
        if not isinstance(solver, dfx.AbstractItoSolver):
            raise ValueError(
                "the noise of this process depends on x and its equation is Ito's, but "
                f"{type(solver).__name__} is not an Ito solver. Use Euler()."
            )
    return _simulate(key, process, x, clock, adaptive, solver, trajectory)


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


@eqx.filter_jit
def _simulate(key, process, x, clock, adaptive, solver, trajectory):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[0]))
    noisy = isinstance(process, AbstractSDE)
    field = process.drift if noisy else process

    def drift(t, y, args):
        return jax.vmap(field, (None, 0))(t, y)

    def noise(t, y, args):
        # Noise that ignores x is one number (or array) for the batch, which tells the
        # solvers for additive noise that it is additive.
        if not noise_depends_on_state(process, t, y[0]):
            return process.diffusion(t, jax.lax.stop_gradient(y[0]))
        g = jax.vmap(process.diffusion, (None, 0))(t, y)
        return g.reshape(g.shape + (1,) * (y.ndim - g.ndim))

    solution = solve(
        drift,
        x,
        clock,
        solver,
        adaptive=adaptive,
        noise=noise if noisy else None,
        keys=keys,
        trajectory=trajectory,
    )
    count = evaluations(solver, solution.stats["num_steps"])
    times, frames = (solution.ts, solution.ys) if trajectory else (None, None)
    x = solution.ys[-1]
    return Solution(x, count, checked(solution.result, x), times, frames)
