"""`sdegen.check`: it notices what is wrong and is silent about what is right.

The weak form is held against sums and differences written here from the exact mixture
of `oracle`; the rest against mistakes put in on purpose. A mistake that leaves a
process as it was (a drift of twice 0) is recognised by its numbers and skipped.
"""

import functools
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracle import G1, PROCESSES, as_float32, process

import sdegen
from sdegen.checks import PARTS, Report
from sdegen.checks import command as command_line
from sdegen.checks.fokker_planck import solve
from sdegen.checks.reversal import ks_row
from sdegen.checks.test_data import LINE, data, lopsided
from sdegen.checks.weak_form import STOCHASTICITIES, coefficients, residuals

SAMPLES = 2000
RIGHT = dict(
    alpha=1.0,
    alpha_power=1.0,
    sigma=1.0,
    sigma_power=1.0,
    drift=1.0,
    drift_warp=1.0,
    offset=0.0,
    bend=0.0,
    mix=0.0,
    diffusion=1.0,
    diffusion_power=1.0,
    diffusion_warp=1.0,
    state=0.0,
    swap=0.0,
    turn=0.0,
)
"""The numbers of a `Mutant` that changes nothing."""
ROOT = float(np.sqrt(2))
MUTANTS = {
    "g^2 for g": dict(diffusion_power=2.0),
    "sqrt(g) for g": dict(diffusion_power=0.5),
    "g sqrt(2)": dict(diffusion=ROOT),
    "g / sqrt(2)": dict(diffusion=1 / ROOT),
    "2 g": dict(diffusion=2.0),
    "g / 2": dict(diffusion=0.5),
    "1.01 g": dict(diffusion=1.01),
    "no noise": dict(diffusion=0.0),
    "noise by the state": dict(state=0.3),
    "g of another schedule": dict(diffusion_warp=1.1),
    "2 f": dict(drift=2.0),
    "f / 2": dict(drift=0.5),
    "-f": dict(drift=-1.0),
    "0.99 f": dict(drift=0.99),
    "f of another schedule": dict(drift_warp=1.1),
    "an offset in the drift": dict(offset=0.1),
    "a drift that bends": dict(bend=0.1),
    "a drift that mixes coordinates": dict(mix=0.2),
    "variance for sigma": dict(sigma_power=2.0),
    "sqrt(sigma)": dict(sigma_power=0.5),
    "2 sigma": dict(sigma=2.0),
    "alpha_bar for alpha": dict(alpha_power=2.0),
    "sqrt(alpha)": dict(alpha_power=0.5),
    "alpha and sigma swapped": dict(swap=1.0),
    "time turned round": dict(turn=1.0),
}


class Mutant(sdegen.AbstractPath, sdegen.AbstractSDE):
    """A process with mistakes, as numbers: one program serves all of them."""

    of: sdegen.AbstractLinearSDE
    m: dict
    t_min: jax.Array
    t_max: jax.Array
    noise: sdegen.AbstractNoise

    def scales(self, t):
        m = self.m
        t = jnp.asarray(t)
        t = (1 - m["turn"]) * t + m["turn"] * (self.t_min + self.t_max - t)
        alpha = m["alpha"] * self.of.alpha(t) ** m["alpha_power"]
        sigma = m["sigma"] * self.of.sigma(t) ** m["sigma_power"]
        swap = m["swap"]
        return (1 - swap) * alpha + swap * sigma, (1 - swap) * sigma + swap * alpha

    def alpha(self, t):
        return self.scales(t)[0]

    def sigma(self, t):
        return self.scales(t)[1]

    def warped(self, t, power):
        span = self.t_max - self.t_min
        return self.t_min + span * ((t - self.t_min) / span) ** power

    def drift(self, t, x):
        m = self.m
        mixed = (1 - m["mix"]) * x + m["mix"] * jnp.mean(x)
        f = m["drift"] * self.of.drift(self.warped(t, m["drift_warp"]), mixed)
        return f + m["offset"] + m["bend"] * x**3 / (1 + x**2)

    def diffusion(self, t, x):
        m = self.m
        g = self.of.diffusion(self.warped(t, m["diffusion_warp"]), x)
        g = m["diffusion"] * g ** m["diffusion_power"]
        return g * (1 + m["state"] * jnp.tanh(x))


