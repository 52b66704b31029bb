"""One interface for all methods: draw from what a method takes for p(x0 | y)."""

import abc
import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Float

from ...models.denoiser import AbstractDenoiser
from ...models.model import conditions
from ...sampling.drive import check_sharding, whole_numbers
from ...solvers.grids import Adaptive, Grid
from ...solvers.solve import Solution
from ...typing import PyTree, Seed, is_traced, random_key
from .linear import is_linear, is_projection
from .measurement import Measurement


@eqx.filter_jit
def _exact(measurement, x):
    """x + A' (y - A x): x at t_min has noise that a measurement without any has not."""
    transpose = jax.linear_transpose(measurement.apply, x)
    return x + transpose(measurement.residual(x))[0]


class Options(NamedTuple):
    """What a method takes of the arguments of `sample`."""

    grid: Grid | Adaptive | Array | int | None
    cond: PyTree
    start: Float[Array, "batch ..."] | None
    denoise: bool | None
    trajectory: bool
    sharding: jax.sharding.Sharding | None


class AbstractMethod(eqx.Module):
    """A way to draw x0 given y = A(x0) + noise, from a denoiser of x0."""

    def __call__(
        self,
        key: Seed,
        denoiser: AbstractDenoiser,
        measurement: Measurement,
        shape: tuple[int, ...],
        *,
        grid: Grid | Adaptive | Array | int | None = None,
        cond: PyTree = None,
        start: Float[Array, "batch ..."] | None = None,
        denoise: bool | None = None,
        trajectory: bool = False,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Solution:
        """`shape[0]` draws: of one posterior, or one for each y of the measurement.

        **Arguments:**
        - `key`: a random key; draw i depends on (key, i).
        - `denoiser`: that of x0 without y.
        - `measurement`: y, and the operator that it comes from.
        - `shape`: (batch, ...).
        - `grid`, `cond`, `start`, `denoise`, `trajectory`, `sharding`: as in `sample`.

        **Returns:** a `Solution`. Where std is 0 and A has A A' A = A, as a mask, A x
        is y to rounding.
        """
        shape = whole_numbers(shape)
        measurement.check(shape)
        check_sharding(sharding, shape)
        cond = conditions(denoiser, cond, shape[0])
        options = Options(grid, cond, start, denoise, trajectory, sharding)
        out = self.draw(random_key(key), denoiser, measurement, shape, options)
        if is_traced(measurement.std) or float(measurement.std) > 0:
            return out
        own = measurement.operator, shape[1:]
        if not is_linear(*own) or not is_projection(*own):
            return out
        return dataclasses.replace(out, x=_exact(measurement, out.x))

    @abc.abstractmethod
    def draw(self, key, denoiser, measurement, shape, options: Options) -> Solution:
        """The draws, of checked shapes; the arguments are those of a call."""
