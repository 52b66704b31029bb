"""The law of x_t given its two ends, and the times at which it has a given noise level.

    x_t = alpha(t) x0 + sigma(t) z,    t_min <= t <= t_max, t = 0 is data         (1)
    logsnr(t) = log(alpha^2 / sigma^2), strictly decreasing in t                  (2)
    tau(t) = sigma / (alpha + sigma) = sigmoid(-logsnr / 2)                       (3)

    h(t) = -log tau(t) = log1p(alpha / sigma)                                     (4)
    h'(t) = (alpha' sigma - alpha sigma') / (sigma (alpha + sigma))               (5)

On the *flow time* tau every path is the rectified flow: with y = x / (alpha + sigma),
(1) reads y = (1 - tau) x0 + tau z. h is relatively precise at both ends, in float32
too. If alpha and sigma are arrays that broadcast against one sample, x_t is held in the
coordinates of the path's `basis`, and one number for how noisy it is, for grids and
networks, is the mean of (4) over the coordinates.
"""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..typing import Scalar, ScalarLike, Time, float_array, is_traced
from .basis import PIXELS, AbstractBasis
from .noise import AbstractNoise

Scales: TypeAlias = Float[Array, "..."]

# Nodes of the inverse, in units of the time range: geometric near the data.
_NODES = np.unique(
    np.concatenate([[0.0], np.geomspace(1e-6, 1.0, 64), np.linspace(0.0, 1.0, 65)])
)
_NEWTON_STEPS = 5


