"""Linear SDEs of a state with momentum: critically damped Langevin and its kin.

The oracles: published numbers, matrix exponentials of scipy (Van Loan's block for the
covariance), brute-force integrals over x0, and Gaussian mixtures through the statistic,
which is all that the law of x0 depends on.
"""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
from oracle import G1, PROBES, Mixture1D, as_float32

import sdegen
from sdegen.checks import PARTS
from sdegen.models.augmented import StateScore
from sdegen.models.denoiser import PosteriorMean
from sdegen.processes.momentum import lower, transition, transition_nodes
from sdegen.solvers import SSCS, BackwardTerm
from sdegen.typing import Scalar, number

KEY = jax.random.key(0)
normal = lambda shape: np.random.default_rng(0).normal(size=shape)  # noqa: E731


def matrix(t, p):
    return (p["beta"] + p["slope"] * t) / (1 - p["pole"] * t) * p["f"]


def noise(t, p):
    return jnp.sqrt(p["beta"] + p["slope"] * t) * p["g"]


def options(f, g, beta=4.0, slope=0.0, pole=0.0, **others):
    """What makes a BlockSDE of these matrices; one program for all of one size."""
    numbers = dict(f=np.array(f, float), g=np.array(g, float))
    params = numbers | dict(beta=beta, slope=slope, pole=pole)
    return dict(F=matrix, G=noise, params=params) | others


LANGEVIN = [[0, 4], [-1, -4]]
KIN = {
    "CLD": options(LANGEVIN, [0, 2**0.5], slope=2.0, auxiliary=0.01),
    # noise in position and velocity
    "PSLD": options([[-0.5, 4], [-1, -4.5]], [1, 1.5], auxiliary=0.01),
    # noise that reaches the data through two integrations
    "HOLD": options(
        [[0, 1, 0], [-1, 0, 8**0.5], [0, -(8**0.5), -(27**0.5)]],
        [0, 0, 108**0.25],
        beta=6.0,
        auxiliary=0.04,
    ),
}


@functools.cache
def made(name):
    """A process by two functions, or CLD itself, in float64."""
    with jax.enable_x64(True):
        if name == "closed":
            return sdegen.CLD()
        return sdegen.BlockSDE(**KIN[name])


@eqx.filter_jit
def _at(process, t):
    moments = dict(zip(("a", "factor"), process.moments(t), strict=True))
    sde = dict(f=process.matrix(t), g=process.noise_scale(t))
    return moments | sde | dict(alpha=process.alpha(t), sigma=process.sigma(t))


def at(process, t):
    """What a process says of the time t, in NumPy: a, factor, f, g, alpha, sigma."""
    return jax.tree.map(np.asarray, _at(process, jnp.asarray(t)))


def cdf(x, alpha, sigma):
    """The distribution function of G1 on a path, in NumPy."""
    spread = np.sqrt((alpha * G1.s) ** 2 + sigma**2)
    each = scipy.stats.norm.cdf(np.asarray(x)[..., None], alpha * G1.mu, spread)
    return each @ G1.w


def quantiles(alpha, sigma):
    """Where the probes of G1 are on a path, (7, 1)."""
    miss = lambda x, q: cdf(x, alpha, sigma) - q  # noqa: E731
    found = [scipy.optimize.brentq(miss, -9, 9, (q,), xtol=1e-14) for q in PROBES]
    return np.array(found)[:, None]


@eqx.filter_jit
def table(process, ts):
    """a, L, log-SNR and its derivative at the times `ts`."""

    def at(t):
        slope = jax.jvp(process.logsnr, (t,), (jnp.ones_like(t),))
        return (*process.moments(t), *slope)

    return jax.vmap(at)(ts)


def exact_moments(f, g, first, t):
    """a and S of constant matrices: Van Loan 1978 for t / 2^12, then doubled."""
    k, h = len(g), t / 2**12
    block = np.block([[-f, np.diag(g**2)], [np.zeros((k, k)), f.T]]) * h
    x = scipy.linalg.expm(block)
    move = x[k:, k:].T
    cov = move @ x[:k, k:]
    for _ in range(12):
        cov, move = cov + move @ cov @ move.T, move @ move
    return move[:, 0], cov + move @ first @ move.T


# -- the law ---------------------------------------------------------------------------