def mutant(of, **changes):
    """`of` with `changes`, made as it would be without its constructor's look at it."""
    of = process(of) if isinstance(of, str) else of
    numbers = {k: jnp.asarray(float(v), of.t_min.dtype) for k, v in RIGHT.items()}
    right = Mutant(of, numbers, of.t_min, of.t_max, of.noise)
    new = {k: jnp.asarray(float(v), of.t_min.dtype) for k, v in changes.items()}
    return eqx.tree_at(lambda p: p.m, right, right.m | new)


@eqx.filter_jit
def functions(p):
    """All that a process declares, at times inside, off the steps of a chain."""
    ts = p.t_min + (p.t_max - p.t_min) * (jnp.arange(40) + 0.382) / 41
    x = jnp.array([0.7, -1.3])
    at = lambda t: (p.alpha(t), p.sigma(t), p.drift(t, x), p.diffusion(t, x) * x)  # noqa: E731
    return jax.vmap(at)(ts)


def same(one, other):
    pairs = zip(functions(one), functions(other), strict=True)
    return all(np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)


KINDS = ("VP", "EDM", "RectifiedFlow", "DDPM")
"""Where mistakes are put in: the usual, alpha 1, alpha 0 at the end, and a chain.

What is tried there is `check`, which sees functions of time and no classes.
"""


@functools.cache
def full(name):
    return sdegen.check(process(name), samples=SAMPLES)


# --- no false alarm


@pytest.mark.parametrize("name", PROCESSES)
def test_a_right_process_passes_everything(name):
    report = full(name)
    print(report)
    assert report.ok
    assert len(report.rows) >= 15 and all(row.passed for row in report.rows)


@pytest.mark.parametrize("name", ["VP", "RectifiedFlow", "DDPM"])
def test_a_right_process_passes_in_float32(name, float32):
    made = PROCESSES[name]()
    assert made.t_min.dtype == jnp.float32
    report = sdegen.check(made, samples=SAMPLES)
    print(report)
    assert report.ok and report.precision == "float32"


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("VP", dict(beta_min=0.5, beta_max=12.0)),
        ("SubVP", dict(beta_max=30.0, t_min=1e-5)),
        ("VE", dict(sigma_min=0.002, sigma_max=300.0)),
        ("EDM", dict(t_min=1e-3, t_max=500.0)),
        ("FlowMatching", dict(sigma_min=0.05)),
        ("RectifiedFlow", dict(t_min=1e-5, t_max=0.9999)),
        ("Cosine", dict(t_max=0.98)),
        ("LinearSDE", dict(t_max=9.0)),
    ],
)
def test_other_parameters_pass_too(name, numbers):
    report = sdegen.check(PROCESSES[name](**numbers), samples=SAMPLES)
    print(report)
    assert report.ok


def test_a_chain_whose_rates_jump_passes():
    # Steps of 0.1 to 0.9: nothing about this chain is smooth.
    chain = sdegen.DDPM(np.linspace(1e-3, 0.9, 10))
    report = sdegen.check(chain, parts=("finite", "moments", "weak form"))
    print(report)
    assert report.ok


def test_the_unchanged_mutant_passes():
    # Guards the mutation tests: what fails below fails for its mistake.
    for name in KINDS:
        report = sdegen.check(mutant(name), parts=("finite", "moments"))
        assert report.ok, str(report)
        assert same(mutant(name), process(name))


# --- mistakes are caught


@pytest.mark.parametrize("name", KINDS)
def test_every_mistake_is_caught(name):
    right, missed, tried = process(name), [], 0
    for label, changes in MUTANTS.items():
        wrong = mutant(right, **changes)
        if same(wrong, right):
            continue
        tried += 1
        report = sdegen.check(wrong, parts=("finite", "moments"))
        if report.ok:
            missed.append(label)
    print(f"{name}: {tried} mistakes of {len(MUTANTS)} are mistakes here")
    assert not missed
    assert tried >= 14


