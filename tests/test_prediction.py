"""Prediction kinds: what each one says about data, noise, score and velocity.

`published` writes every kind as its paper does, from the posterior means and never from
a row (a, b): a network that returns those must be turned into the oracle's denoiser,
score and velocity, on every process.
"""

import functools
import itertools
import os
import subprocess
import sys
import textwrap
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import G1, PROCESSES, process

import sdegen
from sdegen import prediction
from sdegen.processes.prediction import Prediction
from sdegen.typing import Scalar, number

KINDS = {
    name: kind for name, kind in vars(prediction).items() if type(kind) is Prediction
}
SIGMA_DATA = 0.4
HALF = jnp.asarray(0.5)


class Scales(NamedTuple):
    """alpha, sigma and, by central differences, their rates; one row per time."""

    alpha: np.ndarray
    sigma: np.ndarray
    da: np.ndarray
    ds: np.ndarray


def scales(path, ts):
    """The scales of `path` at `ts`."""
    h = 1e-5 * path.t_max
    both = jax.vmap(lambda t: jnp.stack([path.alpha(t), path.sigma(t)]))
    rate = (both(ts + h) - both(ts - h)) / (2 * h)
    columns = np.concatenate([both(ts), rate], 1).T[..., None]
    return Scales(*columns)


def published(at, x, x0, z):
    """Every kind at x = alpha x0 + sigma z, as its paper writes it."""
    # Karras et al. 2022 write y + n with n of level s; here y = x / alpha.
    y, s = x / at.alpha, at.sigma / at.alpha
    c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
    c_out = s * SIGMA_DATA / (s**2 + SIGMA_DATA**2) ** 0.5
    return {
        "x0": x0 + 0 * x,
        "eps": z + 0 * x,
        "score": (at.alpha * x0 - x) / at.sigma**2,  # Tweedie
        "velocity": at.da * x0 + at.ds * z,  # d/dt with both ends held fixed
        "v": at.alpha * z - at.sigma * x0,  # Salimans and Ho 2022, appendix D
        "edm": (x0 - c_skip * y) / c_out,
    }


@functools.cache
def cut(name):
    """The default object, cut short where alpha(t_max) = 0 and eps says nothing."""
    path = process(name)
    return path if float(path.alpha(path.t_max)) > 0 else PROCESSES[name](t_max=0.99)


def times(path, n=7):
    """Times inside the range, off the kinks of DDPM (at i / T)."""
    a, b = float(path.t_min), float(path.t_max)
    return jnp.asarray(
        np.linspace(a + 0.05 * (b - a), a + 0.95 * (b - a), n) + 3e-5 * b
    )


def test_every_kind_has_a_published_form():
    assert set(published(Scales(1.0, 1.0, 1.0, 1.0), 2.0, 1.0, 1.0)) == set(KINDS)
    assert [repr(KINDS[name]) for name in KINDS] == list(KINDS)


# -- rows ------------------------------------------------------------------------------


@functools.cache
def rows(name):
    """{kind: (a, b)} and {kind: det} of `cut(name)` at its `times`, as columns."""
    path = cut(name)

    def at(t):
        found = {name: kind.row(path, t, SIGMA_DATA) for name, kind in KINDS.items()}
        return found, {n: kind.det(path, t, SIGMA_DATA) for n, kind in KINDS.items()}

    return jax.tree.map(lambda a: a[:, None], jax.vmap(at)(times(path)))


