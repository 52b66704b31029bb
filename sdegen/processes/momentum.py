"""Linear SDEs of a state with momentum: the data and auxiliary rows.

The state u has the shape (k, *data): row 0 is the data, the others (a velocity, an
acceleration) start as N(0, C), independent of x0. F (k, k) and G (k,) act on the rows:

    du = F(t) u dt + G(t) dw,    u_t = a x0 + L z,    S = L L^T                    (1)
    a' = F a, a(0) = e_0,    S' = F S + S F^T + G G^T, S(0) = diag(0, C)           (2)

All that u_t says about x0 is in y: to a denoiser the process is a path,

    y = a^T S^-1 u / snr ~ N(x0, 1 / snr),    snr = a^T S^-1 a                     (3)
    alpha = sqrt(snr / (1 + snr)),  sigma = 1 / sqrt(1 + snr),
    statistic = alpha y = alpha x0 + sigma z                                       (4)
    (log snr)' = -|G^T S^-1 a|^2 / snr                                             (5)
    score(u) = -S^-1 (u - a E[x0 given u])                                         (6)
"""

import abc
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..typing import RandomKey, ScalarLike, float_array
from .path import AbstractPath
from .sde import AbstractSDE, check_gaussian

Data: TypeAlias = Float[Array, "..."]
Rows: TypeAlias = Float[Array, "k ..."]
Square: TypeAlias = Float[Array, "k k"]


class AbstractBlockSDE(AbstractPath, AbstractSDE):
    """du = F u dt + G dw on a state of k rows, equation (1); as a path, (4).

    A subclass writes `matrix`, `noise_scale` and `moments`. Denoisers, losses, samplers
    and likelihoods use the path of the statistic, which is hybrid score matching
    (Dockhorn et al. 2022, "Score-based generative modeling with critically-damped
    Langevin diffusion", section 3.2); `drift` and `diffusion` are of the state.

    **Arguments** of the methods: `t`, the time, a scalar; `u`, a state, (k, ...); `x0`,
    data, (...); `key`, a random key; `shape`, of one sample.
    """

    @abc.abstractmethod
    def matrix(self, t: ScalarLike) -> Square:
        """F(t)."""

    @abc.abstractmethod
    def noise_scale(self, t: ScalarLike) -> Float[Array, " k"]:
        """G(t): the scale of the noise in each row."""

    @abc.abstractmethod
    def moments(self, t: ScalarLike) -> tuple[Float[Array, " k"], Square]:
        """a and the lower Cholesky factor L of (1) at time t."""

    @property
    def size(self) -> int:
        """k, the number of rows of the state."""
        return jax.eval_shape(self.noise_scale, self.t_max).shape[0]

    def alpha(self, t):
        """sqrt(snr / (1 + snr)), equation (4)."""
        return _root_sigmoid(float_array(t), self, 1.0)

    def sigma(self, t):
        """1 / sqrt(1 + snr), equation (4)."""
        return _root_sigmoid(float_array(t), self, -1.0)

    def drift(self, t, x):
        """F u, of the whole state."""
        return mix(self.matrix(t), x)

    def diffusion(self, t, x):
        """G, of the shape of the state."""
        return jnp.broadcast_to(column(self.noise_scale(t), x.ndim), x.shape)

    def statistic(self, t: ScalarLike, u: Rows) -> Data:
        """alpha x0 + sigma z of the state u, equation (4)."""
        direction, _, factor = _direction(t, self)
        return self.sigma(t) * mix(solve_upper(factor, direction), u)

    def corrupt(self, key: RandomKey, t: ScalarLike, x0: Data) -> Rows:
        """A draw of the state at time t for the data x0, equation (1)."""
        a, factor = self.moments(t)
        z = jax.random.normal(key, (len(a), *x0.shape), x0.dtype)
        return column(a, z.ndim) * x0 + mix(factor, z)

    def prior(self, key: RandomKey, shape: tuple[int, ...], dtype=None) -> Rows:
        """A draw of the state at t_max for x0 = 0."""
        zero = jnp.zeros(shape, dtype or jnp.result_type(float))
        return self.corrupt(key, self.t_max, zero)

    def score(self, t: ScalarLike, u: Rows, x0: Data) -> Rows:
        """The score of the state u whose denoised point is `x0`, equation (6)."""
        a, factor = self.moments(t)
        return -solve_upper(factor, solve_lower(factor, u - column(a, u.ndim) * x0))

    def __check_init__(self):
        check_gaussian(self)
        k, (a, factor) = self.size, jax.eval_shape(self.moments, self.t_max)
        found = {
            "matrix": (jax.eval_shape(self.matrix, self.t_max), (k, k)),
            "the mean of moments": (a, (k,)),
            "the factor of moments": (factor, (k, k)),
        }
        for what, (array, wanted) in found.items():
            if array.shape != wanted:
                raise ValueError(
                    f"{type(self).__name__} has noise in {k} rows, so {what} must have "
                    f"the shape {wanted}, got {array.shape}."
                )


def column(v: Float[Array, " k"], ndim: int) -> Rows:
    """One number for each row, shaped to broadcast against a state of `ndim` axes."""
    return v.reshape(v.shape + (1,) * (ndim - 1))


