"""Likelihoods against closed forms: mixtures, quadrature over bins, entropies."""

import dataclasses
import functools

import chex
import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flows import ExactMean, exact, exact_quantiles, flow, scales
from oracle import G1, G2, PROBES, as_float32, process
from scipy.stats import multivariate_normal, multivariate_t, norm

import sdegen
from sdegen import nets, prediction
from sdegen.data import Mixture
from sdegen.likelihood.log_likelihood import error_of_mean
from sdegen.models.denoiser import PosteriorMean
from sdegen.training.feed import as_float

KEY = jax.random.key(0)
WEIGHTS, STDS = np.array([0.3, 0.5, 0.2]), np.array([0.3, 0.2, 0.5])
MEANS = np.array([[-1.0, 0.3], [0.7, 0.2], [0.1, -0.8]])


LAW = Mixture(WEIGHTS, MEANS, STDS)
"""Three round Gaussians in the plane, skewed on purpose."""


def log_density(x, alpha=1.0, sigma=0.0):
    """log p_t(x) of the law, in NumPy float64: a mixture stays one."""
    std = np.sqrt((float(alpha) * STDS) ** 2 + float(sigma) ** 2)
    x = np.asarray(x, np.float64)[:, None]
    each = norm.logpdf(x, float(alpha) * MEANS, std[:, None]).sum(-1)
    return np.log(np.exp(each + np.log(WEIGHTS)).sum(-1))


@functools.cache
def data_of(n, seed=3):
    """n draws of the law, from NumPy: nothing to compile."""
    random = np.random.default_rng(seed)
    k = random.choice(len(WEIGHTS), n, p=WEIGHTS)
    return jnp.asarray(MEANS[k] + STDS[k, None] * random.normal(size=(n, 2)))


def draws_of(path, n=256, seed=1, t=None):
    """Draws of x_t, by default at t_min."""
    alpha, sigma = scales(path, path.t_min if t is None else jnp.asarray(t))
    noise = np.random.default_rng(seed + 1000).normal(size=(n, 2))
    x = float(alpha) * np.asarray(data_of(n, seed)) + float(sigma) * noise
    return jnp.asarray(x, alpha.dtype)


def prior_of(path, t=None):
    """The law at t, by default at t_max: numbers, so that programs are shared."""
    return eqx.Partial(LAW.log_prob, path, path.t_max if t is None else t)


def test_the_exact_mode_is_exact_in_float64():
    path = process("RectifiedFlow")
    x = draws_of(path)
    out = sdegen.log_likelihood(LAW.denoiser(path), x, log_prior=prior_of(path))
    error = np.abs(out.value - log_density(x, *scales(path, path.t_min)))
    print(f"mean {error.mean():.1e}, {int(out.evaluations)} evaluations")
    assert bool(out.ok.all()) and error.mean() < 1e-8
    assert np.all(out.standard_error == 0)


def normal_end(path, latent):
    """The log-density of what `sample` starts from, N(0, sigma_T^2 I), in NumPy."""
    std = float(path.sigma(path.t_max))
    return norm.logpdf(np.asarray(latent), scale=std).sum(-1)


def test_the_exact_mode_with_default_tolerances_in_float32(float32):
    path = as_float32(process("RectifiedFlow"))
    x = draws_of(path)
    denoiser = as_float32(LAW).denoiser(path)
    out = sdegen.log_likelihood(denoiser, x, log_prior=prior_of(path))
    error = np.abs(out.value - log_density(x, *scales(path, path.t_min)))
    print(f"mean {error.mean():.1e}, {int(out.evaluations)} evaluations")
    assert out.value.dtype == jnp.float32
    assert bool(out.ok.all()) and error.mean() < 1e-5


def test_a_skewed_law_on_the_line_with_its_own_end_and_with_the_normal_one():
    path = process("VP")
    x = exact_quantiles("VP", path.t_min)
    truth = np.log(G1.pdf(x[:, 0], *scales(path, path.t_min)))
    normal = sdegen.log_likelihood(exact(path), x, grid=sdegen.Adaptive(1e-10, 1e-10))
    error = np.abs(normal.value - truth)
    # the signal left at t_max = 1, about alpha_T = exp(-B / 2)
    assert 1e-3 < error.max() < 1e-2
    latent = exact_quantiles("VP", path.t_max)
    assert np.abs(normal.latent - latent).max() < 1e-8  # quantiles do not cross
    end = np.log(G1.pdf(normal.latent[:, 0], *scales(path, path.t_max)))
    own = normal.value - normal_end(path, normal.latent) + end
    assert np.abs(own - truth).max() < 1e-7


def test_the_value_is_that_of_the_law_under_a_change_of_scale():
    path = process("EDM")
    doubled = Mixture(WEIGHTS, 2 * MEANS, 2 * STDS)
    # twice the data on a path with twice the noise
    wide = dataclasses.replace(path, t_min=2 * path.t_min, t_max=2 * path.t_max)
    x = draws_of(path)
    one = sdegen.log_likelihood(LAW.denoiser(path), x)
    two = sdegen.log_likelihood(doubled.denoiser(wide), 2 * x)
    assert np.abs(one.value - 2 * np.log(2) - two.value).max() < 1e-7
    # and with the law's own end in place of the normal one both are exact
    end = log_density(one.latent, *scales(path, path.t_max))
    own = one.value - normal_end(path, one.latent) + end
    error = np.abs(own - log_density(x, *scales(path, path.t_min)))
    assert bool(one.ok.all()) and error.mean() < 1e-8


