"""Moment equations, solved once and kept as a table: a polynomial on each step.

Diffrax's dense output finds its step in a loop and evaluates the solver's own
interpolation. Both are large programs, and a sampler holds several of them; two counts
and a polynomial are small ones, and as exact.
"""

import math
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..typing import Scalar, ScalarLike


class MomentTable(eqx.Module):
    """y(t) between the first and the last of `ts`, of which `count` are in use.

    The times are logarithms; those beyond `count` are infinite. Each step has a row: 2
    over its length, y at its start, and a polynomial in the place from -1 to 1 for what
    y gains from there. That is small: rounding is that of y alone. Rows that are not in
    use have y at the last time.
    """

    ts: Float[Array, " times"]
    rows: Float[Array, "steps row"]
    count: Int[Array, ""]
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, t: ScalarLike) -> Float[Array, "..."]:
        """y at time t; NaN outside of the range."""
        ts, t = self.ts, jnp.log(t)
        # Find the step by two counts, in strides and in one stride.
        stride = math.isqrt(len(ts))
        first = stride * jnp.sum(ts[stride::stride] < t)
        first = jnp.minimum(first, len(ts) - 1 - stride)
        near = jax.lax.dynamic_slice_in_dim(ts, first + 1, stride)
        i = jnp.clip(first + jnp.sum(near < t), 0, self.count - 2)
        row = jax.lax.dynamic_index_in_dim(self.rows, i, keepdims=False)
        place = (t - row[0]) * row[1] - 1
        y, *series = row[2:].reshape(-1, math.prod(self.shape))
        gained = series[-1]
        for c in series[-2::-1]:
            gained = c + place * gained
        inside = (t >= ts[0]) & (t <= ts[self.count - 1])
        return jnp.where(inside, y + gained, jnp.nan).reshape(self.shape)

    def nodes(self) -> tuple[Array, Array]:
        """(times, y) at the start of every step, then the last ones again and again."""
        ts = jnp.exp(jnp.minimum(self.ts[:-1], self.ts[self.count - 1]))
        y = self.rows[:, 2 : 2 + math.prod(self.shape)]
        return ts, y.reshape(-1, *self.shape)


def tabulated(dense: dfx.DenseInterpolation, degree: int) -> MomentTable:
    """Diffrax's dense output of a solver whose interpolation has this degree."""
    # Through Chebyshev's points, for these degrees a sum of powers is well conditioned.
    points = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    powers = np.linalg.inv(np.vander(points, increasing=True))
    dtype, last = dense.ts.dtype, dense.ts_size - 2

    def row(place):
        i = jnp.minimum(place, last)  # beyond the last step there are no numbers
        # On the unit interval, so that rounding of the time does no harm.
        infos = jax.tree.map(lambda a: a[i], dense.infos)
        unit = {"t0": jnp.zeros((), dtype), "t1": jnp.ones((), dtype)}
        piece, start = dense.interpolation_cls(**unit, **infos), infos["y0"]
        gained = jax.vmap(piece.evaluate)(jnp.asarray((points + 1) / 2, dtype))
        series = jnp.tensordot(powers.astype(dtype), gained - start, 1)
        time = jnp.stack([dense.ts[i], 2 / (dense.ts[i + 1] - dense.ts[i])])
        y = jnp.where(place > last, piece.evaluate(unit["t1"]), start)
        return jnp.concatenate([time, y.ravel(), series.ravel()])

    shape = dense.infos["y0"].shape[1:]
    rows = jax.vmap(row)(jnp.arange(len(dense.ts) - 1))
    return MomentTable(dense.ts, rows, dense.ts_size, shape)


def solve_moments(
    rate: Callable,
    y: Array,
    times: tuple[Scalar, Scalar],
    solver: dfx.AbstractSolver,
    control: dfx.PIDController,
    steps: int,
    degree: int,
) -> tuple[MomentTable, dfx.Solution]:
    """y' = rate(t, y) between two times, solved in log t, as a table.

    `degree` is that of the solver's own interpolation.
    """

    def rhs(log_t, y, args):
        t = jnp.exp(log_t)
        return t * rate(t, y)

    t0, t1 = (jnp.log(t) for t in times)
    options = {"saveat": dfx.SaveAt(dense=True, t1=True), "max_steps": steps}
    options |= {"stepsize_controller": control, "throw": False}
    out = dfx.diffeqsolve(dfx.ODETerm(rhs), solver, t0, t1, 0.01, y, **options)
    return tabulated(out.interpolation, degree), out
