"""log p(x) of the probability flow, from data to noise, with both of its errors.

In the coordinates of `angle` (u of unit size, clock xi) the flow is du/dxi = F and

    log p(x) = log p_T(x_T) + d log(scale_T / scale_0) + int div F dxi              (1)

with x at the path's t_min and x_T = scale_T u_T at t_max (instantaneous change of
variables: Chen et al. 2018, "Neural ordinary differential equations", theorem 1; Song
et al. 2021, "Score-based generative modeling through SDEs", appendix D.2). div F is
exact, by the d columns of the Jacobian in forward mode, or estimated by

    div F = E[e^T (dF/du) e],    E[e e^T] = I                                      (2)

with probes e that stay fixed along a solve (Grathwohl et al. 2019, "FFJORD", eq. 7-8).

The solver's error. An error du made at xi changes (1) by grad log p_xi(u) . du: the
adjoint of the likelihood is the score, which (u, F) already hold,

    grad log p_xi(u) = -z_hat / sin(xi) = -(u + F cot(xi)).                        (3)

So every step's error in nats is known for nothing. Steps are chosen by it, and the sum
of its absolute values is reported.
"""

from typing import Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ..models.denoiser import AbstractDenoiser
from ..processes.path import basis_of, check_sample
from ..solvers.grids import Adaptive, Grid, check_grid
from ..solvers.semilinear import root
from ..solvers.solve import check_solver, checked, evaluations, solve, spread
from ..solvers.solver import AbstractSemilinearSolver
from ..typing import PyTree, RandomKey, float_array
from .coordinates import Angle, AngleFlow, sigma_data_of


class Likelihood(eqx.Module):
    """Log-likelihoods of a batch, in nats per sample, and what is known of them.

    `standard_error` is that of the mean over probes: 0 for the exact divergence, nan
    for one probe, which cannot know. `solver_error` is an estimate of the solver's
    error in nats, the sum of what its steps say of themselves: usually within a factor
    of ten of the true one, too large with short steps and too small with long ones
    (1e-3 and more) and with Dopri5; without rounding, about 1e-6 per dimension in
    float32; nan where a solver has no estimate and where the noise is not Gaussian.
    `evaluations` counts velocities with their divergence; `result` is a
    `diffrax.RESULTS`, of which `ok` says whether it is success. `latent` is x at the
    noise end, (batch, ...).
    """

    value: Float[Array, " batch"]
    standard_error: Float[Array, " batch"]
    solver_error: Float[Array, " batch"]
    evaluations: Int[Array, ""]
    result: dfx.RESULTS
    latent: Float[Array, "batch ..."]

    @property
    def ok(self) -> Array:
        """Whether the solve reached the noise with finite numbers."""
        return self.result == dfx.RESULTS.successful


