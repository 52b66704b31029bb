"""Sampling against exact quantiles, laws, orders of convergence and counts.

The denoisers are exact (`oracle`), so every error is the sampler's. A flow in one
dimension keeps the distribution function of each point, F_t(x_t) = F_0(x_0); a reverse
SDE keeps the law. Compiling takes the time here, so programs are shared where they can
be: data, parameters, times, tolerances and stochasticities are arguments of a program,
numbers of steps are not.
"""

import subprocess
import sys

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flows import (
    KEY,
    TIME,
    ddim,
    draws,
    exact,
    exact_quantiles,
    flow,
    grids,
    has_the_law_of_x,
    scales,
    vp_time,
)
from oracle import G1, PROBES, PROCESSES, Mixture1D, as_float32, process

import sdegen
from sdegen.models.denoiser import PosteriorMean
from sdegen.sampling.drive import split_keys
from sdegen.solvers.solve import evaluations, worst_sample_norm

# -- the flow --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIME)
def test_flow_keeps_every_quantile(name):
    path = process(name)
    out = flow(name, solver=dfx.Tsit5(), grid=sdegen.Adaptive(1e-11, 1e-11))
    assert bool(out.ok.all())
    error = abs(G1.cdf(out.x[:, 0], *scales(path, path.t_min)) - PROBES).max()
    print("quantiles kept to", error, "in", out.evaluations, "evaluations")
    assert error < 1e-8


@pytest.mark.parametrize("name", PROCESSES)
def test_flow_in_float32_ends_at_the_exact_quantiles(name):
    path = process(name)
    start, end = exact_quantiles(name, path.t_max), exact_quantiles(name, path.t_min)
    out = sdegen.sample(
        KEY,
        exact(as_float32(path)),
        start.shape,
        solver=dfx.Tsit5(),
        grid=sdegen.FlowTimeGrid(32),
        start=start.astype(jnp.float32),
    )
    assert out.x.dtype == jnp.float32
    error = (abs(out.x - end) / (1 + abs(end))).max()
    print("relative error", error)
    assert error < 1e-4


ORDERS = {"Euler": 1, "Heun": 2, "Bosh3": 3}


@pytest.mark.parametrize(
    "name, solver",
    [("VP", s) for s in ORDERS] + [("EDM", "Heun"), ("RectifiedFlow", "Euler")],
)
def test_solvers_have_their_order_on_every_grid(name, solver):
    end, errors = exact_quantiles(name, process(name).t_min), {}
    for steps in (80, 320):
        for label, ts in grids(name, steps):
            out = flow(name, solver=getattr(dfx, solver)(), grid=ts)
            error = float(jnp.sqrt(jnp.mean((out.x - end) ** 2)))
            errors.setdefault(label, []).append(error)
    for label, (coarse, fine) in errors.items():
        slope = np.log2(coarse / fine) / 2
        print(f"{label}: errors {coarse:.3g}, {fine:.3g}, order {slope:.3f}")
        assert abs(slope - ORDERS[solver]) < 0.2
    if (name, solver) == ("VP", "Euler"):
        # An independent float64 NumPy DDIM gave these two digits (systems.md, A7).
        assert f"{errors['log-SNR'][1]:.1e}" == "5.3e-03"
        assert f"{errors['t'][1]:.1e}" == "4.2e-03"


@pytest.mark.parametrize("points, error", [(18, "0.110"), (36, "0.0518")])
def test_edm_with_euler_has_its_golden_errors(points, error):
    """Karras's grid of N points and a last step to 0, exact D (systems.md, A16 d)."""
    out = flow(
        "EDM", solver=dfx.Euler(), grid=sdegen.KarrasGrid(points - 1), denoise=True
    )
    assert int(out.evaluations) == points
    rms = np.sqrt(np.mean((out.x[:, 0] - G1.quantile(PROBES)) ** 2))
    print("rms error", rms, "golden", error)
    assert f"{rms:.3g}" == f"{float(error):.3g}"


IRREGULAR = np.array([0.98, 0.9, 0.89, 0.7, 0.6, 0.5, 0.45, 0.3, 0.2, 0.19, 0.05, 0.02])


