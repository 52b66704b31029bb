"""Ito processes: marginals derived from f and g, and reversals that keep the marginals.

The oracles: for `LinearSDE`, VP and paths built backwards from a known alpha and sigma;
for reversals, a Gaussian law (an affine drift keeps mean and variance), the log-normal
law of geometric Brownian motion, and reversible processes, whose flow is exactly zero.
"""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import PROCESSES, process
from scipy import stats

import sdegen
from sdegen.processes.moment_table import solve_moments
from sdegen.typing import Scalar, number

BETA_MIN, BETA_MAX = 0.1, 20.0


def normal(shape):
    return np.random.default_rng(0).normal(size=shape)


# -- LinearSDE: alpha and sigma from f and g -------------------------------------------


def vp_f(t, params):
    low, high = params
    return -0.5 * (low + (high - low) * t)


def vp_g(t, params):
    low, high = params
    return jnp.sqrt(low + (high - low) * t)


def vp_law(t):
    big_b = BETA_MIN * t + (BETA_MAX - BETA_MIN) * t**2 / 2
    return np.exp(-big_b / 2), np.sqrt(-np.expm1(-big_b))


def ve_f(t, params):
    return jnp.zeros_like(t)


def ve_g(t, params):
    ratio = params["high"] / params["low"]
    return params["low"] * jnp.sqrt(2 * jnp.log(ratio)) * ratio**t


def ve_law(t):
    # The integral of g^2 from 0: sigma(0) = 0 here, so sigma_min^2 is subtracted.
    return np.ones_like(t), 0.01 * np.sqrt(np.expm1(2 * np.log(5000.0) * t))


def tide_f(t, params):
    return -(1.0 + params * jnp.cos(3 * t))


def tide_g(t, params):
    # Built backwards from sigma^2 = alpha^2 (t + t^3): g^2 = alpha^2 (1 + 3 t^2).
    return jnp.exp(-(t + params * jnp.sin(3 * t) / 3)) * jnp.sqrt(1 + 3 * t**2)


def tide_law(t):
    alpha = np.exp(-(t + 1.5 * np.sin(3 * t) / 3))
    return alpha, alpha * np.sqrt(t + t**3)


DERIVED = {
    "VP": (vp_f, vp_g, (BETA_MIN, BETA_MAX), vp_law),
    "VE": (ve_f, ve_g, {"low": 0.01, "high": 50.0}, ve_law),
    "time-dependent OU": (tide_f, tide_g, 1.5, tide_law),
}


def chosen_f(t, which):
    """f of one of them, chosen by a number: one program for all."""
    return which @ jnp.stack([f(t, p) for f, _, p, _ in DERIVED.values()])


def chosen_g(t, which):
    return which @ jnp.stack([g(t, p) for _, g, p, _ in DERIVED.values()])


def derived(name, t_min, ts):
    """alpha, sigma, f and g of a path made under jit to start at `t_min`."""
    which = jnp.asarray(np.eye(3)[list(DERIVED).index(name)], float)
    return _derived(which, t_min, ts)


@jax.jit
def _derived(which, t_min, ts):
    path = sdegen.LinearSDE(chosen_f, chosen_g, which, t_min=t_min)

    def at(t):
        one = jnp.ones_like(t)
        return path.alpha(t), path.sigma(t), path.drift(t, one), path.diffusion(t, one)

    return jax.vmap(at)(ts)


