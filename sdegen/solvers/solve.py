"""The one place that calls Diffrax: a batch on a rising clock, any kind of steps.

On fixed grids there are no host callbacks, no run-time errors and no collectives in the
step loop, so that it lowers for any platform and never hangs a pod.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num

from ..processes.brownian import GridBrownianPath, NoiseTerm, TreeBrownianPath
from ..typing import PyTree, Scalar
from .grids import Adaptive
from .pinned_euler import PinnedEuler
from .semilinear import SemilinearTerm
from .solver import AbstractSemilinearSolver
from .sscs import SSCS

_FRAMES = 33  # frames of an adaptive trajectory
_TREE = 1e-5  # resolution of the Brownian tree, in units of the clock's range


class Solution(eqx.Module):
    """Where a batch ended, and what it cost.

    `x` is (batch, ...). `evaluations` counts network (or drift) calls on the batch, -1
    where the solver's count is not known. `result` is a `diffrax.RESULTS`; `ok` says
    whether it is success. `times` are the frames of `trajectory`, (frames, batch, ...),
    both None unless asked for.
    """

    x: Num[Array, "batch ..."]
    evaluations: Int[Array, ""]
    result: dfx.RESULTS
    times: Float[Array, " frames"] | None = None
    trajectory: Num[Array, "frames batch ..."] | None = None

    @property
    def ok(self) -> Array:
        """Whether the solve reached its end."""
        return self.result == dfx.RESULTS.successful


def checked(result: dfx.RESULTS, x: PyTree) -> dfx.RESULTS:
    """`result`, or "nonfinite" where `x` is not finite: fixed steps never look."""
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(x)]).all()
    return dfx.RESULTS.where(finite, result, dfx.RESULTS.nonfinite)


def worst_sample_norm(error: PyTree) -> Array:
    """The largest, over samples and leaves, of each sample's root mean square."""

    def worst(error):
        return jnp.max(jnp.mean(error**2, axis=tuple(range(1, error.ndim))))

    return jnp.sqrt(jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(worst, error)))))


def evaluations(solver: dfx.AbstractSolver, steps: Int[Array, ""]) -> Array:
    """Drift evaluations in `steps` attempted steps; -1 where the count is unknown."""
    if issubclass(type(solver), dfx.AbstractWrappedSolver):
        return jnp.full_like(steps, -1)
    if isinstance(solver, AbstractSemilinearSolver):
        return solver.evaluations(steps)
    if isinstance(solver, dfx.AbstractSRK):
        ignored = solver.tableau.ignore_stage_f
        skipped = 0 if ignored is None else sum(bool(i) for i in ignored)
        return steps * (len(solver.tableau.b_sol) - skipped)
    if isinstance(solver, dfx.AbstractERK):
        stages = solver.tableau.num_stages  # pyright: ignore[reportAttributeAccessIssue]
        return steps * (stages - 1) + 1 if solver.tableau.fsal else steps * stages  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(
        solver, dfx.Euler | dfx.EulerHeun | dfx.ItoMilstein | dfx.StratonovichMilstein
    ):
        return 1 * steps
    if isinstance(solver, dfx.ReversibleHeun):
        return steps + 1
    if isinstance(solver, PinnedEuler | SSCS):
        return solver.calls * steps
    return jnp.full_like(steps, -1)


def check_solver(solver, adaptive: bool, noise: bool) -> None:
    """Refuse, with a sentence, a solver that cannot do what is asked."""
    if not isinstance(solver, dfx.AbstractSolver):
        raise ValueError(
            f"solver must be a diffrax solver such as diffrax.Heun(), got {solver!r}. "
            "A class needs its brackets: Heun(), not Heun."
        )
    name, srk = type(solver).__name__, isinstance(solver, dfx.AbstractSRK)
    estimates = isinstance(solver, dfx.AbstractAdaptiveSolver)
    if srk and solver.tableau.b_error is not None:  # pyright: ignore[reportAttributeAccessIssue]
        estimates = True
    if adaptive and not estimates:
        raise ValueError(
            f"adaptive steps need a solver with an error estimate, and {name} has "
            "none. Use ExponentialAdams(), Tsit5() or ShARK(), or a fixed grid."
        )
    if isinstance(solver, AbstractSemilinearSolver):
        if noise and solver.family == 0:
            raise ValueError(
                f"{name} solves the flow only, without noise. Sample with "
                "stochasticity=0, or use DDIM(), DPMSolverSDE(), ERSDE() or Langevin()."
            )
        return
    for_sdes = dfx.AbstractItoSolver | dfx.AbstractStratonovichSolver
    if noise and not isinstance(solver, for_sdes):
        raise ValueError(
            f"stochastic sampling needs an SDE solver, and {name} is for ODEs. Use "
            "Euler(), Heun(), SRA1() or ShARK()."
        )
    if not noise and srk:
        raise ValueError(
            f"{name} solves SDEs only. Use an ODE solver such as Heun() or Tsit5(), or "
            "sample with stochasticity > 0."
        )