def log_likelihood(
    denoiser: AbstractDenoiser,
    x0: Shaped[Array, "batch ..."],
    *,
    key: RandomKey | None = None,
    probes: Literal["exact"] | int = "exact",
    probe_law: Literal["rademacher", "gaussian"] = "rademacher",
    solver: dfx.AbstractSolver | None = None,
    grid: Adaptive | Grid | Array | int | None = None,
    log_prior=None,
    cond: PyTree = None,
    at_once: int = 32,
    sharding: jax.sharding.Sharding | None = None,
) -> Likelihood:
    """log p(x0) in nats under the probability flow that `sample` solves.

    p is the law at the path's t_min (or at the last time of a grid), where `sample`
    stops: `bits_per_dim` has the correction from there to data. Equations (1) to (3).

    **Arguments:** `x0`, floating-point data (batch, ...); `probes`, "exact" (d forward
    derivatives per evaluation) or a number of random probes, which need a `key`; probe
    k of sample i depends on (key, i, k) only; `probe_law`, "rademacher" has the smaller
    variance; `solver`, a Diffrax solver for ODEs (default Tsit5, in float64 Dopri8);
    `grid`, `Adaptive(rtol, atol)` (default 1e-5, in float64 1e-8), a number of equal
    steps of the angle, a grid of `sdegen.times`, or an array of falling times;
    `log_prior`, the log-density of x at the noise end for one sample (default: that of
    sigma z, from which `sample` starts); `at_once`, how many derivatives are held in
    memory together; `sharding`, as in `sample`.

    It is differentiable in the denoiser and in x0: with adaptive steps ask for 1e-5 or
    less, or take a number of steps, whose gradient is exact for what was computed. A
    network that computes in low precision needs a number of steps, too, or tolerances
    above its rounding: adaptive steps would follow the rounding.
    """
    path = denoiser.path
    x0 = jnp.asarray(x0)
    if x0.ndim < 2 or not jnp.issubdtype(x0.dtype, jnp.floating):
        what = (
            "Integers have no density: use bits_per_dim, or dequantise them first."
            if jnp.issubdtype(x0.dtype, jnp.integer)
            else "For 1-D data use x0[:, None]."
        )
        raise ValueError(
            "log_likelihood takes floating-point data of shape (batch, ...) with at "
            f"least two axes, got {x0.dtype} of shape {x0.shape}. {what}"
        )
    if len(x0) == 0:
        raise ValueError(
            "log_likelihood got an empty batch: there is nothing to score."
        )
    check_sample(path, x0.shape[1:])
    probes = _check_probes(probes, probe_law, key)
    if log_prior is None and jax.eval_shape(path.noise.log_prob, x0[0]) is None:
        raise ValueError(
            f"the noise of {type(path).__name__}, {type(path.noise).__name__}, has no "
            "known density, so neither have its samples. Give log_prior, the "
            "log-density of x at t_max for one sample."
        )
    precise = float_array(path.t_min).dtype == jnp.float64
    if grid is None:
        tolerance = 1e-8 if precise else 1e-5
        grid = Adaptive(tolerance, tolerance)
    if solver is None:
        solver = dfx.Dopri8() if precise else dfx.Tsit5()
    if isinstance(solver, AbstractSemilinearSolver):
        raise ValueError(
            f"{type(solver).__name__} follows x alone, and a likelihood needs its "
            "divergence too. Use a Diffrax solver for ODEs: Tsit5(), Dopri8(), Heun()."
        )
    check_solver(solver, isinstance(grid, Adaptive), False)
    if isinstance(solver, dfx.AbstractImplicitSolver):
        raise ValueError(
            f"{type(solver).__name__} is implicit, and would solve for the divergence, "
            "too. Use an explicit solver: Tsit5(), Dopri8(), Heun()."
        )
    if not isinstance(grid, int | np.integer) or isinstance(grid, bool):
        grid = check_grid(grid, path)
    elif grid < 1:
        raise ValueError(f"log_likelihood needs at least one step, got grid={grid}.")
    else:
        grid = int(grid)
    if at_once < 1:
        raise ValueError(f"at_once must be a whole number >= 1, got {at_once!r}.")
    key = jax.random.key(0) if key is None else key
    static = (probes, probe_law, at_once)
    return _log_likelihood(
        key, denoiser, x0, cond, grid, solver, log_prior, *static, sharding
    )


def _check_probes(probes, law, key):
    whole = isinstance(probes, int | np.integer) and not isinstance(probes, bool)
    if probes != "exact" and not (whole and probes >= 1):
        raise ValueError(
            'probes must be "exact" or a number of random probes >= 1, got '
            f"{probes!r}. Two or more give an error bar."
        )
    if probes != "exact" and key is None:
        raise ValueError("random probes need a key: log_likelihood(..., key=key).")
    if law not in ("rademacher", "gaussian"):
        raise ValueError(f'probe_law must be "rademacher" or "gaussian", got {law!r}.')
    return probes if probes == "exact" else int(probes)


class _Field(eqx.Module):
    """(F, div F or its probes, 0): what the state (u, log-density, error) moves by."""

    flow: AngleFlow
    probes: Float[Array, "probes batch ..."]
    exact: bool = eqx.field(static=True)
    at_once: int = eqx.field(static=True)

    def __call__(self, xi, state, args):
        u, gained, error = state
        velocity, push = jax.linearize(lambda u: self.flow(xi, u), u)

        def along(probe):
            probe = jnp.broadcast_to(probe, u.shape)
            return jnp.sum(probe * push(probe), axis=tuple(range(1, u.ndim)))

        each = jax.lax.map(along, self.probes, batch_size=self.at_once)
        each = jnp.sum(each, axis=0, keepdims=True) if self.exact else each
        return velocity, each.T, jnp.zeros_like(error)


