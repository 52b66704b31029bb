"""`sample` for what has an equation of its own: a generator, from clock 0 to 1."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..models.generator import AbstractGenerator
from ..processes.sde import AbstractSDE, noise_depends_on_state
from ..solvers.grids import Adaptive
from ..solvers.solve import (
    Solution,
    brownian_path,
    check_solver,
    checked,
    evaluations,
    solve,
    spread,
)
from ..solvers.sscs import BackwardTerm
from ..typing import float_array, is_traced

_STEPS = 200


def generate(
    key,
    generator: AbstractGenerator,
    shape: tuple[int, ...],
    *,
    solver,
    grid,
    stochasticity,
    cond,
    start,
    trajectory: bool,
    sharding,
) -> Solution:
    """The samples of a generator; arguments as in `sample`.

    `grid` is a number of equal steps of the clock (default 200), an array of rising
    times from 0 to 1, or `Adaptive(...)`; `stochasticity` None is the flow; `start` is
    a batch of states at clock 0.
    """
    adaptive = grid if isinstance(grid, Adaptive) else None
    noisy = stochasticity is not None
    if solver is None:
        noisily = getattr(generator, "noisy_solver", dfx.Euler)
        quick = noisily() if noisy else dfx.Heun()
        solver = quick if adaptive is None else dfx.ShARK() if noisy else dfx.Tsit5()
    check_solver(solver, adaptive is not None, noisy)
    dtype = jnp.result_type(float) if start is None else jnp.asarray(start).dtype
    state = jax.eval_shape(lambda k: generator.start(k, shape[1:], dtype), key)
    if start is not None and start.shape != (shape[0], *state.shape):
        raise ValueError(
            "start must be a batch of states at the noise end, of shape "
            f"{(shape[0], *state.shape)}, got {start.shape}."
        )
    clock = _clock(grid, adaptive, dtype)
    _check_equation(generator, stochasticity, cond, solver, state)
    return _generate(
        key,
        generator,
        stochasticity,
        cond,
        start,
        clock,
        adaptive,
        solver,
        shape,
        trajectory,
        sharding,
    )


def _clock(grid, adaptive, dtype):
    if adaptive is not None:
        return jnp.array([0.0, 1.0], dtype)
    grid = _STEPS if grid is None else grid
    if isinstance(grid, int | np.integer):
        if grid < 1:
            raise ValueError(f"sample needs at least one step, got grid={grid}.")
        return jnp.arange(grid + 1, dtype=dtype) / grid
    try:
        clock = float_array(grid).astype(dtype)
    except (TypeError, ValueError):
        clock = jnp.zeros(())
    if is_traced(clock):
        return clock
    values = np.asarray(clock)
    if values.ndim != 1 or len(values) < 2 or not (np.diff(values) > 0).all():
        raise ValueError(
            "this process runs on a clock from 0 (noise) to 1 (data): grid is a number "
            f"of steps, an array of rising times, or Adaptive(...), got {grid!r:.80}."
        )
    if values[0] < 0 or values[-1] > 1:
        raise ValueError(
            "grid times lie between 0 (noise) and 1 (data) for this process, got "
            f"{values[0]:g} to {values[-1]:g}."
        )
    return clock


def _check_equation(generator, stochasticity, cond, solver, state):
    """Shapes, and the calculus of the solver, for one sample."""
    one = None if cond is None else jax.tree.map(lambda c: c[0], cond)
    process = generator.backward(stochasticity, one)
    noisy = isinstance(process, AbstractSDE)
    if noisy != (stochasticity is not None):
        raise ValueError(
            f"{type(generator).__name__}.backward(stochasticity) must return an "
            "AbstractSDE, and for None a function (s, state), got "
            f"{type(process).__name__}."
        )
    if solver.term_structure is BackwardTerm:
        solver.check(process)
    zero = jnp.zeros(state.shape, state.dtype)
    slope = jax.eval_shape(process.drift if noisy else process, jnp.zeros(()), zero)
    if slope.shape != state.shape:
        raise ValueError(
            f"the equation of {type(generator).__name__} must return an array of the "
            f"shape of the state, {state.shape}, got {slope.shape}."
        )
    if noisy and noise_depends_on_state(process, 0.5, zero):
        if not isinstance(solver, dfx.AbstractItoSolver):
            raise ValueError(
                "the noise of this process depends on x and its equation is Ito's, but "
                f"{type(solver).__name__} is not an Ito solver. Use Euler()."
            )


@eqx.filter_jit
def _generate(
    key,
    generator,
    stochasticity,
    cond,
    start,
    clock,
    adaptive,
    solver,
    shape,
    trajectory,
    sharding,
):
    noisy = stochasticity is not None

    def run(y0, keys, cond):
        def process(c):
            return generator.backward(stochasticity, c)

        def drift(s, y, args):
            def one(y, c):
                return process(c).drift(s, y) if noisy else process(c)(s, y)

            return jax.vmap(one)(y, cond)

        def noise(s, y, args):
            own = None if cond is None else jax.tree.map(lambda c: c[0], cond)
            if not noise_depends_on_state(process(own), s, y[0]):
                return process(own).diffusion(s, jax.lax.stop_gradient(y[0]))
            g = jax.vmap(lambda y, c: process(c).diffusion(s, y))(y, cond)
            return g.reshape(g.shape + (1,) * (y.ndim - g.ndim))

        field, whole = drift, solver.term_structure is BackwardTerm
        if whole:  # the solver takes the equation apart itself
            area, brownian = dfx.SpaceTimeLevyArea, None
            if noisy:
                size = y0.shape[1:]
                brownian = brownian_path(clock, keys, size, area, refinable=False)
            field = BackwardTerm(process, cond, brownian)
        out = solve(
            field,
            y0,
            clock,
            solver,
            adaptive=adaptive,
            noise=noise if noisy and not whole else None,
            keys=keys,
            trajectory=trajectory,
        )
        return out.ys, out.ts, out.stats["num_steps"], out.result

    index = jnp.arange(shape[0])
    if sharding is not None:
        index = jax.lax.with_sharding_constraint(index, sharding)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    start_keys, noise_keys = jax.vmap(lambda k: tuple(jax.random.split(k)))(keys)
    if start is None:
        draw = lambda k: generator.start(k, shape[1:], clock.dtype)  # noqa: E731
        start = jax.vmap(draw)(start_keys)
    elif sharding is not None:
        start = jax.lax.with_sharding_constraint(start, sharding)
    if adaptive is not None:
        run = spread(run, adaptive, sharding)
    ys, times, steps, result = run(start, noise_keys, cond)
    x = jax.vmap(generator.data)(ys[-1])
    frames = jax.vmap(jax.vmap(generator.data))(ys) if trajectory else None
    own = solver.term_structure is BackwardTerm
    count = solver.evaluations(steps) if own else evaluations(solver, steps)
    return Solution(
        x,
        count,
        checked(result, x),
        times if trajectory else None,
        frames,
    )
