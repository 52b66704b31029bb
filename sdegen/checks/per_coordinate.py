"""A path whose coordinates have noise levels of their own is as many scalar paths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ..processes.noise import AbstractNoise
from ..processes.path import AbstractPath, check_sample
from ..processes.sde import AbstractSDE
from ..typing import Scalar
from .report import Row


class Coordinate(AbstractPath, AbstractSDE):
    """One coordinate of a path, with the drift and the noise that the path declares.

    `index` is its place in the shape of alpha and sigma. The others are held at zero.
    """

    path: AbstractPath
    index: tuple[int, ...]
    t_min: Scalar
    t_max: Scalar
    noise: AbstractNoise

    def alpha(self, t):
        """The path's, in this coordinate."""
        return self.path.scales(t)[0][self.index]

    def sigma(self, t):
        """The path's, in this coordinate."""
        return self.path.scales(t)[1][self.index]

    def drift(self, t, x):
        """The path's, in this coordinate, for every entry of x."""
        return self._each(self.path.drift, t, x)  # pyright: ignore[reportAttributeAccessIssue]

    def diffusion(self, t, x):
        """The path's, in this coordinate, for every entry of x."""
        return self._each(self.path.diffusion, t, x)  # pyright: ignore[reportAttributeAccessIssue]

    def _each(self, coefficient, t, x):
        shape = jax.eval_shape(self.path.scales, self.t_min)[0].shape

        def one(entry):
            state = jnp.zeros(shape, x.dtype).at[self.index].set(entry)
            return jnp.broadcast_to(coefficient(t, state), shape)[self.index]

        return jax.vmap(one)(x.ravel()).reshape(x.shape)


def chosen(path: AbstractPath, shape: tuple[int, ...] | None) -> list[Coordinate]:
    """The coordinates with the least and with the most noise, halfway in time."""
    if shape is not None:
        check_sample(path, shape)
    alpha, sigma = path.scales((path.t_min + path.t_max) / 2)
    ratio = np.asarray(sigma / alpha)
    places = {np.unravel_index(f(ratio), ratio.shape) for f in (np.argmin, np.argmax)}
    return [
        Coordinate(path, place, path.t_min, path.t_max, path.noise)
        for place in sorted(tuple(map(int, place)) for place in places)
    ]


def labelled(rows: list[Row], coordinate: Coordinate) -> list[Row]:
    """The rows, with the coordinate in what they say they compare."""
    where = ",".join(map(str, coordinate.index))
    return [dataclasses.replace(row, what=f"[{where}] {row.what}"[:58]) for row in rows]