class _InNats(dfx.AbstractWrappedSolver):
    """A solver that turns its error estimate into nats, by (3), and adds it up."""

    solver: dfx.AbstractSolver
    angle: Angle
    gaussian: bool = eqx.field(static=True)

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    def order(self, terms):
        return self.solver.order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(terms, t0, t1, y0, args)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, error, dense, state, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        # A negative sum says that it is not known; nan would stop adaptive steps.
        (u1, gained, total), nats = y1, jnp.full_like(y1[2], -1)
        if error is not None:
            du, gain_error, _ = error
            if self.gaussian and "k" in dense:
                # The first stage of every Runge-Kutta method is F at the start.
                step = jnp.where(t1 > t0, t1 - t0, 1.0)
                cos, sin, rate = self.angle.local(t0)
                score = -(y0[0] + dense["k"][0][0] / (step * rate) * cos / sin)
                along = jnp.sum(score * du, axis=tuple(range(1, du.ndim)))
                gain_error = gain_error + along[:, None]
                nats = jnp.abs(gain_error)
            error = (du, gain_error, jnp.zeros_like(total))
        return (u1, gained, total + nats), error, dense, state, result


def _draw_probes(key, index, probes, law, shape, dtype):
    """(probes, batch, ...), or the basis of the space, (d, 1, ...)."""
    if probes == "exact":
        size = int(np.prod(shape))
        return jnp.eye(size, dtype=dtype).reshape(size, 1, *shape)
    draw = jax.random.rademacher if law == "rademacher" else jax.random.normal

    def one(k, i):
        key_of = jax.random.fold_in(jax.random.fold_in(key, i), k)
        return draw(key_of, shape, dtype)

    each = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    return each(jnp.arange(probes), index)


@eqx.filter_jit
def _log_likelihood(
    key,
    denoiser,
    x0,
    cond,
    grid,
    solver,
    log_prior,
    probes,
    probe_law,
    at_once,
    sharding,
):
    with jax.default_matmul_precision("highest"):
        path, adaptive = denoiser.path, grid if isinstance(grid, Adaptive) else None
        angle, basis = Angle(path, sigma_data_of(denoiser)), basis_of(path)
        first, last = float_array(path.t_min), float_array(path.t_max)
        if adaptive is not None:
            clock = jnp.stack([angle(first), angle(last)])
        elif isinstance(grid, int):
            clock = jnp.linspace(angle(first), angle(last), grid + 1)
        else:
            ts = (grid(path) if callable(grid) else grid).astype(first.dtype)
            first, last = ts[-1], ts[0]
            clock = jax.vmap(angle)(ts[::-1])
        dtype, (batch, *shape) = clock.dtype, x0.shape
        exact = probes == "exact"

        def total(a):  # over the coordinates of one sample
            return jnp.sum(jnp.broadcast_to(a, shape)) if a.ndim else x0[0].size * a

        wrapped = _InNats(solver, angle, path.noise.gaussian)

        def run(y0, index, cond):
            drawn = _draw_probes(key, index, probes, probe_law, shape, dtype)
            field = _Field(AngleFlow(denoiser, angle, cond), drawn, exact, at_once)
            done = solve(field, y0, clock, wrapped, adaptive=adaptive)
            return done.ys, done.ts, done.stats["num_steps"], done.result

        u = basis.coordinates(x0.astype(dtype)) / angle.scale(first)
        zeros = jnp.zeros((batch, 1 if exact else probes), dtype)
        index = jnp.arange(batch)
        if sharding is not None:
            u, zeros, index = (
                jax.lax.with_sharding_constraint(a, sharding) for a in (u, zeros, index)
            )
        if adaptive is not None:
            run = spread(run, adaptive, sharding)
        (u, gained, error), _, steps, result = run((u, zeros, zeros), index, cond)
        x_t = u[-1] * angle.scale(last)
        if log_prior is None:
            sigma = path.sigma(last)
            prior = jax.vmap(path.noise.log_prob)(x_t / sigma) - total(jnp.log(sigma))
        else:
            prior = jax.vmap(log_prior)(basis.data(x_t))
        stretch = total(jnp.log(angle.scale(last) / angle.scale(first)))
        gained, count = gained[-1], 1 if exact else probes
        bar = jnp.zeros(batch, dtype)
        if not exact:
            variance = jnp.var(gained, axis=1) / max(count - 1, 1)
            bar = root(variance) if count > 1 else bar + jnp.nan
        value = prior + stretch + jnp.mean(gained, axis=1)
        return Likelihood(
            value,
            bar,
            jnp.mean(jnp.where(error[-1] < 0, jnp.nan, error[-1]), axis=1),
            evaluations(solver, steps),
            checked(result, (value, x_t)),
            basis.data(x_t),
        )
