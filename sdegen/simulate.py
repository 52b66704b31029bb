"""Running a process as it is written: any SDE, its reversal or its flow, on a batch."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .reverse import ProbabilityFlow
from .sde import AbstractSDE, noise_depends_on_state
from .solvers.solve import Solution, check_solver, evaluations, solve
from .times import Adaptive
from .typing import RandomKey, float_array, is_traced


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
    elif isinstance(grid, int):
        unit = jnp.arange(grid + 1, dtype=process.t_min.dtype) / grid
        clock = process.t_min + (process.t_max - process.t_min) * unit
    else:
        clock = float_array(grid)
        if not is_traced(clock) and not bool(jnp.all(clock[1:] > clock[:-1])):
            raise ValueError(
                "simulate needs a grid of strictly rising times, got one that falls: "
                "a reversed process has a rising clock too, from 0 to 1."
            )
    if noisy and noise_depends_on_state(process, clock[0], x[0]):
        if not isinstance(solver, dfx.AbstractItoSolver):
            raise ValueError(
                "the noise of this process depends on x and its equation is Ito's, but "
                f"{type(solver).__name__} is not an Ito solver. Use Euler()."
            )
    return _simulate(key, process, x, clock, adaptive, solver, trajectory)


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
    return Solution(solution.ys[-1], count, solution.result, times, frames)
