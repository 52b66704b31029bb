"""Evaluating the dense solution of a moment equation, many times in one program."""

import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..typing import ScalarLike


@eqx.filter_jit
def evaluate(table: dfx.DenseInterpolation, t: ScalarLike) -> Float[Array, "..."]:
    """The solution at time `t`, in the units of `table.ts`; NaN outside of its range.

    The value is that of `table.evaluate`, which searches in a loop and has a branch at
    the first and the last time. XLA neither fuses nor merges these where alpha and
    sigma are evaluated at the same time: samplers become twice as large.
    """
    ts, count = table.ts, table.ts_size
    # Find the piece by two counts, in strides and in one stride; times beyond `count`
    # are infinite.
    stride = math.isqrt(len(ts))
    first = stride * jnp.sum(ts[stride::stride] < t)
    first = jnp.minimum(first, len(ts) - 1 - stride)
    near = jax.lax.dynamic_slice_in_dim(ts, first + 1, stride)
    i = jnp.clip(first + jnp.sum(near < t), 0, count - 2)
    pieces = jax.tree.map(lambda a: a[i], table.infos)
    piece = table.interpolation_cls(t0=ts[i], t1=ts[i + 1], **pieces)
    inside = (t >= ts[0]) & (t <= ts[count - 1])
    return jnp.where(inside, piece.evaluate(t), jnp.nan)