@pytest.mark.parametrize(
    "label, name",
    [
        ("noise by the state", "diffusion"),
        ("an offset in the drift", "linear drift"),
        ("a drift that bends", "linear drift"),
        ("a drift that mixes coordinates", "linear drift"),
        ("0.99 f", "moments"),
        ("1.01 g", "moments"),
    ],
)
def test_the_row_that_fails_is_the_one_that_the_mistake_is_about(label, name):
    report = sdegen.check(mutant("VP", **MUTANTS[label]), parts=PARTS[:2])
    assert name in {row.name for row in report.failed}
    linear = {"linear drift", "diffusion"} & {row.name for row in report.failed}
    assert linear == ({name} & {"linear drift", "diffusion"})
    if linear:
        assert f"first repair the {name.split()[-1]}." in report.advice[0]


@pytest.mark.parametrize("label", MUTANTS)
def test_each_part_alone_catches_mistakes(label):
    # What the weak form sees without the moment equations; the samples see less.
    wrong = mutant("VP", **MUTANTS[label])
    report = sdegen.check(wrong, parts=("weak form",), samples=SAMPLES)
    generator, samples = report.rows[:3], report.rows[3:6]
    if label == "a drift that mixes coordinates":  # nothing to mix on the line
        assert all(row.passed for row in generator)
        assert not all(row.passed for row in samples)
        return
    assert not any(row.passed for row in generator), str(report)
    if not label.startswith(("1.01", "0.99")):
        assert not all(row.passed for row in samples), str(report)


@pytest.mark.parametrize(
    "label", ["g^2 for g", "2 g", "g / sqrt(2)", "-f", "variance for sigma", "no noise"]
)
def test_the_reversal_alone_catches_mistakes(label):
    wrong = mutant("VP", **MUTANTS[label])
    report = sdegen.check(wrong, parts=("reversal",), samples=SAMPLES)
    print(report)
    assert not report.ok
    assert {row.part for row in report.rows} == {"reversal"}


def test_the_reversal_catches_a_library_without_the_divergence_term(monkeypatch):
    # Functions of its own, so that no other test meets the programs of the broken
    # library.
    zero = lambda sde, t, x: jnp.zeros_like(x)  # noqa: E731
    monkeypatch.setattr(sys.modules["sdegen.processes.reverse"], "_divergence", zero)
    report = sdegen.check(_sine(), parts=("reversal",), samples=SAMPLES)
    print(report)
    assert [row.name for row in report.failed] == ["flow", "reverse SDE"]


def test_draws_of_another_law_are_not_accepted():
    even = (np.arange(2000) + 0.5) / 2000
    assert ks_row("part", "name", "what", even).passed
    assert ks_row("part", "name", "what", even**2).passed is False


def test_a_constructor_refuses_what_runs_backwards():
    class Swapped(sdegen.RectifiedFlow):
        def alpha(self, t):
            return 1.0 * t

        def sigma(self, t):
            return 1.001 - t

    with pytest.raises(ValueError, match="falls as t rises"):
        Swapped()


def test_a_derivative_that_does_not_belong_to_its_function_is_caught():
    @jax.custom_jvp
    def decay(t):
        return jnp.exp(-2 * t)

    @decay.defjvp
    def _(primals, tangents):
        return decay(primals[0]), -3 * decay(primals[0]) * tangents[0]

    class Deceiving(sdegen.RectifiedFlow):
        def alpha(self, t):
            return decay(jnp.asarray(t))

    report = sdegen.check(Deceiving(), parts=("moments",))
    assert [row.name for row in report.failed] == ["integrals"]
    assert "derivative" in report.advice[0]


def test_too_little_noise_is_caught():
    report = sdegen.check(sdegen.VP(beta_max=4.0), parts=("terminal",))
    signal = np.exp(-2.05 / 2) / np.sqrt(1 - np.exp(-2.05))
    np.testing.assert_allclose(report.rows[0].residual, signal, rtol=1e-6)
    assert not report.ok and "raise t_max" in report.rows[0].remark


class Crash(sdegen.VP):
    def drift(self, t, x):
        return x @ jnp.ones((5, 5))


def test_what_is_not_finite_or_crashes_is_a_finding_and_no_error():
    report = sdegen.check(mutant("VP", offset=np.nan), samples=SAMPLES)
    assert "drift = nan" in report.failed[0].remark and not report.ok
    named = [row.passed for row in report.rows if row.name in ("flow", "reverse SDE")]
    assert named == [False, False]
    report = sdegen.check(Crash())
    assert [row.name for row in report.failed] == ["shapes"]
    assert "drift of a sample of shape (1,)" in report.failed[0].remark


