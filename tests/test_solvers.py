"""The fast solvers: exactness on ideal data, exact variances, laws.

Steps of a linear problem are seen through a term of our own, whose noise is a chosen
number: so variances are exact recursions and not Monte Carlo.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import (
    KEY,
    TIME,
    draws,
    exact,
    exact_quantiles,
    flow,
    grids,
    has_the_law_of_x,
    scales,
)
from oracle import G1, PROBES, Mixture1D, process

import sdegen
from sdegen import prediction, solvers
from sdegen.solvers.semilinear import Node


def row(kind):
    return getattr(prediction, kind)


# -- exact on ideal data ---------------------------------------------------------------


def test_ddim_is_euler_in_sigma_over_alpha():
    for name in TIME:
        _, ts = list(grids(name, 12))[1]
        path, x = process(name), exact_quantiles(name, ts[0])
        out = flow(name, solver=solvers.DDIM(), grid=ts[1:-1])
        x = exact_quantiles(name, ts[1])
        for t, s in zip(ts[1:-2], ts[2:-1], strict=True):
            (a, b), (c, d) = scales(path, t), scales(path, s)
            slope = (x - a * G1.denoise(x, a, b)) / b  # d(x/alpha)/d(sigma/alpha)
            x = c * (x / a + (d / c - b / a) * slope)
        assert abs(out.x - x).max() < 1e-12


@pytest.mark.parametrize("name", TIME)
def test_a_gaussian_of_sigma_data_is_exact_in_the_edm_splitting(name):
    path, std = process(name), 0.7
    law = Mixture1D([0.5, 0.5], [0.0, 0.0], [std, std])
    scale = [jnp.hypot(a * std, s) for a, s in (scales(path, t) for t in ends_of(path))]
    z = jnp.linspace(-2, 2, len(PROBES))[:, None]
    for solver in (solvers.DEIS(3, row("edm"), std), solvers.UniPC(2, sigma_data=std)):
        grid = sdegen.CosineGrid(4)
        out = flow(name, data=law, start=scale[0] * z, solver=solver, grid=grid)
        assert abs(out.x - scale[1] * z).max() < 1e-11


def ends_of(path):
    return path.t_max, path.t_min


def node_at(c):
    """The node of the rectified flow's coordinates at the clock c."""
    return Node(c, -jnp.expm1(-c), jnp.exp(-c), c, jnp.ones_like(c))


def linear_step(solver, c0, c1, variance, stochasticity, state=None, steps=8):
    """(A, B) of y1 = A y0 + B noise for data N(0, variance), exactly."""

    def posterior_means(node, y):
        a, tau = node.a, node.tau
        gain = 1 / (a**2 * variance + tau**2)
        return a * variance * gain * y, tau * gain * y

    def step(y, noise):
        term = types.SimpleNamespace(
            posterior_means=posterior_means,
            node=node_at,
            normal=lambda *a: jnp.full_like(y, noise),
            stochasticity=stochasticity,
            row=None,
            brownian=types.SimpleNamespace(ts=np.zeros(steps + 1)),
        )
        here, there = node_at(c0), node_at(c1)
        first = solver.start(term, here, there, y) if state is None else state(y)
        return solver.advance(term, here, there, y, first)[0][0, 0]

    one = jnp.ones((1, 1))
    return step(one, 0.0), step(0 * one, 1.0)


def chain(solver, clock, variance, start, stochasticity):
    """The variance of y at the end of `clock`, from `start` at its beginning."""

    def body(v, c):
        a, b = linear_step(solver, *c, variance, stochasticity)
        return a**2 * v + b**2, None

    clock = jnp.asarray(clock)
    return float(jax.lax.scan(body, start, (clock[:-1], clock[1:]))[0])


def ddpm_clock(steps):
    """c at `steps` of DDPM's thousand times, 1000 to 1, and at 0, where c = inf."""
    times = np.round(np.linspace(0, 999, steps)).astype(int)[::-1] + 1
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[times - 1]
    clock = np.log1p(np.sqrt(bars / (1 - bars)))
    return np.concatenate([clock, [np.inf]]), bars[0]


@pytest.mark.parametrize(
    "steps, eta, variance, expected",
    [
        (5, 0.0, 4.0, 1.857423),
        (5, 0.5, 4.0, 1.779343),
        (5, 1.0, 4.0, 1.337190),
        (10, 0.0, 4.0, 2.8619),
        (10, 1.0, 4.0, 2.2757),
    ],
)
def test_few_steps_of_ddim_have_their_exact_variance(steps, eta, variance, expected):
    """systems.md, A8: data N(0, v), exact start, steps of the DDPM grid."""
    clock, bar = ddpm_clock(steps)
    scale = np.sqrt(bar) + np.sqrt(1 - bar)
    start = (bar * variance + 1 - bar) / scale**2
    got = chain(solvers.DDIM(), clock, variance, start, eta)
    assert abs(got - expected) < (1e-6 if steps == 5 else 1e-4)


