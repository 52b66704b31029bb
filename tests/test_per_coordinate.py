"""Paths whose coordinates have noise levels of their own, against closed forms.

Gaussian data that are independent in the coordinates stay so: coordinate i has mean
alpha_i m_i and variance alpha_i^2 v_i + sigma_i^2 at every time, its flow keeps the
standardised point, and everything about it is known.
"""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import scipy.stats

import sdegen
from sdegen import prediction, solvers
from sdegen.checks.per_coordinate import Coordinate
from sdegen.processes.basis import laplacian

KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
MEAN, VARIANCE = np.array([1.0, -2.0, 0.5]), np.array([0.25, 0.01, 2.0])


class Powers(sdegen.AbstractLinearSDE):
    """alpha_i = 1 - t^k_i, sigma = t: coordinates that fade at different times."""

    k: jax.Array = eqx.field(default=(1.0, 2.0, 0.5), converter=jnp.asarray)
    t_min: jax.Array = sdegen.number(1e-3)
    t_max: jax.Array = sdegen.number(1.0)
    noise: sdegen.AbstractNoise = sdegen.Gaussian()

    def alpha(self, t):
        return 1 - t**self.k

    def sigma(self, t):
        return 1.0 * t


class GaussianMean(eqx.Module):
    """E[x0 given x_t] for independent Gaussian coordinates; counts its traces."""

    path: sdegen.AbstractPath
    mean: jax.Array = eqx.field(default=tuple(MEAN), converter=jnp.asarray)
    variance: jax.Array = eqx.field(default=tuple(VARIANCE), converter=jnp.asarray)

    def __call__(self, t, x, cond):
        alpha, sigma = self.path.scales(t)
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)


@eqx.filter_jit
def scales_at(path, ts):
    """alpha and sigma at the times `ts`, along the first axis."""
    return jax.vmap(path.scales)(ts)


def scales(path, *ts):
    return [np.asarray(v) for v in scales_at(path, np.array(ts, float))]


def law(path, t, mean=MEAN, variance=VARIANCE):
    """Mean and standard deviation of x_t in every coordinate."""
    alpha, sigma = (v[0] for v in scales(path, t))
    return alpha * mean, np.sqrt(alpha**2 * variance + sigma**2)


PATH = Powers()
DENOISER = sdegen.PosteriorMean(GaussianMean(PATH), PATH)
UNIT = DRAW.normal(size=(32, 3))


def flow_error(**options):
    """How far the flow is from keeping the standardised points."""
    (m1, s1), (m0, s0) = law(PATH, PATH.t_max), law(PATH, PATH.t_min)
    start = m1 + s1 * UNIT
    out = sdegen.sample(KEY, DENOISER, start.shape, start=jnp.asarray(start), **options)
    return np.abs((np.asarray(out.x) - m0) / s0 - UNIT).max()


@pytest.mark.parametrize(
    "solver, order",
    [
        (solvers.UniPC(2, prediction=prediction.velocity), 3),
        (solvers.DPMSolver2(), 2),
        (diffrax.Heun(), 2),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, int) else "",
)
def test_every_coordinate_converges_at_the_solvers_order(solver, order):
    errors = [flow_error(solver=solver, grid=n) for n in (64, 128)]
    slope = np.log2(errors[0] / errors[1])
    print(f"{errors[0]:.2e} {errors[1]:.2e} order {slope:.2f}")
    # UniPC's first step is of the first order, and tells on grids with a long one
    assert abs(slope - order) < 0.25


def test_adaptive_steps_reach_the_exact_flow():
    assert flow_error(grid=sdegen.Adaptive(1e-9, 1e-9)) < 1e-7