class AbstractPath(eqx.Module):
    """x_t = alpha(t) x0 + sigma(t) z with z from `noise`.

    A subclass writes `alpha` and `sigma` so that logsnr strictly falls from `t_min` to
    `t_max`, where alpha may vanish. Both are scalars, or arrays over the coordinates of
    one sample in the basis of a field `basis` (default: the data as they are).

    **Arguments** of the methods: `t`, the time, a scalar; `logsnr`, see (2); `h`, (4).
    """

    t_min: eqx.AbstractVar[Scalar]
    t_max: eqx.AbstractVar[Scalar]
    noise: eqx.AbstractVar[AbstractNoise]

    @abc.abstractmethod
    def alpha(self, t: ScalarLike) -> Scales:
        """The scale of the data at time t."""

    @abc.abstractmethod
    def sigma(self, t: ScalarLike) -> Scales:
        """The scale of the noise at time t."""

    def rates(self, t: ScalarLike) -> tuple[Scales, Scales]:
        """The time derivatives (alpha', sigma')."""
        return self.scales_and_rates(t)[1]

    def scales(self, t: ScalarLike) -> tuple[Scales, Scales]:
        """(alpha, sigma) at time t, of one shape."""
        t = float_array(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        if jnp.shape(alpha) != jnp.shape(sigma):
            alpha, sigma = jnp.broadcast_arrays(alpha, sigma)
        return alpha, sigma

    def scales_and_rates(self, t: ScalarLike):
        """((alpha, sigma), (alpha', sigma')) at time t."""
        t = float_array(t)
        return jax.jvp(self.scales, (t,), (jnp.ones_like(t),))

    def level(self, t: ScalarLike) -> tuple[Scalar, Scalar]:
        """(alpha, sigma) of the scalar path that is as noisy: the mean of (4)."""
        return level_of(*self.scales(t))

    def logsnr(self, t: ScalarLike) -> Scalar:
        """log(alpha^2 / sigma^2), equation (2): twice the lambda of DPM-Solver."""
        alpha, sigma = self.level(t)
        return 2 * (jnp.log(alpha) - jnp.log(sigma))

    def flow_time(self, t: ScalarLike) -> Scalar:
        """tau = sigma / (alpha + sigma), equation (3)."""
        alpha, sigma = self.level(t)
        return sigma / (alpha + sigma)

    def time(self, logsnr: ScalarLike) -> Scalar:
        """The time with the given log-SNR; beyond the ends, the end."""
        return self.inverse()(jax.nn.softplus(float_array(logsnr) / 2))

    def training_time(self, u: Array, sigma_data: ScalarLike) -> Array:
        """The quantile function of the times that this process is trained at.

        Uniform by default.

        **Arguments:**
        - `u`: probabilities, any shape.
        - `sigma_data`: the standard deviation of the data.
        """
        return self.t_min + (self.t_max - self.t_min) * u

    def closed_inverse(self, h: ScalarLike) -> Scalar | None:
        """The time with -log tau = h, where a final has a formula for it."""
        return None

    def levels(self) -> tuple[Array, Array]:
        """(times from t_min to t_max, -log tau there): brackets for the inverse."""
        t_min, t_max = float_array(self.t_min), float_array(self.t_max)
        ts = t_min + (t_max - t_min) * jnp.asarray(_NODES, t_min.dtype)
        return ts, jax.vmap(lambda t: _clock(self, t))(ts)

    def inverse(self) -> "NoiseInverse":
        """The inverse of (4), tabulated: make it once and call it many times."""
        return NoiseInverse(self)

    def __check_init__(self):
        check_times(self)
        if is_traced(self):
            return
        name = type(self).__name__
        with jax.ensure_compile_time_eval():
            low, high = float_array(self.t_min), float_array(self.t_max)
            ts = low + (high - low) * jnp.asarray(_NODES, low.dtype)
            ts = ts.at[-1].set(high)
            scales = jax.vmap(self.scales)(ts)
            alpha, sigma = (np.asarray(a).reshape(len(ts), -1) for a in scales)
            ts = np.asarray(ts)
        bad = ~((alpha >= 0) & (sigma > 0) & np.isfinite(alpha) & np.isfinite(sigma))
        bad[:-1] |= alpha[:-1] == 0
        # One of many coordinates may be gone before t_max, to rounding.
        gone = (alpha < 1e-30 * sigma) & (alpha.shape[1] > 1)
        bad &= ~(gone & (alpha >= 0) & np.isfinite(sigma))
        if bad.any():
            i, j = np.unravel_index(np.argmax(bad), bad.shape)
            raise ValueError(
                f"{name} needs alpha(t) > 0 and sigma(t) > 0, both finite, between "
                f"t_min and t_max (alpha may be 0 at t_max), got alpha({ts[i]:g})="
                f"{alpha[i, j]:g} and sigma({ts[i]:g})={sigma[i, j]:g}"
                f"{_where(j, scales)}. Move t_min={ts[0]:g} or t_max={ts[-1]:g} to "
                "where both are positive."
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            logsnr = 2 * (np.log(alpha) - np.log(sigma))
            step = np.diff(logsnr, axis=0)
        # In float32 a flat stretch near the data can tie by rounding; a rise cannot.
        slack = 1e-5 if ts.dtype == np.float32 else 0.0
        rise = step > slack * np.abs(logsnr[:-1])
        wide = (np.diff(_NODES) > 1e-3)[:, None]  # too wide to be rounding
        rise |= (step >= 0) & wide
        rise[-1] |= ~(logsnr[-1] < logsnr[0])
        rise &= ~(gone[1:] & gone[:-1])
        if rise.any():
            i, j = np.unravel_index(np.argmax(rise), rise.shape)
            raise ValueError(
                f"{name} needs a log-SNR, log(alpha^2/sigma^2), that falls as t rises, "
                f"got {logsnr[i, j]:.6g} at t={ts[i]:.6g} and {logsnr[i + 1, j]:.6g} "
                f"at t={ts[i + 1]:.6g}{_where(j, scales)}. t=0 is data, t_max noise."
            )


def check_times(process: Any, *, first: str = "<=") -> None:
    """Refuse times that do not rise from 0, or with `first` "<" from more than 0."""
    if is_traced((process.t_min, process.t_max)):
        return
    t_min, t_max = float(process.t_min), float(process.t_max)
    if not 0 <= t_min < t_max or (t_min == 0 and first == "<"):
        raise ValueError(
            f"{type(process).__name__} needs 0 {first} t_min < t_max, got t_min="
            f"{t_min:g} and t_max={t_max:g}. t=0 is data, and t rises to noise"
            f"{'; start a little after 0.' if first == '<' else '.'}"
        )


def _where(j, scales):
    """Of which coordinate an error message speaks."""
    shape = scales[0].shape[1:]
    index = tuple(int(i) for i in np.unravel_index(j, shape))
    return f" in the coordinate {index}" if shape else ""


def level_of(alpha: Array, sigma: Array) -> tuple[Scalar, Scalar]:
    """The one (alpha, sigma) that is as noisy as these: the mean of (4)."""
    if alpha.ndim == 0:
        return alpha, sigma
    size = jnp.sqrt(jnp.mean(sigma**2))
    return jnp.expm1(jnp.mean(jnp.log1p(alpha / sigma))) * size, size


def basis_of(path: AbstractPath) -> AbstractBasis:
    """The basis in which x_t is held: the path's, or the data as they are."""
    return getattr(path, "basis", PIXELS)


def check_sample(path: AbstractPath, shape: tuple[int, ...]) -> None:
    """Refuse samples of a shape that the path's alpha and sigma are not for."""
    own = _shape(path)
    try:
        fits = jnp.broadcast_shapes(own, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"the alpha and sigma of this {type(path).__name__} have the shape {own}, "
            f"which does not broadcast to one sample of shape {tuple(shape)}. Make the "
            "process for the shape of your data."
        )


def check_one_level(path: AbstractPath, what: str) -> None:
    """Refuse a path whose coordinates have noise levels of their own."""
    if _shape(path):
        raise ValueError(
            f"{what} is written for one noise level at a time, and in this "
            f"{type(path).__name__} every coordinate has its own. Use log_likelihood."
        )


class NoiseInverse(eqx.Module):
    """t as a function of h = -log tau: a bracket from a table, then Newton on (4), (5).

    Exact to rounding; differentiable in h and in the path's parameters.

    **Arguments:**
    - `path`: the path; `h` of the methods is a scalar.
    """

    path: AbstractPath
    ts: Float[Array, " nodes"] | None
    hs: Float[Array, " nodes"] | None

    def __init__(self, path: AbstractPath):
        self.path, self.ts, self.hs = path, None, None
        if path.closed_inverse(jnp.ones(())) is not None:
            return
        self.ts, self.hs = jax.lax.stop_gradient(path.levels())

    def __call__(self, h: ScalarLike) -> Scalar:
        """The time t in [t_min, t_max] with -log tau(t) = h."""
        h = float_array(h)
        if self.hs is None:
            t = self.path.closed_inverse(h)
            return jnp.clip(t, self.path.t_min, self.path.t_max)
        # Outside the range of the path the answer is the end itself.
        below, above = h >= self.hs[0], h <= self.hs[-1]
        end = jnp.where(below, self.path.t_min, self.path.t_max)
        return jnp.where(below | above, end, _inverted(h, self.path, self.ts, self.hs))

    def local(self, h: ScalarLike) -> Scales:
        """(4) in every coordinate, at the time when its mean is h."""
        h = float_array(h)
        if not _shape(self.path):
            return h
        alpha, sigma = self.path.scales(self(h))
        return jnp.log1p(alpha / sigma)

    def local_rate(self, h: ScalarLike) -> Scales | float:
        """The derivative of `local` in h; 1 where alpha and sigma are scalars."""
        if not _shape(self.path):
            return 1.0
        slope = noise_slope(self.path, self(h))
        return slope / jnp.mean(slope)


def mean_clock(alpha: Array, sigma: Array) -> Scalar:
    """(4): the mean of -log tau over the coordinates."""
    h = jnp.log1p(alpha / sigma)
    return h if h.ndim == 0 else jnp.mean(h)


def _clock(path, t):
    return mean_clock(*path.scales(t))


@eqx.filter_custom_jvp
def _inverted(h, path, ts, hs):
    i = jnp.clip(jnp.sum(hs > h), 1, len(hs) - 1)
    lo, hi, h_lo, h_hi = ts[i - 1], ts[i], hs[i - 1], hs[i]
    gap = jnp.where(h_lo > h_hi, h_lo - h_hi, 1.0)
    t = lo + (hi - lo) * jnp.clip((h_lo - h) / gap, 0.0, 1.0)

    def newton(_, t):
        value, slope = jax.jvp(lambda t: _clock(path, t), (t,), (jnp.ones_like(t),))
        return jnp.clip(t - (value - h) / jnp.where(slope < 0, slope, -1.0), lo, hi)

    return jax.lax.fori_loop(0, _NEWTON_STEPS, newton, t)


@_inverted.def_jvp
def _inverted_jvp(primals, tangents):
    """The implicit function theorem: dt = (dh - dh(t) of the path's numbers) / h'."""
    h, path, ts, hs = primals
    h_dot, path_dot, *_ = tangents
    t = _inverted(h, path, ts, hs)
    change = jnp.zeros_like(t) if h_dot is None else h_dot
    if jax.tree.leaves(path_dot):
        moved = eqx.filter_jvp(lambda path: _clock(path, t), (path,), (path_dot,))[1]
        change = change - (0 if moved is None else moved)
    slope = jax.jvp(lambda t: _clock(path, t), (t,), (jnp.ones_like(t),))[1]
    return t, change / jnp.where(slope < 0, slope, -1.0)


def noise_slope(path: AbstractPath, t: ScalarLike) -> Scales:
    """h'(t) in every coordinate, equation (5)."""
    (a, s), (da, ds) = path.scales_and_rates(t)
    return (da * s - a * ds) / (s * (a + s))


def _shape(path):
    """The shape of alpha and sigma."""
    t = jax.eval_shape(lambda: float_array(path.t_min))
    return jax.eval_shape(path.scales, t)[0].shape


LOGSNR_FLOOR = -13.8155  # 2 log(1e-3): noise, for paths that reach alpha = 0


def logsnr_span(path: AbstractPath) -> tuple[Scalar, Scalar]:
    """(log-SNR at t_max, at t_min), the first not below LOGSNR_FLOOR."""
    low, high = at_both_ends(path, path.logsnr)
    return jnp.maximum(low, LOGSNR_FLOOR), high


def at_both_ends(path: AbstractPath, fn: Callable) -> Float[Array, "2"]:
    """fn at t_max and at t_min, as one program."""
    return jax.vmap(fn)(jnp.stack([float_array(path.t_max), float_array(path.t_min)]))


def batched(fn: Callable, t: Time, x: Float[Array, "batch ..."]):
    """fn(t), scalars or arrays over one sample, shaped to broadcast against x."""
    if t.ndim == 0:
        return fn(t)

    def align(a):  # (batch, ...) against (batch, ..., ...), both from the right
        return a.reshape(a.shape[:1] + (1,) * (x.ndim - a.ndim) + a.shape[1:])

    return jax.tree.map(align, jax.vmap(fn)(t))