@pytest.mark.parametrize(
    "variance, expected", [(1.0, 0.991067376), (4.0, 3.974777), (0.25, 0.246125)]
)
def test_eta_one_on_the_grid_of_ddpm_is_ancestral_sampling(variance, expected):
    """systems.md, A6: a thousand steps from N(0, 1), posterior variance."""
    clock, bar = ddpm_clock(1000)
    start = 1 / (np.sqrt(bar) + np.sqrt(1 - bar)) ** 2
    got = chain(solvers.DDIM(), clock, variance, start, 1.0)
    assert abs(got - expected) < 1e-6


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [2, 5, 10])
def test_the_analytic_variance_makes_any_number_of_steps_exact(steps, eta):
    variance = 4.0
    clock, bar = ddpm_clock(steps)
    a, tau = -np.expm1(-clock[:-1]), np.exp(-clock[:-1])
    rest = solvers.Variance(
        jnp.asarray(clock[:-1]),
        jnp.asarray(variance * tau**2 / (a**2 * variance + tau**2)),
    )
    scale = np.sqrt(bar) + np.sqrt(1 - bar)
    start = (bar * variance + 1 - bar) / scale**2
    got = chain(solvers.DDIM(rest), clock, variance, start, eta)
    assert abs(got - variance) < 1e-10


def test_the_analytic_variance_is_estimated_from_samples():
    """systems.md, A8 b: .7023433990 on G1 at t = .3, by quantiles instead of draws."""
    path = process("VP")
    probability = (np.arange(4000) + 0.5) / 4000
    x = G1.quantile(probability, *scales(path, 0.3))[None, :, None]
    found = solvers.analytic_variance(exact("VP"), x, jnp.asarray([0.3]))
    assert abs(float(found.values[0]) - 0.7023433990) < 1e-3
    clipped = solvers.analytic_variance(exact("VP"), x, jnp.asarray([0.3]), bound=0.5)
    assert float(clipped.values[0]) == 0.5


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    "solver",
    [solvers.DDIM(), solvers.DPMSolverSDE(1), solvers.ERSDE(1, noise=lambda r: r)],
)
def test_one_point_keeps_its_exact_law_under_noise(solver, strength):
    if isinstance(solver, solvers.DDIM) and strength > 1:
        return
    for c0, c1 in ((0.0, 0.3), (0.3, 0.5), (0.5, 4.0)):
        a, b = linear_step(solver, jnp.asarray(c0), jnp.asarray(c1), 0.0, strength)
        if c0 > 0:  # and the share of the old noise is that of its equation
            shrink = np.expm1(c0) / np.expm1(c1)
            keep = shrink**strength**2
            if isinstance(solver, solvers.DDIM):
                keep = np.sqrt(1 - strength**2 * (1 - shrink**2))
            assert abs(a - np.exp(c0 - c1) * keep) < 1e-13
        assert abs(a**2 * np.exp(-2 * c0) + b**2 - np.exp(-2 * c1)) < 1e-14


def test_churn_raises_the_noise_and_keeps_the_law():
    """N(0, s^2 + r^2) becomes N(0, s^2 + rhat^2) exactly (systems.md, A16 e)."""
    solver, variance = solvers.EDMHeun(s_churn=2.0, s_min=0.05, s_max=50.0), 0.25
    top, c0 = jnp.log1p(1 / 80.0), jnp.log1p(1 / 1.3)
    normals = []
    for noise in (0.0, 1.0):
        term = types.SimpleNamespace(
            node=node_at,
            normal=lambda *a, n=noise: jnp.full((1, 1), n),
            brownian=types.SimpleNamespace(ts=np.zeros(8)),
        )
        y = jnp.full((1, 1), 1.0 - noise)
        node, moved = solver._churn(term, node_at(c0), y, node_at(top))
        clock = node.clock
        normals.append(float(moved[0, 0]))
    raised, a0, a1 = 1.3 * (1 + 2.0 / 8), -np.expm1(-c0), -np.expm1(-clock)
    assert abs(1 / np.expm1(clock) - raised) < 1e-12
    before = a0**2 * (variance + 1.3**2)
    after = normals[0] ** 2 * before + normals[1] ** 2
    assert abs(after - a1**2 * (variance + raised**2)) < 1e-12


