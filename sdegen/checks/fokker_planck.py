"""The density of x_t of any SDE on the line, by solving its Fokker-Planck equation.

    dp/dt = -dJ/dx,    J = a p - K dp/dx,    K = D / 2,    a = f - K'              (1)

on cells of a grid, with no flux at its ends, so that mass is kept up to rounding. The
flux between two cells at a distance h is that of the exact solution of constant J (the
exponential fitting of Scharfetter and Gummel 1969):

    J = K/h [B(-w) p_left - B(w) p_right],    w = a h / K,    B(w) = w / (e^w - 1) (2)

second order where K is smooth, upwind where it vanishes. Cells are even in u of x = c
sinh(u). Time steps are the two-stage singly diagonally implicit Runge-Kutta method of
order 2 (gamma = 1 - 1/sqrt(2); L-stable).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float

from ..processes.sde import AbstractSDE
from .test_data import Mixture

_CELLS = 1500
_GAMMA = 1 - 1 / np.sqrt(2)
_FLOOR = 1e-11  # of the largest density: below it is rounding
_CORE = 2.0  # c of the grid


class GridDensity(eqx.Module):
    """p_t on the line as a table over (time, cell): density, distribution, score.

    `x` are the middles of the cells and `edges` their ends. The score is linear in t
    and in u; beyond the floor of the density it is constant.
    """

    ts: Float[Array, " times"]
    x: Float[Array, " cells"]
    edges: Float[Array, " edges"]
    p: Float[Array, "times cells"]
    scores: Float[Array, "times cells"]
    cdfs: Float[Array, "times edges"]

    def __call__(self, t, x):
        """The score, for one sample of shape (1,)."""
        row = jnp.interp(t, self.ts, jnp.arange(len(self.ts)))
        u, start = (jnp.arcsinh(v / _CORE) for v in (x, self.x[:2]))
        column = (u - start[0]) / (start[1] - start[0])
        place = [jnp.broadcast_to(row, column.shape), column]
        return map_coordinates(self.scores, place, order=1, mode="nearest")

    def cdf(self, i: int) -> "GridCDF":
        """The distribution function at time `ts[i]`."""
        return GridCDF(self.edges, self.cdfs[i])

    def mass(self, i: int) -> Float[np.ndarray, " cells"]:
        """The probability of each cell at time `ts[i]`."""
        return np.diff(np.asarray(self.cdfs[i]))


class GridCDF(eqx.Module):
    """A distribution function by its values at the ends of cells."""

    edges: Float[Array, " edges"]
    values: Float[Array, " edges"]

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The probability below x."""
        return jnp.interp(x, self.edges, self.values)

    def quantile(self, q: Float[Array, "..."]) -> Float[Array, "..."]:
        """The x with the probability `q` below it."""
        return jnp.interp(q, self.values, self.edges)


def solve(
    sde: AbstractSDE, data: Mixture, ts: Float[np.ndarray, " times"], reach: float
) -> GridDensity:
    """Equation (1) from the data at ts[0], on |x| < `reach`, at rising times."""
    half = np.arcsinh(reach / _CORE)
    u_edges = np.linspace(-half, half, _CELLS + 1)
    u = (u_edges[1:] + u_edges[:-1]) / 2
    x, edges = _CORE * np.sinh(u), _CORE * np.sinh(u_edges)
    width, gap, steps = np.diff(edges), np.diff(x), np.diff(ts)
    start = np.diff(np.asarray(data.cdf(jnp.asarray(edges))))
    p = [start / start.sum() / width]
    stages = ts[:-1, None] + steps[:, None] * np.array([_GAMMA, 1.0])
    points = map(jnp.asarray, (stages, edges[1:-1], x))
    f, D = map(np.asarray, _coefficients(sde, *points))
    with np.errstate(all="ignore"):
        for n, h in enumerate(steps):
            p.append(_step(p[-1], h, f[n], D[n], width, gap))
    p = np.array(p)
    cdfs = np.cumsum(np.pad(p * width, ((0, 0), (1, 0))), axis=1)
    return GridDensity(*map(jnp.asarray, (ts, x, edges, p, _scores(p, x), cdfs)))


@eqx.filter_jit
def _coefficients(sde, stages, edges, x):
    def at(t):
        f = jax.vmap(lambda x: sde.drift(t, x[None])[0])(edges)
        D = jax.vmap(lambda x: jnp.reshape(sde.diffusion(t, x[None]), ()) ** 2)(x)
        return f, D

    return jax.lax.map(jax.vmap(at), stages)


def _step(p, h, f, D, width, gap):
    """One step of the implicit method: two tridiagonal solves."""
    first = _implicit(p, _GAMMA * h, f[0], D[0], width, gap)
    slope = (first - p) / (_GAMMA * h)
    ahead = p + (1 - _GAMMA) * h * slope
    return _implicit(ahead, _GAMMA * h, f[1], D[1], width, gap)


def _implicit(p, h, f, D, width, gap):
    """The q with q = p + h L q, L from (1) and (2)."""
    from scipy.linalg import solve_banded
    from scipy.special import exprel

    K = 0.25 * (D[1:] + D[:-1]) + 1e-12
    w = np.clip((f - 0.5 * np.diff(D) / gap) * gap / K, -700, 700)
    down, up = K / gap / exprel(w), K / gap / exprel(-w)  # exprel(w) = 1 / B(w)
    bands = np.zeros((3, len(p)))
    bands[1] = 1.0
    bands[1, :-1] += h * up / width[:-1]
    bands[1, 1:] += h * down / width[1:]
    bands[0, 1:] = -h * down / width[:-1]
    bands[2, :-1] = -h * up / width[1:]
    if not np.isfinite(bands).all():
        return np.full_like(p, np.nan)
    return solve_banded((1, 1), bands, p)


def _scores(p, x):
    """The derivative of log p in x; constant beyond the floor."""
    out = np.zeros_like(p)
    for i, row in enumerate(p):
        floor = _FLOOR * np.max(row)
        inside = np.flatnonzero(row > floor)
        if len(inside) < 3:
            continue
        low, high = inside[0], inside[-1] + 1
        part = np.log(np.maximum(row[low:high], floor))
        out[i, low:high] = np.gradient(part, x[low:high])
        out[i, :low], out[i, high:] = out[i, low + 1], out[i, high - 2]
    return out
