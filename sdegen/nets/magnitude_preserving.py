"""Layers that preserve the magnitude of their inputs, for EDM2.

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models".
Independent inputs of root mean square 1 give such outputs:

    w x,  w = gain v / |v| for each output, v free         weights, eq. 47        (1)
    silu(x) / 0.596                                        eq. 81                 (2)
    ((1 - m) a + m b) / sqrt((1 - m)^2 + m^2)              sum, eq. 88            (3)
    C [(1 - m) / sqrt(Na) a, m / sqrt(Nb) b],
      C = sqrt((Na + Nb) / ((1 - m)^2 + m^2))              concatenation, eq. 103 (4)
    sqrt(2) cos(w t + p)                                   Fourier, eq. 75        (5)

The paper also normalises v before every step, eq. 66: see `normalise_weights`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..typing import PyTree, Time
from .conv import conv
from .embeddings import normal_frequencies


def normalise(x: Float[Array, "..."], axes: int | Sequence[int]) -> Float[Array, "..."]:
    """x with magnitude 1 over `axes`, computed in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # The paper divides by |x| + 1e-4; this has a gradient at x = 0 too.
    square = jnp.mean(wide**2, axes, keepdims=True)
    return (wide / jnp.sqrt(square + 1e-8)).astype(x.dtype)


def mp_silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Equation (2)."""
    return nnx.silu(x) / 0.596


def mp_sum(a: Float[Array, "..."], b: Float[Array, "..."], m: float = 0.5) -> Array:
    """Equation (3): `m` is the share of b."""
    return ((1 - m) * a + m * b) / math.hypot(1 - m, m)


def mp_cat(a: Float[Array, "... na"], b: Float[Array, "... nb"], m: float = 0.5):
    """Equation (4), along the last axis."""
    na, nb = a.shape[-1], b.shape[-1]
    scale = math.sqrt(na + nb) / math.hypot(1 - m, m)
    parts = [(1 - m) * scale / math.sqrt(na) * a, m * scale / math.sqrt(nb) * b]
    return jnp.concatenate(parts, axis=-1)


def mp_fourier(t: Time, features: int) -> Float[Array, "... features"]:
    """Equation (5) at frequencies 2 pi N(0, 1) and phases even over the circle."""
    # Steps of the golden ratio are even, and independent of the frequencies.
    phases = 2 * np.pi * (np.arange(features) * (math.sqrt(5) - 1) / 2 % 1)
    w = jnp.asarray(normal_frequencies(features, 1.0), t.dtype)
    return math.sqrt(2) * jnp.cos(t[..., None] * w + jnp.asarray(phases, t.dtype))


class Weight(nnx.Param):
    """A parameter (..., outputs) of which only the direction matters."""


def _by_output(v):
    return normalise(v, tuple(range(v.ndim - 1)))


def normalise_weights(network: PyTree) -> PyTree:
    """`network` with its EDM2 weights at magnitude 1, after an update: eq. 66.

    **Arguments:**
    - `network`: any pytree that holds such weights, a denoiser for example.
    """

    def one(leaf):
        weight = isinstance(leaf, Weight)
        return leaf.replace(_by_output(leaf[...])) if weight else leaf

    return jax.tree.map(one, network, is_leaf=lambda leaf: isinstance(leaf, Weight))


class MPConv(nnx.Module):
    """Equation (1): a `size` x `size` convolution, or for 0 a map of the last axis."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 0,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        shape = (size, size, inputs, outputs) if size else (inputs, outputs)
        normal = nnx.initializers.normal(1.0)
        self.weight = Weight(normal(rngs.params(), shape, param_dtype))

    def __call__(self, x, gain=1.0):
        """w x, in `dtype`."""
        dtype, v = self.dtype or x.dtype, self.weight[...]
        v = _by_output(v) * (gain / math.sqrt(v.size / v.shape[-1]))
        x, v = x.astype(dtype), v.astype(dtype)
        return conv(x, v) if v.ndim == 4 else x @ v
