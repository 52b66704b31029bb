"""Paths whose noise is not Gaussian: no SDE, no score, but a law and a flow.

For data at the points a_k with weights w_k and noise of density q and distribution
function Q, on the line,

    P(x_t < x) = F_t(x) = sum_k w_k Q((x - alpha a_k) / sigma)                     (1)
    E[x0 | x_t = x] = sum_k r_k a_k,    r_k ~ w_k q((x - alpha a_k) / sigma)       (2)

and the probability flow, from (2), has to keep F_t(x_t), from (1). Q is the integral
of q = exp(base.log_prob); draws of `base.sample` have to have it.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..models.denoiser import PosteriorMean
from ..processes.path import AbstractPath
from ..sampling.sample import sample
from ..solvers.grids import CosineGrid
from ..typing import RandomKey, ScalarLike
from .report import Row, measured, skipped
from .reversal import FLOW, FLOW_BAR, KS_BAR, WHAT, ks
from .tables import Clock
from .test_data import PROBES

_ATOMS, _WEIGHTS = np.array([-1.5, 0.2, 1.0]), np.array([0.25, 0.45, 0.3])
_REACH, _NODES = 20.0, 40_000  # of sinh^-1 z: up to 2e8, where Cauchy's tails are thin
_BIAS = 1e-3  # of Q where q jumps, in probability
_STEPS = 400
NOISE = "draws of the noise have the density it declares (KS)"


class _Mean(eqx.Module):
    """Equation (2), for x of shape (batch, 1)."""

    path: AbstractPath

    def __call__(self, t: ScalarLike, x: Float[Array, "batch 1"], cond) -> Array:
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        gap = (x - alpha * _ATOMS) / sigma
        log_q = jax.vmap(jax.vmap(self.path.noise.log_prob))(gap[..., None])
        # Rounding may lead out of the reach of a bounded law: back to the nearest.
        out = jnp.isneginf(log_q).all(axis=1, keepdims=True)
        log_r = jnp.log(_WEIGHTS) + jnp.where(out, -(gap**2), log_q)
        return jax.nn.softmax(log_r, axis=1) @ _ATOMS[:, None]


class _Line:
    """Q as a table."""

    def __init__(self, base):
        self.u = np.linspace(-_REACH, _REACH, _NODES)
        log_q = eqx.filter_jit(jax.vmap(lambda z: base.log_prob(z[None])))
        q = np.exp(np.asarray(log_q(jnp.sinh(self.u)))) * np.cosh(self.u)
        steps = (q[1:] + q[:-1]) / 2 * (self.u[1] - self.u[0])
        self.table = np.concatenate([[0.0], np.cumsum(steps)])

    def __call__(self, z):
        return np.interp(np.arcsinh(z), self.u, self.table)

    def law(self, x, alpha, sigma):
        """Equation (1)."""
        return self((x[:, None] - alpha * _ATOMS) / sigma) @ _WEIGHTS

    def quantiles(self, probes, alpha, sigma):
        """The x with F_t(x) = probes, by bisection of sinh^-1 (x / sigma)."""
        low, high = np.full(len(probes), -_REACH), np.full(len(probes), _REACH)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.law(sigma * np.sinh(middle), alpha, sigma) < probes
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return sigma * np.sinh(low)


def noise_rows(key: RandomKey, path: AbstractPath, samples: int) -> list[Row]:
    """Draws of the noise against Q."""
    line = _line(path)
    if isinstance(line, str):
        return [skipped("terminal law", "noise law", NOISE, line)]
    draw = eqx.filter_jit(jax.vmap(lambda k: path.noise.sample(k, (1,))[0]))
    draws = 8 * samples  # cheap, and a scale that is wrong by 5 % should be seen
    found = ks(line(np.asarray(draw(jax.random.split(key, draws)))))
    allowed = KS_BAR + 2 * _BIAS * np.sqrt(draws)
    return [measured("terminal law", "noise law", NOISE, found, allowed, "SE")]


def flow_rows(key: RandomKey, clock: Clock, path: AbstractPath) -> list[Row]:
    """Data brought back by the flow: (2) keeps (1)."""
    line = _line(path)
    if isinstance(line, str):
        return [skipped("reversal", FLOW, WHAT[FLOW], line)]
    high, low = (tuple(map(float, clock.scales(t))) for t in (clock.high, clock.low))
    start = jnp.asarray(line.quantiles(PROBES, *high))[:, None]
    solved = sample(
        key,
        PosteriorMean(_Mean(path), path),
        start.shape,
        start=start,
        solver=dfx.Heun(),
        grid=CosineGrid(_STEPS, 1.0),
    )
    error = np.abs(line.law(np.asarray(solved.x[:, 0]), *low) - PROBES).max()
    return [measured("reversal", FLOW, WHAT[FLOW], error, FLOW_BAR + _BIAS)]


def _line(path):
    """Q, or why there is none."""
    known = jax.eval_shape(path.noise.log_prob, jax.ShapeDtypeStruct((1,), float))
    if known is None:
        return f"the density of {type(path.noise).__name__} is not known"
    return _Line(path.noise)
