"""The sliced Wasserstein distance, on the device.

    SW_2^2 = E_theta W_2^2(<theta, x>, <theta, y>)                                  (1)

with theta uniform on the unit sphere (Rabin et al. 2012, "Wasserstein barycenter and
its application to texture mixing"; Bonneel et al. 2015, "Sliced and Radon Wasserstein
barycenters of measures"). Each direction is a problem on the line, solved by sorting.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..typing import Scalar, Seed, random_key
from .points import Points, device_pair


class Estimate(NamedTuple):
    """A value and the standard error of the random directions alone."""

    value: Scalar
    error: Scalar


def sliced_w2(key: Seed, x: Points, y: Points, directions: int = 256) -> Estimate:
    """The sliced 2-Wasserstein distance, in units of the data.

    SW_2 of a shift by v is |v| / sqrt(d): compare only within one dimension d. Points
    that are not finite give nan.

    **Arguments:**
    - `key`: draws the directions.
    - `x`, `y`: two sets of points of one space.
    - `directions`: how many estimate the mean of (1), default 256.
    """
    x, y = device_pair(x, y, "sliced_w2")
    if directions < 2:
        raise ValueError(f"sliced_w2 needs at least 2 directions, got {directions}.")
    return _sliced_w2(random_key(key), x, y, directions)


@functools.partial(jax.jit, static_argnames="directions")
def _sliced_w2(key, x, y, directions) -> Estimate:
    centre = y.mean(axis=0)  # a common shift changes nothing, and saves digits
    x, y = x - centre, y - centre
    i, j, widths = coupling(len(x), len(y))

    def along(k):
        theta = jax.random.normal(jax.random.fold_in(key, k), x.shape[1:], x.dtype)
        theta = theta / jnp.linalg.norm(theta)
        # the fast matrix products of accelerators keep three digits
        dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
        gaps = jnp.sort(dot(x, theta))[i] - jnp.sort(dot(y, theta))[j]
        return jnp.sum(widths * gaps**2)

    squares = jax.lax.map(along, jnp.arange(directions), batch_size=32)
    value = jnp.sqrt(squares.mean())
    # d sqrt(s) = ds / (2 sqrt(s)); two equal sets have no error at all
    error = squares.std(ddof=1) / np.sqrt(directions)
    return Estimate(value, jnp.where(value > 0, error / (2 * value), 0.0))


def coupling(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The monotone coupling of n and m equal weights: indices i, j and their mass.

    Sorted point i of the first meets sorted point j of the second. Levels are counted
    in units of 1 / (n m), so nothing is rounded.
    """
    levels = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    widths = np.diff(levels, prepend=0) / (n * m)
    return (levels - 1) // m, (levels - 1) // n, widths
