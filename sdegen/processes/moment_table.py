"""Moment equations, solved once and kept as a table: a Chebyshev series on each step.

Diffrax's dense output finds its step in a loop and evaluates the solver's own
interpolation. Both are large programs, and a sampler holds several of them; a series
and two counts are small ones, and as exact.
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

    The times are logarithms; those beyond `count` are infinite. y is `start`, that at
    the first time of a step, and the Chebyshev polynomials with the coefficients
    `series`, which are small: rounding is that of y alone.
    """

    ts: Float[Array, " times"]
    start: Float[Array, "steps ..."]
    series: Float[Array, "steps degree ..."]
    count: Int[Array, ""]

    def __call__(self, t: ScalarLike) -> Float[Array, "..."]:
        """y at time t; NaN outside of the range."""
        ts, t = self.ts, jnp.log(t)
        # Find the step by two counts, in strides and in one stride.
        stride = math.isqrt(len(ts))
        first = stride * jnp.sum(ts[stride::stride] < t)
        first = jnp.minimum(first, len(ts) - 1 - stride)
        near = jax.lax.dynamic_slice_in_dim(ts, first + 1, stride)
        i = jnp.clip(first + jnp.sum(near < t), 0, self.count - 2)
        place = 2 * (t - ts[i]) / (ts[i + 1] - ts[i]) - 1
        *rest, above = self.series[i]
        two, beyond = 2 * place, jnp.zeros_like(above)
        for c in rest[:0:-1]:  # Clenshaw's recurrence
            above, beyond = c + two * above - beyond, above
        y = self.start[i] + (rest[0] + place * above - beyond)
        inside = (t >= ts[0]) & (t <= ts[self.count - 1])
        return jnp.where(inside, y, jnp.nan)


def tabulated(dense: dfx.DenseInterpolation, degree: int) -> MomentTable:
    """Diffrax's dense output of a solver whose interpolation has this degree."""
    n = degree + 1
    angles = np.pi * (np.arange(n) + 0.5) / n
    nodes = jnp.asarray((1 + np.cos(angles)) / 2, dense.ts.dtype)
    values = np.cos(np.outer(np.arange(n), angles)) * (2 / n)  # points to series
    values[0] /= 2
    # Steps that are not in use have no numbers: take those of the first.
    used = jnp.arange(len(dense.ts) - 1) < dense.ts_size - 1
    place = jnp.where(used, jnp.arange(len(used)), 0)

    def points(i):
        # On the unit interval, so that rounding of the time does no harm.
        infos = jax.tree.map(lambda a: a[i], dense.infos)
        piece = dense.interpolation_cls(t0=0 * nodes[0], t1=1 + 0 * nodes[0], **infos)
        return piece.y0, jax.vmap(piece.evaluate)(nodes) - piece.y0

    start, points = jax.vmap(points)(place)
    series = jnp.tensordot(points, values.astype(nodes.dtype), (1, 1))
    return MomentTable(dense.ts, start, jnp.moveaxis(series, -1, 1), dense.ts_size)


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