def test_the_density_moves_along_the_flow_by_the_divergence():
    path = process("EDM")
    denoiser = LAW.denoiser(path)

    @jax.jit
    def flow_of_law(t, x):
        """The velocity at points of the law at t, and its divergence."""

        def velocity(x):
            return denoiser.velocity(t, x[None])[0]

        trace = jax.vmap(lambda x: jnp.trace(jax.jacfwd(velocity)(x)))
        return jax.vmap(velocity)(x), trace(x)

    for t in (0.05, 0.5, 3.0):
        x = draws_of(path, 16, t=t)
        v, divergence = map(np.asarray, flow_of_law(jnp.asarray(t), x))
        step = lambda h: log_density(x + h * v, *scales(path, t + h))  # noqa: B023, E731
        h = 1e-4 * t
        slope = (8 * (step(h) - step(-h)) - (step(2 * h) - step(-2 * h))) / (12 * h)
        assert np.abs(slope + divergence).max() < 1e-7 * np.abs(divergence).max()


def test_the_variance_exploding_flow_is_the_heat_equation():
    # the transform of p_t is that of p_0 times exp(-sigma^2 omega^2 / 2)
    path, n, width = process("EDM"), 4096, 60.0
    x = (np.arange(n) - n // 2) * width / n
    line = Mixture(G1.w, G1.mu[:, None], G1.s)
    start = norm.pdf(x[:, None], G1.mu, G1.s) @ G1.w
    start = np.fft.fft(np.fft.ifftshift(start))
    omega = 2 * np.pi * np.fft.fftfreq(n, width / n)
    log_prob = jax.jit(jax.vmap(functools.partial(line.log_prob, path), (None, 0)))
    for t in (0.3, 2.0):
        p = np.exp(log_prob(jnp.asarray(t), x[:, None]))
        found = np.fft.fft(np.fft.ifftshift(p))
        assert np.abs(found - start * np.exp(-0.5 * (t * omega) ** 2)).max() < 1e-10


@pytest.mark.parametrize("matched, error", [(False, 3.4e-3), (True, 3.6e-7)])
def test_the_flow_from_a_normal_law_of_matched_moments(matched, error):
    path = process("EDM")
    mean, var = (G1.mean, G1.var) if matched else (0.0, 0.0)
    start = (mean + np.sqrt(6400 + var) * norm.ppf(PROBES))[:, None]
    tight = {"solver": diffrax.Dopri8(), "grid": sdegen.Adaptive(1e-12, 1e-12)}
    out = flow("EDM", start=jnp.asarray(start), **tight)
    end = G1.quantile(PROBES, *scales(path, path.t_min))
    found = np.abs(out.x[:, 0] - end).max()
    print(f"matched {matched}: {found:.2e}")
    assert 0.5 * error < found < 2 * error


# -- probes ----------------------------------------------------------------------------


FIXED = {"grid": 12, "solver": diffrax.Tsit5()}
RADEMACHER = {"probes": 64, **FIXED}
GAUSSIAN = RADEMACHER | {"probe_noise": "gaussian"}
"""One program each, for every mixture of three components and 64 points."""


@functools.cache
def narrow():
    """Eight dimensions with a Jacobian far from diagonal, and points there."""
    random = np.random.default_rng(0)
    means = random.normal(size=(3, 8))
    law = Mixture([0.2, 0.3, 0.5], means, [0.4, 0.5, 0.6])
    k = random.choice(3, 64, p=law.weights)
    x = means[k] + np.asarray(law.stds)[k, None] * random.normal(size=(64, 8))
    return law.denoiser(process("VP")), jnp.asarray(x)


@functools.cache
def narrow_truth():
    return sdegen.log_likelihood(*narrow(), **FIXED)


@pytest.mark.parametrize("options", [RADEMACHER, GAUSSIAN], ids=["signs", "normal"])
def test_probes_agree_with_the_exact_trace_and_their_error_bar_is_honest(options):
    truth = narrow_truth()

    def error(seed):
        out = sdegen.log_likelihood(*narrow(), key=jax.random.key(seed), **options)
        assert np.abs(out.latent - truth.latent).max() < 1e-12
        return out.value - truth.value, out.standard_error

    errors, bars = np.stack([error(seed) for seed in range(16)], axis=1)
    inside, ratio = (
        (np.abs(errors) < 2 * bars).mean(),
        (errors**2).mean() / (bars**2).mean(),
    )
    mean = errors.mean(0) / np.sqrt((bars**2).sum(0)) * 16
    print(
        f"{errors.size} intervals of 2 standard errors hold {inside:.3f} (normal: .954)"
        f"; mean square error over mean square bar {ratio:.3f}; means of 1024 probes "
        f"are off by at most {np.abs(mean).max():.2f} standard errors; "
        f"all are by {errors.mean() / np.sqrt((bars**2).mean()):.3f}"
    )
    assert abs(inside - 0.954) < 0.03 and abs(ratio - 1) < 0.15
    # not the mean of the quotients: squares of normal probes are skewed
    assert abs(errors.mean()) < 0.1 * np.sqrt((bars**2).mean())
    assert np.abs(mean).max() < 4 and bars.min() > 1e-3


def test_rademacher_probes_of_a_diagonal_jacobian_have_no_variance():
    # three equal components are one Gaussian
    mean = np.linspace(-0.5, 0.5, 8)
    gauss = Mixture([0.2, 0.3, 0.5], np.stack(3 * [mean]), [0.7, 0.7, 0.7])
    denoiser, x = gauss.denoiser(process("VP")), narrow()[1]
    out = sdegen.log_likelihood(denoiser, x, key=KEY, **RADEMACHER)
    assert out.standard_error.max() < 1e-12
    out = sdegen.log_likelihood(denoiser, x, key=KEY, **GAUSSIAN)
    assert out.standard_error.min() > 1e-3


@pytest.mark.parametrize("probes", [2, 4, 8, 16])
@pytest.mark.parametrize("law", ["signs", "normal", "squares"])
def test_two_error_bars_hold_at_any_number_of_probes(law, probes):
    """Of the laws that probes have: two values, many terms, one square."""
    random, shape = np.random.default_rng(probes), (4000, probes)
    values = {
        "signs": random.choice([-1.0, 1.0], shape),
        "normal": random.normal(size=shape),
        "squares": random.normal(size=shape) ** 2 - 1,
    }[law]
    bars = np.asarray(error_of_mean(jnp.asarray(values)))
    told = ~np.isnan(bars)
    inside = (np.abs(values.mean(1)) < 2 * bars)[told].mean()
    print(f"{law}, {probes} probes: {inside:.3f} of {told.mean():.3f}")
    assert inside > {"signs": 0.91, "normal": 0.94, "squares": 0.82}[law]
    expected = 1 - 0.5 ** (probes - 1) if law == "signs" and probes < 8 else 1
    assert abs(told.mean() - expected) < 0.03


TURN = np.random.default_rng(3).normal(size=(4, 4))


def turning(t, x, cond):
    """A cheap velocity with a Jacobian far from diagonal."""
    return jnp.tanh(x) @ TURN


def test_a_sample_has_the_same_probes_in_any_batch_on_any_mesh():
    model = sdegen.VelocityModel(turning, interpolant())
    x = jnp.asarray(np.random.default_rng(4).normal(size=(16, 4)))
    options = {"grid": 8, "solver": diffrax.Tsit5(), "key": KEY, "probes": 3}
    whole = sdegen.log_likelihood(model, x, **options)
    assert whole.standard_error.min() > 1e-3
    sharding = sdegen.mesh.batch_sharding(sdegen.mesh.data_mesh())
    # both at once: another batch, one sample to each device
    part = sdegen.log_likelihood(model, x[:8], sharding=sharding, **options)
    chex.assert_trees_all_close(whole.value[:8], part.value, atol=1e-12)
    options["grid"] = sdegen.Adaptive(1e-7, 1e-7)
    spread = sdegen.log_likelihood(model, x, sharding=sharding, **options)
    own = sdegen.log_likelihood(model, x, **options)
    chex.assert_trees_all_close(own.value, spread.value, atol=1e-12)


# -- the solver's error, gradients -----------------------------------------------------


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Dopri8()])
def test_the_solver_s_error_is_known(solver):
    path = process("VP")
    denoiser, x = LAW.denoiser(path), draws_of(path)
    truth = log_density(x, *scales(path, path.t_min))
    # from 1e-4 on a sample's own steps are so long that the estimate is too small
    for tolerance in (1e-5, 1e-6, 1e-7):
        out = sdegen.log_likelihood(
            denoiser,
            x,
            solver=solver,
            grid=sdegen.Adaptive(tolerance, tolerance),
            log_prior=prior_of(path),
        )
        error, said = np.abs(out.value - truth), np.asarray(out.solver_error)
        print(f"{tolerance:g}: true {error.mean():.1e}, said {said.mean():.1e}")
        # Tsit5's own estimate is known to be small where steps are long
        assert (error < 4 * said).mean() > 0.95 and error.mean() < said.mean()
        # not by saying much too much: these are embedded pairs, one order apart
        assert said.mean() < 1e3 * error.mean() and said.mean() < 20 * tolerance


