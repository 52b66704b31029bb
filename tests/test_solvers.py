"""The fast solvers: orders, golden errors, exactness on ideal data, laws, counts.

Steps of a linear problem are seen through a term of our own, whose noise is a chosen
number: so variances are exact recursions and not Monte Carlo.
"""

import functools
import inspect
import types

import diffrax as dfx
import equinox as eqx
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
from oracle import G1, PROBES, PROCESSES, Mixture1D, process

import sdegen
from sdegen import nets, prediction, solvers
from sdegen.solvers.base import AbstractSemilinearSolver

FINALS = {
    name: cls
    for name, cls in vars(solvers).items()
    if inspect.isclass(cls)
    and issubclass(cls, AbstractSemilinearSolver)
    and not inspect.isabstract(cls)
}
"""Every solver that the package exports, default-constructible."""
KINDS = ("x0", "eps", "velocity", "edm")
every_solver = pytest.mark.parametrize("solver", FINALS)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Many programs that run once each: compile them quickly rather than well."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def row(kind):
    return getattr(prediction, kind)


# -- orders ----------------------------------------------------------------------------

ORDERS = {
    "DDIM": (1, solvers.DDIM()),
    "DPM-Solver-2": (2, solvers.DPMSolver2()),
    "DPM++ 2M": (2, solvers.DPMSolverPP(2)),
    "DPM++ 3M": (3, solvers.DPMSolverPP(3)),
    "EDM Heun": (2, solvers.EDMHeun()),
    "SDE-DPM++ 2M": (2, solvers.DPMSolverSDE(2)),
    "ER-SDE-3": (3, solvers.ERSDE(3)),
    "Adams 2": (3, solvers.ExponentialAdams(2)),
    "DEIS-2 eps": (2, solvers.DEIS(2)),
    "DEIS-2 velocity": (2, solvers.DEIS(2, row("velocity"))),
    "DEIS-3 x0": (3, solvers.DEIS(3, row("x0"))),
    "DEIS-3 eps": (3, solvers.DEIS(3)),
}
ORDERS |= {"DEIS-4 edm": (4, solvers.DEIS(4, row("edm")))}
ORDERS |= {f"UniPC-2 {k}": (3, solvers.UniPC(2, prediction=row(k))) for k in KINDS}
GOLDEN = {  # errors at 320 steps on VP: equal steps of log-SNR, of t (systems.md, A7)
    "DDIM": ("5.3e-03", "4.2e-03"),
    "DPM++ 2M": ("5.1e-05", "5.8e-04"),
    "EDM Heun": ("8.4e-05", "4.0e-05"),
    "DPM-Solver-2": ("4.4e-05", "1.0e-04"),
}
PAIRS = [(name, label) for label in GOLDEN for name in TIME]
PAIRS += [("VP", label) for label in ORDERS if label not in GOLDEN]
PAIRS += [("EDM", "UniPC-2 edm"), ("RectifiedFlow", "UniPC-2 edm")]


def smooth_grids(name, steps):
    """Steps of log-SNR, equal and not: the first of them are where nothing happens.

    Solvers of order 3 and 4 start with one step of DDIM, whose error of the second
    order shows on other grids.
    """
    equal = dict(grids(name, steps))["log-SNR"]
    path, u = process(name), np.linspace(0, 1, steps + 1)
    log_ratio = np.asarray([-path.logsnr(t) / 2 for t in (equal[0], equal[-1])])
    log_ratio = np.minimum(log_ratio, np.log(1e3))
    bent = log_ratio[0] + (u + 0.12 * np.sin(2 * np.pi * u)) * np.diff(log_ratio)
    inside = TIME[name](1 / (1 + np.exp(-bent)))[1:-1]
    yield "log-SNR", equal
    yield "bent log-SNR", jnp.asarray([equal[0], *inside, equal[-1]])


