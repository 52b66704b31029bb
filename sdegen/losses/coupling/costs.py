"""What both plans of optimal transport share: plans in a batch, and their costs.

    c_ij = |x0_i - x1_j|^2 + w d(cond_i, cond_j)                                    (1)

Without the second term a class is trained on the noise that it is near to and sampled
from all of it. w = infinity pairs within a class, with d = 0 for equal conditions and 1
for others; for a finite w it is |cond_i - cond_j|^2 (Cheng and Schwing 2025, "The curse
of conditions: analyzing and improving optimal transport for conditional flow-based
generation").
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...typing import AxisName, PyTree, ScalarLike, is_traced


def plans(
    x0: Array, x1: Array, cond: PyTree, points: int | None, weight: ScalarLike | None
) -> Float[Array, "plans points points"]:
    """The costs of one plan for each `points` consecutive rows of the batch.

    The arguments are those of `cost_matrix`, and `points`, None for the whole batch.
    """
    if len(x0) != len(x1):
        raise ValueError(
            "a coupling pairs as many x1 as there are x0, got "
            f"{len(x0)} rows of x0 and {len(x1)} of x1. Draw as many of both."
        )
    _check_ends(x0, x1)
    batch = len(x0)
    points = batch if points is None else min(points, batch)
    if batch % points:
        best = max(n for n in range(1, points) if batch % n == 0)
        raise ValueError(
            f"a batch of {batch} (on each device) is not made of plans of {points} "
            f"points. Take points={best}, or a batch that is a multiple of {points}."
        )

    def split(a):
        return a.reshape(-1, points, *a.shape[1:])

    x0, x1, cond = split(x0), split(x1), jax.tree.map(split, cond)
    cost = jax.vmap(cost_matrix, in_axes=(0, 0, 0, 0, None))(x0, x1, cond, cond, weight)
    if not is_traced(cost) and not bool(jnp.isfinite(cost).all()):
        raise ValueError(
            "the costs between x0 and x1 hold NaN or infinity: the data or conditions "
            "do, or are too large to be squared. Look at both ends."
        )
    return cost


def _check_ends(x0, x1):
    """Refuse sets without points, and points of different shapes."""
    if len(x0) == 0 or len(x1) == 0 or x0.shape[1:] != x1.shape[1:]:
        raise ValueError(
            "the costs of a plan are between two sets of points of one shape, (n, ...) "
            f"and (m, ...) with n, m >= 1, got {x0.shape} and {x1.shape}."
        )


def check_points(points: int | None) -> None:
    """Refuse plans of no points."""
    if points is not None and points < 1:
        raise ValueError(
            f"a plan needs points >= 1, or None for the whole batch, got {points}."
        )


def cost_matrix(
    x0: Float[Array, "n ..."],
    x1: Float[Array, "m ..."],
    cond0: PyTree = None,
    cond1: PyTree = None,
    weight: ScalarLike | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "n m"]:
    """Equation (1), in (units of the data)^2, summed over coordinates.

    **Arguments:**
    - `x0`, `x1`: two sets of points, (n, ...) and (m, ...).
    - `cond0`, `cond1`: their conditions, pytrees of arrays, or None.
    - `weight`: w, in (units of the data)^2; None is infinity, by a number that is more
      than all other costs together.
    - `axis_name`: the mapped axis, if `x0` is one device's part; none.
    """
    _check_ends(x0, x1)
    x, y = x0.reshape(len(x0), -1), x1.reshape(len(x1), -1)
    middle = jnp.mean(y, axis=0)  # far from the origin squares would lose digits
    x, y = x - middle, y - middle
    # the fast matrix products of accelerators keep three digits
    cross = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    cost = jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1) - 2 * cross
    cost = jax.lax.stop_gradient(jnp.maximum(cost, 0.0))
    leaves = zip(jax.tree.leaves(cond0), jax.tree.leaves(cond1), strict=True)
    pairs = [(c.reshape(len(c), -1)[:, None], d.reshape(len(d), -1)) for c, d in leaves]
    if not pairs:
        return cost
    if weight is None:
        apart = sum((c != d).any(axis=-1) for c, d in pairs) > 0
        top = jnp.max(cost)
        top = top if axis_name is None else jax.lax.pmax(top, axis_name)
        weight = 1 + top * cost.shape[1]
    else:
        apart = sum(jnp.sum((c * 1.0 - d) ** 2, axis=-1) for c, d in pairs)
    return cost + jnp.asarray(weight, cost.dtype) * apart.astype(cost.dtype)  # pyright: ignore[reportAttributeAccessIssue]