def mix(matrix: Float[Array, "*k k"], u: Rows) -> Data:
    """The rows of u mixed by a matrix (or a vector), in full precision."""
    return jnp.tensordot(matrix, u, 1, precision="highest").astype(u.dtype)


def solve_lower(factor: Square, b: Rows) -> Rows:
    """L^-1 b, written out: k is small, and it fuses with its neighbours."""
    rows = []
    for i in range(len(factor)):
        known = sum((factor[i, j] * rows[j] for j in range(i)), start=0.0)
        rows.append((b[i] - known) / factor[i, i])
    return jnp.stack(rows).astype(b.dtype)


def solve_upper(factor: Square, b: Rows) -> Rows:
    """L^-T b."""
    return solve_lower(factor[::-1, ::-1].T, b[::-1])[::-1]


def _direction(t, process):
    """w / |w| and log |w| for w = L^-1 a, without squares that overflow, and L."""
    a, factor = process.moments(t)
    w = solve_lower(factor, a)
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(w)))
    w = w / scale
    norm = jnp.sqrt(jnp.sum(w**2))
    return w / norm, jnp.log(norm) + jnp.log(scale), factor


@eqx.filter_jit
def _root_sigmoid(t, process, sign):
    """alpha (sign 1) or sigma (sign -1), equation (4)."""
    return jnp.sqrt(jax.nn.sigmoid(sign * _log_snr(t, process)))


@eqx.filter_custom_jvp
def _log_snr(t, process):
    """log(a^T S^-1 a); its derivative in t is (5) for any `moments`."""
    return 2 * _direction(t, process)[1]


@_log_snr.def_jvp
def _log_snr_jvp(primals, tangents):
    t, process = primals
    t_dot, process_dot = tangents
    direction, half, factor = _direction(t, process)
    out_dot = jnp.zeros_like(half)
    if t_dot is not None:
        pull = process.noise_scale(t) * solve_upper(factor, direction)
        out_dot -= t_dot * jnp.sum(pull**2)
    if jax.tree.leaves(process_dot):
        own = eqx.filter_jvp(lambda p: _direction(t, p)[1], (process,), (process_dot,))
        out_dot += 0 if own[1] is None else 2 * own[1]
    return 2 * half, out_dot


def _collocation(n):
    """Gauss's nodes c, weights b and Lagrange's integrals A_jl from 0 to c_j."""
    x, b = np.polynomial.legendre.leggauss(n)
    values = np.polynomial.legendre.legvander(x, n)
    p = np.arange(1, n)
    integrals = np.empty((n, n))
    integrals[:, 0] = x + 1
    integrals[:, 1:] = (values[:, 2:] - values[:, :-2]) / (2 * p + 1)
    return (x + 1) / 2, b / 2, integrals @ np.linalg.inv(values[:, :-1]) / 2


_NODES, _WEIGHTS, _INTEGRALS = _collocation(8)


def transition(
    matrix: Float[Array, "nodes k k"], noise: Float[Array, "nodes k"]
) -> tuple[Square, Float[Array, "nodes_k k"]]:
    """(E, N): u_1 = E u_0 + N^T z for du = F u dr + G dw on 0 <= r <= 1.

    With Y(r) the transition from r to 1, by Gauss's method of order 16,

        Y = 1 + int_r^1 Y F,    E = Y(0),    N^T N = int Y G G^T Y^T               (7)

    **Arguments:**
    - `matrix`, `noise`: F and G at the times `transition_nodes`, (8, k, k) and (8, k).
    """
    n, k, dtype = len(_NODES), matrix.shape[-1], matrix.dtype
    inner, weights = jnp.asarray(_INTEGRALS, dtype), jnp.asarray(_WEIGHTS, dtype)
    one = jnp.eye(k, dtype=dtype)
    matrix, noise = matrix[::-1], noise[::-1]  # the nodes seen from r = 1

    def sweep(y, rule):
        return one + jnp.einsum("jl,lpq,lqr->jpr", rule, y, matrix, precision="highest")

    blocks = jnp.einsum("jl,lqp->jplq", inner, matrix).reshape(n * k, n * k)
    system = jnp.eye(n * k, dtype=dtype) - blocks
    y = jnp.linalg.solve(system, jnp.tile(one, (n, 1))).reshape(n, k, k)
    y = jnp.swapaxes(y, 1, 2)
    # The solve is precise in norm; a sweep of (7) for each row makes every entry so.
    for _ in range(k):
        y = sweep(y, inner)
    spread = jnp.sqrt(weights)[:, None, None] * noise[:, :, None]
    return sweep(y, weights[None])[0], (spread * jnp.swapaxes(y, 1, 2)).reshape(-1, k)


def transition_nodes(dtype) -> Float[Array, " nodes"]:
    """The times r at which `transition` needs F and G."""
    return jnp.asarray(_NODES, dtype)


def lower(rows: Float[Array, "n k"]) -> Square:
    """The Cholesky factor of rows^T rows, by QR without a square."""
    upper = jnp.linalg.qr(rows, mode="r")
    return (upper * jnp.where(jnp.diagonal(upper) < 0, -1, 1)[:, None]).T
