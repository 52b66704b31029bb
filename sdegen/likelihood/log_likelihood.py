"""log p(x) of the probability flow, from data to noise, with both of its errors.

In coordinates u of unit size, on the clock xi (`coordinates`), du/dxi = F and

    log p(x) = log p_T(x_T) + d log(scale_T / scale_0) + int div F dxi              (1)

with x at the path's t_min and x_T = scale_T u_T at t_max (Chen et al. 2018, "Neural
ordinary differential equations", theorem 1; Song et al. 2021, "Score-based generative
modeling through SDEs", appendix D.2). div F is exact, by the d columns of the Jacobian
in forward mode, or estimated by

    div F = E[e^T (dF/du) e],    E[e e^T] = I                                      (2)

with probes e that stay fixed along a solve (Grathwohl et al. 2019, "FFJORD", eq. 7-8).
An error du made at xi changes (1) by grad log p_xi(u) . du: the adjoint of the
likelihood is the score, which (u, F) already hold,

    grad log p_xi(u) = -z_hat / sin(xi) = -(u + F cot(xi)).                        (3)

So the error of every step in nats is known. Steps are chosen by it, and the sum of its
absolute values is reported. On an interpolant u = x, xi = t and scale = 1; its velocity
says nothing about the score, so that the solver's error stays unknown.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ..models.model import AbstractModel, conditions, floating_batch
from ..processes.path import AbstractPath, check_sample
from ..solvers.grids import Adaptive, Grid, whole_steps
from ..solvers.semilinear import root
from ..solvers.solve import (
    check_solver,
    checked,
    derivatives_said,
    evaluations,
    solve,
    spread,
)
from ..solvers.solver import AbstractSemilinearSolver
from ..typing import PyTree, Seed, float_array, is_whole, random_key
from .coordinates import Flow, check_end, flow_of, sum_per_sample, unit_vectors


class Likelihood(eqx.Module):
    """Log-likelihoods of a batch, in nats per sample, and what is known of them.

    `standard_error` is over probes: two of them hold the error in .954 of the cases, by
    Student's t. It is 0 for the exact divergence, and nan for one probe and where less
    than 8 random signs agree, as they may by chance.
    `solver_error` is an estimate, usually within a factor of ten, too large with short
    steps and too small with long ones (1e-4 and more) and with Dopri5; without
    rounding, about 1e-6 per dimension in float32; nan where a solver has no estimate
    and where the noise is not Gaussian. `evaluations` counts velocities with their
    divergence. `result` is a `diffrax.RESULTS` for each sample: a hopeless one costs no
    other its value. `latent` is x at the noise end.
    """

    value: Float[Array, " batch"]
    standard_error: Float[Array, " batch"]
    solver_error: Float[Array, " batch"]
    evaluations: Int[Array, ""]
    result: dfx.RESULTS
    latent: Float[Array, "batch ..."]

    @property
    def ok(self) -> Array:
        """Which samples reached the noise with finite numbers; `ok.all()`: all."""
        return self.result == dfx.RESULTS.successful


def log_likelihood(
    model: AbstractModel,
    x0: Shaped[Array, "batch ..."],
    *,
    key: Seed | None = None,
    probes: Literal["exact"] | int = "exact",
    probe_noise: Literal["rademacher", "gaussian"] = "rademacher",
    solver: dfx.AbstractSolver | None = None,
    grid: Adaptive | Grid | Array | int | None = None,
    log_prior: Callable | None = None,
    cond: PyTree = None,
    at_once: int = 32,
    sharding: jax.sharding.Sharding | None = None,
) -> Likelihood:
    """log p(x0) in nats under the flow that `sample` solves, by (1) to (3).

    p is the density at t_min (or at the last time of a grid), where `sample` stops. It
    is differentiable: with adaptive steps ask for 1e-5 or less, and for forward mode
    or second derivatives for an `adjoint` of `Adaptive`. A network in low precision
    needs a number of steps, or tolerances above its rounding.

    **Arguments:**
    - `model`: a denoiser or an `AbstractVelocityModel`, whose x at t_max must be x1.
    - `x0`: floating-point data, (batch, ...).
    - `key`: a random key for the probes; not needed for the exact divergence.
    - `probes`: "exact", d forward derivatives per evaluation, or a number of random
      probes. Probe k of sample i depends on (key, i, k) alone.
    - `probe_noise`: "rademacher" (the smaller variance) or "gaussian".
    - `solver`: a Diffrax solver for ODEs; Tsit5, in float64 Dopri8.
    - `grid`: `Adaptive(rtol, atol)`, by default 1e-5 and in float64 1e-8; a number of
      equal steps of the angle (of t on an interpolant); an array of times that fall
      from t_max to t_min; or, on a path, a grid such as `LogSNRGrid(64)`.
    - `log_prior`: the log-density of x at t_max for one sample; that of `sample`.
    - `cond`: the condition, a pytree with leading axis batch; none.
    - `at_once`: how many derivatives are held in memory together; 32.
    - `sharding`: how to split the batch over devices, as in `sample`; none.

    **Raises:** a ValueError for a model without a velocity, for noise without a
    density, and for what cannot be solved.
    """
    x0 = _checked_data(x0)
    flow = flow_of(model, conditions(model, cond, len(x0)), "log_likelihood")
    if isinstance(flow.process, AbstractPath):
        check_sample(flow.process, x0.shape[1:])
    probes = _check_probes(probes, probe_noise, key)  # pyright: ignore[reportAssignmentType]
    if log_prior is None:
        check_end(flow, x0.shape[1:])
    solver, grid = _solver_and_grid(solver, grid, flow)
    if not is_whole(at_once):
        raise ValueError(f"at_once must be a whole number >= 1, got {at_once!r}.")
    key = random_key(0 if key is None else key)
    static = (probes, probe_noise, at_once, sharding)
    with derivatives_said():
        return _log_likelihood(key, flow, x0, grid, solver, log_prior, *static)


def _checked_data(x0):
    advice = "Integers have no density: use bits_per_dim, or dequantise them."
    x0 = floating_batch(x0, "log_likelihood", advice)
    if len(x0) == 0:
        raise ValueError("log_likelihood got an empty batch: nothing to score.")
    return x0


def _solver_and_grid(solver, grid, flow):
    precise = float_array(flow.process.t_min).dtype == jnp.float64
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
    steps = whole_steps(grid, "log_likelihood")
    if steps is not None:
        return solver, steps
    return solver, grid if isinstance(grid, Adaptive) else flow.grid(grid)


def _check_probes(probes, noise, key):
    if probes != "exact" and not is_whole(probes):
        what = f'probes must be "exact" or a number >= 1, got {probes!r}.'
        raise ValueError(f"{what} Two or more give an error bar.")
    if probes != "exact" and key is None:
        raise ValueError("random probes need a key: log_likelihood(..., key=key).")
    if noise not in ("rademacher", "gaussian"):
        raise ValueError(f"probe_noise is rademacher or gaussian, got {noise!r}.")
    return probes if probes == "exact" else int(probes)


class _Field(eqx.Module):
    """(F, div F or its probes, 0): what the state (u, log-density, error) moves by."""

    flow: Flow
    probes: Float[Array, "probes batch ..."]
    exact: bool = eqx.field(static=True)
    at_once: int = eqx.field(static=True)

    def __call__(self, c, state, args):
        u, gained, error = state
        velocity, push = jax.linearize(lambda u: self.flow(c, u), u)

        def along(probe):
            probe = jnp.broadcast_to(probe, u.shape)
            return sum_per_sample(probe * push(probe))

        each = jax.lax.map(along, self.probes, batch_size=self.at_once)
        each = jnp.sum(each, axis=0)[:, None] if self.exact else each.T
        return velocity, each, jnp.zeros_like(error)


def _of_solver(name) -> Any:
    return property(lambda self: getattr(self.solver, name))


class _InNats(dfx.AbstractWrappedSolver):
    """A solver that turns its error estimate into nats, by (3), and adds it up."""

    solver: dfx.AbstractSolver
    flow: Flow

    term_structure = _of_solver("term_structure")
    interpolation_cls = _of_solver("interpolation_cls")
    term_compatible_contr_kwargs = _of_solver("term_compatible_contr_kwargs")
    order = _of_solver("order")
    error_order = _of_solver("error_order")
    init = _of_solver("init")
    func = _of_solver("func")
    scan_kind = _of_solver("scan_kind")

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        given = (terms, t0, t1, y0, args, solver_state, made_jump)
        y1, error, dense, state, result = self.solver.step(*given)
        # A negative sum says that it is not known; nan would stop adaptive steps.
        (u1, gained, total), nats = y1, -1.0
        if error is not None:
            du, gain_error, _ = error
            score = None
            if "k" in dense:
                # The first stage of every Runge-Kutta method is F at the start.
                step = jnp.maximum(t1 - t0, jnp.finfo(total.dtype).tiny)
                score = self.flow.score(t0, y0[0], dense["k"][0][0] / step)
            if score is not None:
                gain_error = gain_error + sum_per_sample(score * du)[:, None]
                nats = jnp.abs(gain_error)
            error = (du, gain_error, jnp.zeros_like(total))
        return (u1, gained, total + nats), error, dense, state, result


def _draw_probes(key, index, probes, noise, shape, dtype):
    """(probes, batch, ...), or the basis of the space, (d, 1, ...)."""
    if probes == "exact":
        return unit_vectors(shape, dtype)
    draw = jax.random.rademacher if noise == "rademacher" else jax.random.normal

    def one(k, i):
        return draw(jax.random.fold_in(jax.random.fold_in(key, i), k), shape, dtype)

    each = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    return each(jnp.arange(probes), index)


def student(count: int) -> float:
    """What makes two standard errors of `count` draws hold in .954 of the cases.

    Half the quantile of Student's t with count - 1 degrees of freedom (Student 1908,
    "The probable error of a mean"): 7.0, 1.7, 1.2 and 1.1 of 2, 4, 8 and 16; nan of 1.
    """
    from scipy.special import ndtr, stdtrit

    return float(stdtrit(count - 1, ndtr(2.0))) / 2 if count > 1 else math.nan


def error_of_mean(values: Float[Array, "batch probes"]) -> Float[Array, " batch"]:
    """The standard error of each row's mean, widened by `student`.

    nan of one value, and of less than 8 that agree: of two values alike in probability,
    as two dimensions give, 7 agree by chance in a case of 64, 8 in one of 128.
    """
    count = values.shape[1]
    bar = student(count) * root(jnp.var(values, axis=1) / max(count - 1, 1))
    if count >= 8:
        return bar
    size = jnp.max(jnp.abs(values), axis=1)
    agree = jnp.ptp(values, axis=1) <= 16 * jnp.finfo(values.dtype).eps * size
    return jnp.where(agree, jnp.nan, bar)


@eqx.filter_jit
def _log_likelihood(
    key, flow, x0, grid, solver, log_prior, probes, probe_noise, at_once, sharding
):
    with jax.default_matmul_precision("highest"):
        process, adaptive = flow.process, grid if isinstance(grid, Adaptive) else None
        first, last = float_array(process.t_min), float_array(process.t_max)
        if adaptive is not None:
            clock = jnp.stack([flow.clock(first), flow.clock(last)])
        elif isinstance(grid, int):
            clock = jnp.linspace(flow.clock(first), flow.clock(last), grid + 1)
        else:
            ts = (grid(process) if callable(grid) else grid).astype(first.dtype)  # pyright: ignore[reportAttributeAccessIssue]
            first, last = ts[-1], ts[0]
            clock = jax.vmap(flow.clock)(ts[::-1])
        dtype, (batch, *shape) = clock.dtype, x0.shape
        exact = probes == "exact"

        def run(y0, index, cond):
            drawn = _draw_probes(key, index, probes, probe_noise, shape, dtype)
            own = dataclasses.replace(flow, cond=cond)
            field, wrapped = _Field(own, drawn, exact, at_once), _InNats(solver, own)
            done = solve(field, y0, clock, wrapped, adaptive=adaptive)
            return done.ys, done.ts, done.steps, done.result

        u = flow.enter(x0.astype(dtype), first)
        zeros = jnp.zeros((batch, 1 if exact else probes), dtype)
        index = jnp.arange(batch)
        if sharding is not None:
            split = jax.lax.with_sharding_constraint
            u, zeros, index = (split(a, sharding) for a in (u, zeros, index))
        if adaptive is not None:
            run = spread(run, sharding)
        ys, _, steps, result = run((u, zeros, zeros), index, flow.cond)
        u, gained, error = jax.tree.map(lambda a: a.squeeze(0), ys)
        latent, log_p = flow.leave(u, first, last, log_prior)
        bar = jnp.zeros(batch, dtype)
        if not (exact or (probe_noise == "rademacher" and math.prod(shape) == 1)):
            bar = error_of_mean(gained)
        # of one column the mean is itself, in a smaller program
        mean = lambda a: jnp.mean(a, 1) if a.shape[1] > 1 else a.squeeze(1)  # noqa: E731
        value = log_p + mean(gained)
        return Likelihood(
            value,
            bar,
            mean(jnp.where(error < 0, jnp.nan, error)),
            evaluations(solver, steps),
            checked(result, value),
            latent,
        )