@pytest.mark.parametrize("solver", [None, solvers.DPMSolverSDE()])
def test_the_reverse_sde_has_the_law_of_the_data(solver):
    n = 20_000
    out = sdegen.sample(
        KEY, DENOISER, (n, 3), grid=64, stochasticity=1.0, solver=solver
    )
    mean, std = law(PATH, PATH.t_min)
    unit = (np.asarray(out.x) - mean) / std
    print(unit.mean(0) * np.sqrt(n), (unit.var(0) - 1) * np.sqrt(n / 2))
    assert np.all(np.abs(unit.mean(0)) < 5 / np.sqrt(n) + 0.01)
    assert np.all(np.abs(unit.var(0) - 1) < 5 * np.sqrt(2 / n) + 0.02)


def test_the_scalar_path_is_the_special_case():
    """One number for all coordinates, written as an array, changes nothing."""

    paths = Powers(k=[1.0, 1.0, 1.0]), sdegen.RectifiedFlow()
    for solver in (solvers.UniPC(2, prediction=prediction.velocity), diffrax.Heun()):
        results = []
        for p in paths:
            d = sdegen.PosteriorMean(GaussianMean(p), p)
            # shape and steps of `flow_error`: the programs of the arrays are the same
            options = dict(solver=solver, grid=64, start=jnp.asarray(UNIT))
            results.append(np.asarray(sdegen.sample(KEY, d, UNIT.shape, **options).x))
        assert np.max(np.abs(results[0] - results[1])) < 1e-12


def test_the_likelihood_is_exact_in_every_coordinate():
    mean, std = law(PATH, PATH.t_min)
    x = mean + std * UNIT
    end_mean, end_std = law(PATH, PATH.t_max)
    normal = jax.scipy.stats.norm.logpdf
    prior = lambda x: normal(x, end_mean, end_std).sum()  # noqa: E731
    out = sdegen.log_likelihood(DENOISER, jnp.asarray(x), log_prior=prior)
    wanted = scipy.stats.norm.logpdf(x, mean, std).sum(-1)
    error = np.abs(np.asarray(out.value) - wanted).max()
    estimate = np.asarray(out.solver_error).max()
    print(f"error {error:.1e}, estimate {estimate:.1e}")
    assert bool(out.ok.all()) and error < 1e-6
    assert error < 10 * estimate < 1e-4


def test_reverse_and_flow_agree_with_the_sampler():
    path = Powers(t_max=0.95)
    denoiser = sdegen.PosteriorMean(GaussianMean(path), path)
    (m1, s1), (m0, s0) = law(path, path.t_max), law(path, path.t_min)
    flow = sdegen.probability_flow(path, denoiser.sample_score)
    grid = sdegen.Adaptive(1e-9, 1e-9)
    start = jnp.asarray(m1 + s1 * UNIT)
    out = sdegen.simulate(KEY, flow, start, solver=diffrax.Tsit5(), grid=grid)
    assert np.abs((np.asarray(out.x) - m0) / s0 - UNIT).max() < 1e-7


def test_forward_simulation_has_the_declared_moments():
    x0 = jnp.asarray(np.broadcast_to(MEAN, (20_000, 3)))
    path = Powers(t_max=0.9)
    out = sdegen.simulate(KEY, path, x0, grid=100)
    alpha, sigma = (v[0] for v in scales(path, path.t_max))
    unit = (np.asarray(out.x) - alpha * MEAN) / sigma
    assert np.all(np.abs(unit.mean(0)) < 5 / np.sqrt(20_000) + 0.01)
    assert np.all(np.abs(unit.std(0) - 1) < 5 / np.sqrt(40_000) + 0.01)


def test_a_linear_sde_of_arrays_is_one_scalar_process_for_each_coordinate():
    rates = jnp.array([0.5, 3.0])
    together = sdegen.LinearSDE(
        lambda t, k: -k * t, lambda t, k: jnp.sqrt(2.0 * t), params=rates
    )
    ts, k = np.array([1e-3, 0.3, 1.0]), np.asarray(rates)
    # x' = -k t x: alpha = exp(-k t^2 / 2), sigma^2 = (1 - alpha^2) / k
    decay = k * ts[:, None] ** 2
    wanted = np.exp(-decay / 2), np.sqrt(-np.expm1(-decay) / k)
    for mine, theirs in zip(scales(together, *ts), wanted, strict=True):
        assert mine.shape == (3, 2) and np.abs(mine / theirs - 1).max() < 1e-8


