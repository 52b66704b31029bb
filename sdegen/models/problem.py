"""How a model is sampled: what the driver of `sdegen.sampling` integrates."""

import abc
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..solvers.grids import Adaptive
from ..typing import PyTree, RandomKey, Scalar, ScalarLike, float_array, is_traced


def noise_level(stochasticity: ScalarLike) -> Scalar | None:
    """The stochasticity as a number, None for the flow."""
    if jnp.ndim(stochasticity):
        shape = jnp.shape(stochasticity)
        raise ValueError(f"stochasticity is one number, got an array of shape {shape}.")
    if is_traced(stochasticity):
        return float_array(stochasticity)
    level = float(stochasticity)
    if not level >= 0:
        what = "stochasticity must be >= 0 (0 is the flow, 1 the reverse SDE)"
        raise ValueError(f"{what}, got {level:g}.")
    return None if level == 0 else float_array(stochasticity)


class Table(NamedTuple):
    """The steps of a solve: the rising clock, its times, and rows for the equation."""

    clock: Float[Array, " points"]
    times: Float[Array, " points"]
    rows: PyTree = None


class AbstractProblem(eqx.Module):
    """A model with the solver and the grid of one call of `sample`, all checked."""

    solver: eqx.AbstractVar[dfx.AbstractSolver]
    grid: eqx.AbstractVar[Any]
    draws_start: eqx.AbstractClassVar[bool]
    """Whether half of a sample's key draws its start."""

    @property
    def adaptive(self) -> Adaptive | None:
        """The tolerances of adaptive steps, None for a fixed grid."""
        return self.grid if isinstance(self.grid, Adaptive) else None

    @abc.abstractmethod
    def table(self) -> Table:
        """The steps; with adaptive steps the first and the last point alone."""

    @abc.abstractmethod
    def start(self, table: Table, key: RandomKey, shape: tuple[int, ...]) -> Array:
        """A draw of one state at the start of the clock, for samples of `shape`."""

    def encode(self, table: Table, x: Array) -> Array:
        """The states at the start of the clock of a batch that is given: as it is."""
        return x

    @abc.abstractmethod
    def equation(self, table: Table, keys: Array, cond: PyTree, shape, refinable: bool):
        """(slope or Diffrax term, noise or None) for a batch, as `solve` takes them."""

    def times(self, clock: Float[Array, " frames"]) -> Float[Array, " frames"]:
        """The times at points of the clock: the clock itself."""
        return clock

    def decode(self, t: Array, y: Array) -> Array:
        """The samples (or points on their way) of states at time t: the states."""
        return y

    def finish(self, table: Table, y: Array, cond: PyTree) -> tuple[Array, int]:
        """(the samples of the last states, evaluations that this takes)."""
        return self.decode(table.times[-1], y), 0