@pytest.mark.parametrize("name", DERIVED)
def test_derived_marginals_are_the_known_ones(name):
    f, g, params, law = DERIVED[name]

    @jax.jit
    @jax.vmap
    def coefficients(t):
        return jnp.stack([f(t, params), g(t, params)])

    for t_min in (1e-6, 1e-3, 0.1):  # a start near 0 leaves the most to the quadrature
        ts = np.concatenate([np.geomspace(t_min, 1, 60), np.linspace(t_min, 1, 60)])
        ts = np.clip(ts, t_min, 1)
        alpha, sigma, drift, diffusion = derived(
            name, jnp.asarray(t_min), jnp.asarray(ts)
        )
        np.testing.assert_allclose((alpha, sigma), law(ts), rtol=1e-9)
        # f and g come back exactly, not as derivatives of an interpolation.
        given = np.asarray(coefficients(jnp.asarray(ts)))
        np.testing.assert_allclose(drift, given[:, 0], rtol=1e-12)
        np.testing.assert_allclose(diffusion, given[:, 1], rtol=1e-12)


@pytest.mark.parametrize("name", DERIVED)
def test_derived_marginals_are_the_known_ones_in_float32(name, float32):
    ts = np.geomspace(1e-3, 1, 120).astype(np.float32).clip(1e-3, 1)
    made = derived(name, jnp.asarray(1e-3), jnp.asarray(ts))
    assert {a.dtype.name for a in made} == {"float32"}
    expected = DERIVED[name][3](ts.astype(float))
    np.testing.assert_allclose(made[:2], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "solver, degree, steps",
    [(dfx.Tsit5(), 4, 349), (dfx.Dopri8(), 6, 250)],
)
def test_the_table_is_read_as_diffrax_reads_it(solver, degree, steps):
    def rate(t, y):
        return jnp.stack([-jnp.ones_like(t), 2 * jnp.exp(-y[1]) - 2])

    start, times = jnp.log(jnp.array([0.999, 2e-3])), (jnp.array(1e-3), jnp.array(5.0))
    control = dfx.PIDController(rtol=1e-10, atol=1e-10)
    table, out = solve_moments(rate, start, times, solver, control, steps, degree)
    theirs, count = out.interpolation, int(table.count)
    assert len(table.ts) == steps + 1 and 20 < count < steps
    nodes = np.asarray(table.ts)[:count]
    places = nodes[:-1] + np.diff(nodes) * np.linspace(0, 1, 7)[:, None]
    ts = np.concatenate([places.ravel(), nodes[[0, -1]] + [-1, 1]])
    mine = jax.jit(jax.vmap(table))(np.exp(ts))
    theirs = np.asarray(jax.jit(jax.vmap(theirs.evaluate))(ts))
    assert np.isnan(mine[-2:]).all() and np.isfinite(theirs[:-2]).all()
    inside = slice(1, -3)  # exp and log may leave the ends by a rounding
    np.testing.assert_allclose(mine[inside], theirs[inside], rtol=1e-11, atol=1e-13)


def test_the_inverse_of_a_table_has_the_derivatives_of_a_formula():
    def beta(t):
        return 0.1 + 19.9 * t

    made = sdegen.LinearSDE(
        lambda t, _: -0.5 * beta(t), lambda t, _: jnp.sqrt(beta(t)), t_max=1.0
    )
    levels = jnp.array([-6.0, -1.0, 2.0, 5.0])

    @jax.jit
    def derivatives(path):  # by Newton's steps, or by the formula of VP
        first = jax.grad(path.time)
        return jax.vmap(lambda l: (path.time(l), first(l), jax.grad(first)(l)))(levels)

    for mine, known in zip(derivatives(made), derivatives(sdegen.VP()), strict=True):
        np.testing.assert_allclose(mine, known, rtol=1e-7)


def test_a_sweep_of_gradients_through_the_construction_is_that_of_vp():
    def fact(path):  # a mixture of all that is derived: one gradient sees it all
        law = path.alpha(0.4) + 0.7 * path.sigma(0.4) + 3.1 * path.time(-1.0)
        x = jnp.ones(())
        return law + 0.3 * path.drift(0.4, x) + 0.2 * path.diffusion(0.4, x)

    params = jnp.array([[0.1, 5.0], [0.5, 10.0], [0.1, 20.0]])
    mine = jax.value_and_grad(lambda p: fact(sdegen.LinearSDE(vp_f, vp_g, p)))
    exact = jax.value_and_grad(lambda p: fact(sdegen.VP(*p)))
    value, grad = jax.jit(jax.vmap(mine))(params)
    exact_value, exact_grad = jax.jit(jax.vmap(exact))(params)
    np.testing.assert_allclose(value, exact_value, rtol=1e-9)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-7)
    assert np.abs(exact_grad).min() > 1e-3