# --- what would repair it

FACTORS = {
    "g^2 for g": "diffusion -> diffusion^(1/2): you returned g^2 for g",
    "sqrt(g) for g": "diffusion -> diffusion^2",
    "g sqrt(2)": "diffusion x 1/sqrt(2)",
    "g / sqrt(2)": "diffusion x sqrt(2)",
    "2 g": "diffusion x 1/2",
    "g / 2": "diffusion x 2",
    "2 f": "drift x 1/2",
    "f / 2": "drift x 2",
    "-f": "drift x -1",
    "variance for sigma": "sigma -> sigma^(1/2): a variance for a standard deviation",
    "sqrt(sigma)": "sigma -> sigma^2",
    "alpha_bar for alpha": "alpha -> alpha^(1/2)",
    "sqrt(alpha)": "alpha -> alpha^2",
}


@pytest.mark.parametrize("name", KINDS)
def test_the_hint_names_the_factor(name):
    right = process(name)
    for label, hint in FACTORS.items():
        wrong = mutant(right, **MUTANTS[label])
        if same(wrong, right):
            continue
        advice = sdegen.check(wrong, parts=("moments",)).advice
        assert any(line.strip().startswith(hint) for line in advice), (label, advice)


def test_without_a_factor_the_needed_schedules_are_shown():
    wrong = mutant("VP", diffusion_warp=1.1)
    report = sdegen.check(wrong, parts=("moments",))
    assert "No single factor" in report.advice[0]
    row = report.advice[1].splitlines()[-2].split()
    t, f, f_declared, g, g_declared = map(float, row)
    np.testing.assert_allclose(f, -0.5 * (0.1 + 19.9 * t), rtol=1e-3)
    np.testing.assert_allclose(f_declared, f, rtol=1e-3)
    np.testing.assert_allclose(g, np.sqrt(0.1 + 19.9 * t), rtol=1e-3)
    assert abs(g_declared / g - 1) > 5e-3


# --- the method of test functions, by sums written here

GRID = np.linspace(-9, 9, 60001)
PHI = {
    "x": (lambda x: x, lambda x: 1 + 0 * x, lambda x: 0 * x),
    "x^2": (lambda x: x**2, lambda x: 2 * x, lambda x: 2 + 0 * x),
    "sin 2x": (
        lambda x: np.sin(2 * x),
        lambda x: 2 * np.cos(2 * x),
        lambda x: -4 * np.sin(2 * x),
    ),
    "exp(-x^2)": (
        lambda x: np.exp(-(x**2)),
        lambda x: -2 * x * np.exp(-(x**2)),
        lambda x: (4 * x**2 - 2) * np.exp(-(x**2)),
    ),
}
"""phi and its two derivatives."""


@eqx.filter_jit
def residual(path, t):
    t, xs = jnp.asarray(t), jnp.asarray(GRID)
    scales, sde = (path.alpha(t), path.sigma(t)), coefficients(path, t, xs)
    return residuals(data(), scales, path.rates(t), sde, xs, 1.0).value


def by_hand(t, m, phi, factor):
    """d/dt E phi by a difference of fourth order, minus E L phi; VP, g times factor."""
    value, slope, bend = (v(GRID) for v in PHI[phi])

    def scales(t):
        B = 0.1 * t + 9.95 * t**2
        return np.exp(-B / 2), np.sqrt(1 - np.exp(-B))

    def mean(t):
        p = np.asarray(G1.pdf(jnp.asarray(GRID), *scales(t)))
        return np.sum(p * value) * (GRID[1] - GRID[0])

    h = 1e-3 * t
    change = (mean(t - 2 * h) - 8 * mean(t - h) + 8 * mean(t + h) - mean(t + 2 * h)) / (
        12 * h
    )
    p = np.asarray(G1.pdf(jnp.asarray(GRID), *scales(t)))
    s = np.asarray(G1.score(jnp.asarray(GRID), *scales(t)))
    beta = 0.1 + 19.9 * t
    D = beta * factor**2
    b = -0.5 * beta * GRID - 0.5 * (1 - m**2) * D * s
    return change - np.sum(p * (b * slope + 0.5 * m**2 * D * bend)) * (
        GRID[1] - GRID[0]
    )


