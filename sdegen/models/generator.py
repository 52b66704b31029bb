"""Models that are sampled by an equation of their own, not by that of a path."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..processes.reverse import probability_flow, reverse
from ..processes.sde import AbstractSDE, noise_depends_on_state
from ..solvers.grids import Adaptive, whole_steps
from ..solvers.solve import brownian_path, check_solver
from ..solvers.sscs import BackwardTerm
from ..typing import PyTree, RandomKey, Scalar, ScalarLike, float_array, is_traced
from .model import AbstractModel
from .problem import AbstractProblem, Table


class AbstractGenerator(AbstractModel):
    """From noise to data on a clock from 0 to 1, for one sample, in its own state."""

    noisy_solver: ClassVar = dfx.Euler
    """The class of the solver of its noise by default."""

    @abc.abstractmethod
    def start(self, key: RandomKey, shape: tuple[int, ...], dtype=None) -> Array:
        """A draw of the state at clock 0, for data of shape `shape`."""

    @abc.abstractmethod
    def backward(self, stochasticity, cond: PyTree = None) -> AbstractSDE | Callable:
        """The equation of a sample: an SDE, or for None a field (s, state) -> slope."""

    def data(self, state: Array) -> Array:
        """The data of the state at clock 1: the state itself."""
        return state

    def time(self, s: ScalarLike) -> Array:
        """The time at clock s: 1 - s where a model has no other."""
        return 1 - s  # pyright: ignore[reportReturnType]

    def clock_of(self, t: ScalarLike) -> Array:
        """The clock at time t, the inverse of `time`."""
        return 1 - t  # pyright: ignore[reportReturnType]

    def problem(
        self, shape, *, solver, grid, stochasticity, denoise, refinable, cond, start
    ):
        """The equation of the model on its clock; see `AbstractModel.problem`."""
        if denoise or refinable:
            raise ValueError(
                "denoise and refinable are for a denoiser on a path, and "
                f"{type(self).__name__} runs an equation of its own. Leave them out."
            )
        adaptive, noisy = isinstance(grid, Adaptive), stochasticity is not None
        if solver is None:
            quick = self.noisy_solver() if noisy else dfx.Heun()
            solver = (dfx.ShARK() if noisy else dfx.Tsit5()) if adaptive else quick
        check_solver(solver, adaptive, noisy)
        dtype = jnp.result_type(float) if start is None else start.dtype
        start = lambda k: self.start(k, shape[1:], dtype)  # noqa: E731
        state = jax.eval_shape(start, jax.random.key(0))
        if not adaptive:
            grid = self.steps(grid, dtype)
        one = jax.tree.map(lambda c: c[0], cond)
        check_equation(self.backward(stochasticity, one), stochasticity, solver, state)
        return _EquationProblem(self, solver, grid, stochasticity, jnp.zeros((), dtype))

    def steps(self, grid: Any, dtype) -> Float[Array, " points"]:
        """The clock of a number of steps (200 for None) or of an array of times."""
        grid = 200 if grid is None else grid
        if (count := whole_steps(grid, "sample")) is not None:
            return jnp.arange(count + 1, dtype=dtype) / count
        try:
            times = float_array(grid).astype(dtype)
        except (TypeError, ValueError):
            times = jnp.zeros(())
        clock = jnp.asarray(self.clock_of(times), dtype)
        if is_traced(clock):
            return clock
        values, ts = np.atleast_1d(np.asarray(clock)), np.asarray(times)
        first, last = (float(self.time(jnp.asarray(s, dtype))) for s in (0.0, 1.0))
        if ts.ndim != 1 or len(values) < 2 or not (np.diff(values) > 0).all():
            way = "fall" if first > last else "rise"
            raise ValueError(
                f"for {type(self).__name__} grid is a number of steps, Adaptive(...), "
                f"or an array of times that {way} from {first:g} to {last:g}, got "
                f"{grid!r:.80}."
            )
        slack = 10 * np.finfo(values.dtype).eps
        if values[0] < -slack or values[-1] > 1 + slack:
            raise ValueError(
                f"grid times of {type(self).__name__} lie between {first:g} and "
                f"{last:g}, got {ts[0]:g} to {ts[-1]:g}."
            )
        return jnp.clip(clock, 0, 1)


class _EquationProblem(AbstractProblem):
    """The equation of a generator, for a batch."""

    generator: AbstractGenerator
    solver: dfx.AbstractSolver
    grid: Any
    stochasticity: Scalar | None
    zero: Scalar  # of the precision of the state
    draws_start: ClassVar = True

    def table(self):
        clock = self.grid
        if self.adaptive is not None:
            clock = jnp.array([0.0, 1.0], self.zero.dtype)
        return Table(clock, self.times(clock))

    def start(self, table, key, shape):
        return self.generator.start(key, shape, table.clock.dtype)

    def times(self, clock):
        return jax.vmap(self.generator.time)(clock)

    def decode(self, t, y):
        return jax.vmap(self.generator.data)(y)

    def equation(self, table, keys, cond, shape, refinable):
        noisy = self.stochasticity is not None
        process = lambda c: self.generator.backward(self.stochasticity, c)  # noqa: E731
        if self.solver.term_structure is not BackwardTerm:
            return batch_equation(process, cond, noisy)
        brownian = None
        if noisy:
            start = lambda k: self.start(table, k, shape)  # noqa: E731
            size, area = jax.eval_shape(start, keys[0]).shape, dfx.SpaceTimeLevyArea
            brownian = brownian_path(table.clock, keys, size, area, refinable=False)
        return BackwardTerm(process, cond, brownian), None


def backward_of(sde: AbstractSDE, score: Callable, stochasticity: Scalar | None):
    """The reverse SDE by a score, or for None the probability flow."""
    if stochasticity is None:
        return probability_flow(sde, score)
    return reverse(sde, score, stochasticity)


def batch_equation(process: Callable, cond: PyTree, noisy: bool):
    """(drift, noise or None) of a batch, from `process(cond)`, that of one sample."""

    def drift(s, y, args):
        def one(y, c):
            return process(c).drift(s, y) if noisy else process(c)(s, y)

        return jax.vmap(one)(y, cond)

    def noise(s, y, args):
        # Noise that ignores x is one number (or array) for the batch, which tells the
        # solvers for additive noise that it is additive.
        own = process(jax.tree.map(lambda c: c[0], cond))
        if not noise_depends_on_state(own, s, y[0]):
            return own.diffusion(s, jax.lax.stop_gradient(y[0]))
        g = jax.vmap(lambda y, c: process(c).diffusion(s, y))(y, cond)
        return g.reshape(g.shape + (1,) * (y.ndim - g.ndim))

    return drift, noise if noisy else None


def check_equation(process, stochasticity, solver, state) -> None:
    """Shapes, and the calculus of the solver, for one sample."""
    noisy = isinstance(process, AbstractSDE)
    if noisy != (stochasticity is not None):
        raise ValueError(
            "backward(stochasticity) must return an AbstractSDE, and for None a "
            f"function (s, state), got {type(process).__name__}."
        )
    if solver.term_structure is BackwardTerm:
        solver.check(process)
    zero = jnp.zeros(state.shape, state.dtype)
    drift = process.drift if noisy else process
    check_shape("the drift of a generator", drift, jnp.zeros(()), zero)
    if noisy:
        check_ito(process, 0.5, zero, solver)


def check_shape(name: str, function: Callable, t, x, scalar: bool = False) -> None:
    """Refuse a function (t, x) of one sample that returns another shape."""
    found = jax.eval_shape(function, t, x).shape
    if found != x.shape and not (scalar and found == ()):
        raise ValueError(
            f"{name} must return an array of the shape of one state, {x.shape}"
            f"{' or a scalar' * scalar}, got {found}."
        )


def check_ito(process: AbstractSDE, t: ScalarLike, x: Array, solver) -> None:
    """Refuse a solver of another calculus where the noise depends on the state."""
    ito = isinstance(solver, dfx.AbstractItoSolver)
    if not ito and noise_depends_on_state(process, t, x):
        raise ValueError(
            "the noise of this process depends on x and its equation is Ito's, but "
            f"{type(solver).__name__} is not an Ito solver. Use Euler()."
        )