@pytest.mark.parametrize("t", [0.1, 0.3])
def test_the_score_carries_the_error_of_the_point_into_nats(t):
    """One step of Heun: its error in nats is the distance to Euler's answer."""
    path = process("VP")
    denoiser, gaps = LAW.denoiser(path), []
    x = draws_of(path, 64, t=t)
    for width in (2e-2, 1e-2):
        grid = jnp.asarray([t + width, t])
        end = prior_of(path, grid[0])
        heun, euler = (
            sdegen.log_likelihood(denoiser, x, solver=solver, grid=grid, log_prior=end)
            for solver in (diffrax.Heun(), diffrax.Euler())
        )
        assert np.isnan(euler.solver_error).all()
        true = np.abs(heun.value - euler.value)
        gaps.append(np.abs(heun.solver_error - true).mean() / true.mean())
    print(f"relative gaps {gaps}")  # without the score's share they stay above .3
    assert gaps[1] < 0.1 and gaps[1] < 0.7 * gaps[0]


def test_the_value_is_that_of_the_ends_of_the_grid():
    path, denoiser = process("RectifiedFlow"), LAW.denoiser(process("RectifiedFlow"))
    x = draws_of(path, 16, t=0.1)
    out = sdegen.log_likelihood(
        denoiser,
        x,
        solver=diffrax.Dopri8(),
        grid=jnp.linspace(0.9, 0.1, 65),
        log_prior=prior_of(path, jnp.asarray(0.9)),
    )
    assert np.abs(out.value - log_density(x, *scales(path, 0.1))).max() < 1e-8


def test_too_few_steps_end_with_a_code():
    out = sdegen.log_likelihood(
        sdegen.VelocityModel(turning, interpolant()),
        jnp.ones((8, 4)),
        solver=diffrax.Tsit5(),
        grid=sdegen.Adaptive(1e-9, 1e-9, max_steps=5),
    )
    assert not bool(out.ok.all())