def test_langevin_keeps_the_law_to_second_order_in_its_step():
    c, variance = jnp.asarray(0.7), 0.25
    a, tau = -np.expm1(-c), np.exp(-c)
    law = a**2 * variance + tau**2
    for snr in (0.01, 0.05):
        solver = solvers.Langevin(corrections=3, snr=snr)

        def step(solver=solver):
            gains = []
            for i in range(4):  # no noise, then the noise of one correction at a time

                def posterior_means(node, y):
                    return a * variance * y / law, tau * y / law

                term = types.SimpleNamespace(
                    posterior_means=posterior_means,
                    normal=lambda draw=0, i=i: jnp.full((1, 1), float(draw == i)),
                    stochasticity=None,
                )
                y = jnp.full((1, 1), float(i == 0))
                here = node_at(c)
                gains.append(float(solver.advance(term, here, here, y, None)[0][0, 0]))
            return gains

        gains = step()
        after = gains[0] ** 2 * law + sum(g**2 for g in gains[1:])
        q = 2 * snr**2 * tau**2 / law
        assert abs(after / law - 1) < 4 * q**2 and gains[0] < 1


def test_er_sde_integrates_a_linear_prediction_exactly_under_noise():
    """x / alpha goes with phi, and x0 with d(-1 / phi), phi(r) = r g(r)^strength^2."""
    solver, y = solvers.ERSDE(2), jnp.full((1, 1), 0.7)
    first, start, stop = (node_at(jnp.asarray(c)) for c in (0.3, 0.8, 1.7))

    def posterior_means(node, y):
        x0 = jnp.full_like(y, node.half_logsnr)
        return x0, (y - node.a * x0) / node.tau

    strength, zero = jnp.asarray(0.8), lambda: jnp.zeros((1, 1))
    term = types.SimpleNamespace(
        posterior_means=posterior_means, normal=zero, stochasticity=strength
    )
    state = solver.start(term, first, start, y)
    state = solver.advance(term, first, start, y, state)[2]
    got = solver.advance(term, start, stop, y, state)[0]
    r = np.linspace(*(float(n.tau / n.a) for n in (start, stop)), 20_001)
    phi = r * (np.exp(r**0.3) + 10) ** 0.64
    x = phi[-1] / phi[0] * 0.7 / float(start.a)
    x += phi[-1] * np.sum(-np.log((r[1:] + r[:-1]) / 2) * np.diff(1 / phi))
    assert abs(got - float(stop.a) * x).max() < 1e-7


# -- laws ------------------------------------------------------------------------------

NOISY = {
    "DDIM": (solvers.DDIM(), 1.0, 400),
    "SDE-DPM++ 2M": (solvers.DPMSolverSDE(), 1.0, 100),
    "ER-SDE-3": (solvers.ERSDE(), 1.0, 60),
    "Langevin": (solvers.Langevin(), 1.0, 400),
    "churn": (solvers.EDMHeun(s_churn=20.0), 0.0, 100),
}
LAWS = [("VP", label) for label in NOISY] + [
    ("RectifiedFlow", "SDE-DPM++ 2M"),
    ("RectifiedFlow", "ER-SDE-3"),
]
"""Solvers see the clock alone, and alpha is 0 at its beginning or it is not."""


@pytest.mark.parametrize("name, label", LAWS)
def test_noisy_solvers_reach_the_law_of_the_data(name, label):
    solver, strength, steps = NOISY[label]
    path = process(name)
    start = draws(path, 5000)
    out = sdegen.sample(
        KEY,
        exact(name),
        start.shape,
        solver=solver,
        grid=sdegen.LogSNRGrid(steps),
        stochasticity=strength,
        start=start,
    )
    assert bool(out.ok.all())
    has_the_law_of_x(out.x, path, path.t_min)


def test_refinable_noise_gives_the_same_sample_at_every_number_of_steps():
    path, ends, solver = process("VP"), {}, solvers.DPMSolverSDE(1)
    start = draws(path, 100)
    for steps in (32, 128, 512):
        out = sdegen.sample(
            KEY,
            exact("VP"),
            start.shape,
            solver=solver,
            grid=sdegen.LogSNRGrid(steps),
            stochasticity=1.0,
            start=start,
            refinable=True,
        )
        ends[steps] = np.asarray(out.x)
    coarse, fine = (np.mean(abs(ends[n] - ends[512])) for n in (32, 128))
    slope = np.log2(coarse / fine) / 2
    print("strong errors", coarse, fine, "slope", slope)
    assert coarse < 0.3 and slope > 0.7
