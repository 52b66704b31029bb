"""Any linear SDE on an augmented state, from its two matrices.

    du = F(t) u dt + G(t) dw    =>    u_t = a x0 + L z                             (1)

by the moment equations in a form that keeps S = L L^T positive in spite of rounding,

    a' = F a,    L' = L Phi(W),    W = A + A^T + H H^T,                            (2)

with A = L^-1 F L, H = L^-1 G, and Phi the lower triangle with half of the diagonal.
"""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..typing import PyTree, Scalar, ScalarLike, float_array, is_traced
from .moment_table import MomentTable, solve_moments
from .momentum import AbstractBlockSDE, lower, solve_lower, transition, transition_nodes
from .noise import AbstractNoise, Gaussian
from .path import check_times
from .sde import both


class BlockSDE(AbstractBlockSDE):
    """du = F(t, params) u dt + G(t, params) dw; a and L follow from (2).

    The moment equations are solved once, when the object is made: to differentiate or
    sweep `params`, make it inside the differentiated function. Accuracy, in units of
    the noise: 1e-9 in float64, 1e-5 in float32. Examples are phase space Langevin
    (Pandey and Mandt 2023, "A complete recipe for diffusion generative models") and
    higher orders (Mou et al. 2021, "High-order Langevin diffusion").

    **Arguments:**
    - `F`, `G`: functions of (t, params) that return (k, k) and (k,). Default: a
      Langevin diffusion of unit mass that is damped less than critically.
    - `params`: any pytree of numbers, default None.
    - `auxiliary`: the covariance of rows 1 to k - 1 at t = 0, (k - 1, k - 1) and
      positive definite, or their variances, (k - 1,) or one number; default 0.04.
    - `t_min`, `t_max`: 0 < t_min < t_max, see `AbstractSDE`; defaults 1e-3 and 1.
    - `noise`: default `Gaussian()`.

    **Raises:** `ValueError` for matrices that do not fit or cannot be solved.
    """

    F: Callable = eqx.field(static=True)
    G: Callable = eqx.field(static=True)
    params: PyTree
    auxiliary: Float[Array, "..."]
    t_min: Scalar
    t_max: Scalar
    noise: AbstractNoise
    table: MomentTable

    def __init__(
        self,
        F: Callable | None = None,
        G: Callable | None = None,
        params: PyTree = None,
        *,
        auxiliary: ScalarLike | Float[Array, "..."] = 0.04,
        t_min: ScalarLike = 1e-3,
        t_max: ScalarLike = 1.0,
        noise: AbstractNoise | None = None,
    ):
        names = "F(t, params), (k, k), and G(t, params), (k,)"
        self.F, self.G = both(self, (F, G), _LANGEVIN, names)
        self.params = jax.tree.map(float_array, params)
        self.t_min, self.t_max = float_array(t_min), float_array(t_max)
        self.auxiliary = float_array(auxiliary)
        self.noise = Gaussian() if noise is None else noise
        check_times(self, first="<")
        _check_shapes(self.F, self.G, self.params, self.t_min, self.auxiliary)
        times = (self.t_min, self.t_max)
        self.table = _solve(self.F, self.G, self.params, self.auxiliary, *times)  # pyright: ignore[reportAttributeAccessIssue]

    def matrix(self, t):
        """F(t, params)."""
        return float_array(self.F(float_array(t), self.params))

    def noise_scale(self, t):
        """G(t, params)."""
        return float_array(self.G(float_array(t), self.params))

    def moments(self, t):
        """a and L, equation (2)."""
        return _unpack(self.table(float_array(t)))


_LANGEVIN = (
    lambda t, _: 12.0 * jnp.array([[0.0, 1.0], [-1.0, -1.5]], jnp.result_type(t)),
    lambda t, _: jnp.sqrt(jnp.array([0.0, 36.0], jnp.result_type(t))),
)


def _check_shapes(F, G, params, t, auxiliary):
    arrays = jax.eval_shape(lambda: [jnp.asarray(m(t, params)) for m in (F, G)])
    f, g = (array.shape for array in arrays)
    if len(f) != 2 or f[0] != f[1] or f[0] < 1:
        raise ValueError(
            f"BlockSDE needs F(t, params) of shape (k, k), got an array of shape {f}. "
            "Row i says how the parts of the state move part i; part 0 is the data."
        )
    k = f[0]
    if g != (k,):
        raise ValueError(
            f"BlockSDE needs G(t, params) of shape ({k},), one scale of noise for each "
            f"row of F, got an array of shape {g}. Return its diagonal if it is a "
            "matrix; if G G^T is not diagonal, turn the auxiliary rows until it is."
        )
    if auxiliary.shape not in ((), (k - 1,), (k - 1, k - 1)):
        raise ValueError(
            f"auxiliary is the covariance of rows 1 to {k - 1} at t=0, ({k - 1}, "
            f"{k - 1}), or their variances, ({k - 1},) or one number, got an array of "
            f"shape {auxiliary.shape}."
        )