def _levy_area(solver) -> type:
    if not isinstance(solver, dfx.AbstractSRK) or solver.tableau.coeffs_hh is None:
        return dfx.BrownianIncrement
    if solver.tableau.coeffs_kk is not None:
        raise ValueError(
            f"{type(solver).__name__} needs space-time-time Levy area, which these "
            "Brownian paths do not draw. Use SRA1() or ShARK()."
        )
    return dfx.SpaceTimeLevyArea


def brownian_path(
    clock: Float[Array, " times"],
    keys: Key[Array, " batch"],
    shape: tuple[int, ...],
    levy_area: type = dfx.BrownianIncrement,
    *,
    refinable: bool,
) -> GridBrownianPath | TreeBrownianPath:
    """Noise for one sample's `shape` per key: by cells, or the same at every step."""
    if not refinable:
        return GridBrownianPath(clock, keys, shape, levy_area)
    # A margin, because a query one rounding outside the tree is an error.
    span = clock[-1] - clock[0]
    low, high = clock[0] - 1e-3 * span, clock[-1] + 1e-3 * span
    steps = jnp.diff(clock)
    finest = jnp.min(jnp.where(steps > 0, steps, span)) / 2
    tolerance = jnp.clip(finest, 1e-7 * span, _TREE * span)
    return TreeBrownianPath(low, high, tolerance, keys, shape, levy_area)


class Solved(NamedTuple):
    """The states at the end, or along the way, with a leading axis of frames."""

    ys: PyTree
    ts: Float[Array, " frames"]
    steps: Int[Array, ""]
    result: dfx.RESULTS


def solve(
    drift: Callable | dfx.AbstractTerm,
    y0: PyTree,
    clock: Float[Array, " times"],
    solver: dfx.AbstractSolver,
    *,
    adaptive: Adaptive | None = None,
    noise: Callable | None = None,
    keys: Key[Array, " batch"] | None = None,
    trajectory: bool = False,
    refinable: bool = False,
    rows: PyTree = None,
) -> Solved:
    """Integrate dy = drift(u, y) du [+ noise(u, y) dW] along the rising `clock`.

    Trace-time only: call it inside a jitted function.

    **Arguments:**
    - `drift`: a function (u, y, args) -> slope, or a Diffrax term, which then is the
      whole equation.
    - `y0`: a batch, or where there is no noise a pytree of batches.
    - `clock`: the points at which steps end, (steps + 1,); with `adaptive` its first
      and last point.
    - `solver`: any Diffrax solver.
    - `adaptive`: let the error estimate choose the steps; none by default.
    - `noise`: a function (u, y, args) -> g; none by default.
    - `keys`: one key per sample for the noise, (batch,).
    - `trajectory`: keep the state at every point of the clock.
    - `refinable`: noise that is the same path on every clock of the same range.
    - `rows`: what the equation needs of each point of the clock, a pytree with that
      leading axis. On a fixed grid the pair of a step's ends is handed to the equation
      as `args`, a `Stages`, so that nothing of it is computed in the loop.
    """
    term = drift if isinstance(drift, dfx.AbstractTerm) else dfx.ODETerm(drift)
    semilinear = isinstance(solver, AbstractSemilinearSolver)
    if semilinear and not isinstance(term, SemilinearTerm):
        raise ValueError(
            f"{type(solver).__name__} solves what `sample` solves, the flow or the "
            "reverse SDE of a denoiser. For an equation as it is written use a solver "
            "of Diffrax, such as Heun()."
        )
    if not semilinear:
        check_solver(solver, adaptive is not None, noise is not None)
    if noise is not None:
        refinable = refinable or adaptive is not None
        path = brownian_path(
            clock, keys, y0.shape[1:], _levy_area(solver), refinable=refinable
        )
        term = dfx.MultiTerm(term, NoiseTerm(noise, path))
    if adaptive is None:
        rows = rows if stages_at_ends(solver) else None
        return _scan(term, y0, clock, solver, trajectory, rows)
    # Without dt0 Diffrax would try 0.01 whatever the scale of the clock.
    span = clock[-1] - clock[0]
    dtype = jnp.result_type(*jax.tree.leaves(y0))
    controller = dfx.PIDController(
        rtol=adaptive.rtol.astype(dtype),
        atol=adaptive.atol.astype(dtype),
        norm=worst_sample_norm,
        # A step below the tree's resolution would see noise of the wrong distribution.
        dtmin=None if noise is None else 2 * _TREE * span,
    )
    frames = jnp.linspace(clock[0], clock[-1], _FRAMES)
    out = dfx.diffeqsolve(
        term,
        solver,
        t0=clock[0],
        t1=clock[-1],
        dt0=0.01 * span,
        y0=y0,
        stepsize_controller=controller,
        saveat=dfx.SaveAt(ts=frames) if trajectory else dfx.SaveAt(t1=True),
        adjoint=dfx.RecursiveCheckpointAdjoint(),
        max_steps=adaptive.max_steps,
        throw=False,
    )
    return Solved(out.ys, out.ts, out.stats["num_steps"], out.result)


