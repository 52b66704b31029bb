"""From noise to data: the probability flow, and every reverse SDE, of any path.

A path x = alpha x0 + sigma z becomes, with y = x / (alpha + sigma) and the flow time
tau = sigma / (alpha + sigma), the rectified flow y = (1 - tau) x0 + tau z. There

    dy = (z_hat - x0_hat) dtau                                                      (1)

is the probability flow of every path: no alpha', sigma', division by alpha or by sigma.
Euler's method on (1) is DDIM (Song et al. 2021, "Denoising diffusion implicit models")
for any process and any grid, and the higher orders inherit its exactness on point
masses. The clock is u = 1 - tau, which rises.

The stochastic family with the same marginals (equation (4) of `sde`) is regular in the
clock l = log(alpha / sigma), where g^2 |dt| = 2 sigma^2 dl, with noise strength lambda:

    dy = tau [(1 - tau)(x0_hat - z_hat) - lambda^2 z_hat] dl
         + lambda tau sqrt(2) dW                                                    (2)

Noise is additive, so Euler, Heun, SRA1 and ShARK apply, and Ito equals Stratonovich.
"""

import operator

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .denoiser import AbstractDenoiser
from .path import NoiseInverse
from .solvers.solve import Solution, check_solver, checked, evaluations, solve
from .times import LOGSNR_FLOOR, Adaptive, FlowTimeGrid, Grid, LogSNRGrid
from .typing import PyTree, RandomKey, ScalarLike, float_array, is_traced


def sample(
    key: RandomKey,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    solver: dfx.AbstractSolver | None = None,
    grid: Grid | Adaptive | Array | int | None = None,
    stochasticity: ScalarLike = 0.0,
    cond: PyTree = None,
    start: Float[Array, "batch ..."] | None = None,
    denoise: bool = False,
    trajectory: bool = False,
    sharding: jax.sharding.Sharding | None = None,
) -> Solution:
    """Draw `shape[0]` samples; sample i depends on (key, i), not on the batch or mesh.

    **Arguments:** `shape`, (batch, ...); `solver`, any Diffrax solver (default Heun);
    `grid`, a grid of `sdegen.times`, an array of times that fall from t_max to t_min,
    or `Adaptive(rtol, atol)` (default: 32 equal steps of flow time); `stochasticity`,
    lambda in (2): 0 is the probability flow, 1 the reverse SDE of Anderson; `cond`, a
    pytree with leading axis batch; `start`, x at the first time instead of noise;
    `denoise`, return E[x0 given x] at the end, for one evaluation more; `trajectory`,
    keep the states along the way; `sharding`, how to spread the batch over devices.

    **Returns:** a `Solution`: `x`, `evaluations`, `result` (check `.ok` on the host; a
    solve never raises on the device), and with `trajectory` the frames and their times.

    Paths that reach alpha = 0 start their SDE at alpha / sigma = 1e-3, where (2)
    begins.
    """
    solver = dfx.Heun() if solver is None else solver
    path = denoiser.path
    given, shape = shape, _whole_numbers(shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            "sample needs a shape (batch, ...) of whole numbers with at least two "
            f"axes, got {given!r}. For 1-D data use (batch, 1)."
        )
    if jnp.ndim(stochasticity):
        raise ValueError(
            "stochasticity is one number for the whole batch, got an array of shape "
            f"{jnp.shape(stochasticity)}."
        )
    flow = not is_traced(stochasticity) and float(stochasticity) == 0
    if not is_traced(stochasticity) and not float(stochasticity) >= 0:
        raise ValueError(
            "stochasticity must be >= 0 (0 is the flow, 1 the reverse SDE), got "
            f"{float(stochasticity):g}."
        )
    if not flow and not path.base.gaussian:
        raise ValueError(
            f"the reverse SDE needs Gaussian noise, and {type(path).__name__} has base="
            f"{type(path.base).__name__}. Sample with stochasticity=0."
        )
    if grid is None or isinstance(grid, int):
        # Each in the clock that it is solved in, where equal steps serve it best.
        grid = (FlowTimeGrid if flow else LogSNRGrid)(32 if grid is None else grid)
    if start is not None and jnp.shape(start) != shape:
        raise ValueError(f"start must have the shape {shape}, got {jnp.shape(start)}.")
    check_solver(solver, isinstance(grid, Adaptive), not flow)
    return _sample(
        key,
        denoiser,
        cond,
        start,
        _check_grid(grid, path),
        None if flow else float_array(stochasticity),
        solver,
        shape,
        denoise,
        trajectory,
        sharding,
    )


def _whole_numbers(shape) -> tuple[int, ...]:
    try:
        return tuple(operator.index(n) for n in shape)
    except TypeError:
        return ()


