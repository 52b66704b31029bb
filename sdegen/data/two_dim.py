"""Distributions of the plane on which couplings are compared, as public code has them.

Points are drawn at random, or `stratified`: from one shifted lattice of uniform numbers
(Roberts 2018, "The unreasonable effectiveness of quasirandom sequences"). Where modes
are far apart W2 between random sets measures the counts in the modes: 0.53 between
2,048 and 2,048 points of eight Gaussians, 0.16 if stratified.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from jaxtyping import Array, Float

from ..typing import Seed, random_key


class Planar(eqx.Module):
    """A distribution of the plane.

    **Arguments:**
    - `point`: from uniform numbers, (size,), to a point, (2,).
    - `size`: how many uniform numbers a point takes.
    """

    point: Callable = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def sample(
        self, key: Seed, n: int, stratified: bool = False
    ) -> Float[Array, "n 2"]:
        """`n` points, independent (the default) or stratified, in no useful order."""
        key = random_key(key)
        if not stratified:
            u = jax.random.uniform(key, (n, self.size))
        else:
            lattice = jnp.asarray(_lattice(n, self.size), jnp.result_type(float))
            u = (lattice + jax.random.uniform(key, (self.size,))) % 1
        eps = jnp.finfo(u.dtype).eps
        return jax.vmap(self.point)(jnp.clip(u, eps, 1 - eps))


def _lattice(n, size):
    """The additive sequence of the root of x^(size + 1) = x + 1."""
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (size + 1))
    return np.arange(1, n + 1)[:, None] * root ** -np.arange(1.0, size + 1) % 1


def gaussian() -> Planar:
    """N(0, I)."""
    return Planar(ndtri, 2)


def eight_gaussians(radius: float = 5.0, std: float = 0.1**0.25) -> Planar:
    """Eight Gaussians of equal weight on a circle, of standard deviation `std`.

    Tong et al. 2024 write a variance of 0.1; their code, and so all results made with
    it, gives sqrt(0.1) to a sampler that takes a covariance: std = 0.1^(1/4).

    **Arguments:**
    - `radius`: of the circle, default 5.
    - `std`: the standard deviation of each Gaussian, default 0.1^(1/4).
    """

    def point(u):
        angle = jnp.floor(8 * u[0]) * jnp.pi / 4
        centre = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        return centre + std * ndtri(u[1:])

    return Planar(point, 3)


def moons(noise: float = 0.2, scale: float = 3.0, shift: float = -1.0) -> Planar:
    """Two half circles times `scale` plus `shift`, thickened along the diagonal.

    Published results on "moons" use torchdyn's generator (called by torchcfm), which
    adds one uniform number to both coordinates; scikit-learn adds normal noise to each.
    It puts the angles on a grid; here they are drawn.

    **Arguments:**
    - `noise`: the largest of the uniform numbers, default 0.2.
    - `scale`, `shift`: of the points with their noise, default 3 and -1.
    """

    def point(u):
        side, angle = u[0] < 0.5, jnp.pi * (2 * u[0] % 1)
        x, y = jnp.cos(angle), jnp.sin(angle)
        x, y = jnp.where(side, x, 1 - x), jnp.where(side, y, 0.5 - y)
        return scale * (jnp.stack([x, y]) + noise * u[1]) + shift

    return Planar(point, 2)


def s_curve(noise: float = 0.1) -> Planar:
    """Two coordinates of scikit-learn's S curve, with normal noise.

    **Arguments:**
    - `noise`: its standard deviation, default 0.1.
    """

    def point(u):
        t = 3 * jnp.pi * (u[0] - 0.5)
        curve = jnp.stack([jnp.sin(t), jnp.sign(t) * (jnp.cos(t) - 1)])
        return curve + noise * ndtri(u[1:])

    return Planar(point, 3)


def checkerboard(scale: float = 2.0) -> Planar:
    """Eight squares of a 4 x 4 board (Grathwohl et al. 2019, "FFJORD", their code).

    **Arguments:**
    - `scale`: the side of a square, default 2.
    """

    def point(u):
        x = 4 * u[0] - 2
        y = 2 * u[1]  # the row, 0 or -2, and the place in it
        y = y % 1 - 2 * jnp.floor(y) + jnp.floor(x) % 2
        return scale * jnp.stack([x, y])

    return Planar(point, 2)