# -- A3(b): every stochasticity has the same marginals ---------------------------------

MEAN, VAR = 1.0, 0.25  # of the data


class GaussianScore(eqx.Module):
    """The exact score of N(MEAN, VAR) data on `path`."""

    path: sdegen.AbstractLinearSDE

    def __call__(self, t, x):
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return -(x - alpha * MEAN) / (alpha**2 * VAR + sigma**2)


@eqx.filter_jit
def scales(path, ts):
    return jax.vmap(path.alpha)(ts), jax.vmap(path.sigma)(ts)


@eqx.filter_jit
def affine(process, clock):
    """(slope, intercept, G^2) of an affine process at the times `clock`."""

    def at(s):
        zero, one = jnp.zeros(()), jnp.ones(())
        intercept = process.drift(s, zero)
        return (
            process.drift(s, one) - intercept,
            intercept,
            process.diffusion(s, zero) ** 2,
        )

    return jax.vmap(at)(clock)


def euler_moments(slope, intercept, g2, mean, variance):
    """Mean and variance after len(slope) equal Euler steps of the unit clock."""
    h = 1 / len(slope)
    for a, b, noise in zip(slope, intercept, g2, strict=True):
        mean = mean + h * (a * mean + b)
        variance = variance * (1 + h * a) ** 2 + h * noise
    return mean, variance


def marginal(path, t):
    # eight times of one program for all tests of a path
    alpha, sigma = (float(v[0]) for v in scales(path, jnp.full(9, t)))
    return alpha * MEAN, alpha**2 * VAR + sigma**2


def reversal_errors(path, steps, weigh):
    """Errors of mean and variance at t_min; `weigh` makes the affine coefficients."""
    mean, variance = euler_moments(*weigh(steps), *marginal(path, path.t_max))
    true_mean, true_variance = marginal(path, path.t_min)
    return mean - true_mean, variance - true_variance


@functools.cache
def reversed_coefficients(stochasticity, steps):
    path = process("VP")
    backwards = sdegen.reverse(path, GaussianScore(path), stochasticity)
    # one compilation; coarser grids are its subsets
    clock = jnp.asarray(np.arange(4000) / 4000)
    return tuple(np.asarray(c)[:: 4000 // steps] for c in affine(backwards, clock))


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0, 2.0])
def test_every_stochasticity_tends_to_the_data_at_first_order(stochasticity):
    path = process("VP")
    weigh = functools.partial(reversed_coefficients, stochasticity)
    errors = np.array(
        [reversal_errors(path, n, weigh) for n in (500, 1000, 2000, 4000)]
    )
    ratios = errors[:-1] / errors[1:]
    print(errors, ratios)
    assert (np.abs(errors[-1]) < 5e-3).all()
    assert (np.abs(ratios - 2) < 0.15).all()


@pytest.mark.parametrize("stochasticity", [0.5, 1.0, 2.0])
def test_the_forward_sign_in_the_reversal_would_be_seen(stochasticity):
    # (1 - lambda^2) is right forward in time only. The drift is linear in lambda^2, so
    # the wrong one is twice the flow minus the right one.
    def wrong(steps):
        flow = reversed_coefficients(0.0, steps)
        right = reversed_coefficients(stochasticity, steps)
        return 2 * flow[0] - right[0], 2 * flow[1] - right[1], right[2]

    variance = [reversal_errors(process("VP"), n, wrong)[1] for n in (2000, 4000)]
    assert min(np.abs(variance)) > 0.1
    assert abs(variance[0] / variance[1] - 2) > 0.5


