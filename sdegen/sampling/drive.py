"""The one driver of a solve: keys, start, sharding, the solve itself, `Solution`."""

import operator
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from ..losses import per_sample
from ..models.problem import AbstractProblem
from ..solvers.solve import (
    Solution,
    checked,
    derivatives_said,
    evaluations,
    solve,
    spread,
)
from ..typing import PyTree, RandomKey, Seed, random_key

Sharding: TypeAlias = jax.sharding.Sharding | None


def drive(
    key: Seed,
    problem: AbstractProblem,
    shape: tuple[int, ...],
    *,
    cond: PyTree = None,
    start: Num[Array, "batch ..."] | None = None,
    trajectory: bool = False,
    refinable: bool = False,
    sharding: Sharding = None,
) -> Solution:
    """Solve a problem for a batch; the arguments are those of `sample`."""
    check_sharding(sharding, shape)
    key = random_key(key)
    if start is not None:
        draw = lambda k: problem.start(problem.table(), k, shape[1:])  # noqa: E731
        own = (shape[0], *jax.eval_shape(draw, key).shape)
        if start.shape != own:
            what = f"start must have the shape {own}, got {start.shape}"
            raise ValueError(f"{what}: a batch of states at the first time.")
    static = (shape, trajectory, refinable, sharding)
    with derivatives_said():
        return _drive(key, problem, cond, start, *static)


def whole_numbers(shape) -> tuple[int, ...]:
    """A shape (batch, ...) with at least two axes, or a sentence."""
    try:
        found = tuple(operator.index(n) for n in shape)
    except TypeError:
        found = ()
    if len(found) < 2 or min(found) < 1:
        raise ValueError(
            "sample needs a shape (batch, ...) of whole numbers with at least two "
            f"axes, got {shape!r}. For 1-D data use (batch, 1)."
        )
    return found


def check_sharding(sharding: Sharding, shape) -> None:
    """Refuse a sharding that does not split the batch in equal parts."""
    if sharding is None:
        return
    try:
        sharding.shard_shape(shape[:1])
    except ValueError:
        raise ValueError(
            f"sharding must split the batch axis alone, in equal parts, got {sharding} "
            f"for a batch of {shape[0]}. Use sdegen.mesh.batch_sharding(mesh)."
        ) from None


def constrain(x: Array, sharding: Sharding) -> Array:
    """`x` split over its batch as `sharding` says; as it is for None."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def sample_keys(key: RandomKey, batch: int, sharding: Sharding = None) -> Array:
    """One key per sample, which depends on (key, i) alone."""
    return per_sample.sample_keys(key, constrain(jnp.arange(batch), sharding))


def split_keys(key: RandomKey, batch: int, sharding: Sharding = None) -> Array:
    """Two keys for each sample, `split(fold_in(key, i))`, (2, batch)."""
    # split folds in 0 and 1: both are one cipher in a loop, which halves the program.
    index = constrain(jnp.arange(batch), sharding)

    def fold(stage, keys):
        number = jnp.where(stage == 0, index, jnp.arange(2)[:, None])
        return jax.vmap(jax.vmap(jax.random.fold_in))(keys, number)

    return jax.lax.fori_loop(0, 2, fold, jnp.broadcast_to(key, (2, batch)))


@eqx.filter_jit
def _drive(key, problem, cond, start, shape, trajectory, refinable, sharding):
    table, adaptive = problem.table(), problem.adaptive
    if problem.draws_start:
        start_keys, keys = split_keys(key, shape[0], sharding)
    else:
        keys = sample_keys(key, shape[0], sharding)
    if start is None:
        y0 = jax.vmap(lambda k: problem.start(table, k, shape[1:]))(start_keys)
    else:
        y0 = problem.encode(table, start.astype(table.clock.dtype))
        y0 = constrain(y0, sharding)

    def run(y0, keys, cond):
        """Solve for these samples: (states, their clock, steps, result)."""
        field, noise = problem.equation(table, keys, cond, shape[1:], refinable)
        return solve(
            field,
            y0,
            table.clock,
            problem.solver,
            adaptive=adaptive,
            noise=noise,
            keys=keys,
            trajectory=trajectory,
            refinable=refinable,
            rows=table.rows,
        )

    if adaptive is not None:
        run = spread(run, sharding)
    ys, clocks, steps, result = run(y0, keys, cond)
    times = frames = None
    if trajectory:
        times = table.times if adaptive is None else problem.times(clocks)
        frames = jax.vmap(problem.decode)(times, ys)
    x, more = problem.finish(table, ys[-1], cond)
    count = evaluations(problem.solver, steps)
    count = jnp.where(count < 0, count, count + more)
    return Solution(x, count, checked(result, x), times, frames)
