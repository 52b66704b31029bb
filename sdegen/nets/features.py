"""What a network is told about time and condition, as one vector per sample."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..typing import Time

_FREQUENCIES = 16  # from one period over 8 units of time to one over 1/4


def fourier(t: Time) -> Float[Array, "... features"]:
    """sin and cos of t at geometric frequencies, and t itself, in t's precision.

    Made for times of order one, such as the log(sigma / alpha) / 4 of `edm_inputs`.
    """
    frequencies = 2 * jnp.pi * jnp.geomspace(0.125, 4.0, _FREQUENCIES, dtype=t.dtype)
    phase = t[..., None] * frequencies
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase), t[..., None]], axis=-1)


class Embedding(nnx.Module):
    """Time (and, if `cond_dim`, a vector of conditions) to a vector of `width`.

    For classes, hand in `jax.nn.one_hot(labels, classes)`.
    """

    def __init__(self, width: int, *, cond_dim: int = 0, dtype=None, rngs: nnx.Rngs):
        self.cond_dim = cond_dim
        self.time = nnx.Linear(2 * _FREQUENCIES + 1, width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.cond = nnx.data(
            nnx.Linear(cond_dim, width, use_bias=False, dtype=dtype, rngs=rngs)
            if cond_dim
            else None
        )

    def __call__(
        self, t: Time, cond: Float[Array, "batch cond"] | None
    ) -> Float[Array, "... width"]:
        """The embedding: (width,) for one time alone, else (batch, width)."""
        h = self.time(fourier(t))
        if self.cond_dim and (cond is None or cond.shape[-1:] != (self.cond_dim,)):
            came = "none" if cond is None else f"one of shape {cond.shape}"
            raise ValueError(
                f"this network was made for a condition of shape (batch, "
                f"{self.cond_dim}), got {came}."
            )
        if not self.cond_dim and cond is not None:
            raise ValueError(
                "this network was made without a condition, got one. Make it with "
                "cond_dim=the length of the condition vector."
            )
        if self.cond is not None:
            h = h + self.cond(cond)
        return nnx.silu(self.out(nnx.silu(h)))