@pytest.mark.parametrize("name", PROCESSES)
def test_a_reversal_satisfies_the_moment_equations_of_its_path(name):
    # Along the clock the law is N(m, v) with m, v of the path at time(s), so
    # dm/ds = a m + b and dv/ds = 2 a v + G^2, by central differences of m and v.
    clock, h = np.linspace(0.11, 0.91, 5), 1e-5
    strengths = np.array([0.0, 1.0, 2.0])
    found = reversed_law(below_one(name), *map(jnp.asarray, (clock, h, strengths)))
    (mean, variance), up, down, found, ends = jax.tree.map(np.asarray, found)
    rate = (up - down) / (2 * h)
    for slope, intercept, g2 in zip(*found, strict=True):
        moments = [slope * mean + intercept, 2 * slope * variance + g2]
        np.testing.assert_allclose(moments, rate, rtol=1e-5, atol=1e-8)
    path = below_one(name)
    assert abs(ends[0] / float(path.t_max) - 1) < 1e-14 and ends[1] == path.t_min


@eqx.filter_jit
def reversed_law(path, clock, h, strengths):
    """Mean and variance along the clock, before and after; what is affine in x.

    The flow is the last of the reversals, without noise; and when it starts and ends.
    """
    flow = sdegen.probability_flow(path, GaussianScore(path))

    def law(s):
        t = jax.vmap(flow.time)(s)
        alpha, sigma = jax.vmap(path.scales)(t)
        return jnp.stack([alpha * MEAN, alpha**2 * VAR + sigma**2])

    def coefficients(strength):
        return affine(sdegen.reverse(path, GaussianScore(path), strength), clock)

    start = jax.vmap(lambda s: flow(s, jnp.zeros(())))(clock)
    slope = jax.vmap(lambda s: flow(s, jnp.ones(())))(clock) - start
    still = slope, start, jnp.zeros_like(start)
    found = [
        jnp.concatenate([many, one[None]])
        for many, one in zip(jax.vmap(coefficients)(strengths), still, strict=True)
    ]
    ends = jax.vmap(flow.time)(jnp.array([0.0, 1.0]))
    return law(clock), law(clock + h), law(clock - h), found, ends


# -- A3(d): the flow of a Gaussian in closed form --------------------------------------


@functools.cache
def below_one(name):
    """The default object, cut short where alpha(t_max) = 0 and f is infinite."""
    path = process(name)
    alpha = scales(path, jnp.full(9, path.t_max))[0]
    return path if float(alpha[0]) > 0 else PROCESSES[name](t_max=0.99)


def integrate(flow, x, kinks=None):
    """States of a flow at equally spaced clock times, and those times."""
    ys, ts = _integrate(flow, x, kinks)
    return np.asarray(ys), ts


@eqx.filter_jit
def _integrate(flow, x, kinks):
    clock = jnp.linspace(0.0, 1.0, 9)
    controller = dfx.PIDController(rtol=1e-13, atol=1e-14)
    if kinks is not None:
        controller = dfx.ClipStepSizeController(controller, jump_ts=kinks)
    out = dfx.diffeqsolve(
        dfx.ODETerm(flow),
        dfx.Tsit5(),
        t0=0.0,
        t1=1.0,
        dt0=1e-4,
        y0=x,
        stepsize_controller=controller,
        saveat=dfx.SaveAt(ts=clock),
        max_steps=20_000,
    )
    return out.ys, jax.vmap(flow.time)(clock)


@eqx.filter_jit
def chain_kinks(flow, steps):
    """Clock times of t = i / steps, where the drift of a chain jumps, by bisection."""
    t = jnp.arange(steps - 1, 1, -1) / steps
    lo, hi = jnp.zeros_like(t), jnp.ones_like(t)

    def halve(_, ends):
        lo, hi = ends
        mid = (lo + hi) / 2
        early = jax.vmap(flow.time)(mid) > t
        return jnp.where(early, mid, lo), jnp.where(early, hi, mid)

    return jax.lax.fori_loop(0, 60, halve, (lo, hi))[0]