def test_euler_is_ddim_on_any_grid():
    path = process("VP")
    for ts in (
        vp_time(IRREGULAR),
        np.linspace(1, 1e-3, 12),
        np.geomspace(0.9, 2e-3, 12),
    ):
        start = exact_quantiles("VP", ts[0])
        out = flow("VP", solver=dfx.Euler(), grid=jnp.asarray(ts))
        assert abs(out.x - ddim(path, ts, start)).max() < 1e-12


def test_processes_that_meet_the_same_flow_times_give_the_same_samples():
    ends = []
    for name, time in TIME.items():
        path, ts = process(name), time(IRREGULAR)
        total = [sum(scales(path, t)) for t in (ts[0], ts[-1])]
        start = total[0] * jnp.linspace(-2, 2, 7)[:, None]
        out = flow(name, solver=dfx.Euler(), grid=jnp.asarray(ts), start=start)
        ends.append(out.x / total[1])
    assert abs(ends[0] - ends[1]).max() < 1e-10
    assert abs(ends[0] - ends[2]).max() < 1e-10


POINT = Mixture1D([0.5, 0.5], [1.5, 1.5], [0.0, 0.0])
"""Data that are all one point, as a mixture of the size of G1."""


def check_point(name, **options):
    """One point under noise z is alpha 1.5 + sigma z at all times, in any steps."""
    path, z = process(name), jnp.linspace(-2, 2, len(PROBES))[:, None]
    start, end = (
        alpha * 1.5 + sigma * z
        for alpha, sigma in (scales(path, path.t_max), scales(path, path.t_min))
    )
    out = flow(name, data=POINT, start=start, **options)
    # Near the data z = (x - alpha 1.5) / sigma: the later stages magnify rounding.
    tolerance = 1e-10 if isinstance(options["solver"], dfx.Euler) else 1e-7
    assert abs(out.x - (1.5 if options.get("denoise") else end)).max() < tolerance
    return out


@pytest.mark.parametrize("name", TIME)
def test_one_point_comes_back_exactly(name):
    out = check_point(name, solver=dfx.Tsit5(), grid=sdegen.Adaptive(1e-2, 1e-2))
    assert out.evaluations < 100  # the way is straight: the steps grow


@pytest.mark.parametrize("steps", [1, 17])
def test_one_point_comes_back_in_any_number_of_steps(steps):
    # 17 is the program of EDM's golden errors.
    grid = sdegen.KarrasGrid(steps)
    check_point("EDM", solver=dfx.Euler(), grid=grid, denoise=True)
    if steps == 1:
        check_point("EDM", solver=dfx.Euler(), grid=grid)


# -- the reverse SDE -------------------------------------------------------------------

DRAWS = 5000
STEPS = {"Euler": 128, "Heun": 64, "SRA1": 64, "ShARK": 64}
"""Where the bias, measured with 1e5 draws, is under one standard error of DRAWS."""
PAIRS = [
    ("VP", "SRA1"),
    ("VP", "ShARK"),
    ("EDM", "Heun"),
    ("RectifiedFlow", "SRA1"),
    ("RectifiedFlow", "Euler"),
]
"""A program each: processes and solvers meet in alpha and sigma only."""


@pytest.mark.parametrize("name, solver", PAIRS)
def test_reverse_sde_reaches_the_law_of_the_data(name, solver):
    path = process(name)
    start = draws(path, DRAWS)
    for stochasticity in (0.5, 1.0, 2.0) if solver == "SRA1" else (1.0,):
        out = sdegen.sample(
            KEY,
            exact(name),
            start.shape,
            solver=getattr(dfx, solver)(),
            grid=sdegen.LogSNRGrid(STEPS[solver]),
            stochasticity=stochasticity,
            start=start,
        )
        assert bool(out.ok.all())
        note = f"stochasticity {stochasticity}:"
        has_the_law_of_x(out.x, path, path.t_min, note=note)


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_samples_from_noise_have_the_law_of_the_data(stochasticity):
    # alpha = 0 at t_max, so that the noise is the exact terminal law
    path = process("RectifiedFlow")
    out = sdegen.sample(
        KEY,
        exact("RectifiedFlow"),
        (DRAWS, 1),
        grid=sdegen.LogSNRGrid(64),
        stochasticity=stochasticity,
    )
    has_the_law_of_x(out.x, path, path.t_min)


