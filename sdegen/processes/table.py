"""Evaluating the dense solution of a moment equation, many times in one program."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..typing import ScalarLike


@eqx.filter_jit
def evaluate(table: dfx.DenseInterpolation, t: ScalarLike) -> Float[Array, "..."]:
    """The solution at `t`, in its own units; NaN outside of what was solved.

    The polynomials are Diffrax's, and so is the value. Its own method searches in a
    loop and guards the ends by a branch, which XLA neither fuses nor merges where alpha
    and sigma ask for the same time: a sampler, which inverts the noise level by
    Newton's method in every step, then takes nearly twice as long to compile.
    """
    count = table.ts_size
    # Places beyond `count` are infinite.
    i = jnp.clip(jnp.sum(table.ts[1:] < t), 0, count - 2)
    pieces = jax.tree.map(lambda a: a[i], table.infos)
    piece = table.interpolation_cls(t0=table.ts[i], t1=table.ts[i + 1], **pieces)
    inside = (t >= table.ts[0]) & (t <= table.ts[count - 1])
    return jnp.where(inside, piece.evaluate(t), jnp.nan)
