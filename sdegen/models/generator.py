"""What turns noise into data by an equation of its own.

`sample` follows the flow or a reverse SDE of a denoiser, in coordinates made for paths.
A process that has no path alpha x0 + sigma z (a nonlinear SDE, a state with momentum, a
flow between two laws) says here how it starts, by which equation it moves and what the
data are when it has arrived, and `sample` does the rest.
"""

import abc
from collections.abc import Callable

from jaxtyping import Array, Float

from ..processes.sde import AbstractSDE
from ..typing import PyTree, RandomKey, Scalar
from .model import AbstractModel


class AbstractGenerator(AbstractModel):
    """From noise to data on a clock that rises from 0 (noise) to 1 (data).

    Everything is for one sample. The state may have another shape than the data. An
    attribute `noisy_solver`, a class, is the solver of its noise by default.
    """

    @abc.abstractmethod
    def start(
        self, key: RandomKey, shape: tuple[int, ...], dtype=None
    ) -> Float[Array, "..."]:
        """A draw of the state at clock 0, for data of shape `shape`."""

    @abc.abstractmethod
    def backward(
        self, stochasticity: Scalar | None, cond: PyTree = None
    ) -> AbstractSDE | Callable:
        """The equation of the state: an SDE, or for None a field (s, state) -> slope.

        `cond` is the condition of the one sample, or None.
        """

    @abc.abstractmethod
    def data(self, state: Float[Array, "..."]) -> Float[Array, "..."]:
        """The data of the state at clock 1."""