def test_a_hopeless_sample_costs_no_other_its_value():
    """nan, and 2000 standard deviations away, whose error in nats no step makes small.

    In float32: there the floor of the steps ends the solve of the second.
    """
    denoiser = as_float32(LAW).denoiser(as_float32(process("VP")))
    x = draws_of(process("VP"), 8).astype(jnp.float32)
    whole = sdegen.log_likelihood(denoiser, x)
    out = sdegen.log_likelihood(denoiser, x.at[2].set(jnp.nan).at[5].set(1e6))
    left = np.array([0, 1, 3, 4, 6, 7])
    assert whole.ok.all() and np.array_equal(np.flatnonzero(out.ok), left)
    assert np.array_equal(out.value[left], whole.value[left])
    assert out.evaluations < 2 * whole.evaluations


def model(s, path):
    """The exact denoiser of N(0, s^2) for a trainable s."""
    mean = ExactMean(path, jnp.ones(1), jnp.zeros(1), s[None])
    return PosteriorMean(mean, path)


@pytest.mark.parametrize(
    "options",
    [
        {"grid": sdegen.Adaptive(1e-7, 1e-7)},
        # signs are exact in one dimension: their bar is zero, and so is its gradient
        {"grid": 40, "key": KEY, "probes": 3},
    ],
    ids=["adaptive", "probes that agree"],
)
def test_gradients_of_a_gaussian_s_likelihood(options):
    path, x = process("RectifiedFlow"), jnp.linspace(-1.5, 2.0, 7)[:, None]

    def mean_log_p(s, x):
        found = sdegen.log_likelihood(
            model(s, path), x, solver=diffrax.Tsit5(), **options
        )
        return jnp.mean(found.value + found.standard_error)

    s = jnp.asarray(0.8)
    by_s, by_x = jax.jit(jax.grad(mean_log_p, argnums=(0, 1)))(s, x)
    a, b = (float(v) for v in scales(path, path.t_min))
    var = a**2 * 0.8**2 + b**2
    expected = np.mean(a**2 * 0.8 * (np.asarray(x) ** 2 / var**2 - 1 / var))
    assert abs(by_s - expected) < 1e-5 * abs(expected)
    assert np.abs(by_x * 7 + x / var).max() < 1e-5


@pytest.mark.parametrize(
    "grid",
    [
        12,
        sdegen.Adaptive(1e-7, 1e-7, adjoint="forward"),
        pytest.param(
            sdegen.Adaptive(1e-7, 1e-7, adjoint="direct"), marks=pytest.mark.exhaustive
        ),
    ],
    ids=["fixed", "forward", "direct"],
)
def test_forward_and_second_derivatives_of_a_gaussian_s_likelihood(grid):
    """log p(x) = -x^2 / (2 var) + c in each of the samples."""
    path, x = process("RectifiedFlow"), jnp.asarray([[0.3], [-1.2]])
    a, b = (float(v) for v in scales(path, path.t_min))
    var, forward = a**2 * 0.8**2 + b**2, "ForwardMode" in repr(grid)

    def log_p(x):
        exact = model(jnp.asarray(0.8), path)
        return sdegen.log_likelihood(exact, x, grid=grid, solver=diffrax.Tsit5()).value

    if forward:
        push = jax.jvp(log_p, (x,), (jnp.ones_like(x),))[1]
        assert np.abs(push * var + x[:, 0]).max() < 1e-4
    else:
        second = jax.hessian(lambda x: log_p(x).sum())(x).reshape(2, 2)
        assert np.abs(second * var + np.eye(2)).max() < 1e-3


def test_adaptive_steps_name_the_derivatives_that_they_lack():
    path, x = process("RectifiedFlow"), jnp.ones((2, 1))
    unit = model(jnp.asarray(0.8), path)
    with pytest.raises(ValueError, match='adjoint="forward"'):
        jax.jvp(lambda x: sdegen.log_likelihood(unit, x).value, (x,), (x,))
    with pytest.raises(ValueError, match="checkpointed, direct, forward"):
        sdegen.Adaptive(adjoint="backward")


@pytest.mark.exhaustive  # the gradients are exact, as tests above show
@pytest.mark.usefixtures("well_compiled")
def test_training_by_likelihood_finds_the_law():
    """A continuous normalising flow: a network fitted by the likelihood alone."""
    path = process("RectifiedFlow")
    x = 0.4 * jax.random.normal(KEY, (256, 1)) + 0.5
    network = nets.MLPConfig(width=16)((1,), jax.random.key(1))
    denoiser = sdegen.Denoiser(network, path, prediction.velocity, sigma_data=0.6)

    @eqx.filter_jit
    def step(network, state):
        def loss(network):
            model = dataclasses.replace(denoiser, network=network)
            found = sdegen.log_likelihood(model, x, solver=diffrax.Heun(), grid=12)
            return -jnp.mean(found.value)

        value, grads = jax.value_and_grad(loss)(network)
        updates, state = optimizer.update(grads, state, network)
        return jax.tree.map(lambda p, u: p + u, network, updates), state, value

    optimizer = optax.adam(5e-2)
    state, losses = optimizer.init(network), []
    for _ in range(60):
        network, state, value = step(network, state)
        losses.append(float(value))
    entropy = -np.mean(norm.logpdf(np.asarray(x), np.mean(x), np.std(x)))
    print(f"from {losses[0]:.3f} to {losses[-1]:.3f}; best Gaussian fit {entropy:.3f}")
    assert losses[0] > entropy + 0.05 and abs(losses[-1] - entropy) < 0.05


# -- models on an interpolant ----------------------------------------------------------

TIGHT = sdegen.Adaptive(1e-11, 1e-11)
SLANTED = np.array([[0.9, 0.0], [-0.5, 0.4]])
"""A root of the covariance of x0; its mean is CENTRE."""
CENTRE = np.array([0.7, -0.2])


VARIANCES, AXES = np.linalg.eigh(SLANTED @ SLANTED.T)


