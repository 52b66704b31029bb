"""One interface for all: a method draws from what it takes for p(x0 | y)."""

import abc

import diffrax as dfx
import equinox as eqx
import jax

from ...models.denoiser import AbstractDenoiser
from ...sampling.sample import sample
from ...solvers.solve import Solution
from ...typing import PyTree, RandomKey, Scalar
from .linear import check_linear
from .measurement import Measurement


class AbstractMethod(eqx.Module):
    """A way to draw x0 given y = A(x0) + noise, from a denoiser of x0."""

    @abc.abstractmethod
    def __call__(
        self,
        key: RandomKey,
        denoiser: AbstractDenoiser,
        measurement: Measurement,
        shape: tuple[int, ...],
        *,
        grid=None,
        cond: PyTree = None,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Solution:
        """`shape[0]` draws: of one posterior, or one for each y of the measurement."""


class AbstractGuided(AbstractMethod):
    """A method that is a guidance: a denoiser from a denoiser and a measurement.

    `solver` and `stochasticity` are those of `sdegen.sample`; None is its default.
    """

    solver: eqx.AbstractVar[dfx.AbstractSolver | None]
    stochasticity: eqx.AbstractVar[Scalar]
    linear: eqx.AbstractClassVar[bool]
    """Whether it is for linear operators only."""

    @abc.abstractmethod
    def guide(
        self, denoiser: AbstractDenoiser, measurement: Measurement
    ) -> AbstractDenoiser:
        """The denoiser of x0 given x_t and y, as this method has it."""

    def __call__(
        self,
        key,
        denoiser,
        measurement,
        shape,
        *,
        grid=None,
        cond=None,
        sharding=None,
    ):
        """Draws by `sdegen.sample` from the guided denoiser."""
        measurement.check(tuple(shape))
        if self.linear:
            check_linear(measurement.operator, tuple(shape[1:]), type(self).__name__)
        return sample(
            key,
            self.guide(denoiser, measurement),
            shape,
            solver=self.solver,
            grid=grid,
            stochasticity=self.stochasticity,
            cond=cond,
            sharding=sharding,
        )
