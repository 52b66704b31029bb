"""The coordinates in which a process acts on each number of a sample separately.

White noise stays white in an orthonormal basis, and no density changes its value. A
`Normaliser` scales besides, and says by how much.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..typing import Scalar


class AbstractBasis(eqx.Module):
    """A change of coordinates of the last axes of an array, orthonormal by default.

    Both methods take one sample, or a batch with any leading axes, and keep its shape.
    """

    @property
    def orthonormal(self) -> "AbstractBasis":
        """The part that only turns: networks see data without it."""
        return self

    @property
    def unit(self) -> Scalar | float:
        """How long one unit of the coordinates is in data."""
        return 1.0

    def log_det(self, shape: tuple[int, ...]) -> Scalar | float:
        """log |d coordinates / d data| of one sample of `shape`."""
        return 0.0

    @abc.abstractmethod
    def coordinates(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The coordinates of data x."""

    @abc.abstractmethod
    def data(self, coordinates: Float[Array, "..."]) -> Float[Array, "..."]:
        """The data with the given coordinates."""


class DCT(AbstractBasis):
    """The cosine transform (type II): Ahmed, Natarajan and Rao 1974.

    **Arguments:**
    - `axes`: the axes to transform, counted from the end, default (-3, -2).
    """

    axes: tuple[int, ...] = eqx.field(default=(-3, -2), static=True)

    def __check_init__(self):
        if not all(isinstance(a, int) and a < 0 for a in self.axes):
            raise ValueError(
                "axes of a basis are counted from the end: use negative ones, such as "
                f"(-3, -2), got {self.axes}."
            )

    def coordinates(self, x):
        """One coordinate for each frequency, lowest first."""
        return self._apply(x, inverse=False)

    def data(self, coordinates):
        """The data with these frequencies."""
        return self._apply(coordinates, inverse=True)

    def _apply(self, x, *, inverse):
        if x.ndim < -min(self.axes, default=0):
            raise ValueError(
                f"this basis transforms the axes {self.axes}, counted from the end, "
                f"got an array of shape {x.shape}. Give axes that the data have."
            )
        for axis in self.axes:
            matrix = jnp.asarray(cosines(x.shape[axis]), x.dtype)
            matrix = matrix.T if inverse else matrix
            product = jnp.tensordot(x, matrix, ((axis,), (1,)), precision="highest")
            x = jnp.moveaxis(product, -1, axis)
        return x


PIXELS = DCT(axes=())
"""The data as they are: no axis is transformed."""


def cosines(n: int) -> np.ndarray:
    """The orthonormal DCT-II matrix: row k is the wave of frequency k, (n, n)."""
    k, i = np.arange(n)[:, None], np.arange(n)[None, :]
    matrix = np.sqrt(2 / n) * np.cos(np.pi * k * (2 * i + 1) / (2 * n))
    matrix[0] /= np.sqrt(2)
    return matrix


def laplacian(shape: tuple[int, ...], axes: tuple[int, ...] = (-3, -2)) -> np.ndarray:
    """Minus the eigenvalues of the Laplacian on the unit pixel grid, in the DCT.

    lambda_k = sum over axes of (pi k / n)^2 (Rissanen et al. 2023, "Generative
    modelling with inverse heat dissipation", eq. 6).

    **Arguments:**
    - `shape`: of one sample.
    - `axes`: the axes that are space, counted from the end, default (-3, -2).
    """
    total = np.zeros([1] * len(shape))
    for axis in axes:
        wave = (np.pi * np.arange(shape[axis]) / shape[axis]) ** 2
        total = total + wave.reshape(-1, *[1] * (-1 - axis))
    return total
