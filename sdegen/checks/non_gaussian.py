"""Paths whose noise is not Gaussian: no SDE and no score, but a known p_t and a flow.

For data at the points a_k with weights w_k and noise of density q and distribution
function Q, on the line,

    P(x_t < x) = F_t(x) = sum_k w_k Q((x - alpha a_k) / sigma)                     (1)
    E[x0 | x_t = x] = sum_k r_k a_k,    r_k ~ w_k q((x - alpha a_k) / sigma)       (2)

and the probability flow, from (2), has to keep F_t(x_t), from (1). Q is the integral
of q = exp(noise.log_prob), and draws of `noise.sample` must have it.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..models.denoiser import PosteriorMean
from ..processes.path import AbstractPath
from ..sampling.sample import sample
from ..solvers.grids import CosineGrid
from ..typing import ScalarLike
from .fokker_planck import GridCDF
from .report import Row, measured, skipped
from .reversal import FLOW, FLOW_BAR, WHAT, ks_row
from .tables import Case
from .test_data import ATOM_WEIGHTS, ATOMS, PROBES, bisect

_REACH, _NODES = 20.0, 40_000  # of sinh^-1 z: up to 2e8, where Cauchy's tails are thin
_BIAS = 1e-3  # of Q where q jumps, in probability
_STEPS = 400
NOISE = "draws of the noise have the density it declares (KS)"


class _Mean(eqx.Module):
    """Equation (2), for x of shape (batch, 1)."""

    path: AbstractPath

    def __call__(self, t: ScalarLike, x: Float[Array, "batch 1"], cond) -> Array:
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        gap = (x - alpha * ATOMS) / sigma
        log_q = jax.vmap(jax.vmap(self.path.noise.log_prob))(gap[..., None])
        # Rounding may lead out of the support of the noise: back to the nearest point.
        out = jnp.isneginf(log_q).all(axis=1, keepdims=True)
        log_r = jnp.log(ATOM_WEIGHTS) + jnp.where(out, -(gap**2), log_q)
        return jax.nn.softmax(log_r, axis=1) @ ATOMS[:, None]


def noise_rows(case: Case) -> list[Row]:
    """Draws of the noise against Q."""
    noise = case.process.noise
    Q = _distribution(noise)
    if isinstance(Q, str):
        return [skipped("terminal", "noise draws", NOISE, Q)]
    draw = eqx.filter_jit(jax.vmap(lambda k: noise.sample(k, (1,))[0]))
    draws = 8 * case.samples  # cheap, and a scale that is wrong by 5 % should show
    cdf = Q(jnp.arcsinh(draw(jax.random.split(case.key, draws))))
    return [ks_row("terminal", "noise draws", NOISE, cdf, _BIAS)]


def flow_rows(case: Case) -> list[Row]:
    """Data brought back by the flow: (2) keeps (1)."""
    clock, path = case.clock, case.process
    Q = _distribution(path.noise)
    if isinstance(Q, str):
        return [skipped("reversal", FLOW, WHAT[FLOW], Q)]

    def cdf(x, alpha, sigma):
        """Equation (1)."""
        return Q(jnp.arcsinh((x[:, None] - alpha * ATOMS) / sigma)) @ ATOM_WEIGHTS

    high, low = clock.scales(clock.high), clock.scales(clock.low)
    reach = jnp.full(len(PROBES), _REACH)
    below = lambda u: cdf(high[1] * jnp.sinh(u), *high) < PROBES  # noqa: E731
    start = high[1] * jnp.sinh(bisect(below, -reach, reach, 60))[:, None]
    denoiser = PosteriorMean(_Mean(path), path)
    options = {"solver": dfx.Heun(), "grid": CosineGrid(_STEPS, 1.0)}
    solved = sample(case.key, denoiser, start.shape, start=start, **options)
    error = jnp.abs(cdf(solved.x[:, 0], *low) - PROBES).max()
    return [measured("reversal", FLOW, WHAT[FLOW], error, FLOW_BAR + _BIAS)]


def _distribution(noise):
    """Q as a table over sinh^-1 z, or why there is none."""
    known = jax.eval_shape(noise.log_prob, jax.ShapeDtypeStruct((1,), float))
    if known is None:
        return f"the density of {type(noise).__name__} is not known"
    u = jnp.linspace(-_REACH, _REACH, _NODES)
    log_q = eqx.filter_jit(jax.vmap(lambda z: noise.log_prob(z[None])))
    q = jnp.exp(log_q(jnp.sinh(u))) * jnp.cosh(u)
    steps = (q[1:] + q[:-1]) / 2 * (u[1] - u[0])
    return GridCDF(u, jnp.append(0.0, jnp.cumsum(steps)))