def grid_errors(name, solver, steps, grids=grids):
    """RMS errors at the probes by what the grid has equal steps of."""
    end, errors = exact_quantiles(name, process(name).t_min), {}
    for label, ts in grids(name, steps):
        out = flow(name, solver=solver, grid=ts)
        assert bool(out.ok)
        errors[label] = float(jnp.sqrt(jnp.mean((out.x - end) ** 2)))
    return errors


@pytest.mark.parametrize("name, label", PAIRS)
def test_every_solver_has_its_order_on_every_grid(name, label):
    order, solver = ORDERS[label]
    few, many = (160, 1280) if order < 3 else (160, 640)
    make = grids if order < 3 else smooth_grids
    coarse, fine = (grid_errors(name, solver, n, make) for n in (few, many))
    for grid in coarse:
        slope = np.log2(coarse[grid] / fine[grid]) / np.log2(many / few)
        print(f"{grid}: {coarse[grid]:.3g}, {fine[grid]:.3g}, order {slope:.3f}")
        if name == "VP" and label in GOLDEN:  # the bounds of systems.md, A7
            assert (0.95, 1.93)[order - 1] < slope < (1.05, 2.08)[order - 1]
        elif order < 3:
            assert abs(slope - order) < 0.2
        else:  # still rising towards its order, from errors near 1e-5
            assert order - 0.3 < slope < order + 0.5


@pytest.mark.parametrize("label", GOLDEN)
def test_errors_are_those_of_an_independent_implementation(label):
    errors = grid_errors("VP", ORDERS[label][1], 320)
    found = tuple(f"{errors[grid]:.1e}" for grid in ("log-SNR", "t"))
    assert found == GOLDEN[label]


@pytest.mark.parametrize(
    "points, error", [(18, 0.0379), (36, 0.00772), (72, 0.00176), (144, 4.2e-4)]
)
def test_heun_has_the_golden_errors_of_edm(points, error):
    grid = sdegen.KarrasGrid(points - 1)
    out = flow("EDM", solver=solvers.EDMHeun(), grid=grid, denoise=True)
    assert int(out.evaluations) == 2 * points - 1
    rms = np.sqrt(np.mean((out.x[:, 0] - G1.quantile(PROBES)) ** 2))
    digits = 2 if error < 1e-3 else 3
    assert f"{rms:.{digits}g}" == f"{error:.{digits}g}"


@pytest.mark.parametrize("name", PROCESSES)
def test_the_cosine_grid_has_equal_angles(name):
    path = process(name)
    for scale, rho in ((1.0, 1.0), (0.5, 1.5)):
        ts = sdegen.CosineGrid(12, scale=scale, rho=rho)(path)
        alpha, sigma = jax.vmap(path.alpha)(ts), jax.vmap(path.sigma)(ts)
        angle = np.arctan2(sigma ** (1 / rho), (scale * alpha) ** (1 / rho))
        assert ts[0] == path.t_max and ts[-1] == path.t_min
        assert np.ptp(np.diff(angle)) < 1e-9 and (np.diff(ts) < 0).all()


def test_equal_steps_of_time_are_the_cosine_grid_of_the_cosine_schedule():
    path = process("Cosine")
    ts = sdegen.CosineGrid(10, scale=1.0, rho=1.0)(path)
    assert abs(ts - sdegen.UniformGrid(10)(path)).max() < 1e-9


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


ATOMS = Mixture1D([0.5, 0.5], [1.5, 1.5], [0.0, 0.0])
STRAIGHT = {k: v[1] for k, v in ORDERS.items() if "edm" not in k and "Adams" not in k}


@pytest.mark.parametrize("label", STRAIGHT)
def test_one_point_comes_back_in_a_few_steps(label):
    path, z = process("EDM"), jnp.linspace(-2, 2, len(PROBES))[:, None]
    start, grid = 1.5 + path.t_max * z, sdegen.LogSNRGrid(5)
    out = flow("EDM", data=ATOMS, start=start, solver=STRAIGHT[label], grid=grid)
    # the weights of the past multiply differences of rounding of 80
    assert abs(out.x - (1.5 + path.t_min * z)).max() < 1e-10