@pytest.mark.parametrize("t", [0.05, 0.3, 0.7])
def test_the_weak_form_vanishes_for_all_three_generators(t):
    found = np.abs(np.asarray(residual(process("VP"), t)))
    print(f"t = {t}: at most {found.max():.1e}")
    assert found.shape == (3, 4) and list(LINE) == list(PHI)
    assert found.max() < 1e-9


@pytest.mark.parametrize("t", [0.05, 0.3, 0.7])
def test_the_weak_form_sees_a_missing_half_in_all_functions_but_x(t):
    found = np.asarray(residual(mutant("VP", diffusion=ROOT), t))
    forward = np.abs(found[0])
    print(f"t = {t}:", forward)
    assert forward[0] < 1e-9  # x is blind
    assert (forward[1:] > 0.158).all() and (forward[1:] < 14.05).all()
    for i, m in enumerate(STOCHASTICITIES.values()):
        for j, phi in enumerate(PHI):
            exact = by_hand(t, m, phi, ROOT)
            np.testing.assert_allclose(found[i, j], exact, rtol=1e-6, atol=1e-7)


def test_the_law_of_the_data_is_the_mixture_of_the_oracle():
    law, x = data(), jnp.linspace(-4, 4, 41)

    @jax.jit
    def here(alpha, sigma):
        at = lambda x: (law.log_prob(x, alpha, sigma), law.score(x, alpha, sigma)[0])  # noqa: E731
        return jax.vmap(at)(x[:, None])

    for alpha, sigma in [(1.0, 0.0), (0.4, 0.9)]:
        log_prob, score = here(alpha, sigma)
        np.testing.assert_allclose(
            jnp.exp(log_prob), G1.pdf(x, alpha, sigma), rtol=1e-10
        )
        np.testing.assert_allclose(score, G1.score(x, alpha, sigma), rtol=1e-10)
        q = jnp.array([0.05, 0.5, 0.9])
        np.testing.assert_allclose(
            law.quantile(q, alpha, sigma), G1.quantile(q, alpha, sigma), rtol=1e-9
        )


def test_the_score_in_more_dimensions_is_the_gradient_of_the_density():
    law, x = data(), jnp.array([[0.3, -0.2, 1.1], [0.4, 0.0, -0.9]])
    slope = jax.jit(jax.grad(lambda x: law.log_prob(x, 0.6, 0.5)))(x)
    np.testing.assert_allclose(law.score(x, 0.6, 0.5), slope, rtol=1e-9, atol=1e-12)
    draws = np.asarray(law.sample(jax.random.key(0), 20_000, (2, 3)))
    error = (draws.mean(0) - 0.25 * lopsided((2, 3))) / (draws.std(0) / np.sqrt(20_000))
    assert np.abs(error).max() < 4.5


# --- an SDE without a path


class Ornstein(sdegen.AbstractSDE):
    """dx = -x dt + sqrt(2) dw, without alpha and sigma."""

    t_min: jax.Array = sdegen.number(0.0)
    t_max: jax.Array = sdegen.number(4.0)
    noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.Gaussian)

    def drift(self, t, x):
        return -x

    def diffusion(self, t, x):
        return jnp.sqrt(2.0)


def test_the_grid_law_is_the_exact_one_of_ornstein_and_uhlenbeck():
    law = data().standardised()
    ts = np.linspace(0.0, 2.0, 201)
    grid = solve(Ornstein(), law, ts, reach=8.0)
    for i in (20, 100, 200):
        alpha, sigma = np.exp(-ts[i]), np.sqrt(1 - np.exp(-2 * ts[i]))
        exact = np.asarray(law.cdf(grid.edges, alpha, sigma))
        np.testing.assert_allclose(grid.cdfs[i], exact, atol=1e-4)
        x = jnp.linspace(-2.5, 2.5, 21)
        score = jax.vmap(lambda x, t=ts[i]: grid(jnp.asarray(t), x[None])[0])(x)
        one = lambda x, a=alpha, s=sigma: law.score(x[None], a, s)[0]  # noqa: E731
        np.testing.assert_allclose(score, jax.vmap(one)(x), atol=5e-3)
    np.testing.assert_allclose(np.asarray(grid.cdfs)[:, -1], 1, atol=1e-12)