def test_adaptive_sde_reaches_the_law_of_the_data():
    path = process("VP")
    start = draws(path, 600)
    out = sdegen.sample(
        KEY,
        exact("VP"),
        start.shape,
        solver=dfx.ShARK(),
        grid=sdegen.Adaptive(1e-2, 1e-2),
        stochasticity=1.0,
        start=start,
    )
    assert bool(out.ok.all())
    print("evaluations", out.evaluations)
    has_the_law_of_x(out.x, path, path.t_min, bias=2e-2)


def test_noise_makes_samples_of_one_start_independent():
    path = process("VP")
    start = jnp.broadcast_to(draws(path, 1), (DRAWS, 1))
    x = sdegen.sample(
        KEY,
        exact("VP"),
        start.shape,
        solver=dfx.SRA1(),
        grid=sdegen.LogSNRGrid(STEPS["SRA1"]),
        stochasticity=1.0,
        start=start,
    ).x[:, 0]
    halves = np.corrcoef(x[: DRAWS // 2], x[DRAWS // 2 :])[0, 1]
    neighbours = np.corrcoef(x[:-1], x[1:])[0, 1]
    print("correlations", halves, neighbours)
    assert len(np.unique(x)) == DRAWS
    assert abs(halves) < 5 / np.sqrt(DRAWS / 2)
    assert abs(neighbours) < 5 / np.sqrt(DRAWS)


def test_nodes_before_the_floor_of_the_log_snr_change_nothing():
    # A traced zero: no noise, in the clock of the SDE, which begins at log-SNR -13.8.
    def end(stochasticity, ts):
        return sdegen.sample(
            KEY,
            exact("RectifiedFlow"),
            (3, 1),
            grid=jnp.asarray(ts),
            stochasticity=stochasticity,
        ).x

    few, many = (
        jax.jit(end)(0.0, ts)
        for ts in ([1.0, 0.9, 0.4, 0.1], [1.0, 0.9999, 0.9995, 0.9, 0.4, 0.1])
    )
    assert jnp.isfinite(few).all()
    assert abs(few - many).max() < 1e-12


# -- keys, frames ----------------------------------------------------------------------


def grid_of_eight(stochasticity):
    return sdegen.LogSNRGrid(8) if stochasticity else sdegen.FlowTimeGrid(8)


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_a_sample_does_not_depend_on_its_batch(stochasticity):
    few, many = (
        sdegen.sample(
            KEY,
            exact("VP"),
            (n, 3),
            solver=dfx.Euler(),
            grid=grid_of_eight(stochasticity),
            stochasticity=stochasticity,
        ).x
        for n in (5, 64)
    )
    assert abs(few - many[:5]).max() <= 1e-14  # vector and scalar code may round apart
    assert len(np.unique(many)) == many.size


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_a_number_of_steps_means_equal_steps_of_the_clock(stochasticity):
    a, b = (
        sdegen.sample(
            KEY,
            exact("VP"),
            (5, 3),
            solver=dfx.Euler(),
            grid=grid,
            stochasticity=stochasticity,
        ).x
        for grid in (8, grid_of_eight(stochasticity))
    )
    assert (a == b).all()


def test_no_key_of_a_start_is_that_of_a_path():
    keys = jax.random.key_data(split_keys(KEY, 6)).reshape(12, -1)
    assert len(np.unique(keys, axis=0)) == 12


def test_another_key_makes_other_samples():
    a, b = (
        sdegen.sample(
            jax.random.key(k), exact("VP"), (5, 3), solver=dfx.Euler(), grid=8
        ).x
        for k in (0, 1)
    )
    assert abs(a - b).min() > 1e-6


@pytest.mark.parametrize("steps", [40, None], ids=["grid", "adaptive"])
def test_every_frame_of_a_trajectory_keeps_the_quantiles(steps):
    path = process("VP")
    grid = sdegen.FlowTimeGrid(steps) if steps else sdegen.Adaptive(1e-9, 1e-9)
    out = flow("VP", solver=dfx.Tsit5(), grid=grid, trajectory=True)
    times, frames = np.asarray(out.times), out.trajectory
    assert frames.shape == (*times.shape, *out.x.shape)
    assert len(times) == (steps or 32) + 1
    assert abs(times[[0, -1]] - np.array([1.0, 1e-3])).max() < 1e-12
    assert (np.diff(times) < 0).all()
    assert (frames[-1] == out.x).all()
    assert abs(frames[0] - exact_quantiles("VP", path.t_max)).max() < 1e-12
    alpha, sigma = (jax.vmap(f)(times)[:, None, None] for f in (path.alpha, path.sigma))
    error = abs(G1.cdf(frames[..., 0], alpha, sigma) - PROBES).max(axis=1)
    print("worst error of a frame", error.max())
    assert error.max() < 1e-5


def test_every_frame_of_a_stochastic_trajectory_has_its_law():
    path = process("VP")
    start = draws(path, DRAWS)
    out = sdegen.sample(
        KEY,
        exact("VP"),
        start.shape,
        grid=sdegen.LogSNRGrid(64),
        stochasticity=1.0,
        start=start,
        trajectory=True,
    )
    assert (out.trajectory[-1] == out.x).all()
    for frame in (0, 16, 32, 48, 64):
        t = out.times[frame]
        has_the_law_of_x(out.trajectory[frame], path, t, note=f"t = {t:.4f}:")


# -- evaluations, result codes ---------------------------------------------------------


def evaluated(solver, grid, **options):
    """(what the solution says, how often the network ran), on a cheap denoiser."""
    calls = []

    def mean(t, x, cond):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return 0.5 * x

    denoiser = PosteriorMean(mean, process("RectifiedFlow"))
    out = sdegen.sample(KEY, denoiser, (2, 1), solver=solver, grid=grid, **options)
    said = int(out.evaluations)
    jax.effects_barrier()
    assert bool(out.ok.all())
    return said, len(calls)


TEN_STEPS = {
    "Euler": 10,
    "Heun": 20,
    "Midpoint": 20,
    "Bosh3": 31,
    "Tsit5": 61,
    "Dopri5": 61,
    "Dopri8": 131,
    "ReversibleHeun": 11,
}
TEN_NOISY_STEPS = {
    "Euler": 10,
    "Heun": 20,
    "SRA1": 20,
    "ShARK": 20,
    "SEA": 10,
    "EulerHeun": 10,
}


def by_the_formula(solver, steps):
    return int(evaluations(getattr(dfx, solver)(), jnp.asarray(steps)))


def test_ten_steps_have_their_number_of_evaluations():
    # The formula, for all; below what runs, for one solver of each kind.
    for table in (TEN_STEPS, TEN_NOISY_STEPS):
        assert {solver: by_the_formula(solver, 10) for solver in table} == table


@pytest.mark.parametrize("solver", ["Euler", "Heun", "Tsit5", "ReversibleHeun"])
def test_evaluations_are_those_that_ran(solver):
    ran = evaluated(getattr(dfx, solver)(), sdegen.UniformGrid(10))
    assert ran == (TEN_STEPS[solver],) * 2


@pytest.mark.parametrize("solver", ["Heun", "SRA1", "SEA", "EulerHeun"])
def test_evaluations_of_an_sde_are_those_that_ran(solver):
    ran = evaluated(
        getattr(dfx, solver)(), sdegen.UniformGrid(10), stochasticity=1.0, denoise=True
    )
    assert ran == (TEN_NOISY_STEPS[solver] + 1,) * 2


def test_evaluations_of_an_adaptive_solve_are_those_that_ran():
    said, ran = evaluated(dfx.Tsit5(), sdegen.Adaptive(1e-6, 1e-6), denoise=True)
    # every evaluation of the two samples together, and the one that denoises
    assert ran == 2 * (said - 1) + 1 and said % 6 == 2 and said > 5 * 6


def test_evaluations_of_an_unknown_solver_are_not_guessed():
    said, ran = evaluated(dfx.LeapfrogMidpoint(), sdegen.UniformGrid(10), denoise=True)
    assert said == -1 and ran > 10


def test_too_few_steps_are_a_code_and_no_exception():
    out = flow("VP", solver=dfx.Tsit5(), grid=sdegen.Adaptive(1e-9, 1e-9, max_steps=3))
    assert not bool(out.ok.all())
    assert bool((out.result == dfx.RESULTS.max_steps_reached).all())
    assert int(out.evaluations) == 3 * 6 + 1


def test_a_fixed_grid_that_meets_nan_says_so():
    def broken(t, x, cond):
        return jnp.where(t < 0.5, jnp.nan, x)

    denoiser = PosteriorMean(broken, process("RectifiedFlow"))
    out = sdegen.sample(KEY, denoiser, (2, 1), grid=sdegen.UniformGrid(4))
    assert not bool(out.ok.all())


def test_the_tolerance_bounds_the_worst_sample():
    path = process("VP")
    end = exact_quantiles("VP", path.t_min)
    errors = []
    for tolerance in (1e-3, 1e-6):
        grid = sdegen.Adaptive(tolerance, tolerance)
        out = flow("VP", solver=dfx.Tsit5(), grid=grid)
        errors.append(abs(out.x - end).max() / tolerance)
    print("worst error in units of the tolerance", errors)
    assert max(errors) < 30
    one_is_wrong = jnp.zeros((100, 3)).at[7].set(jnp.array([3.0, 4.0, 0.0]))
    norm = worst_sample_norm((0 * one_is_wrong, one_is_wrong))
    assert abs(norm - (25 / 3) ** 0.5) < 1e-12


# -- programs, derivatives -------------------------------------------------------------


class OneList(list):
    """A list that is equal to itself whatever it holds, so that it can be static."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.mark.parametrize("kind", ["grid", "noise", "adaptive"])
def test_no_value_traces_again_but_another_process_does(kind):
    traces = OneList()

    def draw(path=None, seed=0, stochasticity=1.0, ends=(0.9, 0.2), rtol=1e-3):
        path = sdegen.VP() if path is None else path
        options = {
            "grid": {"grid": jnp.linspace(*ends, 4)},
            "noise": {"grid": sdegen.UniformGrid(3), "stochasticity": stochasticity},
            "adaptive": {"grid": sdegen.Adaptive(rtol, rtol)},
        }[kind]
        denoiser = exact(path, traces=traces)
        solver = dfx.Bosh3() if kind == "adaptive" else dfx.Euler()
        key = jax.random.key(seed)
        return sdegen.sample(key, denoiser, (2, 1), solver=solver, **options).x

    before, count = draw(), len(traces)
    assert count > 0
    changed = [draw(sdegen.VP(beta_max=15.0)), draw(seed=1)]
    if kind == "grid":
        changed.append(draw(ends=(0.8, 0.1)))
    if kind == "noise":
        changed += [draw(stochasticity=2.0), draw(stochasticity=jnp.float64(0.5))]
    if kind == "adaptive":
        changed.append(draw(rtol=1e-5))
    assert all(abs(x - before).max() > 1e-9 for x in changed)
    assert len(traces) == count
    if kind == "grid":
        draw(sdegen.Cosine())
        assert len(traces) > count


@pytest.mark.parametrize("noise", [False, True], ids=["flow", "SDE"])
def test_gradients_through_a_fixed_grid_are_those_of_finite_differences(noise):
    weights = jnp.array([[1.0], [-2.0], [0.5]])
    start = jnp.array([[-1.0], [0.2], [1.3]])

    def objective(values):
        beta_max, shift, stochasticity = values
        path = sdegen.VP(beta_max=beta_max)
        out = sdegen.sample(
            KEY,
            exact(path, shift=shift),
            start.shape,
            solver=dfx.Heun(),
            # Its times move with beta, through the inverse of the log-SNR.
            grid=sdegen.LogSNRGrid(4),
            start=start,
            stochasticity=stochasticity if noise else 0.0,
        )
        return jnp.sum(weights * out.x)

    at = jnp.array([15.0, 0.1, 0.7])
    both = jax.jit(jax.value_and_grad(objective))
    gradient = both(at)[1]
    h = jnp.diag(1e-4 * at)
    quotient = jnp.stack([both(at + d)[0] - both(at - d)[0] for d in h])
    quotient = quotient / (2e-4 * at)
    print("gradient", gradient, "difference quotient", quotient)
    parts = 3 if noise else 2
    assert abs(gradient[:parts]).min() > 1e-4
    assert abs(gradient - quotient).max() < 1e-5


def test_vmap_over_a_parameter_is_a_loop_over_it():
    values = jnp.array([10.0, 15.0, 20.0])

    def draw(beta_max):
        path = sdegen.VP(beta_max=beta_max)
        grid = sdegen.LogSNRGrid(3)
        return sdegen.sample(
            KEY, exact(path), (4, 1), solver=dfx.Euler(), grid=grid, stochasticity=1.0
        ).x

    together = jax.jit(jax.vmap(draw))(values)
    apart = jnp.stack(list(map(jax.jit(draw), values)))
    assert abs(together - apart).max() < 1e-12
    assert abs(together[0] - together[1]).max() > 1e-3


# -- other noise, and what is refused --------------------------------------------------


class HeavyTails(sdegen.AbstractPath):
    """A rectified flow whose noise is Student's: a path, not an SDE."""

    t_min: jax.Array = eqx.field(default=1e-3, converter=jnp.asarray)
    t_max: jax.Array = eqx.field(default=1.0, converter=jnp.asarray)
    noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.StudentT)

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return 1.0 * t


def to_a_point(t, x, cond):
    return jnp.full_like(x, 1.5)


def test_the_flow_starts_from_the_law_of_its_base():
    path = HeavyTails()
    denoiser = PosteriorMean(to_a_point, path)
    x = sdegen.sample(KEY, denoiser, (4000, 1), grid=sdegen.UniformGrid(2)).x
    alpha, sigma = scales(path, path.t_min)
    z = np.asarray((x - alpha * 1.5) / sigma)[:, 0]
    ks = scipy.stats.kstest(z, scipy.stats.t(4).cdf)
    print("KS", ks.statistic, "p", ks.pvalue)
    assert ks.pvalue > 1e-6
    assert (
        scipy.stats.kstest(z, "norm").pvalue < 1e-6
    )  # it would have seen a normal law


REFUSED = {
    r"shape \(batch, \.\.\.\) .* at least two axes, got \(5,\)": {"shape": (5,)},
    r"whole numbers .* got \(0, 1\)": {"shape": (0, 1)},
    "Tsit5 is for ODEs": {"solver": dfx.Tsit5(), "stochasticity": 1.0},
    "SRA1 solves SDEs only": {"solver": dfx.SRA1()},
    "error estimate, and Euler has none": {
        "solver": dfx.Euler(),
        "grid": sdegen.Adaptive(),
    },
    "times that fall strictly": {"grid": [0.1, 0.5, 1.0]},
    "at least two times": {"grid": [1.0]},
    r"lie in \[t_min, t_max\] = \[0.001, 1\] of VP, got times from 1.5": {
        "grid": [1.5, 0.5]
    },
    "got times from 1 to 1e-05": {"grid": [1.0, 1e-5]},
    r"such as KarrasGrid\(32\), got the class": {"grid": sdegen.KarrasGrid},
    "stochasticity must be >= 0": {"stochasticity": -1.0},
    r"start must have the shape \(5, 1\), got \(4, 1\)": {"start": [[0.0]] * 4},
    "reverse SDE needs Gaussian noise, and HeavyTails has noise=StudentT": {
        "model": PosteriorMean(to_a_point, HeavyTails()),
        "stochasticity": 1.0,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_are_answered_with_a_sentence(message):
    options = {"model": exact("VP"), "shape": (5, 1)} | {
        k: jnp.asarray(v) if isinstance(v, list) else v
        for k, v in REFUSED[message].items()
    }
    with pytest.raises(ValueError, match=message):
        sdegen.sample(KEY, **options)


def test_mistakes_of_type_are_answered_with_a_sentence_too():
    # In another process, because under pytest beartype speaks before the library does.
    code = """
import diffrax as dfx, jax, sdegen
denoiser = sdegen.PosteriorMean(lambda t, x, cond: 0 * x, sdegen.VP())
for options in (
    {"solver": dfx.Heun},
    {"solver": "heun"},
    {"grid": "karras"},
    {"shape": (5, 1.0)},
    {"shape": 5},
):
    try:
        sdegen.sample(jax.random.key(0), denoiser, **{"shape": (5, 1)} | options)
    except Exception as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = done.stdout.splitlines()
    print(done.stdout, done.stderr)
    assert len(said) == 5
    assert "A class needs its brackets: Heun(), not Heun." in said[0]
    assert "must be a diffrax solver such as diffrax.Heun(), got 'heun'" in said[1]
    assert "such as KarrasGrid(18)" in said[2] and "got 'karras'" in said[2]
    for line in said[3:]:
        assert "sample needs a shape (batch, ...) of whole numbers" in line
    assert all(line.startswith("ValueError") for line in said)