def test_cld_has_the_golden_covariance_and_keeps_its_stationary_law():
    cld = made("closed")
    factor = at(cld, 0.1)["factor"]
    cov = factor @ factor.T
    golden = [0.2218100610, 0.1298598404, 0.2157583505]
    np.testing.assert_allclose([cov[0, 0], cov[0, 1], cov[1, 1]], golden, atol=6e-11)
    law, now, end = np.diag([1.0, 0.25]), at(cld, 0.3), at(cld, 1.0)
    f, g = now["f"], now["g"]
    np.testing.assert_allclose(f @ law + law @ f.T, -np.diag(g**2), atol=1e-12)
    assert np.abs(end["a"]).max() < 1e-2  # the data are forgotten
    factor = end["factor"]
    np.testing.assert_allclose(factor @ factor.T, law, atol=3e-5)


def test_closed_form_is_the_moment_equations_is_the_matrix_exponential():
    ts = np.geomspace(1e-3, 1, 60).clip(1e-3, 1)
    slow = sdegen.CLD(beta=4.0, slope=2.0)
    closed, solved = (
        [np.asarray(v) for v in table(p, jnp.asarray(ts))] for p in (slow, made("CLD"))
    )
    for i, t in enumerate(ts):
        first = np.diag([0.0, 0.01])
        f, g = np.array(LANGEVIN, float), np.array([0, 2**0.5])
        a, cov = exact_moments(f, g, first, 4 * t + t * t)  # in the time int beta
        np.testing.assert_allclose(closed[0][i], a, atol=1e-13)
        scale = np.sqrt(np.diag(cov))
        gap = (closed[1][i] @ closed[1][i].T - cov) / scale / scale[:, None]
        assert np.abs(gap).max() < 1e-10
    # in units of the noise, the hardest: L^-1 of the one with the other
    white = np.linalg.solve(closed[1], solved[1]) - np.eye(2)
    assert np.abs(white).max() < 1e-9
    shift = np.linalg.solve(closed[1], (solved[0] - closed[0])[..., None])[..., 0]
    assert (np.abs(shift).max(1) < 1e-9 * np.exp(closed[2] / 2).clip(1)).all()
    np.testing.assert_allclose(closed[2], solved[2], atol=5e-9)
    np.testing.assert_allclose(closed[3], solved[3], rtol=5e-9)
    # (5) against a difference of the log-SNR itself
    up, down = (
        np.asarray(table(slow, jnp.asarray(ts * (1 + s)))[2])[5:55]
        for s in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(
        (up - down) / (2e-5 * ts[5:55]), closed[3][5:55], rtol=1e-6
    )


@pytest.mark.parametrize("name", ["PSLD", "HOLD"])
def test_two_functions_are_enough_for_noise_anywhere_and_any_order(name):
    p, auxiliary = KIN[name]["params"], KIN[name]["auxiliary"]
    ts = np.geomspace(1e-3, 1, 60).clip(1e-3, 1)
    found = table(made(name), jnp.asarray(ts))
    a, factor, logsnr, _ = (np.asarray(v) for v in found)
    f, g = p["beta"] * p["f"], np.sqrt(p["beta"]) * p["g"]
    first = np.diag([0.0] + [auxiliary] * (len(g) - 1))
    for i in range(8, 60, 3):  # before, Van Loan's own rounding is the larger
        wanted, cov = exact_moments(f, g, first, float(ts[i]))
        root = np.linalg.cholesky(cov)
        assert np.abs(np.linalg.solve(root, factor[i]) - np.eye(len(g))).max() < 1e-7
        snr = np.sum(np.linalg.solve(root, wanted) ** 2)
        assert abs(float(logsnr[i]) - np.log(snr)) < 1e-6
    white, mean = two_steps(jnp.asarray(f), jnp.asarray(g), first, a[0], factor[0])
    assert float(white) < 1e-9 and float(mean) < 1e-10


@eqx.filter_jit
def two_steps(f, g, first, a, factor):
    """What two exact steps to t_min, of which none forms a covariance, differ by."""
    half, n = 5e-4, len(transition_nodes(f.dtype))
    over = lambda v: jnp.broadcast_to(v, (n, *v.shape))  # noqa: E731
    move, rows = transition(half * over(f), jnp.sqrt(half) * over(g))
    noise = lower(jnp.concatenate([jnp.sqrt(first) @ move.T, rows]))
    noise = lower(jnp.concatenate([(move @ noise).T, rows]))
    white = jnp.linalg.solve(factor, noise) - jnp.eye(len(g))
    return jnp.abs(white).max(), jnp.abs(a - move @ move[:, 0]).max()


@pytest.mark.parametrize("name, bound", [("closed", 1e-5), ("CLD", 3e-5)])
def test_float32_is_precise_from_very_small_times(name, bound, float32):
    if name == "closed":
        single = sdegen.CLD(slope=2.0, t_min=1e-5)
    else:
        single = sdegen.BlockSDE(**KIN["CLD"], t_min=1e-5)
    ts = np.geomspace(1e-5, 1, 60).astype(np.float32).clip(1e-5, 1)
    found = table(single, jnp.asarray(ts))
    assert {v.dtype.name for v in found} == {"float32"}
    with jax.enable_x64(True):
        exact = sdegen.CLD(slope=2.0, t_min=1e-5)
        exact = table(exact, jnp.asarray(ts, jnp.float64))
    found, exact = ([np.asarray(v, float) for v in w] for w in (found, exact))
    white = np.linalg.solve(exact[1], found[1]) - np.eye(2)
    print(np.abs(white).max(), np.abs(found[2] - exact[2]).max())
    assert np.abs(white).max() < bound
    assert np.abs(found[2] - exact[2]).max() < bound
    np.testing.assert_allclose(found[3], exact[3], rtol=bound)


def test_a_gradient_goes_through_the_construction():
    def fact(process):
        path = process.alpha(0.3) + 2 * process.sigma(0.1)
        return path + process.moments(0.2)[1][1, 0]

    def mine(beta):
        p = KIN["CLD"]["params"] | dict(beta=beta)
        return fact(sdegen.BlockSDE(matrix, noise, p, auxiliary=0.01))

    def exact(beta):
        cld = sdegen.CLD(beta=beta, slope=2.0)
        path = at(cld, 0.3)["alpha"] + 2 * at(cld, 0.1)["sigma"]
        return path + at(cld, 0.2)["factor"][1, 0]

    h = 1e-4
    slope = (exact(4.0 + h) - exact(4.0 - h)) / (2 * h)
    found = jax.jit(jax.value_and_grad(mine))(4.0)
    np.testing.assert_allclose(found, (exact(4.0), slope), rtol=1e-6)
    assert abs(slope) > 1e-2


# -- the statistic ---------------------------------------------------------------------


@eqx.filter_jit
def posterior(process, t, us):
    """Exact E[x0 given the statistic], the score by it, and the statistic's weights."""

    def at(u):
        y = process.statistic(t, u)
        x0 = G1.denoise(y, process.alpha(t), process.sigma(t))
        return x0, process.score(t, u, x0)

    return jax.vmap(at)(us)


@pytest.mark.parametrize("name", ["closed", "HOLD"])
def test_the_statistic_is_all_that_the_state_says_of_the_data(name):
    process, now = made(name), at(made(name), 0.15)
    a, factor = now["a"], now["factor"]
    us = normal((12, len(a), 1)) * 0.7
    found = posterior(process, jnp.asarray(0.15), jnp.asarray(us))
    x0, score = (np.asarray(v) for v in found)
    cov, grid = factor @ factor.T, np.linspace(-8, 8, 40001)
    prior = scipy.stats.norm.pdf(grid[:, None], G1.mu, G1.s) @ G1.w

    def log_density(u):  # of the state, by the integral over x0
        gap = u[None] - np.outer(grid, a)
        log = -0.5 * np.einsum("ni,ij,nj->n", gap, np.linalg.inv(cov), gap)
        p = prior * np.exp(log - log.max())
        return np.log(p.sum()) + log.max(), (p * grid).sum() / p.sum()

    for u, mean, slope in zip(us[..., 0], x0[:, 0], score[..., 0], strict=True):
        assert abs(log_density(u)[1] - float(mean)) < 1e-9
        for i in range(len(u)):
            h = np.eye(len(u))[i] * 1e-4
            wanted = (log_density(u + h)[0] - log_density(u - h)[0]) / 2e-4
            assert abs(wanted - float(slope[i])) < 1e-5 * (1 + abs(wanted))


def test_the_score_of_the_velocity_is_that_of_hybrid_score_matching():
    # With x0 known the target is -ell eps_v, where u = a x0 + (the factor with v last)
    # (eps_x, eps_v): Dockhorn et al. 2022, eq. 7 and 8.
    cld, t, x0 = made("closed"), jnp.asarray(0.2), jnp.array([0.7, -0.3])
    now, eps = at(cld, t), normal((2, 2))
    factor = now["factor"]
    u = jnp.asarray(now["a"][:, None] * x0 + factor @ eps)
    cov = factor @ factor.T
    ell = np.sqrt(cov[0, 0] / (cov[0, 0] * cov[1, 1] - cov[0, 1] ** 2))
    score = eqx.filter_jit(lambda process, *args: process.score(*args))(cld, t, u, x0)
    np.testing.assert_allclose(score[1], -ell * eps[1], rtol=1e-10)


@eqx.filter_jit
def states(process, t, x0, keys):
    u = jax.vmap(lambda k: process.corrupt(k, t, x0))(keys)
    return u, jax.vmap(lambda u: process.statistic(t, u))(u)


def test_draws_of_the_state_have_its_law_and_the_statistic_that_of_the_path():
    for name in ("closed", "HOLD"):
        process, t, n, x0 = made(name), 0.05, 20_000, np.array([0.8])
        keys = jax.random.split(KEY, n)
        found = states(process, jnp.asarray(t), jnp.asarray(x0), keys)
        (u, y), now = (np.asarray(v) for v in found), at(process, t)
        mean, sd = now["alpha"] * x0[0], now["sigma"]
        assert scipy.stats.kstest(y[:, 0], "norm", (mean, sd)).pvalue > 1e-4
        z = np.linalg.solve(now["factor"], u[..., 0].T - np.outer(now["a"], x0))
        assert np.abs(z.mean(1)).max() < 5 / np.sqrt(n)
        assert np.abs(np.cov(z) - np.eye(len(z))).max() < 5 * np.sqrt(2 / n)


# -- sampling --------------------------------------------------------------------------


class Exact(eqx.Module):
    """E[x0 given x_t] of a mixture on a path whose numbers are leaves."""

    path: sdegen.AbstractPath
    std: Scalar | None = None

    def __call__(self, t, x, cond):
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        if self.std is None:
            # JAX remembers an array of NumPy in the precision of its first use: copies
            law = Mixture1D(*(v.copy() for v in (G1.w, G1.mu, G1.s)))
            return law.denoise(x, alpha, sigma).astype(x.dtype)
        variance = self.std**2
        return alpha * variance / (alpha**2 * variance + sigma**2) * x


def generator(process, std=None):
    return sdegen.Augmented(PosteriorMean(Exact(process, std), process))


def has_the_law_of_x(x, process, t):
    now = at(process, t)
    law = now["a"][0], np.sqrt(np.sum(now["factor"][0] ** 2))
    result = scipy.stats.kstest(np.asarray(x)[:, 0], cdf, law)
    print(result)
    return result.pvalue > 1e-4


def test_samples_of_data_are_exact_through_the_path():
    cld = made("closed")
    ends = (at(cld, t) for t in (cld.t_max, cld.t_min))
    start, wanted = (quantiles(v["alpha"], v["sigma"]) for v in ends)
    denoiser = PosteriorMean(Exact(cld), cld)
    start = jnp.asarray(start)
    out = sdegen.sample(KEY, denoiser, start.shape, start=start, grid=400)
    assert bool(out.ok.all())
    np.testing.assert_allclose(out.x, wanted, atol=2e-4)


def check_samples_of_the_state(process, **options):
    out = sdegen.sample(KEY, generator(process), (3000, 1), **options)
    assert bool(out.ok.all()) and out.x.shape == (3000, 1)
    steps = options.get("grid", 200)
    assert int(out.evaluations) == 2 * steps
    assert has_the_law_of_x(out.x, process, process.t_min)
    return out


@pytest.mark.parametrize(
    "options", [dict(), dict(stochasticity=1.0, solver=dfx.Heun())], ids=["flow", "SDE"]
)
def test_samples_of_the_state_have_the_law_of_the_data(options):
    check_samples_of_the_state(made("closed"), **options)


def test_the_splitting_has_the_law_of_the_data_and_stays_float32(float32):
    # in float64 its covariances are seen exactly, below
    solver = SSCS(midpoint=True)
    process = sdegen.BlockSDE(**KIN["PSLD"])
    out = check_samples_of_the_state(
        process, stochasticity=1.0, solver=solver, grid=100
    )
    assert out.x.dtype == jnp.float32
    assert SSCS().calls == 1


def test_the_flow_of_gaussian_data_keeps_every_radius():
    process, std = made("closed"), jnp.asarray(0.6)
    score = StateScore(PosteriorMean(Exact(process, std), process))
    u = at(process, process.t_max)["factor"] @ normal((2, 5))

    def radius(t, u):
        now = at(process, t)
        cov = now["factor"] @ now["factor"].T + 0.36 * np.outer(now["a"], now["a"])
        return np.sum(np.linalg.solve(np.linalg.cholesky(cov), u) ** 2)

    flow = sdegen.probability_flow(process, score)
    out = sdegen.simulate(
        KEY,
        flow,
        jnp.asarray(u)[None],
        solver=dfx.Dopri8(),
        grid=sdegen.Adaptive(rtol=1e-11, atol=1e-12),
    )
    first, last = radius(process.t_max, u), radius(process.t_min, np.asarray(out.x)[0])
    assert abs(float(last / first) - 1) < 1e-8


# -- the splitting sampler -------------------------------------------------------------


class Chosen(dfx.AbstractBrownianPath):
    """Two chosen normals per step, in place of drawn ones."""

    z: jax.Array
    t0 = 0.0
    t1 = 1.0
    levy_area = dfx.SpaceTimeLevyArea

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        dt = t1 - t0
        w, h = jnp.sqrt(dt) * self.z[0], jnp.sqrt(dt / 12) * self.z[1]
        return dfx.SpaceTimeLevyArea(dt=dt, W=w, H=h)


@eqx.filter_jit
def covariance_at_the_end(generator, start, steps, strength, solver):
    """Exact: for Gaussian data a step is a matrix, seen by its effect on a basis."""
    basis = jnp.eye(6)[:, :, None]
    u, z = basis[:, :2], jnp.stack([basis[:, 2:4], basis[:, 4:]])

    def by_solver(c):
        backward = lambda cond: generator.backward(strength)  # noqa: E731
        term = BackwardTerm(backward, None, Chosen(z))
        state = solver.init(term, *c, u, None)
        return solver.step(term, *c, u, None, state, False)[0]

    def by_euler(c):
        process, h = generator.backward(strength), c[1] - c[0]
        g = process.diffusion(c[0], u[0])
        return jax.vmap(
            lambda u, z: u + h * process.drift(c[0], u) + jnp.sqrt(h) * g * z
        )(u, z[0])

    def body(i, cov):
        c = (i / steps, (i + 1) / steps)
        step = (by_euler(c) if solver is None else by_solver(c))[..., 0].T
        return step[:, :2] @ cov @ step[:, :2].T + step[:, 2:] @ step[:, 2:].T

    return jax.lax.fori_loop(0, steps, body, start)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_splitting_has_its_order_and_beats_euler(strength):
    process, std = sdegen.CLD(t_min=1e-2), jnp.asarray(0.55)

    def law(t):
        now = at(process, t)
        a, factor = now["a"], now["factor"]
        return factor @ factor.T + 0.55**2 * np.outer(a, a)

    exact, start = law(process.t_min)[0, 0], jnp.asarray(law(process.t_max))
    run = functools.partial(covariance_at_the_end, generator(process, std), start)

    def bias(solver, steps):
        cov = np.asarray(run(jnp.asarray(steps), jnp.asarray(strength), solver))
        return abs(float(cov[0, 0] / exact - 1))

    one = bias(SSCS(), 100), bias(SSCS(), 400)
    two = bias(SSCS(midpoint=True), 100), bias(SSCS(midpoint=True), 400)
    print(one, two)
    assert abs(np.log2(one[0] / one[1]) / 2 - 1) < 0.1
    assert abs(np.log2(two[0] / two[1]) / 2 - 2) < 0.15
    euler = bias(None, 200)
    assert bias(SSCS(), 200) < 0.8 * euler  # as many evaluations
    assert two[0] < 0.05 * euler


def test_the_splitting_is_exact_where_the_data_are_stationary():
    # Data of unit variance and velocities of variance M: nothing is left for B.
    process = sdegen.CLD(gamma=1.0, t_min=1e-2)
    start = jnp.asarray(np.diag([1.0, 0.25]))
    cov = covariance_at_the_end(
        generator(process, jnp.asarray(1.0)),
        start,
        jnp.asarray(2),
        jnp.asarray(1.0),
        SSCS(),
    )
    np.testing.assert_allclose(cov, start, atol=1e-12)


# -- likelihood, training, check, errors -----------------------------------------------


def test_the_likelihood_through_the_path_is_exact():
    cld = sdegen.CLD(t_max=2.5)  # by then nothing is left of the data
    x = jnp.array([[-1.6], [0.1], [1.2]])
    out = sdegen.log_likelihood(PosteriorMean(Exact(cld), cld), x)
    now = at(cld, cld.t_min)
    spread = np.sqrt((now["alpha"] * G1.s) ** 2 + now["sigma"] ** 2)
    density = scipy.stats.norm.pdf(np.asarray(x), now["alpha"] * G1.mu, spread)
    wanted = np.log(density @ G1.w)
    print(out.value, wanted)
    np.testing.assert_allclose(out.value, wanted, atol=1e-6)


class Mutant(sdegen.AbstractBlockSDE):
    """CLD with mistakes, as numbers."""

    of: sdegen.CLD
    drift_sign: Scalar = number(1.0)
    strength: Scalar = number(1.0)
    entry: Scalar = number(1.0)
    t_min: Scalar = number(1e-3)
    t_max: Scalar = number(1.0)
    noise: sdegen.AbstractNoise = sdegen.Gaussian()

    def matrix(self, t):
        return self.drift_sign * self.of.matrix(t)

    def noise_scale(self, t):
        return self.strength * self.of.noise_scale(t)

    def moments(self, t):
        a, factor = self.of.moments(t)
        return a, factor.at[1, 1].multiply(self.entry)


@functools.cache
def report(name):
    changes = {
        "right": {},
        "-F": dict(drift_sign=-1.0),
        "2 G": dict(strength=2.0),
        "an entry of L": dict(entry=1.05),
    }[name]
    parts = PARTS if name == "right" else ("moments",)
    return sdegen.check(Mutant(made("closed"), **changes), samples=1000, parts=parts)


@pytest.mark.parametrize("name", ["right", "-F", "2 G", "an entry of L"])
def test_check_is_silent_about_what_is_right_and_sees_what_is_wrong(name):
    print(report(name))
    assert report(name).ok == (name == "right")
    if name == "right":
        assert len(report(name).rows) == 9


WRONG = {
    "shape (k, k), got": dict(F=lambda t, p: jnp.ones(2), G=lambda t, p: jnp.ones(2)),
    "Return its diagonal": dict(F=lambda t, p: -jnp.eye(2), G=lambda t, p: jnp.eye(2)),
    "for each row of F": dict(F=lambda t, p: -jnp.eye(2), G=lambda t, p: jnp.ones(3)),
    "only one of them": dict(F=lambda t, p: -jnp.eye(2)),
    "auxiliary is the covariance": dict(auxiliary=jnp.ones(3)),
    "t_min < t_max": dict(t_min=0.0),
    "are finite": options(LANGEVIN, [0, 2**0.5], pole=1.0),
    "spread in all of its rows": options([[-1, 0], [0, -1]], [1, 0], auxiliary=0.0),
    "more signal than noise": options([[0, -4], [1, 4]], [0, 2**0.5]),
    "grow beyond all numbers": options([[0, -4], [1, 4]], [0, 2**0.5], beta=900.0),
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_told_in_a_sentence(message):
    with pytest.raises(ValueError) as error:
        sdegen.BlockSDE(**WRONG[message])
    assert message in str(error.value)


def test_other_mistakes_are_told_too():
    with pytest.raises(ValueError, match="auxiliary rows"):
        sdegen.Augmented(PosteriorMean(Exact(sdegen.VP()), sdegen.VP()))
    with pytest.raises(ValueError, match="gamma >= 0"):
        sdegen.CLD(gamma=-1.0)
    with pytest.raises(ValueError, match="beta > 0"):
        sdegen.CLD(beta=0.0)
    with pytest.raises(ValueError, match="up to t_max"):
        sdegen.CLD(slope=-5.0)
    with pytest.raises(ValueError, match="Augmented"):
        denoiser = PosteriorMean(Exact(sdegen.CLD()), sdegen.CLD())
        sdegen.sample(KEY, denoiser, (2, 1), solver=SSCS(), stochasticity=1.0)
    with pytest.raises(ValueError, match="denoise and refinable"):
        sdegen.sample(KEY, sdegen.Augmented(denoiser), (2, 1), denoise=True)
    with pytest.raises(ValueError, match="splits the reverse"):
        SSCS().check(sdegen.reverse(sdegen.VP(), lambda t, x: -x))


def test_training_in_float32_takes_it_as_any_path(float32):
    cld = as_float32(sdegen.CLD())
    network = lambda time, x, cond: 0.1 * x + time[:, None]  # noqa: E731
    denoiser = sdegen.Denoiser(network, cld)
    loss = eqx.filter_jit(sdegen.denoising_loss)(denoiser, KEY, jnp.ones((8, 2)))
    assert loss.dtype == jnp.float32 and np.isfinite(float(loss))