def _check_grid(grid, path):
    """An array of times is checked on the host; grid objects know their path."""
    if isinstance(grid, Adaptive):
        return grid
    if callable(grid):
        if isinstance(grid, type):
            raise ValueError(
                f"grid must be an object such as {grid.__name__}(32), got the class."
            )
        return grid
    try:
        ts = float_array(grid).astype(float_array(path.t_min).dtype)
    except (TypeError, ValueError):
        raise ValueError(
            "grid must be a grid of sdegen.times such as KarrasGrid(18), "
            f"Adaptive(rtol, atol), or an array of falling times, got {grid!r}."
        ) from None
    if is_traced((ts, path.t_min, path.t_max)):
        return ts
    values, low, high = np.asarray(ts), float(path.t_min), float(path.t_max)
    if values.ndim != 1 or len(values) < 2 or not (np.diff(values) < 0).all():
        raise ValueError(
            "a grid is one array of at least two times that fall strictly, from noise "
            f"to data, got {np.array2string(values, threshold=6)}."
        )
    if values[0] > high or values[-1] < low:
        raise ValueError(
            f"grid times must lie in [t_min, t_max] = [{low:g}, {high:g}] of "
            f"{type(path).__name__}, got times from {values[0]:g} to {values[-1]:g}."
        )
    return ts


class _FlowField(eqx.Module):
    """The right-hand side of (1) in the clock u = 1 - tau."""

    denoiser: AbstractDenoiser
    inverse: NoiseInverse
    cond: PyTree

    def time(self, u):
        return self.inverse(-jnp.log1p(-u))

    def __call__(self, u, y, args):
        t = self.time(u)
        path = self.denoiser.path
        x0, z = self.denoiser.ends(t, (path.alpha(t) + path.sigma(t)) * y, self.cond)
        return x0 - z


class _ReverseField(eqx.Module):
    """The drift and the noise of (2) in the clock l = log(alpha / sigma)."""

    denoiser: AbstractDenoiser
    inverse: NoiseInverse
    cond: PyTree
    stochasticity: Array

    def time(self, l):
        return self.inverse(jax.nn.softplus(l))

    def __call__(self, l, y, args):
        t, tau = self.time(l), jax.nn.sigmoid(-l)
        path = self.denoiser.path
        x0, z = self.denoiser.ends(t, (path.alpha(t) + path.sigma(t)) * y, self.cond)
        return tau * ((1 - tau) * (x0 - z) - self.stochasticity**2 * z)

    def noise(self, l, y, args):
        return self.stochasticity * jax.nn.sigmoid(-l) * np.sqrt(2).astype(l.dtype)


@eqx.filter_jit
def _sample(
    key,
    denoiser,
    cond,
    start,
    grid,
    stochasticity,
    solver,
    shape,
    denoise,
    trajectory,
    sharding,
):
    path, inverse = denoiser.path, denoiser.path.inverse()
    adaptive = grid if isinstance(grid, Adaptive) else None
    if adaptive is not None:
        ts = jnp.stack([float_array(path.t_max), float_array(path.t_min)])
    else:
        ts = grid(path) if callable(grid) else grid
    dtype = ts.dtype
    if stochasticity is None:
        clock = jax.vmap(lambda t: path.alpha(t) / (path.alpha(t) + path.sigma(t)))(ts)
        tau0, noise = 1 - clock[0], None
        field = _FlowField(denoiser, inverse, cond)
    else:
        clock = jax.vmap(path.logsnr)(ts) / 2
        # Nodes below the floor become one: steps of length zero, which change nothing.
        clock = jnp.maximum(clock, LOGSNR_FLOOR / 2)
        tau0 = jax.nn.sigmoid(-clock[0])
        field = _ReverseField(denoiser, inverse, cond, stochasticity.astype(dtype))
        noise = field.noise

    index = jnp.arange(shape[0])
    if sharding is not None:
        index = jax.lax.with_sharding_constraint(index, sharding)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    start_keys, noise_keys = jax.vmap(lambda k: tuple(jax.random.split(k)))(keys)
    if start is None:
        draw = jax.vmap(lambda k: path.base.sample(k, shape[1:], dtype))
        y0 = tau0 * draw(start_keys)
    else:
        y0 = start.astype(dtype) / (path.alpha(ts[0]) + path.sigma(ts[0]))
    solution = solve(
        field,
        y0,
        clock,
        solver,
        adaptive=adaptive,
        noise=noise,
        keys=noise_keys,
        trajectory=trajectory,
    )
    scale = jax.vmap(lambda t: path.alpha(t) + path.sigma(t))
    times, frames = None, None
    if trajectory:
        times = ts if adaptive is None else jax.vmap(field.time)(solution.ts)
        frames = solution.ys * scale(times).reshape((-1,) + (1,) * len(shape))
    x = solution.ys[-1] * (path.alpha(ts[-1]) + path.sigma(ts[-1]))
    count = evaluations(solver, solution.stats["num_steps"])
    if denoise:
        x, count = denoiser(ts[-1], x, cond), jnp.where(count < 0, count, count + 1)
    return Solution(x, count, checked(solution.result, x), times, frames)
