"""Deterministic degradations (t, x) -> F_t(x), with F_0 the identity, 0 <= t <= 1.

Blurring is the heat equation with mirrored borders, diagonal in the cosine transform:

    F(x) = C^T exp(-lambda sigma^2 / 2) C x,   lambda as in `basis.laplacian`       (1)
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..processes.basis import DCT, laplacian
from ..typing import Scalar, ScalarLike, number

_IMAGE = (-3, -2)


def dissipate(
    x: Float[Array, "..."], sigma: ScalarLike, axes: tuple[int, ...] = _IMAGE
) -> Float[Array, "..."]:
    """x blurred by a Gaussian filter, equation (1) (Rissanen et al. 2023, eq. 6).

    **Arguments:**
    - `x`: an array of any shape.
    - `sigma`: the standard deviation of the filter, in pixels.
    - `axes`: those along which x is blurred; (-3, -2).
    """
    basis = DCT(axes)
    frequencies = jnp.asarray(laplacian(x.shape, axes), x.dtype)
    damping = jnp.exp(-frequencies * jnp.asarray(sigma, x.dtype) ** 2 / 2)
    return basis.data(damping * basis.coordinates(x))


class Blur(eqx.Module):
    """A Gaussian blur whose width grows evenly from 0 to `sigma` pixels.

    **Arguments:**
    - `sigma`: the width at t = 1, in pixels; 4.
    - `axes`: those along which x is blurred; (-3, -2).
    """

    sigma: Scalar = number(4.0)
    axes: tuple[int, ...] = eqx.field(default=_IMAGE, static=True)

    def __call__(self, t, x):
        """x blurred to the width t sigma."""
        return dissipate(x, t * self.sigma, self.axes)


class Downsample(eqx.Module):
    """Averages over blocks of 1, 2, 4, ... pixels (Bansal et al. 2022, section 5.3).

    **Arguments:**
    - `factor`: the side of a block at t = 1, a power of two; 4.
    - `axes`: those of height and width; (-3, -2).
    """

    factor: int = eqx.field(default=4, static=True)
    axes: tuple[int, ...] = eqx.field(default=_IMAGE, static=True)

    def __check_init__(self):
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise ValueError(f"factor must be a power of two >= 2, got {self.factor}.")

    def __call__(self, t, x):
        """x in blocks: the levels next to t log2(factor), linearly between them."""
        levels, total = self.factor.bit_length() - 1, jnp.zeros_like(x)
        for level in range(levels + 1):
            share = jnp.maximum(0, 1 - abs(t * levels - level))
            total = total + share.astype(x.dtype) * self._average(x, 2**level)
        return total

    def _average(self, x, block):
        for axis in self.axes:
            if x.shape[axis] % block:
                raise ValueError(
                    f"Downsample({self.factor}) needs sides that {self.factor} "
                    f"divides, got an array of shape {x.shape}. Pad it."
                )
            y = jnp.moveaxis(x, axis, -1)
            means = y.reshape(*y.shape[:-1], -1, block).mean(-1)
            x = jnp.moveaxis(jnp.repeat(means, block, axis=-1), -1, axis)
        return x


class Inpaint(eqx.Module):
    """What is marked fades.

    **Arguments:**
    - `mask`: 1 where x fades, else 0; it broadcasts against a sample.
    - `fill`: the value to which it fades; 0.
    """

    mask: Float[Array, "..."] = number()
    fill: Scalar = number(0.0)

    def __call__(self, t, x):
        """x with the share t of the marked part gone."""
        gone = t * self.mask
        return ((1 - gone) * x + gone * self.fill).astype(x.dtype)