def velocity_of_gaussians(t, x, cond):
    """E[x1 - x0 given x_t] of N(CENTRE, root root') and independent N(0, I)."""
    t = t[0]
    gap = (x - (1 - t) * CENTRE) @ AXES
    weighted = gap / ((1 - t) ** 2 * VARIANCES + t**2)
    return ((t - (1 - t) * VARIANCES) * weighted) @ AXES.T - CENTRE


def interpolant(**options):
    return sdegen.StochasticInterpolant(latent=None, **options)


def test_the_exact_velocity_between_gaussians_gives_the_density_of_the_data():
    model = sdegen.VelocityModel(velocity_of_gaussians, interpolant())
    x = CENTRE + np.random.default_rng(0).normal(size=(32, 2)) @ SLANTED.T
    out = sdegen.log_likelihood(model, jnp.asarray(x), grid=TIGHT)
    exact = multivariate_normal.logpdf(x, CENTRE, SLANTED @ SLANTED.T)
    print(np.abs(out.value - exact).max(), out.evaluations)
    assert bool(out.ok.all()) and np.abs(out.value - exact).max() < 1e-9
    assert np.isnan(out.solver_error).all()  # the score is not known
    # and the flow that `sample` solves leads from the latent back to x
    back = sdegen.sample(KEY, model, x.shape, start=out.latent, grid=TIGHT)
    assert np.abs(back.x - x).max() < 1e-8


def drifts_of_a_bridge(std, sigma):
    """The networks (down, up) of N(0, std^2) and independent N(0, 1), at all times."""

    def drift(up, t, x, cond):
        t = t[:, None]
        var = (1 - t) ** 2 * std**2 + t**2 + sigma**2 * t * (1 - t)
        if up:
            return -x * ((1 - t) * std**2 - t + sigma**2 * t) / var
        return x * ((1 - t) * std**2 - t - sigma**2 * (1 - t)) / var

    return (functools.partial(drift, up) for up in (False, True))


def test_the_exact_drifts_of_a_bridge_give_the_density_of_the_data():
    model = sdegen.SchroedingerBridge(*drifts_of_a_bridge(0.5, 0.8), sigma=0.8)
    x = jnp.linspace(-1.2, 1.5, 6)[:, None]
    out = sdegen.log_likelihood(model, x, grid=TIGHT)
    assert np.abs(out.value - norm.logpdf(x[:, 0], scale=0.5)).max() < 1e-9


RATE = 0.3


def expansion(t, x, cond):
    """A velocity that multiplies x by exp(RATE) from t = 0 to 1."""
    return RATE * x if cond is None else cond * x


@pytest.mark.parametrize(
    "noise, cases",
    [
        (
            sdegen.StudentT(dof=3.0),
            [
                {"grid": jnp.linspace(1.0, 0.0, 13)},
                {"cond": jnp.full((2, 1), RATE), "grid": 12},
                {"probes": 8, "key": KEY, "grid": 12},  # of a diagonal Jacobian
            ],
        ),
        (sdegen.Box(-2.0, 3.0), [{}, {"probes": 1, "key": KEY, "grid": 12}]),
    ],
)
def test_any_noise_with_a_density_is_carried_back(noise, cases):
    model = sdegen.VelocityModel(expansion, interpolant(noise=noise))
    x = jnp.asarray([[0.1, -0.9], [1.1, 0.3]])
    truth = jax.vmap(noise.log_prob)(x * np.exp(RATE)) + 2 * RATE
    for options in cases:
        out = sdegen.log_likelihood(model, x, **options)
        assert np.abs(out.value - truth).max() < 1e-8, options
        if options.get("probes") == 1:  # it cannot know its error
            assert np.isnan(out.standard_error).all()
        else:
            assert np.abs(out.standard_error).max() < 1e-12


def test_bits_of_a_model_on_an_interpolant_score_its_data_as_they_are():
    model = sdegen.VelocityModel(expansion, interpolant())
    whole, scaled = images()[0][:5], {"levels": LEVELS, "low": LOW, "high": HIGH}
    out = sdegen.bits_per_dim(model, whole, key=KEY, grid=12, **scaled)
    x = sdegen.dequantise(
        jax.random.split(jax.random.fold_in(KEY, 0), 3)[0], whole, **scaled
    )
    nats = sdegen.log_likelihood(model, x, grid=12).value
    bits = np.log2(LEVELS / (HIGH - LOW)) - nats / (2 * np.log(2))
    assert np.allclose(out.value, bits, rtol=1e-12)


def test_what_has_no_velocity_or_no_density_gets_a_sentence():
    x, say = jnp.ones((3, 2)), functools.partial(pytest.raises, ValueError)
    scale, sde = jnp.ones((3, 2)), sdegen.CustomSDE()
    score = sdegen.ScoreModel(expansion, sde, sdegen.Gaussian(), *5 * [scale], None)
    cld = PosteriorMean(expansion, sdegen.CLD())
    line = sdegen.VelocityModel(expansion, interpolant())
    turned = (sdegen.Augmented(cld), sdegen.Forward(line, sdegen.Gaussian()))
    for model in (score, *turned):
        with say(match=f"needs the velocity of a flow.*{type(model).__name__} decl"):
            sdegen.log_likelihood(model, x)
    with say(match="velocity of a flow"):
        sdegen.bits_per_dim(score, images()[0], key=KEY)
    with say(match="Empirical, has no known density"):
        ends = interpolant(noise=sdegen.Empirical(np.ones((4, 2))))
        sdegen.log_likelihood(sdegen.VelocityModel(expansion, ends), x)
    for short in (interpolant(t_max=0.9), sdegen.StochasticInterpolant(t_max=0.999)):
        model = sdegen.VelocityModel(expansion, short)
        with say(match="must be x1 for its density to be that of Gaussian"):
            sdegen.log_likelihood(model, x)
    given = sdegen.log_likelihood(model, x, grid=4, log_prior=lambda x: -x @ x)
    assert bool(given.ok.all())
    for grid in (sdegen.LogSNRGrid(8), jnp.asarray([0.0, 0.5, 1.0])):
        with say(match="array of times that fall from 1 to 0"):
            sdegen.log_likelihood(line, x, grid=grid)