@pytest.mark.parametrize("name", PROCESSES)
def test_rows_are_the_published_predictions(name):
    x0, z = np.array([1.3, -0.4]), np.array([-0.7, 2.1])
    at = scales(cut(name), times(cut(name)))
    expected = published(at, at.alpha * x0 + at.sigma * z, x0, z)
    for kind, (a, b) in rows(name)[0].items():
        rtol = 2e-8 if kind == "velocity" else 1e-11  # finite differences there
        np.testing.assert_allclose(a * x0 + b * z, expected[kind], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", PROCESSES)
def test_all_conversions_are_round_trips(name):
    # (x0, z) -> first kind -> ends -> second kind -> ends -> (x0, z), A1(c).
    x0, z = np.array([1.3, -0.4]), np.array([-0.7, 2.1])
    alpha, sigma = map(jnp.asarray, scales(cut(name), times(cut(name)))[:2])
    x_t = alpha * x0 + sigma * z
    size = np.abs(x_t).max(1, keepdims=True) + 1
    for first, second in itertools.product(KINDS, KINDS):
        mid_x0, mid_z = x0 + 0 * alpha, z + 0 * alpha
        for kind in (first, second):
            a, b = rows(name)[0][kind]
            value = a * mid_x0 + b * mid_z
            mid_x0, mid_z = prediction.posterior_means((a, b), alpha, sigma, x_t, value)
        # x0 and z are determined by x_t to one rounding of their share in it.
        assert (np.abs(mid_x0 - x0) * alpha / size).max() < 1e-12, (first, second)
        assert (np.abs(mid_z - z) * sigma / size).max() < 1e-12, (first, second)


@pytest.mark.parametrize("name", PROCESSES)
def test_determinants_convert_squared_errors(name):
    # At a given x_t an error d of the first kind is det2 / det1 d of the second.
    found, dets = rows(name)
    alpha, sigma = map(jnp.asarray, scales(cut(name), times(cut(name)))[:2])
    for first, second in itertools.product(KINDS, KINDS):
        x0, z = prediction.posterior_means(
            found[first], alpha, sigma, 0 * alpha, 0 * alpha + 1
        )
        a, b = found[second]
        np.testing.assert_allclose(
            (a * x0 + b * z) ** 2, (dets[second] / dets[first]) ** 2, rtol=1e-10
        )


# -- denoisers -------------------------------------------------------------------------


class Answer(eqx.Module):
    """A network that has learnt one answer."""

    prediction: jax.Array

    def __call__(self, t, x, cond):
        return self.prediction


def exact(path, ts, n=2):
    """Draws of x_t for G1, one row per time, and what is true there."""
    at = scales(path, ts)
    x0 = np.asarray(G1.sample(jax.random.key(0), len(ts) * n)).reshape(len(ts), n)
    z = np.asarray(jax.random.normal(jax.random.key(1), x0.shape))
    x = at.alpha * x0 + at.sigma * z
    shape = (len(ts), 1, 1)  # of the scales, against x[..., None] in the oracle
    alpha, sigma = at.alpha.reshape(shape), at.sigma.reshape(shape)
    score = np.asarray(G1.score(x, alpha, sigma))
    mean = (x + at.sigma**2 * score) / at.alpha
    return at, x, score, mean, -at.sigma * score


@pytest.mark.parametrize("name", PROCESSES)
def test_every_kind_becomes_the_exact_score_and_velocity(name):
    path = cut(name)
    ts = times(path)
    at, x, score, mean, noise = exact(path, ts)
    f = jax.vmap(path.drift)(ts, jnp.asarray(x))
    g = np.asarray(jax.vmap(path.diffusion)(ts, ts))[:, None]
    flow = f - g**2 * score / 2  # A1: dx/dt = f - g^2 score / 2
    for kind, value in published(at, x, mean, noise).items():
        d = sdegen.Denoiser(
            Answer(jnp.asarray(value)), path, KINDS[kind], SIGMA_DATA, sdegen.raw_inputs
        )
        rtol = 1e-6 if kind == "velocity" else 1e-9  # finite differences there
        for method, truth in (
            (d, mean),
            (d.eps, noise),
            (d.score, score),
            (d.velocity, flow),
        ):
            out, scale = method(ts, jnp.asarray(x)), np.abs(truth).max()
            np.testing.assert_allclose(out, truth, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_one_time_for_the_batch_is_that_time_for_each(kind):
    x = jnp.array([[0.3, 1.0], [-1.2, 0.1], [2.0, -0.4]])
    d = sdegen.Denoiser(lambda t, x, cond: jnp.sin(3 * x), process("VP"), KINDS[kind])
    t = jnp.asarray(0.37)
    np.testing.assert_allclose(d.sample_score(0.37, x[1]), d.score(t, x)[1], rtol=1e-13)
    for method in (d, d.eps, d.score, d.velocity):
        each = method(jnp.full(3, t), x)
        np.testing.assert_allclose(method(t, x), each, rtol=1e-13)


def test_the_velocity_of_rectified_flow_is_its_identity():
    # A14(d): v = (x - D) / t for noise prediction, and v = f x - g^2 s / 2.
    path = PROCESSES["RectifiedFlow"](t_max=0.999)
    ts = times(path, 20)
    _, x, score, mean, noise = exact(path, ts)
    d = sdegen.Denoiser(Answer(jnp.asarray(noise)), path, prediction.eps)
    velocity, t = d.velocity(ts, jnp.asarray(x)), np.asarray(ts)[:, None]
    np.testing.assert_allclose(velocity, (x - mean) / t, rtol=1e-12, atol=1e-12)
    flow = -x / (1 - t) - t / (1 - t) * score
    np.testing.assert_allclose(velocity, flow, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["RectifiedFlow", "FlowMatching", "Cosine"])
@pytest.mark.parametrize("kind", ["velocity", "v", "x0", "edm"])
def test_denoisers_are_finite_where_nothing_of_the_data_is_left(name, kind):
    # At alpha = 0, x_t = z: E[x0] is the mean of the data and E[z] is x.
    path = process(name)
    x, t = jnp.array([[-1.2], [0.4]]), path.t_max  # alpha(t_max) is 0 on these
    da, ds = path.rates(t)
    predictions = {
        "x0": G1.mean + 0 * x,
        "v": -G1.mean + 0 * x,
        "velocity": da * G1.mean + ds * x,
        "edm": G1.mean / SIGMA_DATA + 0 * x,
    }
    d = sdegen.Denoiser(
        lambda t, x, cond: predictions[kind], path, KINDS[kind], SIGMA_DATA
    )
    np.testing.assert_allclose(d(t, x), G1.mean + 0 * x, rtol=1e-12)
    np.testing.assert_allclose(d.eps(t, x), x, rtol=1e-12)
    np.testing.assert_allclose(d.score(t, x), -x, rtol=1e-12)
    np.testing.assert_allclose(d.velocity(t, x), predictions["velocity"], rtol=1e-12)


def test_the_network_sees_unit_variance_and_a_log_time():
    # c_in and c_noise of Karras et al. 2022, table 1, on the paper's path and on VP.
    seen = {}

    def network(t, x, cond):
        seen["t"], seen["x"] = t, x
        return x

    x = jnp.array([[3.0], [-1.0]])
    for path, t in ((process("EDM"), 0.7), (process("VP"), 0.3)):
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        sdegen.Denoiser(network, path).predict(jnp.array([t, t]), x)
        c_in = 1 / np.sqrt((sigma / alpha) ** 2 + 0.5**2)  # sigma_data is 0.5
        np.testing.assert_allclose(seen["x"], c_in * x / alpha, rtol=1e-12)
        np.testing.assert_allclose(seen["t"], np.log(sigma / alpha) / 4, rtol=1e-12)
        raw = sdegen.Denoiser(network, path, inputs=sdegen.raw_inputs)
        raw.predict(jnp.asarray(t), x)
        assert seen["t"].tolist() == [t, t] and (seen["x"] == x).all()


def test_condition_reaches_the_network():
    d = sdegen.Denoiser(
        lambda t, x, cond: x * 0 + cond[:, None], process("VP"), prediction.x0
    )
    cond = jnp.array([3.0, 5.0])
    out = d(HALF, jnp.ones((2, 1)), cond)
    np.testing.assert_allclose(out[:, 0], cond, rtol=1e-14)


def test_a_low_precision_network_keeps_the_state_in_its_own():
    d = sdegen.Denoiser(
        lambda t, x, cond: x.astype(jnp.bfloat16), process("VP"), prediction.eps
    )
    x = jnp.ones((2, 1), jnp.float32)
    assert d.predict(jnp.float32(0.5), x).dtype == jnp.float32


def test_a_posterior_mean_knows_its_noise():
    path = process("SubVP")
    ts = times(path)
    at, x, score, _, _ = exact(path, ts, n=1)
    d, x = G1.denoiser(path), jnp.asarray(x)
    np.testing.assert_allclose(d.score(ts, x), score, rtol=1e-9)
    both = at.alpha * d(ts, x) + at.sigma * d.eps(ts, x)
    np.testing.assert_allclose(both, x, rtol=1e-12)


# -- refusals --------------------------------------------------------------------------


class Heavy(sdegen.AbstractPath):
    """A straight path to Student noise."""

    t_min: Scalar = number(1e-3)
    t_max: Scalar = number(1.0)
    noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.StudentT)

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return 1.0 * t


def network(t, x, cond):
    return x


def test_a_score_of_noise_that_is_not_gaussian_is_refused():
    with pytest.raises(
        ValueError, match="only where the noise z is Gaussian.*Heavy has"
    ):
        sdegen.Denoiser(network, Heavy(), prediction.score)
    raw = sdegen.raw_inputs
    d = sdegen.Denoiser(network, Heavy(), prediction.velocity, inputs=raw)
    with pytest.raises(ValueError, match="only for Gaussian noise.*noise=StudentT"):
        d.score(HALF, jnp.ones((2, 1)))
    # Its velocity is fine, and what the network says.
    x = jnp.array([[0.3], [2.0]])
    np.testing.assert_allclose(d.velocity(HALF, x), x, rtol=1e-12)


@pytest.mark.parametrize("kind", ["eps", "score"])
@pytest.mark.parametrize("name", ["RectifiedFlow", "FlowMatching", "Cosine"])
def test_noise_prediction_is_refused_where_it_says_nothing_about_the_data(name, kind):
    with pytest.raises(
        ValueError, match=f"prediction {kind} says nothing about x0 at t=1"
    ):
        sdegen.Denoiser(network, process(name), KINDS[kind])
    sdegen.Denoiser(network, PROCESSES[name](t_max=0.99), KINDS[kind])


@pytest.mark.parametrize(
    "t_shape, x_shape", [((3,), (4, 1)), ((2, 2), (2, 2)), ((), (4,)), ((1,), (4, 1))]
)
def test_shapes_that_do_not_go_together_are_refused(t_shape, x_shape):
    d = sdegen.Denoiser(network, process("VP"))
    t, x = jnp.full(t_shape, 0.5), jnp.ones(x_shape)
    for method in (d.predict, d, d.score, d.velocity):
        with pytest.raises(
            ValueError, match=r"x of shape \(batch, ...\) and t of shape"
        ):
            method(t, x)


@pytest.mark.parametrize("shape", [(4, 2), (4,), (1, 1)])
def test_a_network_of_the_wrong_output_shape_is_refused(shape):
    d = sdegen.Denoiser(lambda t, x, cond: jnp.ones(shape), process("VP"))
    with pytest.raises(ValueError, match=r"the shape of x, \(4, 1\), got \("):
        d(HALF, jnp.ones((4, 1)))


def test_wrong_types_are_refused_in_words_without_a_type_checker():
    # The type checker of the test session would speak first: ask a plain interpreter.
    code = """
        import jax, jax.numpy as jnp, sdegen

        def complain(fn):
            try:
                fn()
            except ValueError as error:
                print(str(error).replace("\\n", " "))
            else:
                print("accepted")

        network = lambda t, x, cond: x
        complain(lambda: sdegen.Denoiser(network, sdegen.VP(), "epsilon"))
        complain(lambda: sdegen.Denoiser(network, sdegen.CustomSDE()))
        denoiser = sdegen.Denoiser(network, sdegen.VP())
        images = jnp.ones((4, 2), jnp.uint8)
        complain(lambda: sdegen.denoising_loss(denoiser, jax.random.key(0), images))
        complain(lambda: sdegen.UniformGrid(2.5))
        complain(lambda: sdegen.simulate(
            jax.random.key(0), sdegen.VP(), jnp.ones((2, 1)), solver=print))
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    kind, path, data, grid, solver = out.stdout.splitlines()
    assert (
        kind.startswith("prediction must be a row of sdegen.prediction")
        and "epsilon" in kind
    )
    assert all(name in kind for name in KINDS)
    assert path.startswith(
        "a denoiser needs a path, such as sdegen.VP(), got CustomSDE"
    )
    assert "takes floating-point data, got uint8" in data
    assert "a whole number of steps >= 1, got 2.5" in grid
    assert "solver must be a diffrax solver" in solver
