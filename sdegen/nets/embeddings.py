"""Time and condition as one vector per sample, the input of every network."""

import functools
import statistics

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..typing import Time

_FREQUENCIES = 16  # from one period over 8 units of time to one over 1/4


def fourier(t: Time) -> Float[Array, "... features"]:
    """sin and cos of t, of order one, at geometric frequencies, and t itself."""
    frequencies = 2 * jnp.pi * jnp.geomspace(0.125, 4.0, _FREQUENCIES, dtype=t.dtype)
    phase = t[..., None] * frequencies
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase), t[..., None]], axis=-1)


def positional(
    t: Time, features: int, *, endpoint: bool = False
) -> Float[Array, "... features"]:
    """cos and sin of t w, for w from 1 down to 1e-4 (reached if `endpoint`).

    Vaswani et al. 2017, as DDPM++, ADM and DiT use it.
    """
    half = features // 2
    steps = np.arange(half) / max(1, half - endpoint)
    phase = t[..., None] * jnp.asarray(1e-4**steps, t.dtype)
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


def normal_frequencies(number: int, scale: float) -> np.ndarray:
    """2 pi w, for w the `number` mid-quantiles of a Gaussian of deviation `scale`.

    Constants in place of the draws of random Fourier features (Tancik et al. 2020).
    """
    quantile = statistics.NormalDist(sigma=scale).inv_cdf
    return 2 * np.pi * np.array([quantile((i + 0.5) / number) for i in range(number)])


class Embedding(nnx.Module):
    """Time (and, if `cond_dim`, a vector of conditions) to a vector of `width`."""

    def __init__(self, width: int, *, cond_dim: int = 0, dtype=None, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.time = linear(2 * _FREQUENCIES + 1, width)
        self.out = linear(width, width)
        self.cond = linear(cond_dim, width, use_bias=False) if cond_dim else None

    def __call__(
        self, t: Time, cond: Float[Array, "batch cond"] | None
    ) -> Float[Array, "... width"]:
        """The embedding: (width,) for one time alone, else (batch, width)."""
        h = self.time(fourier(t))
        if self.cond is not None:
            h = h + self.cond(cond)
        return nnx.silu(self.out(nnx.silu(h)))