# -- bits per dimension ----------------------------------------------------------------

LEVELS, LOW, HIGH = 16, -3.0, 3.0
WIDTH = (HIGH - LOW) / LEVELS


@functools.cache
def images():
    """Draws of the law as integers, and -log2 of the true mass of their bins over 2."""
    x = np.asarray(data_of(64, 5))
    whole = np.clip(np.floor((x - LOW) / WIDTH), 0, LEVELS - 1).astype(np.int32)
    edges = norm.cdf((LOW + WIDTH * whole[:, None] - MEANS) / STDS[:, None])
    upper = norm.cdf((LOW + WIDTH * (whole[:, None] + 1) - MEANS) / STDS[:, None])
    return whole, -np.log2(np.prod(upper - edges, axis=-1) @ WEIGHTS) / 2


STEPS = {"solver": diffrax.Tsit5(), "grid": 24}


def bits(draws, whole=None, **options):
    """One program for all: that of EDM, 64 images and 24 steps."""
    return sdegen.bits_per_dim(
        LAW.denoiser(process("EDM")),
        images()[0] if whole is None else whole,
        key=KEY,
        levels=LEVELS,
        low=LOW,
        high=HIGH,
        draws=draws,
        **(STEPS | options),
    )


def test_bits_per_dimension_are_those_of_the_bins():
    one, many = bits(1), bits(64)
    truth = images()[1]
    gap = many.value - truth
    score = gap.mean() / np.sqrt(np.mean(many.standard_error**2) / len(truth))
    print(
        f"64 draws: {many.mean_and_error[0]:.4f}, truth {truth.mean():.4f}, one draw "
        f"{one.mean_and_error[0]:.4f}; {score:.1f} standard errors"
    )
    assert bool(many.ok.all()) and abs(score) < 4 and abs(gap.mean()) < 0.02
    assert (
        one.mean_and_error[0] > many.mean_and_error[0] - 0.01
    )  # more draws tighten an upper bound
    assert np.isnan(one.standard_error).all()
    assert many.mean_and_error[1] == pytest.approx(np.std(many.value, ddof=1) / 8)
    inside = np.abs(gap) < 3 * many.standard_error
    assert inside.mean() > 0.9


def test_the_step_from_t_min_to_data_is_exact_on_a_gaussian():
    """At t_min = .25, where the density is far from that of the data.

    For N(m, s^2) the denoiser is affine, D = a + gain x, so the model's law of v is
    N(m, gain^2 var(x) + (sigma / alpha)^2), and P(k) is a difference of its cdf.
    """
    path, m, s = sdegen.VP(t_min=0.25), 0.4, 0.6
    alpha, sigma = (float(v) for v in scales(path, path.t_min))
    var = alpha**2 * s**2 + sigma**2
    std = np.sqrt((alpha * s**2 / var) ** 2 * var + (sigma / alpha) ** 2)
    bins, n = np.arange(5, 12), 4000
    edges = LOW + WIDTH * np.arange(5, 13)
    mass = np.diff(norm.cdf(edges, m, std))
    gauss = Mixture([1.0], [[m]], [s])

    def mass_by(correct):
        """P(k) = E exp(log P), the draws of each bin in a row."""
        out = sdegen.bits_per_dim(
            gauss.denoiser(path),
            np.repeat(bins, n)[:, None],
            key=KEY,
            levels=LEVELS,
            low=LOW,
            high=HIGH,
            solver=diffrax.Tsit5(),
            grid=16,
            log_prior=eqx.Partial(gauss.log_prob, path, path.t_max),
            correct=correct,
        )
        return np.asarray(2.0 ** -np.asarray(out.value)).reshape(len(bins), n)

    each = mass_by(True)
    score = (each.mean(1) - mass) / (each.std(1) / np.sqrt(n))
    print(f"P(k) {each.mean(1)}, exact {mass}: {score} standard errors")
    assert np.abs(score).max() < 4
    assert np.abs(mass_by(False).mean(1) / mass - 1).max() > 0.1


def test_the_solver_s_error_of_bits_is_that_of_the_likelihood():
    out = bits(1, correct=False)
    key = jax.random.split(jax.random.fold_in(KEY, 0), 3)[0]
    x = sdegen.dequantise(key, images()[0], levels=LEVELS, low=LOW, high=HIGH)
    nats = sdegen.log_likelihood(LAW.denoiser(process("EDM")), x, key=KEY, **STEPS)
    assert np.allclose(out.solver_error, nats.solver_error / (2 * np.log(2)))
    assert int(out.evaluations) == int(nats.evaluations)


def test_the_scaling_s_offset_and_bits_under_jit():
    # the same integers scaled to another range, by a model of the data in that range
    path, scale = process("EDM"), 1 / 3
    small = Mixture(WEIGHTS, MEANS * scale, STDS * scale)
    narrow = dataclasses.replace(path, t_min=path.t_min * scale)
    scaled = {"levels": LEVELS, "low": -1.0, "high": 1.0}
    unit = sdegen.bits_per_dim(
        small.denoiser(narrow), images()[0], key=KEY, **scaled, **STEPS
    )
    wide = bits(1).value
    assert np.abs(wide - unit.value).max() < 5e-3  # the ends at t_max differ
    traced = jax.jit(lambda whole: bits(1, whole).value)(jnp.asarray(images()[0]))
    assert np.allclose(traced, wide)