# Every process has its flow in the moment equations above. These are integrated: one
# that is smooth, one that jumps, one that is derived, one cut short before alpha = 0.
@pytest.mark.parametrize("name", ["VP", "DDPM", "LinearSDE", "RectifiedFlow"])
def test_the_flow_keeps_the_standard_score_of_a_gaussian(name):
    path = below_one(name)
    u = np.array([-2.0, -0.5, 0.3, 1.7])
    mean, variance = marginal(path, path.t_max)
    flow = sdegen.probability_flow(path, GaussianScore(path))
    kinks = chain_kinks(flow, len(path.betas)) if name == "DDPM" else None
    x, t = integrate(flow, jnp.asarray(mean + np.sqrt(variance) * u), kinks)
    assert abs(float(t[0]) / float(path.t_max) - 1) < 1e-14
    assert float(t[-1]) == float(path.t_min)
    alpha, sigma = (np.asarray(s)[:, None] for s in scales(path, t))
    error = (x - alpha * MEAN) / np.sqrt(alpha**2 * VAR + sigma**2) - u
    assert np.abs(error).max() < 1e-8


# -- nonlinear, state-dependent noise: geometric Brownian motion -----------------------

GROWTH, VOLATILITY = 0.3, 0.5
LOG_MEAN, LOG_STD = -0.2, 0.4


@functools.cache
def market():
    """dx = m x dt + s x dw from a log-normal x0: log-normal at all times."""
    return sdegen.CustomSDE(
        lambda t, x, p: p["growth"] * x,
        lambda t, x, p: p["volatility"] * x,
        {"growth": GROWTH, "volatility": VOLATILITY},
        t_max=1.0,
    )


def market_law(t):
    """Mean and standard deviation of log x_t."""
    mean = LOG_MEAN + (GROWTH - VOLATILITY**2 / 2) * t
    return mean, (LOG_STD**2 + VOLATILITY**2 * t) ** 0.5


class MarketScore(eqx.Module):
    """The score of the market, less `missing` times div D / D = 2 / x."""

    missing: Scalar = number(0.0)

    def __call__(self, t, x):
        mean, std = market_law(t)
        return -(1 + (jnp.log(x) - mean) / std**2) / x - self.missing * 2 / x


market_score = MarketScore()
without_divergence = MarketScore(1.0)
"""What a reversal that forgets div D = 2 s^2 x would see: D (score - div D / D)."""


def flow_error(score):
    u = np.array([-2.0, -0.5, 0.3, 1.7])
    mean, std = market_law(1.0)
    flow = sdegen.probability_flow(market(), score)
    x, t = integrate(flow, jnp.asarray(np.exp(mean + std * u)))
    mean, std = market_law(np.asarray(t)[:, None])
    return np.abs((np.log(x) - mean) / std - u).max()


def test_the_flow_keeps_quantiles_under_state_dependent_noise():
    assert flow_error(market_score) < 1e-7


def test_a_flow_without_the_divergence_term_would_be_seen():
    assert flow_error(without_divergence) > 0.1


def log_cloud(score, stochasticity):
    """Deviations, in standard errors, of mean and variance of log x at t = 0."""
    mean, std = market_law(1.0)
    n = 4000
    x = jnp.asarray(np.exp(mean + std * normal((n, 1))))
    backwards = sdegen.reverse(market(), score, stochasticity)
    out = sdegen.simulate(jax.random.key(4), backwards, x, grid=500)
    assert bool(out.ok.all()) and int(out.evaluations) == 500
    log_x = np.log(np.asarray(out.x))
    mean, std = market_law(0.0)
    return (
        (log_x.mean() - mean) / (std / n**0.5),
        (log_x.var() / std**2 - 1) / (2 / n) ** 0.5,
    )