def test_the_loss_is_zero_for_the_exact_denoiser_and_minimal_there():
    data = MEAN + np.sqrt(VARIANCE) * DRAW.normal(size=(512, 3))
    loss = eqx.filter_jit(sdegen.denoising_loss)

    def network(t, x, cond):
        return jnp.zeros_like(x)

    denoiser = sdegen.Denoiser(network, PATH, prediction.x0)
    value = loss(denoiser, KEY, jnp.asarray(data))
    # x0 predicted as 0: the loss is the mean square of the data
    assert abs(float(value) - np.mean(data**2)) < 1e-12

    class Exact(eqx.Module):
        path: sdegen.AbstractPath

        def __call__(self, time, x, cond):
            t = time  # with raw_inputs the network sees t and x_t
            return jax.vmap(lambda t, x: GaussianMean(self.path)(t, x, None))(t, x)

    denoiser = sdegen.Denoiser(
        Exact(PATH), PATH, prediction.x0, inputs=sdegen.raw_inputs
    )
    zero = loss(denoiser, KEY, jnp.asarray(data), exact=DENOISER_VMAP)
    assert float(zero) < 1e-20


class _Each(eqx.Module):
    """The exact mean for one time per sample."""

    path: sdegen.AbstractPath

    def __call__(self, t, x, cond):
        one = GaussianMean(self.path)
        return jax.vmap(lambda t, x: one(t, x, None))(jnp.broadcast_to(t, len(x)), x)


DENOISER_VMAP = sdegen.PosteriorMean(_Each(PATH), PATH)


# -- frequencies -----------------------------------------------------------------------

SHAPE = (6, 5, 1)
IMAGE = DRAW.normal(size=SHAPE)


@eqx.filter_jit
def coordinates(basis, x):
    return basis.coordinates(x)


@eqx.filter_jit
def pixels(basis, x):
    return basis.data(x)


def test_the_basis_is_the_cosine_transform():
    x = DRAW.normal(size=(2, *SHAPE))
    basis = sdegen.DCT()
    mine = coordinates(basis, x)
    theirs = scipy.fft.dctn(x, axes=(1, 2), norm="ortho")
    assert np.abs(np.asarray(mine) - theirs).max() < 1e-13
    assert np.abs(np.asarray(pixels(basis, mine)) - x).max() < 1e-13


@eqx.filter_jit
def blurred(path, t, image):
    """E[x_t given x0] in pixels."""
    return path.basis.data(path.alpha(t) * path.basis.coordinates(image))


def test_blurring_blurs_as_a_gaussian_filter_does():
    path = sdegen.Blurring(SHAPE, blur=3.0, floor=0.0)
    t = 0.5
    width = 3.0 * np.sin(np.pi * t / 2) ** 2
    mine = np.asarray(blurred(path, t, IMAGE))
    signal = np.cos(np.pi * t / 2)
    # the heat equation with reflecting borders, at continuous frequencies
    waves = np.exp(-laplacian(SHAPE) * width**2 / 2)
    theirs = scipy.fft.idctn(
        waves * scipy.fft.dctn(IMAGE, axes=(0, 1), norm="ortho"),
        axes=(0, 1),
        norm="ortho",
    )
    assert np.abs(mine - signal * theirs).max() < 1e-12
    big = DRAW.normal(size=(64, 64, 1))
    path = sdegen.Blurring(big.shape, blur=2.0 / np.sin(np.pi / 4) ** 2, floor=0.0)
    mine = np.asarray(blurred(path, t, big)) / signal
    theirs = scipy.ndimage.gaussian_filter(
        big[..., 0], 2.0, mode="reflect", truncate=10
    )
    assert np.abs(mine[..., 0] - theirs).max() < 1e-8


