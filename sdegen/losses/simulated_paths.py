"""Euler-Maruyama from the data, and unbiased targets for the score of where it is.

    x_{k+1} = Phi_k(x_k) = x_k + f dt_k + G dW_k,    t_k = t_min + T (k / n)^2      (1)

With s_k the score of the law of x_k, one step says (denoising score matching, Vincent
2011)

    s_{k+1}(x_{k+1}) = E[r_k given x_{k+1}],    r_k = -dW_k / (G dt_k)              (2)

with a variance of 1 / (G^2 dt). By the change of variables, with M = dPhi_k / dx,

    s_{k+1}(x_{k+1}) = E[M^-T (T_k - grad log|det M|) given x_{k+1}]                (3)

for any T_k with E[T_k given x_k] = s_k. So every mixture with weights w of time alone,

    T_{k+1} = (1 - w_k) M^-T (T_k - grad log|det M|) + w_k r_k,    w_0 = 1,         (4)

is a target for the score without bias, exact for the chain (1) at any dt, also for
noise that depends on x (M contains G' dW). Its variance is least where E|T|^2 is:

    w_k = E[a (a - r)] / E[(a - r)^2] per coordinate,  a the first term of (4)      (5)

measured once, on paths of its own. For a linear SDE this is -z / sigma, the target of
denoising score matching. In continuous time (3) is Bismut's formula. The first term of
(4) is cut off at ten times the size of r, for rare paths where M is nearly singular.
"""

from typing import TypeAlias

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ..processes.sde import AbstractSDE
from ..solvers.solve import solve

Times: TypeAlias = Float[Array, " times"]
Paths: TypeAlias = Float[Array, "times batch ..."]
Weights: TypeAlias = Float[Array, "steps ..."]


def square_clock(sde: AbstractSDE, steps: int, dtype=None) -> Times:
    """t_0 .. t_n of (1).

    **Arguments** of the functions of this file:
    - `sde`: the process.
    - `steps`, `dtype`: n, and that of the times, default that of t_min.
    - `keys`, `x0`: one key for each sample, (batch,), and data, (batch, ...).
    - `ts`, `xs`: t_0 .. t_n, and the states of `chain` there, (times, batch, ...).
    - `weights`: of (4), (steps, ...), or None.
    """
    unit = jnp.arange(steps + 1, dtype=dtype or sde.t_min.dtype) / steps
    return sde.t_min + (sde.t_max - sde.t_min) * unit**2


def chain(sde: AbstractSDE, keys: Key[Array, " batch"], x0: Array, ts: Times) -> Paths:
    """The states of (1) at every time; sample i depends on its own key only."""

    def drift(t, x, args):
        return jax.vmap(sde.drift, (None, 0))(t, x)

    def noise(t, x, args):
        g = jax.vmap(sde.diffusion, (None, 0))(t, x)
        return g.reshape(g.shape + (1,) * (x.ndim - g.ndim))

    out = solve(drift, x0, ts, dfx.Euler(), noise=noise, keys=keys, trajectory=True)
    return jax.lax.stop_gradient(out.ys)


def targets(
    sde: AbstractSDE, ts: Times, xs: Paths, weights: Weights | None
) -> Float[Array, "steps batch ..."]:
    """T_1 .. T_n of (4) for the states of `chain`; r_k of (2) where weights is None."""
    if weights is None:
        return _local(sde, ts, xs)[0]
    return _mix(sde, ts, xs, weights)[0]


def best_weights(sde: AbstractSDE, ts: Times, xs: Paths) -> Weights:
    """The weights (5), measured on the states of `chain`."""
    return _mix(sde, ts, xs, None)[1]


def _every_step(one, ts, *states):
    """one(t_k, dt_k, *states) for every step and sample."""
    over = jax.vmap(jax.vmap(one, (None, None, 0, 0)))
    return over(ts[:-1], jnp.diff(ts), *states)


def _local(sde, ts, xs):
    """r_k of (2), its standard deviation, and dW_k."""

    def one(t, dt, x, y):
        g = sde.diffusion(t, x)
        noise = (y - x - sde.drift(t, x) * dt) / g
        return -noise / (g * dt), 1 / (g * jnp.sqrt(dt)) + 0 * x, noise

    return _every_step(one, ts, xs[:-1], xs[1:])


def _pull_back(sde, ts, xs, noise):
    """M^-1 and grad log|det M| of every step, for samples as flat vectors."""

    def one(t, dt, x, noise):
        def phi(flat):
            y = flat.reshape(x.shape)
            return (y + sde.drift(t, y) * dt + sde.diffusion(t, y) * noise).ravel()

        slope = jax.jacfwd(phi)
        inverse = _inverse(slope(x.ravel()))
        curvature = jax.jacfwd(slope)(x.ravel())  # d^2 phi_a / dx_b dx_c
        return inverse, jnp.einsum("ba,abc->c", inverse, curvature)

    return _every_step(one, ts, xs[:-1], noise)


def _inverse(matrix):
    """By elimination without pivots: M is near 1, and LAPACK is slow on small ones."""
    size = len(matrix)
    rows = jnp.concatenate([matrix, jnp.eye(size, dtype=matrix.dtype)], axis=1)
    for i in range(size):
        row = rows[i] / rows[i, i]
        rows = (rows - rows[:, i, None] * row).at[i].set(row)
    return rows[:, size:]


def _mix(sde, ts, xs, weights):
    """T_1 .. T_n of (4) and their weights, those of (5) unless given."""
    local, sizes, noise = _local(sde, ts, xs)
    inverses, shifts = _pull_back(sde, ts[1:], xs[1:], noise[1:])
    flat = (xs.shape[1], -1)

    def step(target, inputs):
        r, size, inverse, shift, weight = inputs
        carried = jnp.einsum("nba,nb->na", inverse, target.reshape(flat) - shift)
        carried = jnp.clip(carried.reshape(r.shape), -10 * size, 10 * size)
        gap = carried - r
        if weight is None:
            weight = jnp.clip((carried * gap).mean(0) / (gap**2).mean(0), 0.0, 1.0)
        target = carried - weight * gap
        return target, (target, weight)

    if weights is not None:
        weights = weights[1:].astype(xs.dtype)
    _, (found, used) = jax.lax.scan(
        step, local[0], (local[1:], sizes[1:], inverses, shifts, weights)
    )
    one = jnp.ones((1, *xs.shape[2:]), xs.dtype)
    return jnp.concatenate([local[:1], found]), jnp.concatenate([one, used])