@pytest.mark.parametrize("stochasticity", [0.5, 1.0])
def test_the_reversal_gives_the_data_back_under_state_dependent_noise(stochasticity):
    errors = log_cloud(market_score, stochasticity)
    print(errors)
    assert max(np.abs(errors)) < 5


def test_a_reversal_without_the_divergence_term_would_be_seen():
    assert max(np.abs(log_cloud(without_divergence, 1.0))) > 20


# -- reversible processes: nothing flows -----------------------------------------------


def shear_diffusion(t, x, params):
    """G_i depends on the other coordinate as well."""
    return jnp.sqrt(1.5 + jnp.sin(jnp.array([1.0, 2.0]) @ x + jnp.array([0.0, 0.7])))


def shear_drift(t, x, params):
    """Half of div D + D score for N(0, I): dD_i/dx_i by hand."""
    phase = jnp.array([1.0, 2.0]) @ x + jnp.array([0.0, 0.7])
    own_derivative = jnp.array([1.0, 2.0]) * jnp.cos(phase)
    return 0.5 * (own_derivative - x * (1.5 + jnp.sin(phase)))


def swap_diffusion(t, x, params):
    """G_i depends on the other coordinate only: the divergence is zero."""
    return jnp.sqrt(1.5 + jnp.sin(x[::-1]))


def swap_drift(t, x, params):
    return -0.5 * x * (1.5 + jnp.sin(x[::-1]))


def radial_diffusion(t, x, params):
    """One scalar that depends on all of x."""
    return jnp.sqrt(1 + jnp.sum(x**2))


def radial_drift(t, x, params):
    return x - 0.5 * x * (1 + jnp.sum(x**2))


REVERSIBLE = {
    "default": lambda: sdegen.CustomSDE(),
    "shear": lambda: sdegen.CustomSDE(shear_drift, shear_diffusion),
    "swap": lambda: sdegen.CustomSDE(swap_drift, swap_diffusion),
    "radial": lambda: sdegen.CustomSDE(radial_drift, radial_diffusion),
}


def normal_score(t, x):
    return -x


@pytest.mark.parametrize("name", REVERSIBLE)
def test_the_flow_of_a_reversible_process_is_zero(name):
    # f = (div D + D score) / 2 carries no probability: dx/ds vanishes everywhere.
    flow = sdegen.probability_flow(REVERSIBLE[name](), normal_score)
    x = normal((50, 2))
    velocity = jax.jit(jax.vmap(lambda x: flow(0.6, x)))(x)
    assert np.abs(velocity).max() < 1e-13


@pytest.mark.parametrize("name", REVERSIBLE)
def test_a_reversible_process_is_its_own_reversal(name):
    sde, x, s, h = REVERSIBLE[name](), jnp.array([0.3, -1.1]), 0.6, 1e-6

    @jax.jit
    def terms(s):
        backwards = sdegen.reverse(sde, normal_score)
        pairs = (backwards.drift, sde.drift), (backwards.diffusion, sde.diffusion)
        return backwards.time(s), [(mine(s, x), its(0.0, x)) for mine, its in pairs]

    rate = -float(terms(s + h)[0] - terms(s - h)[0]) / (2 * h)
    drift, diffusion = jax.tree.map(np.asarray, terms(s)[1])
    np.testing.assert_allclose(drift[0], rate * drift[1], rtol=1e-8)
    np.testing.assert_allclose(diffusion[0], rate**0.5 * diffusion[1], rtol=1e-8)