def test_blurring_without_frequencies_is_the_cosine_schedule():
    ts = 1e-3, 0.4, 0.99
    mine, theirs = (scales(p, *ts) for p in (sdegen.Blurring(), sdegen.Cosine()))
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"stochasticity": 1.0, "denoise": True}])
def test_one_image_comes_back_in_pixels(options):
    """Data that are one point: every solver returns it, whatever the steps."""
    path = sdegen.Blurring(SHAPE, blur=3.0)

    def network(time, x, cond):
        assert x.shape[1:] == SHAPE
        return jnp.broadcast_to(IMAGE, x.shape)

    denoiser = sdegen.Denoiser(network, path, prediction.x0)
    solver = solvers.DPMSolverSDE() if "stochasticity" in options else solvers.DDIM()
    out = sdegen.sample(
        KEY, denoiser, (3, *SHAPE), grid=4, solver=solver, trajectory=True, **options
    )
    # x at t_min still has its noise, of standard deviation .0016
    last = np.asarray(out.trajectory)[-1]
    assert np.abs(last - IMAGE).max() < 0.01
    exact = IMAGE if options.get("denoise") else last
    assert np.abs(np.asarray(out.x) - exact).max() < 1e-9
    assert np.abs(last - IMAGE).max() > 1e-4


def test_the_network_sees_images():
    """A network that is linear in pixels acts in pixels, in `eps` and in `edm`."""
    path = sdegen.Blurring(SHAPE, blur=3.0)
    seen = []

    def network(time, x, cond):
        seen.append(x)
        return x

    denoiser = sdegen.Denoiser(network, path, prediction.x0, inputs=sdegen.raw_inputs)
    x = DRAW.normal(size=(2, *SHAPE))

    @eqx.filter_jit
    def run(denoiser, x):
        x0 = denoiser(jnp.asarray(0.3), path.basis.coordinates(x))
        return seen[0], path.basis.data(x0)

    for found in run(denoiser, x):
        assert np.abs(np.asarray(found) - x).max() < 1e-12


def test_frequencies_of_a_gaussian_have_an_exact_likelihood():
    """Independent Gaussian frequencies: exact density of images, nothing lost."""
    path = sdegen.Blurring(SHAPE, blur=3.0)
    variance = 1 / (0.1 + np.broadcast_to(laplacian(SHAPE), SHAPE))
    d = sdegen.PosteriorMean(GaussianMean(path, np.zeros(SHAPE), variance), path)
    mean, std = law(path, path.t_min, 0.0, variance)
    z = DRAW.normal(size=(4, *SHAPE))
    images = pixels(path.basis, std * z)
    out = sdegen.log_likelihood(d, images)
    exact = scipy.stats.norm.logpdf(std * z, 0.0, std).sum((1, 2, 3))
    error = np.abs(np.asarray(out.value) - exact)
    print(f"{error.max():.1e} nats, solver {float(out.solver_error.max()):.1e}")
    assert error.max() < 1e-5
    assert out.latent.shape == z.shape


def test_grids_and_draws_use_the_mean_noise_level():
    path = sdegen.Blurring(SHAPE, blur=3.0)
    ts = np.array([0.01, 0.5, 0.97])

    @eqx.filter_jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def errors(path, t):
        """Inverse in h, in log-SNR, the local clocks and their rates."""
        alpha, sigma = path.scales(t)
        local, inverse = jnp.log1p(alpha / sigma), path.inverse()
        mean = jnp.mean(local)
        mine, rate = jax.jvp(inverse.local, (mean,), (jnp.ones(()),))
        return (
            inverse(mean) - t,
            path.time(path.logsnr(t)) - t,
            mine - local,
            inverse.local_rate(mean) - rate,
        )

    found = [np.abs(v).max() for v in errors(path, ts)]
    print(found)
    assert (np.array(found) < [1e-10, 1e-8, 1e-9, 1e-6]).all()
    grids = (
        sdegen.CosineGrid(9),
        sdegen.KarrasGrid(9),
        sdegen.LogSNRGrid(9),
        sdegen.FlowTimeGrid(9),
    )
    for times in eqx.filter_jit(lambda path: [grid(path) for grid in grids])(path):
        assert np.all(np.diff(times) < 0)
        assert times[0] == path.t_max and times[-1] == path.t_min


