"""Where a sampler stops on its way: path -> times that fall from t_max to t_min."""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..processes.path import AbstractPath, at_both_ends, logsnr_span
from ..typing import Scalar, float_array, is_traced, is_whole, number


def _plain(steps: Any) -> Any:
    return int(steps) if is_whole(steps) else steps


class AbstractGrid(eqx.Module):
    """`steps` + 1 times that fall from t_max to t_min."""

    steps: int = eqx.field(default=32, static=True, converter=_plain)

    @abc.abstractmethod
    def __call__(self, path: AbstractPath) -> Float[Array, " times"]:
        """The times for `path`, both ends included."""

    def __check_init__(self):
        if not is_whole(self.steps):
            raise ValueError(
                f"{type(self).__name__} needs a whole number of steps >= 1, got "
                f"{self.steps!r}."
            )


def _fraction(path, steps):
    return jnp.arange(steps + 1, dtype=float_array(path.t_min).dtype) / steps


def _pin(path, ts):
    """Both ends exactly, whatever rounding or the log-SNR floor did to them."""
    return ts.at[0].set(path.t_max).at[-1].set(path.t_min)


def between(path: AbstractPath, inner: Float[Array, " n"]) -> Float[Array, " times"]:
    """The times `inner` with t_max before and t_min after them."""
    first, last = (float_array(end)[None] for end in (path.t_max, path.t_min))
    return jnp.concatenate([first, inner, last])


class UniformGrid(AbstractGrid):
    """Equal steps in t."""

    def __call__(self, path):
        """The times for `path`."""
        u = _fraction(path, self.steps)
        return _pin(path, path.t_max + (path.t_min - path.t_max) * u)


class FlowTimeGrid(AbstractGrid):
    """Equal steps in the flow time tau = sigma / (alpha + sigma)."""

    def __call__(self, path):
        """The times for `path`."""
        high, low = at_both_ends(path, path.flow_time)
        tau = high + (low - high) * _fraction(path, self.steps)
        return _pin(path, jax.vmap(path.inverse())(-jnp.log(tau)))


class LogSNRGrid(AbstractGrid):
    """Equal steps in the log-SNR. Lu et al. 2022, "DPM-Solver", section 3.4."""

    def __call__(self, path):
        """The times for `path`."""
        low, high = logsnr_span(path)
        logsnr = low + (high - low) * _fraction(path, self.steps)
        return _pin(path, jax.vmap(path.inverse())(jax.nn.softplus(logsnr / 2)))


class KarrasGrid(AbstractGrid):
    """Equal steps in (sigma / alpha)^(1/rho). Karras et al. 2022, eq. 5.

    The paper's grid of N points and a last step to 0 is `KarrasGrid(N - 1)` with
    `sample(..., denoise=True)`. Paths that reach alpha = 0 start from sigma/alpha = 80.
    """

    rho: Scalar = number(7.0)

    def __call__(self, path):
        """The times for `path`."""
        low, high = (jnp.exp(-logsnr / 2) for logsnr in logsnr_span(path))
        low = jnp.where(path.level(path.t_max)[0] == 0, jnp.minimum(low, 80.0), low)
        start, stop = low ** (1 / self.rho), high ** (1 / self.rho)
        ratio = (start + (stop - start) * _fraction(path, self.steps)) ** self.rho
        return _pin(path, jax.vmap(path.inverse())(jnp.log1p(1 / ratio)))


class CosineGrid(AbstractGrid):
    """Equal steps in the angle arctan((sigma / (alpha scale))^(1/rho)).

    With scale 1 and rho 1 these are equal steps of the cosine schedule (Nichol and
    Dhariwal 2021, eq. 17, without its offset) on any path. `scale`, the standard
    deviation of the data, puts the densest steps where noise and data are of a size,
    and rho spreads them from there to both ends: log-SNR steps have the density 1 /
    cosh(log(sigma / (alpha scale)) / rho). rho between 1.25 and 1.5 is the best grid
    known here for the multistep solvers (see docs/choosing-a-solver.md).
    """

    sigma_data: Scalar = number(0.5)
    rho: Scalar = number(1.5)

    def __call__(self, path):
        """The times for `path`."""

        def angle(t):
            # from alpha = 0 the angle is pi / 2
            alpha, sigma = path.level(t)
            alpha = alpha * self.sigma_data
            power, positive = 1 / self.rho, alpha > 0
            root = jnp.where(positive, alpha, 1.0) ** power
            return jnp.arctan2(sigma**power, jnp.where(positive, root, 0.0))

        high, low = at_both_ends(path, angle)
        angles = (high + (low - high) * _fraction(path, self.steps))[1:-1]
        ratio = self.sigma_data * jnp.tan(angles) ** self.rho
        times = jax.vmap(path.inverse())(jnp.log1p(1 / ratio).astype(angles.dtype))
        return between(path, times)