def check_standard_normal(x):
    n = x.size
    assert abs(x.mean()) < 5 / n**0.5
    assert abs((x**2).mean() - 1) < 5 * (2 / n) ** 0.5
    assert stats.kstest(x.ravel(), "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    "name, direction",
    [("default", "forward"), ("shear", "forward"), ("shear", "reverse")],
)
def test_the_standard_normal_law_is_stationary(name, direction):
    sde = REVERSIBLE[name]()
    if direction == "reverse":
        sde = sdegen.reverse(sde, normal_score)
    x = normal((2000, 2))
    out = sdegen.simulate(jax.random.key(6), sde, jnp.asarray(x), grid=400)
    out = np.asarray(out.x)
    check_standard_normal(out)
    # Coordinates with the same phase of noise must stay uncorrelated; and it did move.
    assert abs(np.mean(out[:, 0] * out[:, 1])) < 5 / len(out) ** 0.5
    assert abs(np.corrcoef(out[:, 0], x[:, 0])[0, 1]) < 0.3


def test_the_default_process_forgets_its_start():
    start = jnp.full((2000, 1), 1.5)
    sde = sdegen.CustomSDE(t_max=8.0)
    out = sdegen.simulate(jax.random.key(7), sde, start, grid=800).x
    check_standard_normal(np.asarray(out))


# -- simulate and terms ----------------------------------------------------------------


@pytest.mark.parametrize("which", ["VP", "reversed market"])
def test_a_sample_does_not_depend_on_the_batch_around_it(which):
    sde = {
        "VP": process("VP"),
        "reversed market": sdegen.reverse(market(), market_score),
    }[which]
    x = np.exp(0.3 * normal((7, 3)))
    starts = (jnp.asarray(x[:n]) for n in (7, 3))
    whole, part = (
        np.asarray(sdegen.simulate(jax.random.key(1), sde, start, grid=20).x)
        for start in starts
    )
    np.testing.assert_array_equal(whole[:3], part)
    assert len(np.unique(whole)) == whole.size


def test_a_trajectory_starts_at_the_data_and_ends_at_the_result():
    x = jnp.ones((4000, 1))
    out = sdegen.simulate(jax.random.key(1), market(), x, grid=8, trajectory=True)
    np.testing.assert_array_equal(out.trajectory[0], x)
    np.testing.assert_array_equal(out.trajectory[-1], out.x)
    np.testing.assert_allclose(out.times, np.linspace(0, 1, 9), atol=1e-15)
    # Brownian scaling: the spread of the first step is s sqrt(dt).
    expected = VOLATILITY * np.sqrt(1 / 8)
    assert abs(float(out.trajectory[1].std()) / expected - 1) < 5 / np.sqrt(2 * 4000)


@eqx.filter_jit
def strong_endpoints(sde, keys, dt):
    """x_1 of `diffeqsolve` on `terms`, from 1, with the exact x_1 on the same path."""

    def one(key):
        shape = jax.ShapeDtypeStruct((), jnp.float64)
        noise = dfx.VirtualBrownianTree(0.0, 1.0, 2**-11, shape, key)
        out = dfx.diffeqsolve(sde.terms(noise), dfx.Euler(), 0.0, 1.0, dt, jnp.ones(()))
        w = noise.evaluate(0.0, 1.0)
        exact = jnp.exp(GROWTH - VOLATILITY**2 / 2 + VOLATILITY * w)
        return out.ys[0], exact

    return jax.vmap(one)(keys)


def test_terms_converge_strongly_in_diffrax_itself():
    # On one Brownian path Euler tends to Ito's solution, not Stratonovich's: order 1/2.
    keys = jax.random.split(jax.random.key(0), 200)
    errors = []
    for steps in (16, 64, 256):
        approx, exact = strong_endpoints(market(), keys, jnp.asarray(1 / steps))
        gap = np.asarray(approx) - np.asarray(exact)
        errors.append(np.sqrt(np.mean(gap**2)))
    slope = np.polyfit(np.log([16, 64, 256]), np.log(errors), 1)[0]
    print(errors, slope)
    assert abs(slope + 0.5) < 0.1 and errors[-1] < 0.02


