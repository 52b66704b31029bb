"""Ito processes, and their time reversals with the same marginals.

    dx = f(t, x) dt + G(t, x) dw,    D = G G^T                                     (1)

A linear process has the path x_t = alpha x0 + sigma z with Gaussian z, so (autodiff of
alpha and sigma gives the coefficients; both terms of g^2 are positive, nothing cancels)

    f = (alpha' / alpha) x,    g^2 = 2 sigma (sigma' - sigma alpha' / alpha)       (2)

Conversely f(t) and g(t) give alpha and sigma by the moment equations (A1 of Song et al.
2021, "Score-based generative modeling through SDEs", appendix B)

    (log alpha)' = f,    (log sigma^2)' = 2 f + g^2 / sigma^2                      (3)

Every reverse-time process with the marginals of (1), for any lambda >= 0, is, on a clock s
that rises as t falls, r = -dt/ds > 0 (Anderson 1982 for lambda = 1; probability flow for 0)

    dx = r [-f + (1 + lambda^2)/2 (div D + D score)] ds + lambda sqrt(r) G dw      (4)

(div D)_i = sum_j d_j D_ij is zero unless G depends on x. The clock is exponential near the
data, so that small times keep their relative precision in float32:

    t(s) = t_min + (t_max - t_min) expm1(k (1 - s)) / expm1(k),    k = 7           (5)
"""

import abc
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .base import AbstractBase, Gaussian
from .brownian import NoiseTerm
from .path import AbstractPath
from .typing import PyTree, Scalar, ScalarLike, float_array, is_traced, number

_TINY = 1e-30  # t = 0 stands for this time, where sigma' may be infinite but (2) is not
_CLOCK = 7.0  # k in (5)


