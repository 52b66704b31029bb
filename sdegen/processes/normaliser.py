"""Data in units in which they have mean 0 and variance 1, and paths in these units.

    x = shift + scale u,    u = (x - shift) / scale                                (1)

A path of u is a path whose basis is (1): training, solvers and likelihoods work on u,
and every verb takes and returns x.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..typing import float_array, is_traced
from .basis import PIXELS, AbstractBasis
from .path import AbstractPath, basis_of
from .sde import AbstractLinearSDE


class Normaliser(AbstractBasis):
    """The change of units (1), for all coordinates or for each of them.

    **Arguments:**
    - `shift`, `scale`: the mean and the standard deviation of the data, numbers or
      arrays that broadcast against one sample. A coordinate whose scale is 0 is a
      constant: it always comes back as its shift.
    - `basis`: an orthonormal basis of u; the data as they are.

    **Raises:** ValueError for a scale that is negative or not finite.
    """

    shift: Float[Array, "..."] = eqx.field(converter=float_array)
    scale: Float[Array, "..."] = eqx.field(converter=float_array)
    basis: AbstractBasis = PIXELS

    @classmethod
    def of(cls, data: Any, per_coordinate: bool | None = None) -> "Normaliser":
        """That of data, measured in float64.

        **Arguments:**
        - `data`: floating-point data, (n, ...).
        - `per_coordinate`: whether each coordinate has its own mean and deviation; by
          default those of vectors, (n, d), have, and larger samples share them, so
          that images and series keep their proportions.

        **Raises:** ValueError for data that are not finite.
        """
        if per_coordinate is None:
            per_coordinate = np.ndim(data) == 2
        axes = 0 if per_coordinate else None
        if is_traced(data):
            return cls(jnp.mean(data, axes), jnp.std(data, axes))
        # The deviation is relative to the mean: data far from 0 lose no digits.
        values = np.asarray(data)
        wide = values.dtype if values.dtype == np.float64 else np.float32
        values = values.astype(np.float64)
        shift = values.mean(axes)
        scale = np.sqrt(np.square(values - shift).mean(axes))
        # What the rounding of the data explains is no deviation.
        scale = np.where(scale > np.finfo(wide).eps * np.abs(shift), scale, 0.0)
        if not (np.isfinite(shift).all() and np.isfinite(scale).all()):
            bad = np.argmin(np.isfinite(values).reshape(len(values), -1).all(1))
            raise ValueError(
                f"the data are not finite: row {bad} is the first that is not. Remove "
                "such rows, or replace what is missing in them."
            )
        return cls(shift, scale)

    @property
    def orthonormal(self):
        """`basis`."""
        return self.basis

    @property
    def unit(self):
        """The scale; 1 for a coordinate that is constant."""
        return jnp.where(self.scale > 0, self.scale, 1.0)

    def coordinates(self, x):
        """u in its basis, for data x."""
        x = jnp.asarray(x)
        u = (x - self.shift.astype(x.dtype)) / self.unit.astype(x.dtype)
        return self.basis.coordinates(u)

    def data(self, coordinates):
        """x, for u in its basis."""
        u = self.basis.data(coordinates)
        return self.shift.astype(u.dtype) + self.scale.astype(u.dtype) * u

    def log_det(self, shape):
        """Minus the sum of log(scale) over the coordinates that are not constant."""
        return -jnp.sum(jnp.log(jnp.broadcast_to(self.unit, shape)))

    def __check_init__(self):
        if is_traced((self.shift, self.scale)):
            return
        shift, scale = np.asarray(self.shift), np.asarray(self.scale)
        if not (np.isfinite(shift).all() and np.isfinite(scale).all()):
            raise ValueError(
                f"a Normaliser needs a finite shift and scale, got {shift} and {scale}."
            )
        if (scale < 0).any():
            raise ValueError(
                "a Normaliser needs a scale that is positive, or 0 for a coordinate "
                f"that is constant, got {scale}."
            )


def check_units(what: str, path: AbstractPath, other: AbstractPath) -> None:
    """Refuse two denoisers of which one has units of its own and the other has not."""
    if len({isinstance(basis_of(p), Normaliser) for p in (path, other)}) == 2:
        raise ValueError(
            f"{what} compares two denoisers on one path, and one of them has other "
            "units (a Normaliser). Make the exact one on `model.path`, or give the "
            "model sigma_data, so that `fit` leaves the units of the data."
        )


class _Normalised(AbstractPath):
    """A path of u, in the units of `basis`; made by `normalised`."""

    path: AbstractPath
    basis: Normaliser

    @property
    def t_min(self):
        """That of the path of u."""
        return self.path.t_min

    @property
    def t_max(self):
        """That of the path of u."""
        return self.path.t_max

    @property
    def noise(self):
        """That of the path of u."""
        return self.path.noise

    def alpha(self, t):
        """That of the path of u."""
        return self.path.alpha(t)

    def sigma(self, t):
        """That of the path of u."""
        return self.path.sigma(t)

    def scales(self, t):
        """Those of the path of u."""
        return self.path.scales(t)

    def closed_inverse(self, h):
        """That of the path of u."""
        return self.path.closed_inverse(h)

    def levels(self):
        """Those of the path of u."""
        return self.path.levels()

    def training_time(self, u, sigma_data):
        """That of the path of u."""
        return self.path.training_time(u, sigma_data)


class _NormalisedSDE(_Normalised, AbstractLinearSDE):
    """A `_Normalised` with Gaussian noise, hence a linear SDE of u."""


def normalised(path: AbstractPath, normaliser: Normaliser) -> _Normalised:
    """`path` for data in the units of `normaliser`.

    **Arguments:**
    - `path`: any path; if it has a basis, u is held in it.
    - `normaliser`: the units of the data; its own basis is replaced by the path's.

    **Raises:** ValueError for a path that has units already.
    """
    if isinstance(basis := basis_of(path), Normaliser):
        raise ValueError(
            f"this {type(path).__name__} has a Normaliser already. Start from the path "
            "inside, `path.path`."
        )
    kind = _NormalisedSDE if path.noise.gaussian else _Normalised
    return kind(path, Normaliser(normaliser.shift, normaliser.scale, basis))