_ADJOINTS = {
    "checkpointed": dfx.RecursiveCheckpointAdjoint,
    "direct": dfx.DirectAdjoint,
    "forward": dfx.ForwardMode,
}


def _adjoint(value) -> dfx.AbstractAdjoint:
    if isinstance(value, str) and value in _ADJOINTS:
        return _ADJOINTS[value]()
    if isinstance(value, dfx.AbstractAdjoint):
        return value
    raise ValueError(
        f"adjoint must be one of {', '.join(_ADJOINTS)}, or an adjoint of Diffrax such "
        f"as DirectAdjoint(), got {value!r}."
    )


class Adaptive(eqx.Module):
    """Steps chosen by the solver's error estimate, for each sample by itself.

    So a sample does not depend on its batch, and one that cannot be solved ends alone,
    with a result code. On a device the batch goes on until the slowest has arrived.

    **Arguments:**
    - `rtol`, `atol`: relative and absolute tolerance per coordinate, of data of order
      one, of a sample's root mean square; 1e-4.
    - `max_steps`: at most so many steps, after which the result code says so; 4096.
    - `adjoint`: which derivatives the solve has: "checkpointed" (the default), first
      ones in reverse mode (`grad`); "forward", any in forward mode alone (`jvp`);
      "direct", all, also second ones (`hessian`), with much more memory. Or an adjoint
      of Diffrax.

    **Raises:** a ValueError for another adjoint.
    """

    rtol: Scalar = number(1e-4)
    atol: Scalar = number(1e-4)
    max_steps: int = eqx.field(default=4096, static=True)
    adjoint: Any = eqx.field(default="checkpointed", converter=_adjoint)


Grid: TypeAlias = AbstractGrid | Callable[[AbstractPath], Array]
"""Anything that maps a path to falling times: the classes above, or a function."""


def whole_steps(grid: Any, what: str) -> int | None:
    """`grid` as a number of steps; None for what is no number, such as a grid.

    **Raises:** a ValueError, which begins with `what`, for a number that is not whole,
    for one below 1, and for True and False.
    """
    none = grid is None or isinstance(grid, str | eqx.Module) or callable(grid)
    if none or np.ndim(grid):
        return None
    count = grid
    if isinstance(grid, jax.Array) and jnp.issubdtype(grid.dtype, jnp.integer):
        count = grid if is_traced(grid) else int(grid)
    if not is_whole(count):
        raise ValueError(
            f"{what} needs at least one step: a number of steps is a whole number such "
            f"as 10, got {grid!r}."
        )
    return int(count)


def check_grid(grid: Any, path: AbstractPath) -> Any:
    """`grid` where it can be used on `path`; an array of times is checked on the host.

    Grid objects and functions know their path; `Adaptive` is returned as it is.
    """
    if isinstance(grid, type):
        raise ValueError(
            f"grid must be an object such as {grid.__name__}(32), got the class."
        )
    if isinstance(grid, Adaptive) or callable(grid):
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
            f"{type(path).__name__}, got times from {values[0]:g} to {values[-1]:g}. "
            "Only `sample` takes a last time of 0, after two others, where sigma is 0; "
            "elsewhere give the path another t_min."
        )
    return ts


def without_data(grid: Any, path: AbstractPath) -> tuple[Any, bool]:
    """(`grid` without a last time of 0 that is data, whether it had one).

    The exact last step to alpha = 1, sigma = 0 is the denoised point, by every solver.
    """
    if callable(grid) or isinstance(grid, Adaptive) or is_traced((grid, path)):
        return grid, False
    if np.ndim(grid) != 1 or len(grid) < 3 or grid[-1] != 0:
        return grid, False
    alpha, sigma = map(np.asarray, path.scales(0.0))
    data = bool((alpha == 1).all() and (sigma == 0).all())
    return (grid[:-1], True) if data else (grid, False)
