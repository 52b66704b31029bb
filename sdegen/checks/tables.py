"""A process as numbers: its declared functions at many times, on the host.

Half of the times are even in t, half in log-SNR, because a mistake may be at either
end. Where alpha falls to 0 they stop at a small alpha / sigma. From drift and diffusion
at a few points x,

    f(t) = <drift(t, x), x> / <x, x>,    g(t)^2 = mean of diffusion(t, x)^2,       (1)

which is the whole of both if drift = f(t) x and the diffusion ignores x.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..processes.momentum import AbstractBlockSDE
from ..processes.path import AbstractPath
from ..processes.sde import AbstractSDE
from ..typing import RandomKey, Scalar, number
from .test_data import lopsided

_ENDS = (np.geomspace(1e-8, 1, 193), 1 - np.geomspace(1e-8, 1))
_UNIT = np.unique(np.concatenate([np.linspace(0, 1, 257), *_ENDS]))
Times: TypeAlias = Float[np.ndarray, " times"]
_POINTS = np.array([1.0, -1.0, 0.3, 2.5, 0.0])  # x of (1), in standard deviations
_OFFSET = 0.382  # keeps the times off the round numbers where a chain has its steps


class Window(AbstractSDE):
    """The SDE of x_t between two other times, without alpha and sigma.

    A path that declares none, or only that of a state with more rows, has f = alpha' /
    alpha and g^2 = 2 sigma (sigma' - sigma f).
    """

    process: Any
    t_min: Scalar = number()
    t_max: Scalar = number()

    @property
    def noise(self):
        """That of the process."""
        return self.process.noise

    @property
    def _declared(self):
        kind = type(self.process)
        return issubclass(kind, AbstractSDE) and not issubclass(kind, AbstractBlockSDE)

    def drift(self, t, x):
        """That of the process, or f x."""
        if self._declared:
            return self.process.drift(t, x)
        return self.process.rates(t)[0] / self.process.alpha(t) * x

    def diffusion(self, t, x):
        """That of the process, or g."""
        if self._declared:
            return self.process.diffusion(t, x)
        (alpha, sigma), (d_alpha, d_sigma) = self.process.scales_and_rates(t)
        return jnp.sqrt(2 * sigma * (d_sigma - sigma * d_alpha / alpha))


class Clock:
    """The times of a path, by what they are even in."""

    def __init__(self, path: AbstractPath):
        self.path = path
        self.low, self.high = float(path.t_min), float(path.t_max)
        self.ts = self.low + (self.high - self.low) * _UNIT
        self.ts[-1] = self.high
        alpha, sigma = (np.asarray(v) for v in _scales(path, jnp.asarray(self.ts)))
        with np.errstate(all="ignore"):
            fall = np.log(sigma) - np.log(alpha)
        # A declared log-SNR that does not fall is a finding, not a reason to stop.
        fall = np.where(np.isnan(fall), -700.0, np.clip(fall, -700.0, 700.0))
        self.fall = np.maximum.accumulate(fall)
        self.ratio = float(alpha[-1] / sigma[-1])  # at t_max

    def scales(self, t: float) -> tuple[Scalar, Scalar]:
        """alpha and sigma at time t."""
        # At as many times as in the table: that program is compiled already.
        alpha, sigma = _scales(self.path, jnp.full(len(self.ts), float(t)))
        return alpha[0], sigma[0]

    def end(self, ratio: float) -> float:
        """t_max, or where alpha / sigma = `ratio` if t_max is far beyond it."""
        if self.ratio >= 0.1 * ratio:
            return self.high
        return float(np.interp(-np.log(ratio), self.fall, self.ts))

    def even(self, n: int, ratio: float, offset: float = _OFFSET) -> Times:
        """`n` rising times up to `end(ratio)`, half even in t, half in log-SNR."""
        end = self.end(ratio)
        share = (np.arange(n // 2) + offset) / (n // 2)
        stop = min(np.interp(end, self.ts, self.fall), -np.log(0.1 * ratio))
        level = self.fall[0] + (stop - self.fall[0]) * share
        by_noise = np.interp(level, self.fall, self.ts)
        ts = np.sort(np.concatenate([self.low + (end - self.low) * share, by_noise]))
        return np.clip(ts, self.low, end)


@dataclasses.dataclass(frozen=True)
class Case:
    """A process in float64, and how it is checked."""

    process: Any
    key: RandomKey
    shape: tuple[int, ...] | None
    samples: int
    parts: Sequence[str]
    tol: float

    @functools.cached_property
    def clock(self) -> Clock:
        """The times of a path."""
        return Clock(self.process)

    @functools.cached_property
    def sde(self) -> AbstractSDE:
        """The SDE of the process, at all of its times."""
        return Window(self.process, self.process.t_min, self.process.t_max)


@eqx.filter_jit
def _scales(path, ts):
    return jax.vmap(path.alpha)(ts), jax.vmap(path.sigma)(ts)


class Table(eqx.Module):
    """The declared functions at the times `ts`, as arrays over them.

    `f` and `g` are (1); `bend` is the largest part of the drift that is not f(t) x, in
    units of the norm of a typical x, and `scatter` that of g^2 that varies with x.
    """

    ts: Times
    alpha: Times
    sigma: Times
    d_alpha: Times
    d_sigma: Times
    f: Times
    g: Times
    bend: Times
    scatter: Times

    def __getitem__(self, part):
        return jax.tree.map(lambda a: a[part], self)

    @property
    def rate(self):
        """How fast the path moves, |alpha'| / alpha + |sigma'| / sigma."""
        with np.errstate(all="ignore"):
            return np.abs(self.d_alpha / self.alpha) + np.abs(self.d_sigma / self.sigma)


def tabulate(
    path: AbstractPath, sde: AbstractSDE, ts: Times, shape: tuple[int, ...]
) -> Table:
    """The path and the coefficients of `sde`, each by its own methods."""
    values = _tabulate(path, sde, jnp.asarray(ts), shape)
    return Table(np.asarray(ts), *map(np.asarray, values))


@eqx.filter_jit
def _tabulate(path, sde, ts, shape):
    def at(t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        xs = jax.vmap(lambda c: c * lopsided(shape))(jnp.asarray(_POINTS))
        xs = jnp.where(sigma > 0, jnp.sqrt(alpha**2 + sigma**2), 1.0) * xs
        drift = jax.vmap(sde.drift, (None, 0))(t, xs)
        g = jax.vmap(lambda x: jnp.broadcast_to(sde.diffusion(t, x), shape))(xs)
        f = jnp.sum(drift[0] * xs[0]) / jnp.sum(xs[0] ** 2)
        # The mean keeps the sign, which says that a factor was -1; (1) holds for g^2.
        g0 = jnp.sign(jnp.mean(g)) * jnp.sqrt(jnp.mean(g**2))
        size = jnp.sqrt(jnp.sum(xs[0] ** 2))
        bend = jnp.max(jnp.abs(drift - f * xs)) / size
        scatter = jnp.max(jnp.abs(g**2 - g0**2))
        return alpha, sigma, *path.rates(t), f, g0, bend, scatter

    return jax.vmap(at)(ts)