class AbstractSDE(eqx.Module):
    """A forward Ito process, for one sample and a scalar time.

    `diffusion` returns a scalar, or an array of the shape of x (independent noise in
    every coordinate). `base` is the law that the process has, about, at t_max.
    """

    t_min: eqx.AbstractVar[Scalar]
    t_max: eqx.AbstractVar[Scalar]
    base: eqx.AbstractVar[AbstractBase]

    @abc.abstractmethod
    def drift(self, t: ScalarLike, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """f(t, x), of the shape of x."""

    @abc.abstractmethod
    def diffusion(self, t: ScalarLike, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """G(t, x): a scalar, or of the shape of x."""

    def terms(self, brownian: dfx.AbstractBrownianPath) -> dfx.MultiTerm:
        """The equation for `diffrax.diffeqsolve`, driven by `brownian`, one sample."""
        return dfx.MultiTerm(
            dfx.ODETerm(lambda t, x, args: self.drift(t, x)),
            NoiseTerm(lambda t, x, args: self.diffusion(t, x), brownian),
        )


class AbstractLinearSDE(AbstractPath, AbstractSDE):
    """A path with a Gaussian base, which is a linear SDE by equation (2)."""

    def drift(self, t, x):
        """f = (alpha' / alpha) x, equation (2)."""
        t = jnp.maximum(float_array(t), _TINY)
        return self.rates(t)[0] / self.alpha(t) * x

    def diffusion(self, t, x):
        """g(t), a scalar, equation (2)."""
        t = jnp.maximum(float_array(t), _TINY)
        (da, ds), sigma = self.rates(t), self.sigma(t)
        return jnp.sqrt(2 * sigma * (ds - sigma * da / self.alpha(t)))

    def __check_init__(self):
        if not self.base.gaussian:
            raise ValueError(
                f"{type(self).__name__} is a linear SDE, whose noise is Gaussian, got "
                f"base={type(self.base).__name__}. Subclass AbstractPath for a path with "
                "another law of z."
            )


class CustomSDE(AbstractSDE):
    """dx = drift(t, x, params) dt + diffusion(t, x, params) dw, as the user writes it.

    The default is Ito's dx = -1/2 g^2 x + g g' with g^2 = 1 + sin(x)^2 in each
    coordinate: nonlinear, with state-dependent noise, and N(0, I) stationary.

    **Arguments:** `drift` and `diffusion`, functions of (t, x, params) for one sample;
    `params`, any pytree of numbers; `t_min`, `t_max`; `base`, the law about t_max.
    """

    _drift: Callable = eqx.field(static=True)
    _diffusion: Callable = eqx.field(static=True)
    params: PyTree
    t_min: Scalar
    t_max: Scalar
    base: AbstractBase

    def __init__(
        self,
        drift: Callable | None = None,
        diffusion: Callable | None = None,
        params: PyTree = None,
        *,
        t_min: ScalarLike = 0.0,
        t_max: ScalarLike = 4.0,
        base: AbstractBase | None = None,
    ):
        if (drift is None) != (diffusion is None):
            raise ValueError(
                "CustomSDE needs both coefficients, drift(t, x, params) and "
                "diffusion(t, x, params), got only one of them."
            )
        self._drift = drift or _sine_drift
        self._diffusion = diffusion or _sine_diffusion
        self.params = jax.tree.map(float_array, params)
        self.t_min, self.t_max = float_array(t_min), float_array(t_max)
        self.base = Gaussian() if base is None else base

    def drift(self, t, x):
        """f(t, x), as the user wrote it."""
        return self._drift(t, x, self.params)

    def diffusion(self, t, x):
        """G(t, x), as the user wrote it."""
        return self._diffusion(t, x, self.params)

    def __check_init__(self):
        if is_traced(self):
            return
        if not 0 <= float(self.t_min) < float(self.t_max):
            raise ValueError(
                f"CustomSDE needs 0 <= t_min < t_max, got t_min={float(self.t_min):g} "
                f"and t_max={float(self.t_max):g}. t=0 is data and t rises to noise."
            )


def _sine_diffusion(t, x, params):
    return jnp.sqrt(1 + jnp.sin(x) ** 2)


def _sine_drift(t, x, params):
    return -0.5 * (1 + jnp.sin(x) ** 2) * x + jnp.sin(x) * jnp.cos(x)


class LinearSDE(AbstractLinearSDE):
    """dx = f(t, params) x dt + g(t, params) dw; alpha and sigma follow from (3).

    The moment equations are solved once, when the object is made, by Diffrax (Tsit5 in
    log t, dense output; the piece from 0 to t_min by Gauss-Legendre quadrature, so that
    sigma is relatively exact at small t). Accuracy: 1e-9 in float64, 1e-6 in float32. To
    differentiate or sweep `params`, make the object inside the differentiated function.
    The derivatives of alpha and sigma in t are exactly those of (3), not of the table.

    The default is the Ornstein-Uhlenbeck process dx = -x dt + sqrt(2) dw up to t = 5.

    **Arguments:** `f` and `g`, scalar functions of (t, params); `params`, any pytree of
    numbers; 0 < `t_min` < `t_max`; `base`.
    """

    f: Callable = eqx.field(static=True)
    g: Callable = eqx.field(static=True)
    params: PyTree
    t_min: Scalar
    t_max: Scalar
    base: AbstractBase
    moments: dfx.DenseInterpolation

    def __init__(
        self,
        f: Callable | None = None,
        g: Callable | None = None,
        params: PyTree = None,
        *,
        t_min: ScalarLike = 1e-3,
        t_max: ScalarLike | None = None,
        base: AbstractBase | None = None,
    ):
        if (f is None) != (g is None):
            raise ValueError(
                "LinearSDE needs both coefficients, f(t, params) and g(t, params), got "
                "only one of them."
            )
        t_max = (5.0 if f is None else 1.0) if t_max is None else t_max
        self.f, self.g = f or _ou_drift, g or _ou_diffusion
        self.params = jax.tree.map(float_array, params)
        self.t_min, self.t_max = float_array(t_min), float_array(t_max)
        self.base = Gaussian() if base is None else base
        if not is_traced((self.t_min, self.t_max)):
            if not 0 < float(self.t_min) < float(self.t_max):
                raise ValueError(
                    f"LinearSDE needs 0 < t_min < t_max, got t_min={float(self.t_min):g} "
                    f"and t_max={float(self.t_max):g}: sigma(0) = 0, so the path starts "
                    "a little after 0."
                )
        for name, fn in (("f", self.f), ("g", self.g)):
            shape = jax.eval_shape(fn, self.t_min, self.params).shape
            if shape != ():
                raise ValueError(
                    f"LinearSDE needs a scalar {name}(t, params), got an array of shape "
                    f"{shape}. Return one number per time."
                )
        self.moments = _solve_moments(self.f, self.g, self.params, t_min, t_max)

    def alpha(self, t):
        """exp(int f), from (3)."""
        return jnp.exp(self._moments(t)[0])

    def sigma(self, t):
        """The standard deviation of x_t given x0, from (3)."""
        return jnp.exp(0.5 * self._moments(t)[1])

    def _moments(self, t):
        coefficients = eqx.Partial(_coefficients, self.f, self.g, self.params)
        out = _evaluate(float_array(t), self.moments, coefficients)
        return out[..., 0], out[..., 1]


def _ou_drift(t, params):
    return -jnp.ones_like(t)


def _ou_diffusion(t, params):
    return jnp.sqrt(2.0) * jnp.ones_like(t)


def _coefficients(f, g, params, t):
    return float_array(f(t, params)), float_array(g(t, params))


def _solve_moments(f, g, params, t_min, t_max):
    """Solve (3) for (log alpha, log sigma^2) as a function of log t."""
    t_min, t_max = float_array(t_min), float_array(t_max)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    nodes = jnp.asarray((nodes + 1) / 2, t_min.dtype)
    weights = jnp.asarray(weights / 2, t_min.dtype)

    def log_alpha(t):  # the integral of f from 0 to t
        return t * jnp.sum(weights * jax.vmap(lambda c: f(c * t, params))(nodes))

    end = log_alpha(t_min)
    inner = jax.vmap(
        lambda c: (
            g(c * t_min, params) ** 2 * jnp.exp(2 * (end - log_alpha(c * t_min)))
        )
    )(nodes)
    start = jnp.stack([end, jnp.log(t_min * jnp.sum(weights * inner))])

    def rhs(log_t, y, args):
        t = jnp.exp(log_t)
        f_t, g_t = _coefficients(f, g, params, t)
        return t * jnp.stack([f_t, 2 * f_t + g_t**2 * jnp.exp(-y[1])])

    tol = 1e-11 if start.dtype == jnp.float64 else 1e-6
    solution = dfx.diffeqsolve(
        dfx.ODETerm(rhs),
        dfx.Tsit5(),
        t0=jnp.log(t_min),
        t1=jnp.log(t_max),
        dt0=0.01,
        y0=start,
        stepsize_controller=dfx.PIDController(rtol=tol, atol=tol),
        saveat=dfx.SaveAt(dense=True),
        max_steps=2048,
        throw=False,
    )
    ok = solution.result == dfx.RESULTS.successful
    if not is_traced(ok) and not bool(ok):
        raise ValueError(
            "LinearSDE could not solve its moment equations between t_min and t_max: "
            "f(t, params) or g(t, params) is not finite or not smooth there. Check "
            "them, and keep t_max away from a time where f is infinite."
        )
    return solution.interpolation


@eqx.filter_custom_jvp
def _evaluate(t, moments, coefficients):
    """(log alpha, log sigma^2) at time t; the derivative in t is (3) itself."""
    return moments.evaluate(jnp.log(t))


@_evaluate.def_jvp
def _evaluate_jvp(primals, tangents):
    t, moments, coefficients = primals
    t_dot, moments_dot, _ = tangents
    out = _evaluate(t, moments, coefficients)
    out_dot = jnp.zeros_like(out)
    if t_dot is not None:
        f, g = coefficients(t)
        out_dot += t_dot * jnp.stack([f, 2 * f + g**2 * jnp.exp(-out[1])])
    if any(leaf is not None for leaf in jax.tree.leaves(moments_dot)):
        dense = eqx.filter_jvp(
            lambda m: m.evaluate(jnp.log(t)), (moments,), (moments_dot,)
        )[1]
        out_dot += 0 if dense is None else dense
    return out, out_dot


def noise_depends_on_state(sde: AbstractSDE, t: ScalarLike, x: Array) -> bool:
    """Whether G depends on x, read from the derivative's structure while tracing."""
    tangent = eqx.filter_jvp(
        lambda x: sde.diffusion(float_array(t), x), (x,), (jnp.ones_like(x),)
    )[1]
    return len(jax.tree.leaves(tangent)) > 0


def _divergence(sde: AbstractSDE, t, x):
    """(div D)_i = sum_j d_j D_ij for scalar or diagonal G; 0 where G ignores x."""
    if not noise_depends_on_state(sde, t, x):
        return jnp.zeros_like(x)

    def square(x):
        return sde.diffusion(t, x) ** 2

    if square(x).ndim == 0:
        return jax.grad(square)(x)
    jacobian = jax.jacfwd(square)(x).reshape(x.size, x.size)
    return jnp.diagonal(jacobian).reshape(x.shape)


def _time(sde, s):
    """t(s), equation (5), and r = -dt/ds."""
    scale = (sde.t_max - sde.t_min) / np.expm1(_CLOCK)
    t = sde.t_min + scale * jnp.expm1(_CLOCK * (1 - s))
    return t, scale * _CLOCK * jnp.exp(_CLOCK * (1 - s))


def _pull(sde, score, t, x):
    """div D + D score: what turns the forward drift into the reverse one."""
    g = sde.diffusion(t, x)
    if g.ndim and g.shape != x.shape:
        raise ValueError(
            f"diffusion must return a scalar or an array of the shape of x, {x.shape}, "
            f"got {g.shape}. Noise that mixes coordinates cannot be reversed here."
        )
    return _divergence(sde, t, x) + g**2 * score(t, x)


def _check_coefficients(sde):
    if isinstance(sde, AbstractPath) and not is_traced(sde):
        with jax.ensure_compile_time_eval():
            alpha = sde.alpha(sde.t_max)
        if float(alpha) == 0:
            raise ValueError(
                f"{type(sde).__name__} has alpha = 0 at t_max={float(sde.t_max):g}, where "
                "its drift and diffusion are infinite. Give it a smaller t_max (0.999), "
                "or use `sample`, which needs neither."
            )


class ReverseSDE(AbstractSDE):
    """Equation (4): a process on a rising clock s from 0 (noise) to 1 (data).

    `drift(s, x)` and `diffusion(s, x)` are what Diffrax integrates forward; `time(s)` is
    the time t of the forward process. Made by `reverse`.
    """

    sde: AbstractSDE
    score: Callable
    stochasticity: Scalar = number()
    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)

    @property
    def base(self):
        """The law of the noise of the forward process."""
        return self.sde.base

    def time(self, s: ScalarLike) -> Scalar:
        """The time t of the forward process at clock s, equation (5)."""
        return _time(self.sde, s)[0]

    def drift(self, t, x):
        """The drift of (4), in the clock s (called t, as for every process)."""
        time, rate = _time(self.sde, t)
        weight = 0.5 * (1 + self.stochasticity**2)
        pull = _pull(self.sde, self.score, time, x)
        return rate * (-self.sde.drift(time, x) + weight * pull)

    def diffusion(self, t, x):
        """The noise of (4), in the clock s (called t, as for every process)."""
        time, rate = _time(self.sde, t)
        return self.stochasticity * jnp.sqrt(rate) * self.sde.diffusion(time, x)

    def __check_init__(self):
        if not is_traced(self.stochasticity) and not float(self.stochasticity) >= 0:
            raise ValueError(
                "stochasticity must be >= 0 (0 is the flow, 1 Anderson's reverse SDE), "
                f"got {float(self.stochasticity):g}."
            )
        _check_coefficients(self.sde)


class ProbabilityFlow(eqx.Module):
    """Equation (4) with lambda = 0: an ODE on a rising clock s from 0 (noise) to 1 (data).

    Callable as (s, x, args), so `diffrax.ODETerm(probability_flow(sde, score))` is all
    that Diffrax needs. `time(s)` is the time t of the forward process.
    """

    sde: AbstractSDE
    score: Callable
    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)

    def time(self, s: ScalarLike) -> Scalar:
        """The time t of the forward process at clock s, equation (5)."""
        return _time(self.sde, s)[0]

    def __call__(self, s, x, args=None):
        """dx/ds."""
        time, rate = _time(self.sde, s)
        pull = _pull(self.sde, self.score, time, x)
        return rate * (-self.sde.drift(time, x) + 0.5 * pull)

    def __check_init__(self):
        _check_coefficients(self.sde)


def reverse(
    sde: AbstractSDE, score: Callable, stochasticity: ScalarLike = 1.0
) -> ReverseSDE:
    """The reverse-time SDE with the marginals of `sde`, equation (4).

    **Arguments:** `score(t, x)`, the score of the law of x_t for one sample;
    `stochasticity`, lambda in (4): 1 is Anderson's, towards 0 the probability flow.
    """
    return ReverseSDE(sde, score, stochasticity)


def probability_flow(sde: AbstractSDE, score: Callable) -> ProbabilityFlow:
    """The ODE with the marginals of `sde`, run from noise to data: (4) with lambda 0."""
    return ProbabilityFlow(sde, score)
