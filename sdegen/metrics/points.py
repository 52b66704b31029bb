"""Sets of points as every metric reads them: float64, one row per point, checked."""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from ..typing import float_array

Points: TypeAlias = Shaped[ArrayLike, "_ ..."]
Weights: TypeAlias = Shaped[ArrayLike, "_"] | None
Rows: TypeAlias = Float[np.ndarray, "_ _"]

BLOCK = 1024
"""Rows of a distance matrix held at a time: 10,000 columns of them are 80 MB."""


def points(x: Points, name: str, least: int = 1) -> Rows:
    """`x` of shape (n, ...) as (n, d); a sentence where it is no set of points."""
    x = np.asarray(x)
    if x.ndim == 0 or x.size == 0:
        raise ValueError(
            f"{name} must be points of shape (n, ...), got {x.shape}, which holds no "
            "point."
        )
    if len(x) < least:
        raise ValueError(f"{name} needs {least} points or more, got {len(x)}.")
    x = np.asarray(x, dtype=np.float64).reshape(len(x), -1)
    wrong = int(np.sum(~np.isfinite(x).all(axis=1)))
    if wrong:
        raise ValueError(
            f"{name} has {wrong} of {len(x)} points that are not finite. A distance "
            "would hide them: find out why, or count them and leave them out."
        )
    return x


def pair(
    x: Points, y: Points, names: tuple[str, str] = ("x", "y"), least: int = 1
) -> tuple[Rows, Rows]:
    """Two sets of points of one space, each as (points, d)."""
    _same_space(np.shape(x), np.shape(y), names)
    return points(x, names[0], least), points(y, names[1], least)


def device_pair(
    x: Points, y: Points, metric: str
) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
    """Two sets of points of one space as JAX arrays; their values are not looked at."""
    x, y = float_array(x), float_array(y)
    _same_space(x.shape, y.shape, ("x", "y"))
    if x.size == 0 or y.size == 0:
        raise ValueError(
            f"{metric} needs two sets with points, got {x.shape} and {y.shape}."
        )
    return x.reshape(len(x), -1), y.reshape(len(y), -1)


def _same_space(x, y, names):
    """Check the shapes of two sets; points of shape () and (1,) are the same."""
    if (x[1:] or (1,)) != (y[1:] or (1,)):
        raise ValueError(
            f"{names[0]} and {names[1]} must be sets of points in the same space, of "
            f"shapes that agree after the first axis, got {x} and {y}. Reshape one."
        )


def weights(w: Weights, n: int, name: str) -> Float[np.ndarray, " n"]:
    """`w`, or n equal weights: non-negative, with the sum 1."""
    if w is None:
        return np.full(n, 1 / n)
    w = np.asarray(w, dtype=np.float64)
    if w.shape != (n,):
        raise ValueError(
            f"{name} needs one weight for each of the {n} points, got shape {w.shape}."
        )
    if not (np.isfinite(w).all() and w.min() >= 0 and abs(w.sum() - 1) < 1e-5):
        raise ValueError(
            f"{name} must be finite, non-negative and sum to 1, got a smallest of "
            f"{w.min():g} and a sum of {w.sum():g}. Divide them by their sum."
        )
    return w / w.sum()


def blocks(x: Rows, y: Rows, metric="euclidean") -> Iterator[np.ndarray]:
    """The matrix of distances from `x` to `y`, some rows at a time."""
    from scipy.spatial.distance import cdist

    for start in range(0, len(x), BLOCK):
        yield cdist(x[start : start + BLOCK], y, metric)