@pytest.mark.parametrize("name", TIME)
def test_a_gaussian_of_sigma_data_is_exact_in_the_edm_splitting(name):
    path, std = process(name), 0.7
    law = Mixture1D([0.5, 0.5], [0.0, 0.0], [std, std])
    scale = [jnp.hypot(a * std, s) for a, s in (scales(path, t) for t in ends_of(path))]
    z = jnp.linspace(-2, 2, len(PROBES))[:, None]
    for solver in (solvers.DEIS(3, row("edm"), std), solvers.UniPC(2, sigma_data=std)):
        for steps in (1, 4):
            out = flow(
                name,
                data=law,
                start=scale[0] * z,
                solver=solver,
                grid=sdegen.CosineGrid(steps),
            )
            assert abs(out.x - scale[1] * z).max() < 1e-11


def ends_of(path):
    return path.t_max, path.t_min


def linear_step(solver, c0, c1, variance, stochasticity, state=None, steps=8):
    """(A, B) of y1 = A y0 + B noise for data N(0, variance), exactly."""

    def ends(c, y):
        a, tau = -jnp.expm1(-c), jnp.exp(-c)
        gain = 1 / (a**2 * variance + tau**2)
        return a * variance * gain * y, tau * gain * y

    def step(y, noise):
        term = types.SimpleNamespace(
            ends=ends,
            normal=lambda *a: jnp.full_like(y, noise),
            stochasticity=stochasticity,
            brownian=types.SimpleNamespace(ts=np.zeros(steps + 1)),
        )
        first = solver.start(term, c0, c1, y) if state is None else state(y)
        return solver.advance(term, c0, c1, y, first)[0][0, 0]

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
            normal=lambda *a, n=noise: jnp.full((1, 1), n),
            brownian=types.SimpleNamespace(ts=np.zeros(8)),
        )
        y = jnp.full((1, 1), 1.0 - noise)
        clock, moved = solver._churn(term, c0, c0 + 0.1, y, top)
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

                def ends(c, y):
                    return a * variance * y / law, tau * y / law

                term = types.SimpleNamespace(
                    ends=ends,
                    normal=lambda c0, c1, draw, i=i: jnp.full((1, 1), float(draw == i)),
                    stochasticity=None,
                )
                y = jnp.full((1, 1), float(i == 0))
                gains.append(float(solver.advance(term, c, c, y, None)[0][0, 0]))
            return gains

        gains = step()
        after = gains[0] ** 2 * law + sum(g**2 for g in gains[1:])
        q = 2 * snr**2 * tau**2 / law
        assert abs(after / law - 1) < 4 * q**2 and gains[0] < 1


# -- laws ------------------------------------------------------------------------------

NOISY = {
    "DDIM": (solvers.DDIM(), 1.0, 400),
    "SDE-DPM++ 2M": (solvers.DPMSolverSDE(), 1.0, 100),
    "ER-SDE-3": (solvers.ERSDE(), 1.0, 60),
    "Langevin": (solvers.Langevin(), 1.0, 400),
    "churn": (solvers.EDMHeun(s_churn=20.0), 0.0, 100),
}
LAWS = [("VP", label) for label in NOISY] + [
    ("EDM", "churn"),
    ("EDM", "ER-SDE-3"),
    ("RectifiedFlow", "SDE-DPM++ 2M"),
    ("RectifiedFlow", "ER-SDE-3"),
]


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
    assert bool(out.ok)
    has_the_law_of_x(out.x, path, path.t_min)