def test_the_grid_law_of_the_nonlinear_default_settles_at_the_normal_law():
    # The stationary law of the default is N(0, 1): Fokker-Planck with its own drift.
    law = data().standardised()
    grid = solve(sdegen.CustomSDE(), law, np.linspace(0.0, 20.0, 301), reach=8.0)
    exact = scipy.stats.norm.cdf(np.asarray(grid.edges))
    np.testing.assert_allclose(grid.cdfs[-1], exact, atol=2e-5)


def test_the_nonlinear_sde_without_mistakes_reaches_its_base():
    # Guards the test below.
    assert sdegen.check(_sine(), parts=("terminal",), samples=SAMPLES).ok


def test_a_right_sde_without_a_path_passes():
    report = sdegen.check(sdegen.CustomSDE(), samples=SAMPLES)
    print(report)
    assert report.ok
    assert [row.name for row in report.rows if row.passed is None] == ["moments"]


def test_a_right_sde_without_a_path_passes_in_float32(float32):
    report = sdegen.check(sdegen.CustomSDE(), samples=SAMPLES)
    assert report.ok and report.precision == "float32"


def _sine(stratonovich=False, half=0.5, power=0.5):
    """CustomSDE's default, written again, with what may go wrong with it."""

    def drift(t, x, p):
        g2, slope = 1 + jnp.sin(x) ** 2, jnp.sin(x) * jnp.cos(x)
        return -half * g2 * x + (0.5 if stratonovich else 1.0) * slope

    def diffusion(t, x, p):
        return (1 + jnp.sin(x) ** 2) ** power

    return sdegen.CustomSDE(drift, diffusion)


@pytest.mark.parametrize(
    "mistake",
    [
        dict(stratonovich=True),
        dict(half=1.0),
        dict(power=1.0),
    ],
    ids=["a Stratonovich drift", "a missing half", "g^2 for g"],
)
def test_a_wrong_nonlinear_sde_misses_its_base(mistake):
    sde = _sine(**mistake)
    report = sdegen.check(sde, parts=("terminal",), samples=SAMPLES)
    print(report)
    assert not report.ok and "by the noise" in report.failed[0].remark


class Coupled(sdegen.AbstractSDE):
    """An SDE of two coordinates that act on each other: no law on the line."""

    spring: jax.Array = sdegen.number(1.0)
    t_min: jax.Array = sdegen.number(0.0)
    t_max: jax.Array = sdegen.number(6.0)
    noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.Gaussian)

    def drift(self, t, x):
        turn = jnp.array([[-1.0, 0.5], [-0.5, -1.0]])
        return self.spring * (turn @ x)

    def diffusion(self, t, x):
        return jnp.sqrt(2.0)


def test_an_sde_of_more_coordinates_is_checked_by_simulation():
    report = sdegen.check(Coupled())
    assert not report.ok and "give the shape" in report.failed[0].remark
    report = sdegen.check(Coupled(), shape=(2,), samples=SAMPLES)
    print(report)
    assert report.ok
    why = {row.name: row.remark for row in report.rows if row.passed is None}
    assert set(why) == {"moments", "Fokker-Planck", "flow", "reverse SDE"}
    assert "p_t is unknown" in why["flow"]
    report = sdegen.check(Coupled(spring=1.5), shape=(2,), samples=SAMPLES)
    assert [row.name for row in report.failed] == ["noise end"]


# --- a path that is no SDE


class Straight(sdegen.AbstractPath):
    t_min: jax.Array = sdegen.number(1e-3)
    t_max: jax.Array = sdegen.number(1.0)
    noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.Gaussian)

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return 1.0 * t


def test_a_path_alone_is_checked_as_the_sde_that_it_implies():
    report = sdegen.check(Straight(), samples=SAMPLES)
    print(report)
    assert report.ok
    assert [row.name for row in report.rows if row.passed is None] == ["moments"]
    assert {"flow", "continuity", "reverse SDE"} <= {row.name for row in report.rows}