def test_dequantised_integers_are_uniform_in_their_bins():
    whole = jnp.broadcast_to(jnp.arange(4), (4000, 4))
    x = np.asarray(sdegen.dequantise(KEY, whole, levels=4, low=0.0, high=2.0))
    assert np.array_equal(np.floor(x / 0.5), whole)
    inside = x / 0.5 - whole
    assert np.abs(inside.mean(0) - 0.5).max() < 5 / np.sqrt(12 * 4000)
    again = sdegen.dequantise(KEY, whole[:10], levels=4, low=0.0, high=2.0)
    assert np.array_equal(again, x[:10])


def test_bins_are_around_the_bytes_of_fit():
    byte = jnp.broadcast_to(jnp.array([0, 100, 255], jnp.uint8), (20_000, 3))
    off = (np.asarray(sdegen.dequantise(KEY, byte)) - as_float(byte)) * 127.5
    assert np.abs(off).max() < 0.5 + 1e-4  # steps, that is half a bin
    assert np.abs(off.mean(0)).max() < 5 / np.sqrt(12 * 20_000)


# -- the variational bound -------------------------------------------------------------


def test_the_error_bar_of_the_bound_is_honest():
    x = data_of(64)
    found = [
        sdegen.variational_bound(
            LAW.denoiser(process("VP")), x, key=jax.random.key(i), draws=4
        )
        for i in range(60)
    ]
    spread = np.var([one.value for one in found], axis=0, ddof=1).mean()
    said = np.mean([one.standard_error**2 for one in found])
    print(f"variance over keys / mean square of the bars: {spread / said:.3f}")
    assert 0.8 < spread / said < 1.25


@functools.cache
def tight_bound(name):
    """That of the exact denoiser, for 2000 points of the law."""
    denoiser = LAW.denoiser(process(name))
    return sdegen.variational_bound(denoiser, data_of(2000), key=KEY, draws=32)


@pytest.mark.parametrize("name", ["VP", "RectifiedFlow", "EDM"])
def test_the_bound_is_tight_for_the_exact_denoiser(name):
    x, out = data_of(2000), tight_bound(name)
    gap = np.mean(out.value - log_density(x))
    bar = np.sqrt(np.mean(out.standard_error**2) / len(x))
    print(f"{name}: gap {gap:.4f}, {gap / bar:.1f} standard errors")
    assert abs(gap) < 4 * bar and bar < 0.03
    total = -(out.prior + out.diffusion + out.reconstruction)
    chex.assert_trees_all_close(out.value, total, rtol=1e-12)


def test_the_bound_of_a_normal_law_is_its_entropy():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2000, 2)))
    # three equal components: the program is that of the law
    unit = Mixture(WEIGHTS, np.zeros((3, 2)), np.ones(3)).denoiser(process("VP"))
    out = sdegen.variational_bound(unit, x, key=KEY, draws=32)
    value = -np.mean(out.value - (norm.logpdf(x).sum(1) + 2 * 1.418938533))
    bar = np.sqrt(np.mean(out.standard_error**2) / len(x))
    assert abs(value - 2 * 1.418938533) < 4 * bar


def test_a_wrong_denoiser_loosens_the_bound_by_its_error():
    # eps shifted by c at every time: the loss and the reconstruction grow by c^2
    path, c = process("RectifiedFlow"), 0.2

    class Shifted(sdegen.AbstractDenoiser):
        path: sdegen.AbstractPath

        def posterior_means(self, t, x, cond=None):
            alpha, sigma = scales(path, t)
            if t.ndim:
                alpha, sigma = (
                    jax.vmap(f)(t)[:, None] for f in (path.alpha, path.sigma)
                )
            z = LAW.denoiser(path).eps(t, x) + c
            return (x - sigma * z) / alpha, z

    exact_bound = tight_bound("RectifiedFlow")
    shifted = sdegen.variational_bound(Shifted(path), data_of(2000), key=KEY, draws=32)
    low = -13.8155
    high = float(path.logsnr(path.t_min))
    growth = np.mean(exact_bound.value - shifted.value)
    # the cross term with z - z_hat has mean zero
    assert abs(growth / (0.5 * 2 * c**2 * (high - low + 1)) - 1) < 0.1


def test_the_bound_depends_on_the_schedule_by_its_ends_alone():
    x, values = data_of(2000), []
    for beta_min in (0.1, 3.0):
        # B(t) = beta_min t + (beta_max - beta_min) t^2 / 2 has the same end
        path = dataclasses.replace(
            process("VP"),
            beta_min=jnp.asarray(beta_min),
            beta_max=jnp.asarray(20.1 - beta_min),
            t_min=jnp.asarray(start_of(beta_min, 20.1 - beta_min)),
        )
        for uniform_in in ("logsnr", "t") if beta_min < 1 else ("t",):
            out = sdegen.variational_bound(
                LAW.denoiser(path), x, key=KEY, draws=32, uniform_in=uniform_in
            )
            bar = np.mean(out.standard_error**2) / len(x)
            values.append((float(out.value.mean()), float(bar)))
    values = np.array(values)
    print(values[:, 0], "+-", np.sqrt(values[:, 1]))
    for mean, variance in values[1:]:
        assert abs(mean - values[0, 0]) < 4 * np.sqrt(variance + values[0, 1])


def start_of(beta_min, beta_max):
    """The time of the log-SNR that the default VP has at t = 0.05, a root of B(t)."""
    integral = 0.1 * 0.05 + 19.9 * 0.05**2 / 2
    slope = beta_max - beta_min
    return (np.sqrt(beta_min**2 + 2 * slope * integral) - beta_min) / slope