def test_gradients_of_noisy_solvers_are_finite_from_alpha_zero():
    """In the times, in the stochasticity, in the grid's numbers."""

    def end(solver, grid, strength):
        ts = grid if isinstance(grid, jax.Array) else grid(process("RectifiedFlow"))
        law = exact("RectifiedFlow")
        options = {"solver": solver, "grid": ts, "stochasticity": strength}
        return jnp.sum(sdegen.sample(KEY, law, (3, 1), **options).x)

    ts = jnp.asarray([1.0, 0.7, 0.3, 0.02])
    for solver, strength in (
        (solvers.DDIM(), 1.0),
        (solvers.DPMSolverSDE(1), 0.5),
        (solvers.Langevin(), 0.5),
        (solvers.EDMHeun(s_churn=2.0), None),
    ):
        if strength is None:
            slopes = jax.grad(lambda ts, s=solver: end(s, ts, 0.0))(ts)
        else:
            slopes = jax.grad(lambda *a, s=solver: end(s, *a), (0, 1))(ts, strength)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(slopes)), solver
    slope = jax.grad(
        lambda scale: end(solvers.UniPC(), sdegen.CosineGrid(4, scale), 0.0)
    )(0.5)
    assert jnp.isfinite(slope) and slope != 0


def test_a_traced_stochasticity_of_zero_is_the_flow():
    for solver in (solvers.ERSDE(), solvers.DPMSolverSDE(), solvers.DDIM()):

        def end(strength, solver=solver):
            options = {"solver": solver, "grid": sdegen.LogSNRGrid(5)}
            options["stochasticity"] = strength
            return sdegen.sample(KEY, exact("RectifiedFlow"), (3, 1), **options).x

        assert abs(jax.jit(end)(0.0) - end(0.0)).max() < 1e-12


def test_refinable_noise_gives_the_same_sample_at_every_number_of_steps():
    path, ends, solver = process("VP"), {}, solvers.DPMSolverSDE(1)
    start = draws(path, 100)
    for steps in (32, 64, 128, 512):
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
    errors = [np.mean(abs(ends[n] - ends[512])) for n in (32, 64, 128)]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    print("strong errors", errors, "slopes", slopes)
    assert errors[0] < 0.3 and (slopes > 0.7).all()


# -- contracts of every solver ---------------------------------------------------------


def network(width=16):
    net = nets.Mlp(width=width, depth=1)((2,), jax.random.key(0))
    return jax.tree.map(
        lambda a: a + 0.05 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), net
    )


@every_solver
def test_evaluations_are_those_that_run(solver):
    solver, ran = FINALS[solver](), []
    path = process("RectifiedFlow")

    def mean(t, x, cond):
        jax.debug.callback(lambda: ran.append(1))
        return G1.denoise(x, *scales(path, t))

    denoiser = sdegen.PosteriorMean(mean, path)
    for stochasticity in (0.0, 1.0) if solver.family else (0.0,):
        ran.clear()
        out = sdegen.sample(
            KEY, denoiser, (3, 1), solver=solver, grid=7, stochasticity=stochasticity
        )
        jax.effects_barrier()
        assert bool(out.ok)
        assert int(out.evaluations) == len(ran) == 7 * solver.calls + solver.calls_first
    multistep = isinstance(
        solver,
        solvers.DDIM
        | solvers.DPMSolverPP
        | solvers.DPMSolverSDE
        | solvers.DEIS
        | solvers.UniPC
        | solvers.ERSDE,
    )
    assert not multistep or len(ran) == 7


