"""The one place that calls Diffrax: a batch on a rising clock, any kind of steps.

On fixed grids there are no host callbacks, no run-time errors and no collectives in the
step loop, so that it lowers for any platform and never hangs a pod.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

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
    where the solver's count is not known. `result` is a `diffrax.RESULTS` for each
    sample; `ok`, (batch,), says which are success, and `ok.all()` whether all are.
    `times` are the frames of `trajectory`, (frames, batch, ...), both None unless asked
    for.
    """

    x: Num[Array, "batch ..."]
    evaluations: Int[Array, ""]
    result: dfx.RESULTS
    times: Float[Array, " frames"] | None = None
    trajectory: Num[Array, "frames batch ..."] | None = None

    @property
    def ok(self) -> Bool[Array, " batch"]:
        """Which samples reached the end with finite numbers."""
        return self.result == dfx.RESULTS.successful


def checked(result: dfx.RESULTS, x: PyTree) -> dfx.RESULTS:
    """`result` of each sample, "nonfinite" where `x` is: fixed steps never look."""
    leaves = [jnp.isfinite(leaf) for leaf in jax.tree.leaves(x)]
    finite = [a.all(axis=tuple(range(1, a.ndim))) for a in leaves]
    finite = functools.reduce(jnp.logical_and, finite)
    each = jax.tree.map(lambda code: jnp.broadcast_to(code, finite.shape), result)
    pick = lambda ok, code: dfx.RESULTS.where(ok, code, dfx.RESULTS.nonfinite)  # noqa: E731
    return jax.vmap(pick)(finite, each)


def worst_sample_norm(error: PyTree) -> Array:
    """The largest, over samples and leaves, of each sample's root mean square."""

    def worst(error):
        return jnp.max(jnp.mean(error**2, axis=tuple(range(1, error.ndim))))

    return jnp.sqrt(functools.reduce(jnp.maximum, map(worst, jax.tree.leaves(error))))


class _PIDWithFloor(dfx.AbstractStepSizeController):
    """PID steps, and a code where a step of the length `floor` is still refused.

    Diffrax's own `dtmin` would also stop at a last step that the end cuts short. A
    sample that has become nan, or that no step can solve, ends here.
    """

    pid: dfx.PIDController
    floor: Scalar

    def wrap(self, direction):
        return _PIDWithFloor(self.pid.wrap(direction), self.floor)

    def init(self, *args):
        return self.pid.init(*args)

    def adapt_step_size(self, *args):
        keep, t0, t1, jump, state, result = self.pid.adapt_step_size(*args)
        done = keep | (t1 - t0 >= self.floor)  # false where t1 is nan
        result = dfx.RESULTS.where(done, result, dfx.RESULTS.dt_min_reached)
        return keep, t0, t1, jump, state, result


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
    - `adaptive`: let the error estimate choose the steps, one size for the whole batch
      (see `spread`); none by default.
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
    if adaptive is None or not isinstance(
        adaptive.adjoint, dfx.RecursiveCheckpointAdjoint
    ):
        solver = _in_any_mode(solver)
    if adaptive is None:
        rows = rows if stages_at_ends(solver) else None
        return _scan(term, y0, clock, solver, trajectory, rows)
    # Without dt0 Diffrax would try 0.01 whatever the scale of the clock.
    first, last = clock[0], clock[-1]
    span = last - first
    # A step below the tree's resolution would see noise of the wrong distribution.
    floor = 8 * jnp.finfo(clock.dtype).eps if noise is None else 2 * _TREE
    ts = jnp.linspace(first, last, _FRAMES) if trajectory else last[None]
    out = dfx.diffeqsolve(
        term,
        solver,
        t0=first,
        t1=last,
        dt0=0.01 * span,
        y0=y0,
        stepsize_controller=_controller(adaptive, y0, floor * span),
        saveat=dfx.SaveAt(ts=ts) if trajectory else dfx.SaveAt(t1=True),
        adjoint=adaptive.adjoint,
        max_steps=adaptive.max_steps,
        throw=False,
    )
    return Solved(out.ys, ts, out.stats["num_steps"], out.result)


def _controller(adaptive, y0, floor) -> _PIDWithFloor:
    dtype = jnp.result_type(*jax.tree.leaves(y0))
    rtol, atol = adaptive.rtol.astype(dtype), adaptive.atol.astype(dtype)
    pid = dfx.PIDController(rtol=rtol, atol=atol, norm=worst_sample_norm)
    return _PIDWithFloor(pid, floor)


def _in_any_mode(solver):
    """`solver` with stages in a loop that also has derivatives in forward mode."""
    if isinstance(solver, dfx.AbstractWrappedSolver):
        return dataclasses.replace(solver, solver=_in_any_mode(solver.solver))
    if getattr(solver, "scan_kind", "own") is not None:
        return solver
    kind = "lax" if isinstance(solver, dfx.AbstractSRK) else "bounded"
    return dataclasses.replace(solver, scan_kind=kind)


@contextlib.contextmanager
def derivatives_said():
    """Say which argument gives the derivatives that a solve does not have."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise ValueError(
            "these adaptive steps have first derivatives in reverse mode alone. Use "
            'Adaptive(..., adjoint="forward") for jvp and jacfwd, adjoint="direct" for '
            "second derivatives too, or a fixed grid, which has all."
        ) from error


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


def spread(run: Callable, sharding: jax.sharding.Sharding | None) -> Callable:
    """`run` with steps of its own for each sample: one that fails fails alone.

    Steps are then the largest number of any. Devices exchange nothing on the way.
    """

    def share(y0, keys, cond):
        def one(*own):
            ys, *rest = run(*jax.tree.map(lambda a: a[None], own))
            return jax.tree.map(lambda a: a.squeeze(1), ys), *rest

        return jax.vmap(one, out_axes=(1, None, 0, 0))(y0, keys, cond)

    if isinstance(sharding, jax.sharding.NamedSharding):
        batch = jax.P(sharding.spec[0] if len(sharding.spec) else None)
        share = jax.shard_map(
            share,
            mesh=sharding.mesh,
            in_specs=(batch, batch, batch),
            out_specs=(jax.P(None, *batch), jax.P(), batch, batch),
            check_vma=False,
        )

    def together(y0, keys, cond):
        ys, clocks, steps, result = share(y0, keys, cond)
        return ys, clocks, steps.max(), result

    return together