class Stages(NamedTuple):
    """The rows of a step's two ends, as Diffrax's `args` of the step."""

    start: Scalar
    stop: Scalar
    rows: tuple[PyTree, PyTree]

    def row(self, u: Scalar) -> PyTree:
        """The row of the end that u is: for solvers whose stages are at the ends."""
        first = u - self.start < self.stop - u
        return jax.tree.map(lambda a, b: jnp.where(first, a, b), *self.rows)


def stages_at_ends(solver: dfx.AbstractSolver) -> bool:
    """Whether a solver asks for the equation at both ends of its steps alone."""
    if isinstance(solver, AbstractSemilinearSolver | dfx.Euler):
        return True
    return type(solver) is dfx.Heun


def _scan(term, y0, clock, solver, trajectory, rows) -> Solved:
    """Fixed steps: a scan over the solver's own steps, as `diffeqsolve` takes them.

    A fixed grid needs nothing else of Diffrax's loop (error control, dense output, a
    count of steps that is not known before), which is most of its program.
    """
    semilinear = isinstance(solver, AbstractSemilinearSolver)

    def arguments(t0, t1, *pair):
        if rows is None:
            return None
        return pair if semilinear else Stages(t0, t1, pair)

    before = jax.tree.map(lambda a: a[:-1], (clock, rows))
    after = jax.tree.map(lambda a: a[1:], (clock, rows))
    steps = (before[0], after[0], before[1], after[1])
    first = jax.tree.map(lambda a: jax.lax.index_in_dim(a, 0, keepdims=False), steps)
    state = solver.init(term, *first[:2], y0, arguments(*first))

    # Backwards a step is computed again from its state, which alone is kept.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry, now):
        y, state, result = carry
        y1, _, _, state, done = solver.step(
            term, *now[:2], y, arguments(*now), state, False
        )
        y1 = jax.tree.map(lambda new, old: new.astype(old.dtype), y1, y)
        ok = result == dfx.RESULTS.successful
        result = dfx.RESULTS.where(ok, done, result)
        return (y1, state, result), y1 if trajectory else None

    carry = (y0, state, dfx.RESULTS.successful)
    (y, _, result), frames = jax.lax.scan(step, carry, steps)
    ys = jax.tree.map(lambda a: a[None], y)
    ts = clock[-1:]
    if trajectory:
        ys = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), y0, frames)
        ts = clock
    return Solved(ys, ts, jnp.asarray(len(clock) - 1), result)


def spread(
    run: Callable, adaptive: Adaptive, sharding: jax.sharding.Sharding | None
) -> Callable:
    """`run` with steps of its own for each sample, or for each device's share.

    Steps are then the largest number of any, and the result is success if all had it.
    """
    if not adaptive.per_sample and not isinstance(sharding, jax.sharding.NamedSharding):
        return run

    def share(y0, keys, cond):
        if adaptive.per_sample:
            one = lambda *own: run(*jax.tree.map(lambda a: a[None], own))  # noqa: E731
            ys, clocks, steps, result = jax.vmap(one)(y0, keys, cond)
            # (batch, frames, 1, ...) of each leaf becomes (frames, batch, ...)
            ys = jax.tree.map(lambda a: jnp.moveaxis(a[:, :, 0], 0, 1), ys)
            clocks = clocks[0]
        else:
            ys, clocks, steps, result = run(y0, keys, cond)
        ok = result == dfx.RESULTS.successful
        return ys, clocks, steps.max()[None], ok.all()[None]

    if isinstance(sharding, jax.sharding.NamedSharding):
        batch = jax.P(sharding.spec[0] if len(sharding.spec) else None)
        whole = jax.P()
        # No collective inside: every device goes its own way to the end.
        share = jax.shard_map(
            share,
            mesh=sharding.mesh,
            in_specs=(batch, batch, batch),
            out_specs=(jax.P(None, *batch), whole, batch, batch),
            check_vma=False,
        )

    def together(y0, keys, cond):
        ys, clocks, steps, ok = share(y0, keys, cond)
        steps, results = steps.max(), dfx.RESULTS
        short = steps >= adaptive.max_steps
        bad = results.where(short, results.max_steps_reached, results.nonfinite)
        return ys, clocks, steps, results.where(ok.all(), results.successful, bad)

    return together