def _solve(F, G, params, auxiliary, t_min, t_max):
    solved = _integrate(F, G, params, auxiliary, t_min, t_max)
    table, good, start, snr, finite = solved
    if is_traced((good, start, snr)):
        return table
    if not bool(finite):
        raise ValueError(
            "BlockSDE needs matrices F and G that are finite between t_min and t_max. "
            "Keep t_max away from a time where one is infinite."
        )
    factor = np.asarray(start)
    size = np.sqrt((factor**2).sum(1))
    thin = ~(np.diagonal(factor) > 20 * np.finfo(factor.dtype).eps * size)
    if thin.any():
        raise ValueError(
            "BlockSDE needs a state that is spread in all of its rows, and at t_min "
            f"row {int(np.argmax(thin))} is known from those before it. Let noise (G) "
            "reach every row, or give the auxiliary rows a variance (auxiliary=...)."
        )
    if not (bool(good) and np.isfinite(float(snr))):
        raise ValueError(
            "BlockSDE could not solve its moment equations between t_min and t_max: F "
            "and G are not smooth there, or F makes the state grow beyond all numbers. "
            "Check the signs in F: its eigenvalues should have real parts below 0."
        )
    if not float(snr) < 1:
        raise ValueError(
            "BlockSDE needs a state that forgets the data until t_max, and there is "
            f"more signal than noise: a^T S^-1 a = {float(snr):.3g} at t_max="
            f"{float(t_max):g}, which should be near 0. Raise t_max or the noise, or "
            "check the signs in F: a state that grows keeps the data."
        )
    return table


def _pack(a, factor):
    diagonal = jnp.log(jnp.diagonal(factor))
    return jnp.concatenate([a[:, None], jnp.tril(factor, -1) + jnp.diag(diagonal)], 1)


def _unpack(y):
    a, rest = y[:, 0], y[:, 1:]
    return a, jnp.tril(rest, -1) + jnp.diag(jnp.exp(jnp.diagonal(rest)))


@eqx.filter_jit
def _integrate(F, G, params, auxiliary, t_min, t_max):
    """(2) in log t from the moments at t_min, and whether the solution is valid."""
    dtype = t_min.dtype

    def at(t):
        return float_array(F(t, params)).astype(dtype), float_array(G(t, params))

    f, g = jax.vmap(at)(t_min * transition_nodes(dtype))
    moved, rows = transition(t_min * f, jnp.sqrt(t_min) * g.astype(dtype))
    auxiliary = auxiliary.astype(dtype)
    if auxiliary.ndim == 2:
        root = jnp.linalg.cholesky(auxiliary).T
    else:
        root = jnp.diag(jnp.sqrt(jnp.broadcast_to(auxiliary, (len(moved) - 1,))))
    start = lower(jnp.concatenate([root @ moved[:, 1:].T, rows]))

    def rate(t, y):
        (a, factor), (f, g) = _unpack(y), at(t)
        moves = jnp.concatenate([f @ factor, jnp.diag(g)], 1)
        inner, noise = jnp.split(solve_lower(factor, moves), 2, 1)
        w = inner + inner.T + noise @ noise.T
        half = jnp.diag(jnp.diagonal(w)) / 2
        slope = jnp.tril(factor @ (jnp.tril(w, -1) + half), -1) + half
        return jnp.concatenate([(f @ a)[:, None], slope], 1).astype(dtype)

    # In float32 rounding hides the error by which steps are chosen: bound them too.
    tol, widest = (1e-12, None) if dtype == jnp.float64 else (1e-6, 0.1)
    control = dfx.PIDController(rtol=tol, atol=tol / 100, dtmax=widest)
    y, times = _pack(moved[:, 0], start), (t_min, t_max)
    solver = dfx.Dopri8()
    table, solution = solve_moments(rate, y, times, solver, control, 1024, degree=6)
    a, factor = _unpack(solution.ys[-1])
    snr = jnp.sum(solve_lower(factor, a) ** 2)
    seen = jax.vmap(at)(jnp.linspace(t_min, t_max, 9))
    finite = jnp.stack([jnp.isfinite(v).all() for v in seen]).all()
    good = solution.result == dfx.RESULTS.successful
    return table, good, start, snr, finite
