"""Any linear process that acts on each coordinate separately, from two coefficients.

    dx = f(t) x dt + g(t) dw    =>    x_t = alpha x0 + sigma z

by the moment equations (Song et al. 2021, "Score-based generative modeling through
SDEs", appendix B)

    (log alpha)' = f,    (log sigma^2)' = 2 f + g^2 / sigma^2                      (1)
"""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..typing import PyTree, Scalar, ScalarLike, float_array, is_traced
from .basis import PIXELS, AbstractBasis
from .moment_table import MomentTable, solve_moments
from .noise import AbstractNoise, Gaussian
from .path import check_times, mean_clock
from .sde import AbstractLinearSDE, both

_GONE = -80.0  # of log alpha


class LinearSDE(AbstractLinearSDE):
    """dx = f(t, params) x dt + g(t, params) dw; alpha and sigma follow from (1).

    The moment equations are solved once, when the object is made: to differentiate or
    sweep `params`, make it inside the differentiated function. Accuracy: 1e-9 in
    float64, 1e-5 in float32; the derivatives in t are exactly those of (1).

    **Arguments:**
    - `f`, `g`: functions of (t, params) that return a scalar, or an array over the
      coordinates of one sample. Default: the Ornstein-Uhlenbeck process dx = -x dt +
      sqrt(2) dw.
    - `params`: any pytree of numbers, default None.
    - `t_min`, `t_max`: 0 < t_min < t_max, see `AbstractSDE`; defaults 1e-3 and 1 (5 for
      the default process).
    - `noise`: default `Gaussian()`.
    - `basis`: of the coordinates, such as `DCT()` for rates that depend on the
      frequency; default the data as they are.

    **Raises:** `ValueError` for coefficients that do not fit or cannot be solved.
    """

    f: Callable = eqx.field(static=True)
    g: Callable = eqx.field(static=True)
    params: PyTree
    t_min: Scalar
    t_max: Scalar
    noise: AbstractNoise
    basis: AbstractBasis
    moments: MomentTable

    def __init__(
        self,
        f: Callable | None = None,
        g: Callable | None = None,
        params: PyTree = None,
        *,
        t_min: ScalarLike = 1e-3,
        t_max: ScalarLike | None = None,
        noise: AbstractNoise | None = None,
        basis: AbstractBasis | None = None,
    ):
        t_max = (5.0 if f is None else 1.0) if t_max is None else t_max
        self.f, self.g = both(self, (f, g), _OU, "f(t, params) and g(t, params)")
        self.params = jax.tree.map(float_array, params)
        self.t_min, self.t_max = float_array(t_min), float_array(t_max)
        self.noise = Gaussian() if noise is None else noise
        self.basis = PIXELS if basis is None else basis
        check_times(self, first="<")
        shapes = [
            jax.eval_shape(fn, t_min, self.params).shape for fn in (self.f, self.g)
        ]
        try:
            np.broadcast_shapes(*shapes)
        except ValueError:
            raise ValueError(
                "LinearSDE needs f(t, params) and g(t, params) that broadcast, each a "
                "scalar or an array over the coordinates of one sample, got the shapes "
                f"{shapes[0]} and {shapes[1]}. A matrix that mixes coordinates is for "
                "BlockSDE."
            ) from None
        times = (self.t_min, self.t_max)
        self.moments = _solve_moments(self.f, self.g, self.params, *times)  # pyright: ignore[reportAttributeAccessIssue]

    def alpha(self, t):
        """exp(int f), from (1)."""
        return self.scales(t)[0]

    def sigma(self, t):
        """The standard deviation of x_t given x0, from (1)."""
        return self.scales(t)[1]

    def scales(self, t):
        """(alpha, sigma), from one look at the table."""
        coefficients = eqx.Partial(_coefficients, self.f, self.g, self.params)
        return _scales(_evaluate(float_array(t), self.moments, coefficients))

    def levels(self):
        """Those of the nodes of the table, which need no look at it."""
        ts, moments = self.moments.nodes()
        hs = jax.vmap(lambda y: mean_clock(*_scales(y)))(moments)
        return jnp.clip(ts, self.t_min, self.t_max), hs