def test_float32_is_close_to_float64():
    ends, start = [], DRAW.normal(size=(64, 4, 4, 1)).astype(np.float32)
    for double in (True, False):
        with jax.enable_x64(double):
            path = sdegen.Blurring((4, 4, 1), blur=4.0)
            law = np.zeros((4, 4, 1)), np.full((4, 4, 1), 0.3)
            d = sdegen.PosteriorMean(GaussianMean(path, *law), path)
            out = sdegen.sample(KEY, d, start.shape, start=jnp.asarray(start, float))
            ends.append(np.asarray(out.x))
    assert ends[1].dtype == np.float32
    error = np.abs(ends[0] - ends[1]).max()
    print(error)
    assert error < 1e-5


def test_a_check_looks_at_the_coordinates():
    path = Powers(t_max=0.9)
    report = sdegen.check(path, parts=("finite", "moments"))
    assert report.ok and any(
        "[0]" in row.what or "[2]" in row.what for row in report.rows
    )

    class Wrong(sdegen.AbstractPath, sdegen.AbstractSDE):
        path: sdegen.AbstractPath
        t_min: jax.Array = sdegen.number(1e-3)
        t_max: jax.Array = sdegen.number(0.9)
        noise: sdegen.AbstractNoise = sdegen.Gaussian()

        def alpha(self, t):
            return self.path.alpha(t)

        def sigma(self, t):
            return self.path.sigma(t)

        def drift(self, t, x):
            return self.path.drift(t, x)

        def diffusion(self, t, x):
            return 1.1 * self.path.diffusion(t, x)

    report = sdegen.check(Wrong(path), parts=("moments",))
    assert not report.ok
    one = Coordinate(path, (1,), path.t_min, path.t_max, path.noise)
    assert abs(float(one.alpha(0.5)) - 0.75) < 1e-12


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: sdegen.sample(KEY, DENOISER, (4, 2)), ["(3,)", "(2,)", "shape"]),
        (
            lambda: eqx.filter_jit(sdegen.denoising_loss)(
                sdegen.Denoiser(lambda t, x, c: x, PATH), KEY, jnp.zeros((4, 5))
            ),
            ["(3,)", "(5,)"],
        ),
        (lambda: sdegen.log_likelihood(DENOISER, jnp.zeros((4, 2))), ["(3,)", "(2,)"]),
        (lambda: Powers(k=[1.0, -1.0, 2.0]), ["coordinate (1,)", "alpha"]),
        (lambda: sdegen.Blurring((5,)), ["axes", "(5,)"]),
        (lambda: sdegen.DCT((0, 1)), ["negative", "(0, 1)"]),
        (
            lambda: sdegen.LinearSDE(
                lambda t, p: jnp.zeros(2), lambda t, p: jnp.ones(3)
            ),
            ["(2,)", "(3,)", "BlockSDE"],
        ),
        (
            lambda: sdegen.sample(
                KEY, DENOISER, (4, 3), solver=solvers.EDMHeun(s_churn=1.0), grid=4
            ),
            ["churn", "noise level"],
        ),
        (
            lambda: sdegen.variational_bound(DENOISER, jnp.zeros((4, 3)), key=KEY),
            ["variational_bound", "log_likelihood"],
        ),
    ],
)
def test_bad_input_gets_a_sentence(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)