def test_an_adaptive_flow_in_simulate_is_that_of_diffrax():
    path = process("VP")
    flow = sdegen.probability_flow(path, GaussianScore(path))
    x = jnp.array([[-1.0], [0.4], [2.0]])
    out = sdegen.simulate(
        jax.random.key(0),
        flow,
        x,
        solver=dfx.Tsit5(),
        grid=sdegen.Adaptive(1e-10, 1e-10),
    )
    (mean, variance), (end, end_variance) = (
        marginal(path, t) for t in (path.t_max, path.t_min)
    )
    expected = end + (np.asarray(x) - mean) * np.sqrt(end_variance / variance)
    assert bool(out.ok.all())
    np.testing.assert_allclose(out.x, expected, atol=1e-8)


# -- refusals --------------------------------------------------------------------------


def test_noise_that_mixes_coordinates_is_refused():
    mixing = sdegen.CustomSDE(lambda t, x, p: -x, lambda t, x, p: jnp.ones((2, 2)))
    x = jnp.ones(2)
    reversal = sdegen.reverse(mixing, normal_score)
    flow = sdegen.probability_flow(mixing, normal_score)
    for field in (reversal.drift, flow):
        with pytest.raises(ValueError, match=r"the shape of x, \(2,\), got \(2, 2\)"):
            field(0.5, x)


def test_negative_stochasticity_is_refused():
    with pytest.raises(ValueError, match="stochasticity must be >= 0.*got -0.5"):
        sdegen.reverse(process("VP"), normal_score, -0.5)


@pytest.mark.parametrize("name", ["RectifiedFlow", "FlowMatching", "Cosine"])
@pytest.mark.parametrize("make", [sdegen.reverse, sdegen.probability_flow])
def test_infinite_coefficients_at_t_max_are_refused(name, make):
    with pytest.raises(ValueError, match=f"{name} has alpha = 0 at t_max=1.*smaller"):
        make(process(name), normal_score)
    make(PROCESSES[name](t_max=0.999), normal_score)


def test_a_stratonovich_solver_is_refused_where_it_would_be_wrong():
    x = jnp.ones((2, 1))
    with pytest.raises(ValueError, match="Heun is not an Ito solver. Use Euler"):
        sdegen.simulate(jax.random.key(0), market(), x, solver=dfx.Heun(), grid=4)
    # Where g ignores x both calculi agree.
    out = sdegen.simulate(
        jax.random.key(0), process("VP"), x, solver=dfx.Heun(), grid=4
    )
    assert bool(out.ok.all())


def test_an_ode_solver_is_refused_on_noise():
    with pytest.raises(ValueError, match="Tsit5 is for ODEs"):
        sdegen.simulate(
            jax.random.key(0), process("VP"), jnp.ones((2, 1)), solver=dfx.Tsit5()
        )


def test_a_falling_grid_is_refused():
    with pytest.raises(ValueError, match="strictly rising times, got one that falls"):
        sdegen.simulate(
            jax.random.key(0),
            process("VP"),
            jnp.ones((2, 1)),
            grid=jnp.array([1.0, 0.5, 0.1]),
        )


def test_half_a_custom_equation_is_refused():
    with pytest.raises(ValueError, match="CustomSDE needs both coefficients"):
        sdegen.CustomSDE(lambda t, x, p: -x)


def test_a_custom_range_is_checked():
    with pytest.raises(ValueError, match="CustomSDE needs 0 <= t_min < t_max, got"):
        sdegen.CustomSDE(t_min=2.0, t_max=1.0)


class OneMethodShort(sdegen.AbstractSDE):
    """A user's process that forgets `diffusion`."""

    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)
    noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.Gaussian)

    def drift(self, t, x):
        return -x


def test_a_process_without_its_diffusion_cannot_be_made():
    with pytest.raises(TypeError, match="diffusion"):
        OneMethodShort()