def test_the_variance_of_the_bound_is_differentiable_in_the_schedule():
    x = data_of(50)

    def variance(beta_min):
        path = dataclasses.replace(
            process("VP"), beta_min=beta_min, t_min=jnp.asarray(0.05)
        )
        out = sdegen.variational_bound(
            LAW.denoiser(path), x, key=KEY, draws=8, uniform_in="t"
        )
        return jnp.mean(out.standard_error**2)

    both, h = jax.jit(jax.value_and_grad(variance)), 1e-4
    slope = both(0.5)[1]
    finite = (both(0.5 + h)[0] - both(0.5 - h)[0]) / (2 * h)
    assert abs(slope / finite - 1) < 1e-3


# -- noise of another law, bad input ---------------------------------------------------


class Heavy(sdegen.AbstractPath):
    """A path with Student noise, or another base."""

    t_min: jax.Array = sdegen.number(0.1)
    t_max: jax.Array = sdegen.number(2.0)
    noise: sdegen.AbstractNoise = sdegen.StudentT(dof=3.0)

    def alpha(self, t):
        return jnp.ones_like(t)

    def sigma(self, t):
        return 1.0 * t


def test_noise_of_another_law_keeps_its_density():
    # data in one point: x_t is the noise itself
    path = Heavy()
    denoiser = PosteriorMean(lambda t, x, cond: jnp.zeros_like(x), path)
    x = jnp.asarray([[0.1, -0.2], [2.0, 0.3]])
    out = sdegen.log_likelihood(denoiser, x, grid=sdegen.Adaptive(1e-9, 1e-9))
    truth = multivariate_t.logpdf(np.asarray(x) / 0.1, [0, 0], np.eye(2), df=3)
    truth -= 2 * np.log(0.1)
    assert np.abs(out.value - truth).max() < 1e-7
    assert np.isnan(out.solver_error).all()  # the score is not -z / sigma there


class NoDensity(sdegen.AbstractNoise):
    gaussian = False

    def sample(self, key, shape, dtype=None):
        return jax.random.normal(key, shape, dtype)

    def log_prob(self, z):
        return None


def test_bad_input_gets_a_sentence():
    path = process("VP")
    denoiser, x = LAW.denoiser(path), draws_of(path, 4)
    call = functools.partial(sdegen.log_likelihood, denoiser)
    with pytest.raises(ValueError, match="Integers have no density: use bits_per_dim"):
        call(jnp.ones((4, 2), int))
    with pytest.raises(ValueError, match=r"use x0\[:, None\]"):
        call(x[:, 0])
    for probes in (0, -3, True):
        with pytest.raises(ValueError, match='probes must be "exact" or a number'):
            call(x, key=KEY, probes=probes)
    with pytest.raises(ValueError, match="random probes need a key"):
        call(x, probes=4)
    with pytest.raises(ValueError, match="at least one step"):
        call(x, grid=0)
    with pytest.raises(ValueError, match="times that fall strictly"):
        call(x, grid=jnp.asarray([0.1, 0.5, 1.0]))
    with pytest.raises(ValueError, match="its divergence too"):
        call(x, solver=sdegen.solvers.UniPC(2))
    with pytest.raises(ValueError, match="adaptive steps need a solver with an error"):
        call(x, solver=diffrax.Euler())
    with pytest.raises(ValueError, match="Kvaerno5 is implicit"):
        call(x, solver=diffrax.Kvaerno5())
    with pytest.raises(ValueError, match="an empty batch"):
        call(x[:0])
    with pytest.raises(ValueError, match="at_once must be"):
        call(x, at_once=0)
    nameless = PosteriorMean(lambda t, x, cond: 0 * x, Heavy(noise=NoDensity()))
    with pytest.raises(ValueError, match="NoDensity, has no known density.*log_prior"):
        sdegen.log_likelihood(nameless, x)
    given = sdegen.log_likelihood(
        nameless, x, log_prior=lambda x: -jnp.sum(x**2), grid=2, solver=diffrax.Heun()
    )
    assert bool(given.ok.all())
    with pytest.raises(ValueError, match="is for Gaussian noise"):
        sdegen.variational_bound(nameless, x, key=KEY)
    with pytest.raises(ValueError, match="an even number >= 2"):
        sdegen.variational_bound(denoiser, x, key=KEY, draws=3)
    score = functools.partial(sdegen.bits_per_dim, denoiser, key=KEY)
    with pytest.raises(ValueError, match="before they are scaled"):
        score(x)
    with pytest.raises(ValueError, match="have values from 0 to 15, got 0 to 99"):
        score(jnp.asarray([[0, 99]]), levels=16)
    with pytest.raises(ValueError, match="draws must be a whole number"):
        score(images()[0], draws=0)
    with pytest.raises(ValueError, match="needs low < high"):
        score(images()[0], low=1.0, high=-1.0)
    with pytest.raises(ValueError, match="levels must be a whole number >= 2"):
        score(images()[0], levels=0)
    with pytest.raises(ValueError, match="no image"):
        score(images()[0][:0])
    with pytest.raises(ValueError, match="NoDensity.*correct=False"):
        sdegen.bits_per_dim(nameless, images()[0], key=KEY)


def test_a_new_denoiser_of_the_same_shape_compiles_nothing():
    path, x = process("VP"), draws_of(process("VP"), 8)
    traces = []
    for shift in (0.0, 0.1):
        mean = exact(path, G2, traces=traces)
        mean = eqx.tree_at(lambda d: d.mean.shift, mean, jnp.asarray(shift))
        sdegen.log_likelihood(mean, x[:, :1], grid=4, solver=diffrax.Heun())
        count = len(traces) if shift == 0.0 else count
    assert len(traces) == count