def test_a_path_with_other_noise_says_what_is_skipped():
    report = sdegen.check(Straight(noise=sdegen.StudentT()))
    print(report)
    assert report.ok
    passed = {row.part for row in report.rows if row.passed}
    assert passed == {"finite", "reversal", "terminal"}
    skipped = [row for row in report.rows if row.passed is None]
    assert len(skipped) == 3 and all("StudentT" in row.remark for row in skipped)


# --- the report and the command line


def test_the_table_fits_a_terminal():
    wrong = sdegen.check(mutant("VP", diffusion=2.0), samples=SAMPLES)
    for report in (full("FlowMatching"), wrong):
        text = str(report)
        print(text)
        assert max(map(len, text.splitlines())) <= 100
        assert text.count("FAIL") >= len(report.failed)
    assert isinstance(report, Report) and not report.ok


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(ValueError, match="call the class"):
        sdegen.check(sdegen.VP)
    with pytest.raises(ValueError, match="an object of type str"):
        sdegen.check("VP")
    with pytest.raises(ValueError, match="has the parts"):
        sdegen.check(sdegen.VP(), parts=("moment",))
    with pytest.raises(ValueError, match="shape"):
        sdegen.check(sdegen.VP(), shape=())
    with pytest.raises(ValueError, match="at least 100"):
        sdegen.check(sdegen.VP(), samples=3)


def test_the_precision_is_that_of_the_numbers_and_the_mode_is_left_alone():
    assert full("VP").precision == "float64"
    report = sdegen.check(as_float32(process("VP")), parts=PARTS[:2])
    assert report.ok and report.precision == "float32"
    assert jax.config.jax_enable_x64


USER_FILE = """
import jax.numpy as jnp
import sdegen


class Right(sdegen.VP):
    pass


class Wrong(sdegen.VP):
    def diffusion(self, t, x):
        return self.beta_min + t * (self.beta_max - self.beta_min)


class Needy(sdegen.VP):
    def __init__(self, beta):
        self.beta_min = beta


def make():
    return Right(beta_max=15.0)


def fails():
    return sdegen.VP(t_min=2.0)
"""


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    (tmp_path / "user_process.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "check", quick)
    yield "user_process.py"
    sys.modules.pop("user_process", None)


def quick(process, **options):
    return sdegen.check(process, parts=PARTS[:2], **options)


@pytest.mark.parametrize(
    "name, status, said",
    [
        ("user_process.py:Right", 0, "all 6 checks passed"),
        ("user_process:Right", 0, "all 6 checks passed"),
        ("user_process.py:make", 0, "all 6 checks passed"),
        ("user_process.py:Wrong", 1, "you returned g^2 for g"),
        ("user_process.py:Rigth", 2, "Did you mean user_process.py:Right?"),
        ("user_proces.py:Right", 2, "Did you mean user_process.py?"),
        ("user_proces:Right", 2, "Did you mean user_process?"),
        ("user_process.py:Needy", 2, "needs arguments (beta)"),
        ("user_process.py:fails", 2, "needs 0 <= t_min < t_max"),
        ("user_process.py:jnp", 2, "expected a process"),
        ("sdegen:AbstractSDE", 2, "is abstract"),
        ("sdegen:Gaussian", 2, "derives neither"),
        ("sdegen", 2, "expected module:Name"),
    ],
)
def test_the_command_line(user_file, capsys, name, status, said):
    assert command_line.main([name]) == status
    out, err = capsys.readouterr()
    print(out, err)
    assert said in (err if status == 2 else out)
    if status == 2:
        assert err.startswith("error: ") and err.count("\n") == 1


def test_one_failure_of_many_is_a_failure(user_file, capsys):
    names = ["user_process.py:Wrong", "sdegen:VP"]
    assert command_line.main([*names, "--shape", "3", "--seed", "1"]) == 1
    out = capsys.readouterr().out
    assert "Wrong: " in out and "VP: all" in out


def test_python_m_runs_without_a_warning_beside_the_function():
    env = os.environ | {"XLA_FLAGS": "", "PYTHONWARNINGS": "error::RuntimeWarning"}
    line = [sys.executable, "-m", "sdegen.checks", "sdegen:Nothing"]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: sdegen has no name Nothing.")
    assert callable(sdegen.check) and sys.modules["sdegen.checks"].check is sdegen.check