@every_solver
def test_time_and_state_stay_float32_with_a_bfloat16_network(solver, float32):
    solver, net = FINALS[solver](), network()

    def coarse(t, x, cond):
        assert t.dtype == x.dtype == jnp.float32
        return net(t, x, cond).astype(jnp.bfloat16)

    denoiser = sdegen.Denoiser(coarse, sdegen.RectifiedFlow(), row("velocity"))
    out = sdegen.sample(KEY, denoiser, (4, 2), solver=solver, grid=9, trajectory=True)
    assert out.x.dtype == out.trajectory.dtype == out.times.dtype == jnp.float32
    rounded = out.trajectory.astype(jnp.bfloat16).astype(jnp.float32)
    assert (abs(out.trajectory - rounded).max(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize(
    "solver", ["UniPC", "DPMSolver2", "EDMHeun", "DPMSolverSDE", "ERSDE"]
)
def test_gradients_flow_from_alpha_zero_to_the_data(solver):
    solver = FINALS[solver]()

    def end(scale, ts, solver):
        law = exact("RectifiedFlow", shift=0.1 * scale)
        out = sdegen.sample(KEY, law, (3, 1), solver=solver, grid=ts)
        return jnp.sum(out.x)

    ts = jnp.asarray([1.0, 0.8, 0.5, 0.3, 0.1, 0.02])
    slope, times = jax.grad(end, (0, 1))(1.0, ts, solver)
    step = 1e-6
    numeric = (end(1 + step, ts, solver) - end(1 - step, ts, solver)) / (2 * step)
    assert abs(slope - numeric) < 1e-6 * max(1, abs(numeric))
    assert jnp.isfinite(times).all()
    moved = ts.at[2].add(step), ts.at[2].add(-step)
    numeric = (end(1.0, moved[0], solver) - end(1.0, moved[1], solver)) / (2 * step)
    assert abs(times[2] - numeric) < 1e-5 * max(1, abs(numeric))


@every_solver
def test_a_sample_does_not_depend_on_its_batch(solver):
    solver = FINALS[solver]()
    few, many = (
        sdegen.sample(KEY, exact("VP"), (n, 1), solver=solver, grid=6).x
        for n in (4, 32)
    )
    assert abs(few - many[:4]).max() < 1e-13


@every_solver
def test_numbers_do_not_retrace(solver):
    traced, cls = [], FINALS[solver]
    law = exact("VP", traces=traced)
    for scale in (0.4, 0.6):
        solver = cls()
        if hasattr(solver, "sigma_data"):
            solver = eqx.tree_at(lambda s: s.sigma_data, solver, jnp.asarray(scale))
        grid = jnp.linspace(1.0, 1e-3 * scale + 1e-3, 5)
        sdegen.sample(KEY, law, (3, 1), solver=solver, grid=grid)
        first = len(traced) if scale == 0.4 else first  # noqa: F821
    assert len(traced) == first > 0


@pytest.mark.parametrize("solver", ["UniPC", "DPMSolverSDE", "EDMHeun", "ERSDE"])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_solvers_lower_for_accelerators(solver, platform, float32):
    solver = FINALS[solver]()
    denoiser = sdegen.Denoiser(network(), sdegen.VP())
    strength = 1.0 if solver.family else 0.0
    make = jax.jit(
        lambda key: (
            sdegen.sample(
                key, denoiser, (8, 2), solver=solver, grid=4, stochasticity=strength
            ).x
        )
    )
    exported = jax.export.export(make, platforms=[platform])(jax.random.key(0))
    assert exported.platforms == (platform,)


def test_a_mistake_is_answered_with_a_sentence():
    denoiser = exact("VP")
    sample = functools.partial(sdegen.sample, KEY, denoiser, (3, 1))
    for message, call in {
        "flow only": lambda: sample(solver=solvers.DEIS(), stochasticity=1.0),
        "error estimate": lambda: sample(
            solver=solvers.UniPC(), grid=sdegen.Adaptive()
        ),
        "whole number from 1 to 4": lambda: solvers.DEIS(5),
        "prediction of one of": lambda: solvers.UniPC(prediction=prediction.v),
        "solves what `sample` solves": lambda: sdegen.simulate(
            KEY, process("VP"), jnp.ones((2, 1)), solver=solvers.DDIM(), grid=4
        ),
        "refinable noise is that": lambda: sample(refinable=True),
        "needs bound=": lambda: solvers.analytic_variance(
            exact("RectifiedFlow"), jnp.ones((1, 2, 1)), jnp.ones(1)
        ),
        "stochasticity from 0 to 1": lambda: sample(
            solver=solvers.DDIM(), stochasticity=1.5
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# -- adaptive --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIME)
def test_adaptive_adams_keeps_every_quantile(name):
    path, errors = process(name), []
    for tolerance in (1e-6, 1e-9):
        grid = sdegen.Adaptive(tolerance, tolerance)
        out = flow(name, solver=solvers.ExponentialAdams(4), grid=grid)
        assert bool(out.ok)
        errors.append(
            abs(G1.cdf(out.x[:, 0], *scales(path, path.t_min)) - PROBES).max()
        )
    print("errors", errors, "evaluations", out.evaluations)
    assert errors[0] < 1e-4 and errors[1] < 1e-7


@functools.partial(jax.jit, static_argnums=(0, 1))
def raw_flow(name, solver, tolerance):
    """(error, steps) of the ODE dx/dt as it is written, in t."""
    path, denoiser = process(name), exact(name)
    start, end = (exact_quantiles(name, t) for t in ends_of(path))
    solution = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, x, args: denoiser.velocity(t, x)),
        getattr(dfx, solver)(),
        path.t_max,
        path.t_min,
        -0.01 * (path.t_max - path.t_min),
        start,
        stepsize_controller=dfx.PIDController(
            tolerance, tolerance, norm=lambda e: jnp.abs(e).max()
        ),
        max_steps=10_000,
        throw=False,
    )
    error = jnp.sqrt(jnp.mean((solution.ys[-1] - end) ** 2))
    ok = solution.result == dfx.RESULTS.successful
    return jnp.where(ok, error, jnp.inf), solution.stats["num_steps"]


@pytest.mark.parametrize("name", TIME)
def test_adaptive_adams_needs_fewer_evaluations_than_runge_kutta_on_the_raw_ode(name):
    end = exact_quantiles(name, process(name).t_min)
    others = []
    for solver in ("Tsit5", "Dopri5"):
        for tolerance in 10.0 ** -np.arange(1.5, 8.0, 0.5):
            error, steps = raw_flow(name, solver, tolerance)
            others.append((float(error), 6 * int(steps) + 1))
    for tolerance in (1e-2, 1e-3, 1e-4):
        out = flow(
            name,
            solver=solvers.ExponentialAdams(),
            grid=sdegen.Adaptive(tolerance, tolerance),
        )
        error = float(jnp.sqrt(jnp.mean((out.x - end) ** 2)))
        rivals = [n for e, n in others if e <= error]
        print(f"error {error:.2g}: {out.evaluations} evaluations, others {min(rivals)}")
        assert int(out.evaluations) < min(rivals)


def test_steps_of_its_own_make_a_sample_independent_of_its_batch():
    start = exact_quantiles("VP", 1.0)
    options = {"solver": solvers.ExponentialAdams()}
    for per_sample in (True, False):
        grid = sdegen.Adaptive(1e-3, 1e-3, per_sample=per_sample)
        whole = flow("VP", grid=grid, **options)
        part = flow("VP", grid=grid, start=start[:2], **options)
        alone = abs(whole.x[:2] - part.x).max()
        print("per sample" if per_sample else "shared", alone, whole.evaluations)
        assert (alone < 1e-12) == per_sample
        assert bool(whole.ok) and whole.x.shape == start.shape
    out = flow("VP", grid=sdegen.Adaptive(1e-3, 1e-3, 3, per_sample=True), **options)
    assert out.result == dfx.RESULTS.max_steps_reached


# -- learned grids ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def plane():
    """Six unequal modes, exact, with starts that no learning has seen."""
    random = np.random.default_rng(3)
    angle = np.arange(6) * np.pi / 3
    means = 0.68 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    law = sdegen.data.Mixture(
        random.dirichlet(3 * np.ones(6)), means, random.uniform(0.05, 0.15, 6)
    )
    path = sdegen.EDM()
    x0 = law.sample(jax.random.key(1), 500)
    start = x0 + path.t_max * jax.random.normal(jax.random.key(2), x0.shape)
    denoiser = law.denoiser(path)
    grid = sdegen.Adaptive(1e-9, 1e-9)
    fine = sdegen.sample(
        KEY, denoiser, start.shape, solver=dfx.Tsit5(), grid=grid, start=start
    )
    return denoiser, start, fine.x


def plane_errors(plane, **options):
    denoiser, start, fine = plane
    out = sdegen.sample(KEY, denoiser, start.shape, start=start, **options)
    square = jnp.mean((out.x - fine) ** 2, axis=1)
    return np.array([jnp.sqrt(square.mean()), jnp.sqrt(jnp.median(square))]), out


def test_ten_evaluations_beat_the_best_of_the_field(plane):
    """Better than the usual multistep methods on the usual grids."""
    usual = [
        plane_errors(plane, solver=solver, grid=grid(10))[0]
        for solver in (
            solvers.DPMSolverPP(2),
            solvers.DEIS(3),
            solvers.UniPC(3, prediction=prediction.x0),
        )
        for grid in (sdegen.LogSNRGrid, sdegen.KarrasGrid)
    ]
    solver = solvers.UniPC(2, prediction=prediction.velocity)
    ours, out = plane_errors(plane, solver=solver, grid=sdegen.CosineGrid(10))
    print("ours", ours, "best of the others", np.min(usual, axis=0))
    assert int(out.evaluations) == 10
    assert (ours < np.min(usual, axis=0) * [0.5, 0.7]).all()


@pytest.mark.parametrize("weights", [True, False])
def test_a_learned_grid_at_least_halves_the_error_on_unseen_starts(
    plane, weights, tmp_path
):
    denoiser, start, _ = plane
    solver = solvers.UniPC(2, prediction=prediction.velocity)
    stock, _ = plane_errors(plane, solver=solver, grid=sdegen.CosineGrid(5))
    grid = sdegen.learn_grid(
        jax.random.key(3),
        denoiser,
        solver,
        5,
        shape=(2,),
        weights=weights,
        iterations=100,
        draws=1024,
        kept=256,
        progress=False,
    )
    learned, out = plane_errors(plane, grid=grid)
    print("stock", stock, "learned", learned)
    assert int(out.evaluations) == 5
    assert (learned < stock * (0.4 if weights else 0.75)).all()
    times = np.asarray(grid(denoiser.path))
    assert times[0] == 80.0 and times[-1] == np.float64(denoiser.path.t_min)
    assert (np.diff(times) < 0).all()
    again = sdegen.load_grid(grid.save(tmp_path / "grid.json"), solver)
    with pytest.raises(ValueError, match="learned for UniPC.*velocity.*got DDIM"):
        sdegen.load_grid(tmp_path / "grid.json", solvers.DDIM())
    same, repeated = plane_errors(plane, grid=again)
    assert (out.x == repeated.x).all()
    if weights:
        with pytest.raises(ValueError, match="learned for 5 steps"):
            plane_errors(plane, solver=grid.solver, grid=sdegen.CosineGrid(6))


def test_learning_says_what_it_needs():
    denoiser = exact("VP")
    with pytest.raises(ValueError, match="shape of one sample"):
        sdegen.learn_grid(KEY, denoiser)
    with pytest.raises(ValueError, match="no whole number of steps"):
        sdegen.learn_grid(KEY, denoiser, solvers.EDMHeun(), 7, shape=(1,))
    with pytest.raises(ValueError, match="adds noise"):
        sdegen.learn_grid(KEY, denoiser, solvers.Langevin(), 8, shape=(1,))


# -- memory ----------------------------------------------------------------------------


def test_the_memory_of_a_gradient_grows_no_faster_than_the_steps(float32):
    net = network(64)

    def memory(steps):
        def end(net):
            denoiser = sdegen.Denoiser(net, sdegen.VP())
            grid = sdegen.LogSNRGrid(steps)
            out = sdegen.sample(
                jax.random.key(0),
                denoiser,
                (256, 2),
                solver=solvers.UniPC(),
                grid=grid,
            )
            return jnp.sum(out.x**2)

        compiled = jax.jit(jax.grad(end)).lower(net).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = memory(16), memory(64)
    print("temporaries", few, many)
    assert many < 4.5 * few