def _scales(moments):
    """(alpha, sigma) from their logarithms."""
    log_alpha, log_variance = moments
    if log_alpha.ndim:
        # A floor for fast coordinates keeps alpha' / alpha = f at all times.
        lift = jnp.maximum(log_alpha, _GONE) - log_alpha
        log_alpha = log_alpha + jax.lax.stop_gradient(lift)
    return jnp.exp(log_alpha), jnp.exp(0.5 * log_variance)


_OU = (
    lambda t, params: -jnp.ones_like(t),
    lambda t, params: jnp.sqrt(2.0) * jnp.ones_like(t),
)


def _coefficients(f, g, params, t):
    """f and g at time t, of one shape."""
    values = float_array(f(t, params)), float_array(g(t, params))
    return tuple(jnp.broadcast_arrays(*values))


def _solve_moments(f, g, params, t_min, t_max):
    """Solve (1) for (log alpha, log sigma^2) as a function of log t."""
    table, solution = _integrate(f, g, params, t_min, t_max)
    ok = solution.result == dfx.RESULTS.successful
    if not is_traced(ok) and not bool(ok):
        if bool(solution.result == dfx.RESULTS.max_steps_reached):
            raise ValueError(
                f"LinearSDE did not reach t_max in {solution.stats['max_steps']} steps "
                "of its moment equations: f or g is infinite on the way, or |f| too "
                "large for so long a time. Lower t_max: a coordinate is pure noise "
                "after about 10 of its own time units."
            )
        raise ValueError(
            "LinearSDE could not solve its moment equations between t_min and t_max: f "
            "or g is not finite or not smooth there. Keep t_max away from such a time."
        )
    return table


@eqx.filter_jit
def _integrate(f, g, params, t_min, t_max):
    nodes, weights = np.polynomial.legendre.leggauss(16)
    nodes = jnp.asarray((nodes + 1) / 2, t_min.dtype)
    weights = jnp.asarray(weights / 2, t_min.dtype)

    def mean(fn):  # over 0 to 1
        return jnp.tensordot(weights, jax.vmap(fn)(nodes), 1)

    def log_alpha(t):  # the integral of f from 0 to t
        return t * mean(lambda c: _coefficients(f, g, params, c * t)[0])

    end = log_alpha(t_min)

    def gained(c):  # the noise of time c t_min, scaled as it is at t_min
        g_t = _coefficients(f, g, params, c * t_min)[1]
        return g_t**2 * jnp.exp(2 * (end - log_alpha(c * t_min)))

    start = jnp.stack([end, jnp.log(t_min * mean(gained))])

    def rate(t, y):
        f_t, g_t = _coefficients(f, g, params, t)
        return jnp.stack([f_t, 2 * f_t + g_t**2 * jnp.exp(-y[1])])

    tol = 1e-11 if start.dtype == jnp.float64 else 1e-6
    steps = min(max(2**21 // start.size, 256), 4096)  # so that the table stays small
    control = dfx.PIDController(rtol=tol, atol=tol)
    times, solver = (t_min, t_max), dfx.Tsit5()
    return solve_moments(rate, start, times, solver, control, steps, degree=4)


@eqx.filter_custom_jvp
def _evaluate(t, moments, coefficients):
    """(log alpha, log sigma^2) at time t; the derivative in t is (1) itself."""
    return moments(t)


@_evaluate.def_jvp
def _evaluate_jvp(primals, tangents):
    t, moments, coefficients = primals
    t_dot, moments_dot, _ = tangents  # params act through the moments
    out = _evaluate(t, moments, coefficients)
    out_dot = jnp.zeros_like(out)
    if t_dot is not None:
        f, g = coefficients(t)
        out_dot += t_dot * jnp.stack([f, 2 * f + g**2 * jnp.exp(-out[1])])
    if jax.tree.leaves(moments_dot):
        at = lambda m: m(t)  # noqa: E731
        dense = eqx.filter_jvp(at, (moments,), (moments_dot,))[1]
        out_dot += 0 if dense is None else dense
    return out, out_dot
